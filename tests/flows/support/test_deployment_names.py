import asyncio
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from prefect.client.orchestration._deployments.client import DeploymentAsyncClient, DeploymentClient
from prefect.exceptions import ObjectNotFound

from flows.support import deployment_names

DEPLOYMENTS = [("build-dataset", "build-demo"), ("train-unet", "train"), ("other-flow", "train")]


class Client:
    """Answers as Prefect's client does, from the list above."""

    def read_deployments(self, deployment_filter: Any = None) -> list[Any]:
        wanted = deployment_filter.name.any_ if deployment_filter else [name for _, name in DEPLOYMENTS]
        return [SimpleNamespace(name=name, flow_id=flow) for flow, name in DEPLOYMENTS if name in wanted]

    def read_flow(self, flow_id: str) -> Any:
        return SimpleNamespace(name=flow_id)

    def read_deployment_by_name(self, name: str) -> str:
        return f"Prefect's own answer for {name}"


class AsyncClient(Client):
    async def read_deployments(self, deployment_filter: Any = None) -> list[Any]:  # type: ignore[override]
        return super().read_deployments(deployment_filter)

    async def read_flow(self, flow_id: str) -> Any:
        return super().read_flow(flow_id)

    async def read_deployment_by_name(self, name: str) -> str:  # type: ignore[override]
        return super().read_deployment_by_name(name)


def ask_sync(name: str) -> Any:
    patched = type("Patched", (Client,), {"read_deployment_by_name": Client.read_deployment_by_name})
    deployment_names._patch(patched, deployment_names._run)
    return patched().read_deployment_by_name(name)


def ask_async(name: str) -> Any:
    patched = type("Patched", (AsyncClient,), {"read_deployment_by_name": AsyncClient.read_deployment_by_name})
    deployment_names._patch(patched, deployment_names._run_async)
    return asyncio.run(patched().read_deployment_by_name(name))


@pytest.fixture(params=[ask_sync, ask_async])
def ask(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_bare_name_finds_its_only_deployment(ask: Any) -> None:
    assert ask("build-demo").flow_id == "build-dataset"


def test_native_form_goes_to_prefect_untouched(ask: Any) -> None:
    assert ask("build-dataset/build-demo") == "Prefect's own answer for build-dataset/build-demo"


def test_name_of_several_deployments_lists_their_full_names(ask: Any) -> None:
    with pytest.raises(ObjectNotFound, match="Write one of: other-flow/train, train-unet/train"):
        ask("train")


def test_unknown_name_is_answered_with_close_ones(ask: Any) -> None:
    with pytest.raises(ObjectNotFound, match="Did you mean build-demo"):
        ask("build-dem")


def test_unknown_name_without_close_ones_is_answered_with_all() -> None:
    assert deployment_names.no_such_deployment("zzz", ["b", "a"]) == "There is no deployment 'zzz'. Known: a, b."
    assert "deploy --all" in deployment_names.no_such_deployment("zzz", [])


def test_prefect_has_what_the_plugin_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    for client in (DeploymentClient, DeploymentAsyncClient):
        original = getattr(client.read_deployment_by_name, "__wrapped__", client.read_deployment_by_name)
        monkeypatch.setattr(client, "read_deployment_by_name", original)
    deployment_names.setup_environment(ctx=context())
    deployment_names.setup_environment(ctx=context())  # again: wrapped once only
    for client in (DeploymentClient, DeploymentAsyncClient):
        assert not hasattr(client.read_deployment_by_name.__wrapped__, "__wrapped__")  # type: ignore[attr-defined]


def test_prefect_that_looks_different_inside_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = "prefect.client.orchestration._deployments.client"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr("prefect.client.orchestration._deployments.client", ModuleType(name))
    with caplog.at_level(logging.WARNING):
        deployment_names.setup_environment(ctx=context())
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "sdtrain: this Prefect takes only FLOW/DEPLOYMENT as a deployment's name"
    ]


def context() -> Any:
    return SimpleNamespace(logger_factory=logging.getLogger)
