"""Builds flow parameters from declared options and records them without secrets."""

import dataclasses
from inspect import Parameter
from typing import Any, ParamSpec, TypeVar

from prefect import Flow
from pydantic import Field

from sdtrain.redaction import as_recorded

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")


def flow_parameter(field: "dataclasses.Field[Any]", hint: Any) -> Parameter:
    """A flow parameter for a field of `sdtrain.options`, whose help becomes Prefect's description."""
    default = Field(default=field.default, description=field.metadata["help"])
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def records_no_secrets(flow: Flow[ParamsT, ResultT]) -> Flow[ParamsT, ResultT]:
    """Keeps queries and passwords of URLs out of the parameters that Prefect records. Goes above `@flow`.

    A flow called in Python gets them whole. A server would have to store them for a deployment, so
    `sdtrain.settings.Location` refuses them there: write `${NAME}` and set the variable for the worker, in the work
    pool's or deployment's `env`, from a Secret block.
    """
    serialize = flow.serialize_parameters

    def recorded(parameters: dict[str, Any]) -> dict[str, Any]:
        shown: dict[str, Any] = as_recorded(serialize(parameters))
        return shown

    flow.serialize_parameters = recorded  # type: ignore[method-assign]
    return flow
