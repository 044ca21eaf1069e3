"""Registration: idempotent by fingerprint, aliases, and the way back to the raw files."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from rich.console import Console

from models.errors import ArtifactError
from tasks import registry
from tasks.artifacts import ArtifactRef, ArtifactStore
from tasks.lineage import lineage
from tasks.settings import Settings
from tasks.stage import StageContext, stage


@stage(name="ingest", kind="store")
def ingest(ctx: StageContext, data: str = "digest") -> None:
    """Raw."""
    (ctx.out / "rows.txt").write_text(data)


@stage(name="train", kind="model")
def train(ctx: StageContext, store: ArtifactRef, seed: int = 0) -> None:
    """A model."""
    (ctx.out / "model.txt").write_text(f"{seed}")


def made(seed: int = 0) -> ArtifactRef:
    return train.make(store=ingest.make(), seed=seed)


def test_same_fingerprint_is_registered_once(current: Settings) -> None:
    ref = made()
    assert registry.register("judge", ref, {"f1": 0.5}) == "1"
    assert registry.register("judge", ref, {"f1": 0.75, "Recall@10": 1 / 3}) == "1"
    (only,) = registry.versions("judge")
    assert only.metrics == {"f1": 0.75, "Recall_at_10": 1 / 3}
    assert only.ref == ref
    assert only.aliases == ("candidate",)


def test_a_request_sent_twice_makes_one_version(
    current: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    create, ref = MlflowClient.create_model_version, made()

    def twice(*args: Any, **kwargs: Any) -> Any:
        create(*args, **kwargs)  # its answer was lost
        return create(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_model_version", twice)
    assert registry.register("judge", ref) == "1"
    (only,) = registry.versions("judge")
    assert only.version == "1" and only.aliases == ("candidate",)


def test_a_champion_that_cannot_be_asked_for_is_not_a_missing_one(
    current: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    registry.set_alias("judge", "champion", registry.register("judge", made()))

    def refused(*_: Any) -> None:
        raise MlflowException("not yours", error_code=7)  # PERMISSION_DENIED

    assert registry.get("judge", "nobody") is None and registry.get("nothing", "1") is None
    monkeypatch.setattr(MlflowClient, "get_model_version_by_alias", refused)
    with pytest.raises(MlflowException, match="not yours"):
        registry.champion("judge")


def test_candidate_moves_and_champion_stays(current: Settings) -> None:
    one = registry.register("judge", made(0), tags={"store": "synthetic"})
    assert registry.champion("judge") is None
    registry.set_alias("judge", "champion", one)
    two = registry.register("judge", made(1))
    champion, candidate = registry.champion("judge"), registry.get("judge", "candidate")
    assert champion is not None and champion.version == one
    assert champion.tags == {"store": "synthetic"}
    assert candidate is not None and candidate.version == two
    registry.set_alias("judge", "champion", two)
    promoted = registry.champion("judge")
    assert promoted is not None and promoted.aliases == ("candidate", "champion")
    for _ in range(2):
        registry.delete_alias("judge", "champion")
        assert registry.champion("judge") is None
    assert registry.get("judge", "candidate") is not None


def test_alias_of_an_unknown_version_is_refused(current: Settings) -> None:
    registry.register("judge", made())
    with pytest.raises(ArtifactError, match="got judge version 9; expected one of 1"):
        registry.set_alias("judge", "champion", "9")


def test_version_whose_files_went_is_replaced_with_its_aliases(current: Settings) -> None:
    store, ref = ArtifactStore(current), made()
    first = registry.register("judge", ref, {"f1": 0.5}, {"evaluation": "old"})
    registry.set_alias("judge", "champion", first)
    store.client.set_model_version_tag("judge", first, "withdrawn", "it was bad")
    shutil.rmtree(store.path(ref))
    with pytest.raises(ArtifactError, match=r"files missing: model\.txt"):
        registry.register("judge", ref)
    again = made()
    version = registry.register("judge", again, {"f1": 0.6}, {"evaluation": "new"})
    (only,) = registry.versions("judge")
    assert (only.version, only.ref.uri) == (version, again.uri)
    assert only.aliases == ("candidate", "champion")
    assert only.tags == {"withdrawn": "it was bad", "evaluation": "new"}
    assert only.metrics == {"f1": 0.6}


def text_of(name: str) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(lineage(name))
    return capture.get()


def test_lineage_reaches_the_raw_files(current: Settings) -> None:
    ref = made(3)
    version = registry.register("judge", ref, {"f1": 0.5})
    registry.set_alias("judge", "champion", version)
    for name in ("judge", "judge@champion", "judge/1"):
        lines = text_of(name)
        assert lines.index("judge version 1") < lines.index(ref.label) < lines.index("ingest@")
        assert "seed=3" in lines and "data=digest" in lines
    assert ref.label in text_of("train")
    assert text_of(ref.label).index("train@") < text_of(ref.label).index("ingest@")


@pytest.mark.parametrize("name", ["nothing", "judge@nobody", "x' or ''='", "train@zz"])
def test_lineage_of_nothing_lists_what_there_is(current: Settings, name: str) -> None:
    made()
    with pytest.raises(ArtifactError, match="one of ingest, train"):
        lineage(name)


def test_only_what_changed_is_written(current: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    written: list[str] = []
    set_tag = MlflowClient.set_model_version_tag

    def counted(client: Any, name: str, version: str, key: str, value: str) -> None:
        written.append(key)
        set_tag(client, name, version, key, value)

    monkeypatch.setattr(MlflowClient, "set_model_version_tag", counted)
    ref = made()
    for metrics, expected in (
        ({"f1": 0.5, "n": 4}, []),  # they are in the request that makes the version
        ({"f1": 0.5, "n": 4}, []),
        ({"f1": 0.75, "n": 4}, ["metric.f1"]),
    ):
        written.clear()
        registry.register("judge", ref, metrics, {"evaluation": "a"})
        assert written == expected
        (only,) = registry.versions("judge")
        assert (only.metrics, only.tags) == (metrics, {"evaluation": "a"})
