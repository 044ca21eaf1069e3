"""Registered versions as standard MLflow models: what `mlflow.pyfunc.load_model` and `mlflow models
serve` load.

Consumes an ArtifactRef -> produces MLmodel, signature, input example and requirements beside its
files, never copies of them:

    <run>/artifacts/MLmodel         names this module as the loader; the version's source is <run>
    <run>/artifacts/data/...        the artifact as it was made: safetensors, JSON, a LanceDB table

Nothing is pickled. The loader is this package: it has to be installed where a model is served.

    judge      query, title (description, brand, category, price) -> grade, p1..p4, tier
    embedder   text -> a unit vector; parameter side: query or document
    index      query -> rank, product_id, title, score; parameters k and mode
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import ArtifactError, ConfigError, explain
from tasks.artifacts import DATA, ArtifactRef, ArtifactStore, local_path
from tasks.base import weights_in
from tasks.settings import settings

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.models import ModelSignature

MODEL_FILE = "MLmodel"
ROLE = "role"
ENCODER = "encoder"
REQUIREMENTS = ("lancedb", "mlflow", "sentence-transformers", "torch", "transformers")
EXAMPLES: Mapping[str, Mapping[str, list[Any]]] = {
    "judge": {
        "query": ["red couch", "red couch"],
        "title": ["Red velvet sofa, 3 seats", "Blue desk lamp"],
    },
    "embedder": {"text": ["red couch", "blue desk lamp"]},
    "index": {"query": ["red couch"]},
}
"""Input examples; their keys are the kinds of artifact that can be served."""
MAX_K = 1000


def servable(ref: ArtifactRef) -> bool:
    """Whether there is a loader for this kind of artifact."""
    return ref.kind in EXAMPLES


def write_model(store: ArtifactStore, ref: ArtifactRef) -> str:
    """Write the model files of `ref` beside its data, if they are not there; returns their folder's
    URI, the source of a model version.

    Raises:
        ArtifactError: an index whose encoder is not known.
    """
    root = ref.uri.removesuffix(f"/{DATA}")
    if any(item.path == MODEL_FILE for item in store.client.list_artifacts(ref.run_id)):
        return root
    import mlflow
    import pandas as pd
    from mlflow.models import Model

    config: dict[str, Any] = {ROLE: ref.kind}
    if ref.kind == "index":
        config[ENCODER] = _encoder(store, ref)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=__name__,
            mlflow_model=Model(run_id=ref.run_id),
            signature=signature_of(ref.kind),
            input_example=pd.DataFrame(dict(EXAMPLES[ref.kind])),
            pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
            model_config=config,
            metadata={"fingerprint": ref.fingerprint, "stage": ref.name},
        )
        # MLmodel last: a model without it is written again
        (folder / MODEL_FILE).rename(Path(parent) / MODEL_FILE)
        store.client.log_artifacts(ref.run_id, str(folder))
        store.client.log_artifact(ref.run_id, str(Path(parent) / MODEL_FILE))
    return root


def _encoder(store: ArtifactStore, index: ArtifactRef) -> dict[str, str]:
    """The artifact that queries of `index` must be embedded with, from its manifest."""
    manifest = store.manifest(store.client.get_run(index.run_id))
    label = (manifest or {}).get("parents", {}).get("encoder")
    if label is None:
        got = f"{index.label} without an encoder among its parents"
        raise ArtifactError(explain(got, "an index of an encoder", "build it again"))
    from tasks.lineage import find_artifact  # it imports the registry, which imports this

    ref = find_artifact(label, store=store)
    return {"uri": ref.uri, "stage": ref.name, "label": ref.label}


def signature_of(kind: str) -> ModelSignature:
    """Columns and parameters of a kind of model."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    text, real = DataType.string, DataType.double
    if kind == "judge":
        needed = [ColSpec(text, name) for name in ("query", "title")]
        more = [ColSpec(text, n, required=False) for n in ("description", "brand", "category")]
        answers = [ColSpec(DataType.long, "grade"), *(ColSpec(real, f"p{g}") for g in range(1, 5))]
        return ModelSignature(
            Schema([*needed, *more, ColSpec(real, "price", required=False)]),
            Schema([*answers, ColSpec(text, "tier")]),
        )
    if kind == "embedder":
        return ModelSignature(
            Schema([ColSpec(text, "text")]),
            Schema([TensorSpec(np.dtype(np.float32), (-1, -1))]),
            ParamSchema([ParamSpec("side", text, "query")]),
        )
    found = [ColSpec(text, "query"), ColSpec(DataType.long, "rank")]
    found += [ColSpec(text, "product_id"), ColSpec(text, "title"), ColSpec(real, "score")]
    return ModelSignature(
        Schema([ColSpec(text, "query")]),
        Schema(found),
        ParamSchema([ParamSpec("k", DataType.long, 10), ParamSpec("mode", text, "vector")]),
    )


def _load_pyfunc(path: str, model_config: Mapping[str, Any]) -> Any:
    """What MLflow calls with the folder that MLmodel lies in."""
    data = Path(path) / DATA
    current = settings()
    if model_config[ROLE] == "judge":
        return JudgeModel(data, current.torch_device)
    if model_config[ROLE] == "embedder":
        return EmbedderModel(str(data), current.torch_device)
    encoder = model_config[ENCODER]
    weights = weights_in(_fetched(encoder["uri"]), encoder["stage"], current.weights_dir)
    return IndexModel(data, weights, current.torch_device)


def _fetched(uri: str) -> Path:
    local = local_path(uri)
    if local is not None:
        return local
    import mlflow

    return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))


class JudgeModel:
    """A registered judge: rows of query and title -> grade, p1..p4, tier."""

    def __init__(self, folder: Path, device: str) -> None:
        from models.judge.graded import load_graded

        self.judge, self.cumpt = load_graded(folder, device)

    def predict(self, rows: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """One answer a row, in order.

        Raises:
            DataContractError: an empty query or title.
        """
        import pandas as pd

        from models.judge.graded import grade_pairs, pair_of

        # an optional column that a row leaves out is NaN or None here
        plain = rows.astype(object).where(rows.notna(), None).to_dict("records")
        pairs = [pair_of(i, row, "the request") for i, row in enumerate(plain)]
        return pd.DataFrame(grade_pairs(self.judge, self.cumpt, pairs))


class EmbedderModel:
    """A registered encoder: texts [N] -> unit vectors [N, D] float32."""

    def __init__(self, weights: str, device: str) -> None:
        from models.embedder.encoder import load_encoder

        self.encoder = load_encoder(weights, device)

    def predict(self, rows: pd.DataFrame, params: Mapping[str, Any] | None = None) -> Any:
        """side: `query` or `document`, which decides the prompt of a model that has prompts."""
        from models.embedder.encoder import encode

        side = (params or {}).get("side", "query")
        if side not in ("query", "document"):
            raise ConfigError(explain(f"side {side!r}", "query or document", "correct the request"))
        return encode(self.encoder, rows["text"].tolist(), prompt=side)


class IndexModel:
    """A registered index as it was built, without refreshes: queries -> ranked products."""

    def __init__(self, folder: Path, weights: str, device: str) -> None:
        from models.embedder.encoder import load_encoder
        from models.index.lance import LanceIndex

        self.index = LanceIndex.open(folder)
        self.encoder = load_encoder(weights, device)

    def predict(self, rows: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """At most k rows a query, best first, queries in order.

        k: 1 to 1000. mode: `vector`, `lexical` or `hybrid`.
        """
        import pandas as pd

        from models.embedder.encoder import encode
        from models.index.search import search

        asked = dict(params or {})
        k, mode = int(asked.get("k", 10)), str(asked.get("mode", "vector"))
        if not 1 <= k <= MAX_K:
            raise ConfigError(explain(f"k {k}", f"1 to {MAX_K}", "correct the request"))
        queries = rows["query"].tolist()
        vectors = encode(self.encoder, queries, prompt="query")
        out = []
        for query, vector in zip(queries, vectors, strict=True):
            found = search(self.index, query, vector, k, mode)
            titles = self.index.products([product_id for product_id, _ in found])
            out += [
                {"query": query, "rank": rank, "product_id": product_id}
                | {"title": titles[product_id].title, "score": float(score)}
                for rank, (product_id, score) in enumerate(found, 1)
            ]
        return pd.DataFrame(out, columns=["query", "rank", "product_id", "title", "score"])
