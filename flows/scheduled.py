"""The flows that infra/prefect.yaml deploys: what a schedule can start, from values alone.

Consumes a `Chain` (a form in Prefect's pages) -> produces a release that the gate decides on, or a
measurement. Artifacts that a flow needs and does not make are the champions of the registry. Each
flow prepares its environment itself: a worker that `relearn up` did not start may have set nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from prefect import flow
from pydantic import BaseModel, ConfigDict, Field

from flows.data import data_folder, prepare_data
from flows.embedder import train_embedder
from flows.judge import train_judge
from flows.pipeline import run_pipeline
from flows.recipes import PipelineConfig, recipe
from flows.release import ReleaseResult, release
from models.errors import ArtifactError, explain
from tasks.artifacts import ArtifactStore
from tasks.embedder import index_catalogue
from tasks.evaluate import (
    JUDGE_TABLE,
    RETRIEVAL_TABLE,
    evaluate_judge,
    evaluate_retrieval,
    read_table,
)
from tasks.gate import index_config
from tasks.judge import judge_answers
from tasks.registry import Registered, champion, nothing_of
from tasks.release import finish_pending, model_name
from tasks.settings import prepare_environment, settings
from tasks.stage import pipeline

RUN_NAME = "{chain.store} {chain.recipe}"
"""How a run is called in Prefect's lists."""


Change = Annotated[str, Field(pattern=r"^[\w.]+=")]


class Chain(BaseModel):
    """What `relearn run` takes on its command line."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    recipe: Literal["smoke", "small", "full"] = "small"
    """smoke (tiny models), small (two CPU cores) or full (a GPU)."""
    store: Literal["synthetic", "homedepot", "chorus", "esci", "wands", "tables"] = "synthetic"
    """Where the data comes from; `tables` is your own."""
    data: str | None = None
    """Folder with the store's files on the machine that runs the flow; synthetic needs none."""
    changes: tuple[Change, ...] = ()
    """Settings changed, each as key=value, e.g. judge.dpo.beta=0.2."""

    @property
    def config(self) -> PipelineConfig:
        """The recipe with its changes."""
        return recipe(self.recipe, self.store, self.changes)


@flow(name="retrain", flow_run_name=RUN_NAME)
def retrain(chain: Chain) -> ReleaseResult:
    """Data, judge, retriever, index, evaluation, registration, gate: the whole chain."""
    prepare_environment(settings())
    with data_folder(chain.data):
        return run_pipeline(chain.config).release


@flow(name="retrain-judge", flow_run_name=RUN_NAME)
def retrain_judge(chain: Chain) -> ReleaseResult:
    """CoT SFT, pass@N, DPO, GRPO, CumPT on today's data; released with the champion's retriever."""
    prepare_environment(settings())
    config = chain.config
    _champions(config.name, "embedder", "index")  # before the training, not after
    with data_folder(chain.data), pipeline(f"retrain-judge {config.name}", config.name):
        store = prepare_data(config.data)
        made = train_judge(config.judge, store)
        return release(config.name, judge=made, gate=config.gate)


@flow(name="retrain-embedder", flow_run_name=RUN_NAME)
def retrain_embedder(chain: Chain) -> ReleaseResult:
    """Contrastive SFT and Retrieval-GRPO on today's data, with the champion judge as the reward."""
    prepare_environment(settings())
    config = chain.config
    (judge,) = _champions(config.name, "judge")
    _may_teach(judge, config.gate.min_kappa)
    with data_folder(chain.data), pipeline(f"retrain-embedder {config.name}", config.name):
        store = prepare_data(config.data)
        made = train_embedder(config.embedder, store, judge.ref)
        return release(config.name, retriever=made, gate=config.gate)


@flow(name="evaluate-champion", flow_run_name=RUN_NAME)
def evaluate_champion(chain: Chain) -> dict[str, list[dict[str, Any]]]:
    """Both tables for the champions on the held-out queries of today's data; trains nothing.

    The index is built as the champion's was.
    """
    prepare_environment(settings())
    config = chain.config
    champions = _champions(config.name, "judge", "embedder", "index")
    judge, encoder, served = (found.ref for found in champions)
    with data_folder(chain.data), pipeline(f"evaluate-champion {config.name}", config.name):
        store = prepare_data(config.data)
        # a finished judge carries the prompt that it reads by
        answers = judge_answers(config=config.judge.answers, prompt=judge, judge=judge, store=store)
        judged = evaluate_judge(answers={"champion": answers}, judge=judge, store=store)
        built = index_config(served, artifacts_of(config.name))
        index = index_catalogue(config=built, encoder=encoder, store=store)
        retrieved = evaluate_retrieval(
            config=config.embedder.evaluation,
            encoders={"champion": encoder},
            indexes={"champion": index},
            judge=judge,
            store=store,
        )
    artifacts = artifacts_of(config.name)
    return {
        "judge": read_table(artifacts.path(judged), JUDGE_TABLE),
        "retrieval": read_table(artifacts.path(retrieved), RETRIEVAL_TABLE),
    }


def artifacts_of(name: str) -> ArtifactStore:
    """The artifact store, with the store's experiment."""
    return ArtifactStore(settings().model_copy(update={"experiment": name}))


def _champions(name: str, *roles: str) -> list[Registered]:
    """The champions, once a move of champions that a crash cut off is carried out.

    Raises:
        ArtifactError: one is missing.
    """
    artifacts, champions = artifacts_of(name), []
    finish_pending(name, artifacts=artifacts)
    for role in roles:
        found = champion(model_name(name, role), store=artifacts)
        if found is None:
            raise nothing_of(name, f"champion {role}", store=artifacts)
        champions.append(found)
    return champions


def _may_teach(judge: Registered, floor: float) -> None:
    """The champion judge agrees with people well enough to be a reward; the first champion need
    not, and what it taught would be held after all the training.

    Raises:
        ArtifactError: its kappa is below the floor.
    """
    kappa = judge.metrics.get("kappa")
    if kappa is not None and kappa < floor:
        raise ArtifactError(
            explain(
                f"{judge.name} version {judge.version} with kappa {kappa:.3f} against humans",
                f"at least gate.min_kappa = {floor} of a judge that is to be the reward",
                "train a better judge (retrain-judge), or lower gate.min_kappa",
            )
        )
