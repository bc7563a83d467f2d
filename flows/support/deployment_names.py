"""Lets Prefect find a deployment by its bare name: `prefect deployment run build-laion-aesthetics`.

FLOW/DEPLOYMENT, Prefect's form, stays possible. Prefect loads this module on import where plugins are enabled: in this
repository by pyproject.toml, elsewhere by PREFECT_PLUGINS_ENABLED=true.
"""

import difflib
import functools
from collections.abc import Callable, Generator
from typing import Any

from prefect.plugins import HookContext, register_hook

Steps = Generator[Any, Any, Any]
"""Yields client calls, is sent their results, returns the deployment; serves sync and async clients."""


@register_hook
def setup_environment(*, ctx: HookContext) -> None:
    """Patches bare names into Prefect's two clients, unless its internals have changed."""
    logger = ctx.logger_factory("prefect.plugins")
    try:
        from prefect.client.orchestration._deployments import client as module

        _patch(module.DeploymentClient, _run)
        _patch(module.DeploymentAsyncClient, _run_async)
    except (ImportError, AttributeError) as error:
        logger.warning("sdtrain: this Prefect takes only FLOW/DEPLOYMENT as a deployment's name (%s).", error)


def _patch(client_class: Any, driver: Callable[[Steps], Any]) -> None:
    original = client_class.read_deployment_by_name
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def read_deployment_by_name(self: Any, name: str) -> Any:
        return original(self, name) if "/" in name else driver(find(self, name))

    client_class.read_deployment_by_name = read_deployment_by_name


def _run(steps: Steps) -> Any:
    try:
        result = next(steps)
        while True:
            result = steps.send(result)
    except StopIteration as end:
        return end.value


async def _run_async(steps: Steps) -> Any:
    try:
        call = next(steps)
        while True:
            call = steps.send(await call)
    except StopIteration as end:
        return end.value


def find(client: Any, name: str) -> Steps:
    """Finds the only deployment named `name`, of any flow.

    ObjectNotFound if there are none or several; the message, also logged, names the candidates.
    """
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    named_so = DeploymentFilter(name=DeploymentFilterName(any_=[name]))
    found = yield client.read_deployments(deployment_filter=named_so)
    if len(found) == 1:
        return found[0]
    if found:
        flows = []
        for deployment in found:
            flows.append((yield client.read_flow(deployment.flow_id)))
        full_names = sorted(f"{flow.name}/{name}" for flow in flows)
        raise _not_found(f"Several deployments are called '{name}'. Write one of: {', '.join(full_names)}.")
    known = [deployment.name for deployment in (yield client.read_deployments())]
    raise _not_found(no_such_deployment(name, known))


def no_such_deployment(name: str, known: list[str]) -> str:
    """The message for an unknown deployment."""
    if not known:
        return f"There is no deployment '{name}', nor any other. Run `prefect --no-prompt deploy --all` first."
    close = difflib.get_close_matches(name, known, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(sorted(set(known)))}."
    return f"There is no deployment '{name}'. {hint}"


def _not_found(sentence: str) -> Exception:
    from prefect.exceptions import ObjectNotFound
    from prefect.logging import get_logger

    # Logged too, since the command line replaces this exception's message.
    get_logger("sdtrain").error(sentence)
    return ObjectNotFound(http_exc=LookupError(sentence), help_message=sentence)
