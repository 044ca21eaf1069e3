"""infra/: what is deployed exists and accepts its parameters; nothing names hosts or secrets."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args
from uuid import UUID

import pytest
import yaml
from prefect.client.schemas.schedules import CronSchedule
from prefect.flows import load_flow_from_entrypoint

from flows.recipes import RECIPES, STORES
from flows.scheduled import Chain
from models.errors import ConfigError
from tasks.deployments import POOL

INFRA = Path(__file__).resolve().parents[2] / "infra"
PREFECT = yaml.safe_load((INFRA / "prefect.yaml").read_text())
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
SCHEDULES = {
    "retrain": "weekly",
    "retrain-judge": "weekly",
    "retrain-embedder": "daily",
    "evaluate-champion": "daily",
    "refresh-index": "hourly",
    "monitor": "hourly",
    "backfill": "never",
}
FORMS = {
    "backfill": {"span": {"from_date": "2026-03-01", "to_date": "2026-03-02"}},
}
"""What a person must fill in."""


@pytest.mark.parametrize("entry", PREFECT["deployments"], ids=lambda e: e["name"])
def test_a_deployment_names_a_flow_that_takes_its_parameters(entry: dict[str, Any]) -> None:
    flow = load_flow_from_entrypoint(entry["entrypoint"])
    assert flow.name == entry["name"] and entry["work_pool"]["name"] == POOL
    given = entry["parameters"] | FORMS.get(entry["name"], {})
    chain = flow.validate_parameters(given)["chain"]
    assert chain == Chain() and chain.config.name == "synthetic"
    assert entry["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}


def test_schedules_are_those_promised_and_never_start_together() -> None:
    crons = {e["name"]: e["schedules"][0] for e in PREFECT["deployments"] if "schedules" in e}
    found = {e["name"]: "never" for e in PREFECT["deployments"]}
    assert found | {name: _cadence(row["cron"]) for name, row in crons.items()} == SCHEDULES
    assert all(CronSchedule(**row).timezone == "UTC" for row in crons.values())
    assert len({row["cron"] for row in crons.values()}) == len(crons)


def _cadence(cron: str) -> str:
    minute, hour, day, month, weekday = cron.split()
    assert minute.isdigit() and day == month == "*"
    if hour == "*":
        assert weekday == "*"
        return "hourly"
    assert hour.isdigit()
    return "daily" if weekday == "*" else "weekly"


def test_what_the_monitor_asks_for_has_an_automation_that_runs_it() -> None:
    """By Prefect's own validators, with the event that the monitor sends."""
    from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger
    from prefect.server.events.actions import RunDeployment
    from prefect.server.events.schemas.automations import EventTrigger
    from prefect.server.events.schemas.events import ReceivedEvent, Resource
    from prefect.utilities.schema_tools.hydration import HydrationContext, hydrate

    from models.evaluation.monitor import Reaction
    from tasks.monitor import EVENT, REACTION_LABEL, STORE_RESOURCE

    entries = {e["name"]: e["triggers"] for e in PREFECT["deployments"] if "triggers" in e}
    assert set(entries) == {str(r) for r in Reaction} - {"none"}
    names = [trigger["name"] for rows in entries.values() for trigger in rows]
    assert len(set(names)) == len(names) == len(entries)
    for name, (spec,) in entries.items():
        made = DeploymentEventTrigger.model_validate(spec)
        made.set_deployment_id(UUID(int=1))
        automation = made.as_automation().model_dump(mode="json")
        trigger = EventTrigger.model_validate(automation["trigger"])
        action = RunDeployment.model_validate(automation["actions"][0])
        payload = {"chain": {"store": "homedepot", "data": None, "changes": ["a=1"]}, "other": 1}
        for label in entries:
            resource = {
                "prefect.resource.id": f"{STORE_RESOURCE}homedepot-smoke",
                REACTION_LABEL: label,
            }
            event = ReceivedEvent(
                occurred=datetime(2026, 3, 1, tzinfo=UTC),
                event=EVENT,
                resource=Resource.model_validate(resource),
                payload=payload,
                id=UUID(int=2),
            )
            assert trigger.covers(event) == (label == name)
        parameters = dict(action.parameters or {})
        RunDeployment._upgrade_v1_templates(parameters)  # as the server does before it renders
        context = {"event": event}
        given = hydrate(
            parameters,
            HydrationContext(raise_on_error=True, render_jinja=True, jinja_context=context),
        )
        assert given == {"chain": payload["chain"]} | ({"delta": None} if "index" in name else {})


def test_the_form_offers_every_recipe_and_store() -> None:
    fields = Chain.model_fields
    assert get_args(fields["recipe"].annotation) == tuple(RECIPES)
    assert get_args(fields["store"].annotation) == STORES
    assert all(field.description for field in fields.values())


@pytest.mark.parametrize(
    "wrong", [{"recipe": "huge"}, {"sotre": "chorus"}, {"changes": ["judge.dpo.beta"]}]
)
def test_a_wrong_form_is_refused_before_anything_runs(wrong: dict[str, Any]) -> None:
    flow = load_flow_from_entrypoint("flows.scheduled.retrain")
    with pytest.raises(Exception, match=next(iter(wrong))):
        flow.validate_parameters({"chain": wrong})


def test_a_change_reaches_the_config() -> None:
    chain = Chain(recipe="smoke", store="synthetic", changes=("judge.dpo.beta=0.7",))
    assert chain.config.judge.dpo.beta == 0.7
    with pytest.raises(ConfigError, match="nowhere"):
        _ = Chain(changes=("nowhere=1",)).config


def test_images_have_no_host_and_ports_are_on_loopback() -> None:
    services = COMPOSE["services"].values()
    for image in {s["image"] for s in services}:
        assert not re.match(r"[^/]*[.:][^/]*/", image), image
    published = [port for s in services for port in s.get("ports", [])]
    assert len(published) == 2 and all(p.startswith("127.0.0.1:") for p in published)


def test_secrets_come_from_the_environment() -> None:
    secret = re.compile(r"PASSWORD|SECRET|ACCESS_KEY")
    checked = 0
    for service in COMPOSE["services"].values():
        for name, value in service.get("environment", {}).items():
            if secret.search(name):
                checked += 1
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), name
            for found in re.findall(r"://[^:/@]+:([^@]+)@", str(value)):
                checked += 1
                assert found == "${POSTGRES_PASSWORD}", name
    assert checked > 6


def test_the_servers_without_containers_name_what_compose_names() -> None:
    script = (INFRA / "servers.py").read_text()
    services = COMPOSE["services"]
    names = {n for n in services["worker"]["environment"] if n.startswith(("AWS_", "MLFLOW_S3"))}
    assert {"AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP", "MLFLOW_S3_ENDPOINT_URL"} <= names
    for name in names | {"RELEARN_ARTIFACT_ROOT", "PREFECT_API_DATABASE_CONNECTION_URL"}:
        assert f'"{name}"' in script, name
    for service, name in (("prefect", "asyncpg"), ("mlflow", "psycopg2")):
        (url,) = [v for v in services[service]["environment"].values() if "postgresql" in str(v)]
        assert url.startswith(f"postgresql+{name}://relearn:") and url.endswith(f"/{service}")
        assert f"postgresql+{name}://" in script and f"/{service}" in script
    assert services["worker"]["environment"]["RELEARN_ARTIFACT_ROOT"] == "s3://relearn/artifacts"
    assert 'BUCKET = "relearn"' in script


def test_services_wait_only_for_services_that_can_get_there() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        for name, wanted in service.get("depends_on", {}).items():
            if wanted["condition"] == "service_healthy":
                assert "healthcheck" in services[name]
            if wanted["condition"] == "service_completed_successfully":
                assert services[name]["restart"] == "on-failure"


def test_a_server_takes_the_kubernetes_job_template() -> None:
    """By the server's own validator; and every variable is used."""
    from prefect.server.schemas.actions import WorkPoolCreate

    template = json.loads((INFRA / "k8s" / "base-job-template.json").read_text())
    WorkPoolCreate(name="k8s", type="kubernetes", base_job_template=template)
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["args"] == "{{ command }}"
    template["job_configuration"]["name"] = "{{ nowhere }}"
    with pytest.raises(ValueError, match="nowhere"):
        WorkPoolCreate(name="k8s", type="kubernetes", base_job_template=template)
