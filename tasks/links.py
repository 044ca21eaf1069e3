"""Links from Prefect's pages to MLflow's: where a flow run's numbers and files are.

Consumes an MLflow run of a pipeline or a stage -> produces a link artifact of the run around it.
"""

from __future__ import annotations

import logging
import sys

from tasks.settings import Settings

KEY = "mlflow-run"

logger = logging.getLogger(__name__)


def mlflow_link(pages: str, experiment_id: str, run_id: str) -> str:
    """Address of a run in MLflow's pages.

    >>> mlflow_link("http://127.0.0.1:5000", "1", "abc")
    'http://127.0.0.1:5000/#/experiments/1/runs/abc'
    """
    return f"{pages}/#/experiments/{experiment_id}/runs/{run_id}"


def link_to_mlflow(
    current: Settings, experiment_id: str, run_id: str, name: str, key: str = KEY
) -> None:
    """Show the MLflow run of `name` in the flow or task run around this call, if there is one.

    Without a known MLflow server, or outside a flow run, nothing is shown. What is only shown may
    fail: that is a warning.
    """
    if current.mlflow_pages is None or "prefect" not in sys.modules:
        return
    from prefect.artifacts import create_link_artifact
    from prefect.context import FlowRunContext

    if FlowRunContext.get() is None:
        return
    link = mlflow_link(current.mlflow_pages, experiment_id, run_id)
    try:
        create_link_artifact(link=link, link_text=f"{name} in MLflow", key=key, description=name)
    except Exception as error:
        logger.warning("Prefect does not show the link to MLflow: %s", error)
