"""Both UIs in a browser after a run: the run, its tables and reports, and the champions are there.

Run it with `make test-live`; it needs Chromium (Debian: chromium, chromium-driver) and the extra
`ui`. The pages it saw are kept in infra/screenshots.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import SMALLER
from tests.live import REPOSITORY, WAIT_S, free_port, ours, relearn, wait_for

SCREENSHOTS = REPOSITORY / "infra" / "screenshots"
LARGEST_BYTES = 150_000
COLOURS = 64
SETTLE_S = 3.0
"""For the picture alone: what is drawn rather than written has no text to wait for."""
STORE = "synthetic-smoke"
RUN_S = 1200
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--window-size=1400,900",
)


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Chromium without a screen."""
    pytest.importorskip("selenium", reason="no selenium here: pip install '.[ui]'")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    opened = Chrome(options=options, service=Service(driver))
    opened.set_page_load_timeout(WAIT_S)
    try:
        yield opened
    finally:
        opened.quit()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home whose processes are gone afterwards, whatever the test did."""
    folder = tmp_path / "home"
    yield folder
    for process in ours(folder):
        process.kill()


def look(browser: Any, url: str, *words: str) -> None:
    """Open a page and wait until it shows all of `words`."""
    browser.get("about:blank")  # a page of the same address but for the # would not load
    browser.get(url)

    def missing() -> list[str]:
        text = browser.execute_script("return document.body.innerText").lower()
        return [word for word in words if word.lower() not in text]

    wait_for(missing, lambda left: not left)
    dismiss(browser)
    time.sleep(SETTLE_S)


def dismiss(browser: Any) -> None:
    """Close what MLflow lays over its pages on a first visit."""
    browser.execute_script(
        "document.querySelectorAll('button[aria-label*=\"lose\"]').forEach(b => b.click())"
    )


def keep(browser: Any, name: str) -> None:
    """The page as a small picture."""
    from io import BytesIO

    from PIL import Image

    SCREENSHOTS.mkdir(exist_ok=True)
    picture = Image.open(BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    path = SCREENSHOTS / f"{name}.png"
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < LARGEST_BYTES


@pytest.mark.live
def test_both_uis_show_the_run_its_artifacts_and_the_champions(home: Path, browser: Any) -> None:
    prefect, mlflow = free_port(), free_port()
    done = relearn(home, "up", "--port-prefect", str(prefect), "--port-mlflow", str(mlflow))
    assert done.returncode == 0, done.stdout + done.stderr
    changes = [word for change in SMALLER for word in ("--set", change)]
    done = relearn(home, "run", "--recipe", "smoke", *changes, limit_s=RUN_S)
    assert done.returncode == 0, done.stdout + done.stderr
    see_prefect(browser, f"http://127.0.0.1:{prefect}")
    see_mlflow(browser, home, f"http://127.0.0.1:{mlflow}")
    assert relearn(home, "down").returncode == 0 and ours(home) == []


def see_prefect(browser: Any, url: str) -> None:
    """The flow run with its stages, and the artifacts people look for."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with (
        temporary_settings({PREFECT_API_URL: f"{url}/api"}),
        get_client(sync_client=True) as client,
    ):
        (run,) = [r for r in client.read_flow_runs() if r.name == STORE]
        artifacts = {a.key: a for a in client.read_artifacts(limit=200)}
    assert {
        "mlflow-run",
        "stages",
        "judge-dpo-metrics",
        "judge-dpo-mlflow",
        "validate-validation",
        "evaluate-judge-judge-report",
        "evaluate-retrieval-retrieval-report",
        f"gate-{STORE}",
    } <= set(artifacts)
    look(browser, f"{url}/runs/flow-run/{run.id}", STORE, "Completed")
    keep(browser, "prefect-run")
    report = artifacts["evaluate-judge-judge-report"]
    look(browser, f"{url}/artifacts/artifact/{report.id}", "macro_f1", "majority", "CoT SFT")
    keep(browser, "prefect-evaluation")


def see_mlflow(browser: Any, home: Path, url: str) -> None:
    """The pipeline's run with a run a stage below it, and the champion's version."""
    from tasks.artifacts import ArtifactStore
    from tasks.settings import settings

    store = ArtifactStore(settings(home=home, experiment=STORE))
    (judged,) = store.search("tags.`relearn.stage` = 'evaluate_judge'")
    page = f"{url}/#/experiments/{store.experiment_id}/runs/{judged.info.run_id}"
    look(browser, page, "evaluate_judge", "judge/macro_f1", "relearn.fingerprint")
    keep(browser, "mlflow-run")
    look(browser, f"{url}/#/models/{STORE}-judge", f"{STORE}-judge", "champion", "Version 1")
    keep(browser, "mlflow-champion")
    look(browser, f"{url}/#/models/{STORE}-judge/versions/1", "champion", "Version 1")
