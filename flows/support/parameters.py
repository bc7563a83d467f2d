"""Parameters of flows: made from declared options, and recorded without secrets."""

import dataclasses
from inspect import Parameter
from typing import Any, ParamSpec, TypeVar

from prefect import Flow
from pydantic import Field

from sdtrain.redaction import as_recorded

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")


def flow_parameter(field: "dataclasses.Field[Any]", hint: Any) -> Parameter:
    """A flow's parameter for a field of `sdtrain.options`; its help text is the description on Prefect's page."""
    default = Field(default=field.default, description=field.metadata["help"])
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def records_no_secrets(flow: Flow[ParamsT, ResultT]) -> Flow[ParamsT, ResultT]:
    """Keeps queries and passwords of URLs out of what Prefect records of the parameters. Goes above `@flow`.

    The flow itself gets them whole where it is called in Python. A server that is to start a deployment must pass
    parameters on and so would have to keep them: it refuses such URLs by `sdtrain.settings.Location`. There, write
    `${NAME}` and set the variable for the worker, in the work pool's or deployment's `env`, from a Secret block.
    """
    serialize = flow.serialize_parameters

    def recorded(parameters: dict[str, Any]) -> dict[str, Any]:
        shown: dict[str, Any] = as_recorded(serialize(parameters))
        return shown

    flow.serialize_parameters = recorded  # type: ignore[method-assign]
    return flow
