"""The dense retriever the judge teaches: SFT -> index -> Retrieval-GRPO -> index."""

from __future__ import annotations

from prefect import flow
from pydantic import BaseModel, ConfigDict

from flows.recipes import EmbedderConfig
from tasks.artifacts import ArtifactRef
from tasks.base import TINY, base_content, base_model
from tasks.embedder import embedder_base, embedder_rgrpo, embedder_sft, index_catalogue
from tasks.evaluate import evaluate_retrieval


class EmbedderResult(BaseModel):
    """The finished encoder, the index of the whole catalogue, and the retrieval table."""

    model_config = ConfigDict(frozen=True)

    embedder: ArtifactRef
    index: ArtifactRef
    evaluation: ArtifactRef


def base_encoder(config: EmbedderConfig, store: ArtifactRef) -> ArtifactRef:
    """The encoder everything starts from; call it inside a flow."""
    base = base_model(
        name=config.base,
        role="embedder",
        content=base_content(config.base),
        store=store if config.base == TINY else None,
    )
    return base if config.encoder is None else embedder_base(config=config.encoder, base=base)


@flow(name="train-embedder", flow_run_name="retriever", log_prints=False)
def train_embedder(
    config: EmbedderConfig, store: ArtifactRef, judge: ArtifactRef
) -> EmbedderResult:
    """Train, index and evaluate the retriever; the judge is its reward."""
    config = config.in_step()
    base = base_encoder(config, store)
    sft = embedder_sft(config=config.sft, base=base, store=store)
    rgrpo = embedder_rgrpo(
        config=config.rgrpo, rewards=config.rewards, encoder=sft, judge=judge, store=store
    )
    encoders = {"base": base, "SFT": sft, "SFT + R-GRPO": rgrpo}
    indexes = {
        name: index_catalogue(config=config.index, encoder=encoder, store=store)
        for name, encoder in encoders.items()
    }
    evaluation = evaluate_retrieval(
        config=config.evaluation, encoders=encoders, indexes=indexes, judge=judge, store=store
    )
    return EmbedderResult(embedder=rgrpo, index=indexes["SFT + R-GRPO"], evaluation=evaluation)
