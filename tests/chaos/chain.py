"""A cheap chain for the fault cases: the data stages on a tiny store, without Prefect."""

from __future__ import annotations

import argparse
import logging

from flows.console import guarded
from models.sources import SyntheticSource
from models.split import SplitConfig
from tasks.faults import databases_ready
from tasks.ingest import ingest, validate_store
from tasks.quality import QualityConfig
from tasks.settings import prepare_environment, settings
from tasks.stage import pipeline


def main() -> None:
    """Make the artifacts of NAME's store, as `relearn run` would."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="MLflow experiment")
    parser.add_argument("--seed", type=int, default=0, help="another store, in no cache yet")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    prepare_environment(settings())
    databases_ready(settings())
    source = SyntheticSource(
        num_products=100, num_queries=24, judgments_per_query=8, seed=asked.seed
    )
    with pipeline(f"chaos {asked.name}", experiment=asked.name):
        raw = ingest.make(source=source, split=SplitConfig(), content="")
        validate_store.make(raw=raw, quality=QualityConfig())


if __name__ == "__main__":
    guarded(main)
