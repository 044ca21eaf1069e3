"""Fingerprints and the store: what is the same artifact, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from mlflow.entities import FileInfo
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from pydantic import BaseModel, ConfigDict, SecretStr

from models.errors import ArtifactError, ConfigError
from tasks.artifacts import (
    ArtifactRef,
    ArtifactStore,
    Identity,
    describe,
    differences,
    flatten,
    folder_digest,
    identify,
)
from tasks.settings import Settings


class Lora(BaseModel):
    model_config = ConfigDict(frozen=True)
    rank: int = 8


class Dpo(BaseModel):
    model_config = ConfigDict(frozen=True)
    beta: float = 0.1
    lora: Lora = Lora()
    key: SecretStr | None = None


def make_ref(name: str = "sft", digit: str = "a", uri: str = "file:///x") -> ArtifactRef:
    fingerprint = digit * 64
    return ArtifactRef(
        kind="judge", name=name, version=fingerprint[:12], uri=uri, fingerprint=fingerprint
    )


def fingerprint(stage: str = "dpo", code: str = "1", **inputs: object) -> str:
    return identify(stage, code, inputs).fingerprint


def test_fingerprint_ignores_order_and_place() -> None:
    one = fingerprint(config={"a": 1, "b": {"c": 2, "d": 3}}, sft=make_ref())
    other = fingerprint(sft=make_ref(uri="s3://y"), config={"b": {"d": 3, "c": 2}, "a": 1})
    assert one == other
    assert len(one) == 64


def test_fingerprint_is_the_same_tomorrow() -> None:
    content = (
        '{"code_version":"1","config":{"config":{"beta":0.1,"key":null,"lora":{"rank":8}}},'
        f'"parents":{{"sft":"{"a" * 64}"}},"stage":"dpo"}}'
    )
    expected = hashlib.sha256(content.encode()).hexdigest()
    assert fingerprint(config=Dpo(), sft=make_ref()) == expected


@pytest.mark.parametrize(
    "changed",
    [
        fingerprint(stage="grpo", config=Dpo(), sft=make_ref()),
        fingerprint(code="2", config=Dpo(), sft=make_ref()),
        fingerprint(config=Dpo(beta=0.2), sft=make_ref()),
        fingerprint(config=Dpo(lora=Lora(rank=9)), sft=make_ref()),
        fingerprint(config=Dpo(), sft=make_ref(digit="b")),
        fingerprint(config=Dpo(), pairs=make_ref()),
        fingerprint(config=Dpo(), sft=(make_ref(),)),
        fingerprint(config=Dpo(), sft=make_ref(), seed=0),
        fingerprint(dpo=Dpo(), sft=make_ref()),
    ],
)
def test_every_part_of_the_identity_counts(changed: str) -> None:
    assert changed != fingerprint(config=Dpo(), sft=make_ref())


def test_order_of_a_tuple_of_parents_counts_and_of_a_dict_does_not() -> None:
    a, b = make_ref("a", "a"), make_ref("b", "b")
    assert fingerprint(rows=(a, b)) != fingerprint(rows=(b, a))
    assert fingerprint(rows={"x": a, "y": b}) == fingerprint(rows={"y": b, "x": a})
    assert fingerprint(rows={"x": a, "y": b}) != fingerprint(rows={"x": b, "y": a})


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"x", Path("/data")])
def test_what_is_no_identity_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="got"):
        _ = fingerprint(config=value)


def test_artifacts_mixed_with_config_are_refused() -> None:
    with pytest.raises(ConfigError, match="split the input"):
        identify("dpo", "1", {"rows": (make_ref(), 3)})


def test_secret_does_not_enter_the_manifest() -> None:
    identity = identify("dpo", "1", {"config": Dpo(key=SecretStr("hunter2"))})
    assert "hunter2" not in json.dumps(identity.as_json())


def test_flatten_keeps_both_when_names_meet() -> None:
    assert flatten({"config": {"seed": 0, "none": {}}, "seed": 1}) == {
        "config.seed": 0,
        "none": {},
        "seed": 1,
    }


def test_differences_name_field_parent_and_code() -> None:
    before = identify("dpo", "1", {"dpo": Dpo(), "sft": make_ref()}).as_json()
    now = identify("dpo", "2", {"dpo": Dpo(beta=0.2), "sft": make_ref(digit="b")}).as_json()
    assert differences(now, before) == [
        "code changed: version 1 -> 2",
        "config changed: dpo.beta 0.1 -> 0.2",
        "parent sft changed",
    ]
    assert differences(before, before) == []


def test_differences_name_fields_and_parents_that_came_and_went() -> None:
    before = identify("dpo", "1", {"config": {"old": 1}, "sft": make_ref()}).as_json()
    now = identify("dpo", "1", {"config": {"new": None}, "pairs": make_ref("pairs")}).as_json()
    assert differences(now, before) == [
        "config changed: new (absent) -> None",
        "config changed: old 1 -> (absent)",
        "parent pairs added",
        "parent sft removed",
    ]


def commit(
    current: Settings, folder: Path, stage: str = "dpo"
) -> tuple[ArtifactStore, ArtifactRef]:
    """An artifact with one small and one large file."""
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "small.txt").write_text("hello")
    (folder / "large.bin").write_bytes(bytes(2 << 20))
    store = ArtifactStore(current)
    identity: Identity = identify(stage, "1", {"seed": 1})
    tags = {
        "relearn.fingerprint": identity.fingerprint,
        "relearn.stage": stage,
        "relearn.kind": "judge",
        "relearn.parents": "{}",
    }
    run_id = store.client.create_run(store.experiment_id, tags=tags).info.run_id
    return store, store.commit(run_id, folder, identity)


def test_commit_then_find(current: Settings, tmp_path: Path) -> None:
    store, ref = commit(current, tmp_path / "out")
    assert store.find(ref.fingerprint).ref == ref
    assert (store.path(ref) / "sub" / "small.txt").read_text() == "hello"
    assert not (tmp_path / "out").exists()  # moved, not copied


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda p: (p / "sub" / "small.txt").unlink(), "files missing: sub/small.txt"),
        (lambda p: (p / "sub" / "small.txt").write_text("hullo"), "another content"),
        (lambda p: (p / "large.bin").write_bytes(bytes(1 << 20)), "large.bin has 1048576 bytes"),
        (lambda p: (p.parent / "manifest.json").unlink(), "manifest.json"),
        (lambda p: (p.parent / "manifest.json").write_text('{"fi'), "manifest.json"),
    ],
)
def test_harmed_artifact_is_missing_with_a_reason(
    current: Settings, tmp_path: Path, harm: object, reason: str
) -> None:
    store, ref = commit(current, tmp_path / "out")
    harm(store.path(ref))  # type: ignore[operator]
    found = store.find(ref.fingerprint)
    assert found.ref is None
    assert reason in found.reason


class Bucket(ArtifactRepository):
    """A remote store: only MLflow reads it, and what is missing is MLflow's error."""

    down = False

    @property
    def inner(self) -> LocalArtifactRepository:
        return LocalArtifactRepository(self.artifact_uri.replace("bucket://here", "file://"))

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        self.inner.log_artifact(local_file, artifact_path)

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        self.inner.log_artifacts(local_dir, artifact_path)

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        if self.down:
            raise ValueError("could not connect to the endpoint")
        return self.inner.list_artifacts(path)

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        self.list_artifacts()
        self.inner._download_file(remote_file_path, local_path)


def test_a_missing_manifest_of_a_remote_store_is_files_missing(
    current: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_artifact_repository_registry._registry, "bucket", Bucket)
    root = tmp_path / "bucket"
    store, ref = commit(
        current.model_copy(update={"artifact_root": f"bucket://here{root}"}), tmp_path / "out"
    )
    assert store.find(ref.fingerprint).ref == ref
    (manifest,) = root.rglob("manifest.json")
    manifest.rename(tmp_path / "manifest.json")
    found = store.find(ref.fingerprint)
    assert found.ref is None and "files missing: manifest.json" in found.reason
    assert store.why(identify("dpo", "1", {"seed": 2})) == "first time"
    monkeypatch.setattr(Bucket, "down", True)
    with pytest.raises(ValueError, match="could not connect"):
        store.find(ref.fingerprint)


def test_run_without_end_is_not_served(current: Settings, tmp_path: Path) -> None:
    store, ref = commit(current, tmp_path / "out")
    store.client.update_run(ref.run_id, status="RUNNING")
    assert store.find(ref.fingerprint).ref is None


def test_path_of_a_removed_artifact_says_what_to_do(current: Settings, tmp_path: Path) -> None:
    store, ref = commit(current, tmp_path / "out")
    store.path(ref).rename(tmp_path / "moved")
    with pytest.raises(ArtifactError, match="run the pipeline again"):
        store.path(ref)


def test_artifact_is_found_from_another_experiment(current: Settings, tmp_path: Path) -> None:
    _, ref = commit(current, tmp_path / "out")
    other = ArtifactStore(current.model_copy(update={"experiment": "another"}))
    assert other.experiment_id != ArtifactStore(current).experiment_id
    assert other.find(ref.fingerprint).ref == ref


def test_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match="link"):
        describe(tmp_path)


def test_folder_digest_sees_names_and_bytes_not_places(tmp_path: Path) -> None:
    for place, text in (("one", "a"), ("two", "a"), ("three", "b")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "f").write_text(text)
    one, two, three = (folder_digest(tmp_path / p) for p in ("one", "two", "three"))
    assert one == two != three
    (tmp_path / "two" / "f").rename(tmp_path / "two" / "g")
    assert folder_digest(tmp_path / "two") != one
    with pytest.raises(ArtifactError, match="--data"):
        folder_digest(tmp_path / "none")


def test_a_database_cut_off_in_the_making_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed among MLflow's migrations: no file of that name is left that MLflow would refuse."""
    from mlflow.store.db import utils

    current = Settings(home=tmp_path, blanks_dir=tmp_path / "blanks")
    store, file = ArtifactStore(current), tmp_path / "mlflow.db"
    made = utils.InitialBase.metadata.create_all

    def cut_off(engine: object) -> None:
        made(engine)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", cut_off)
        with pytest.raises(KeyboardInterrupt):
            store.client.search_experiments()
    assert not file.exists()
    assert [e.name for e in store.client.search_experiments()] == ["Default"]
    assert [p.name for p in tmp_path.rglob("*partial*")] == []
