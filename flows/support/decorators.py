"""Decorates flows: parameters from declared options, recorded without secrets; users' mistakes told as messages."""

import dataclasses
import functools
from collections.abc import Callable
from inspect import Parameter
from typing import Any, ParamSpec, TypeVar

from prefect import Flow
from prefect.logging import get_run_logger
from prefect.states import Failed
from pydantic import Field

from sdtrain.errors import UserError, user_error_of
from sdtrain.redaction import as_recorded, safe_error

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


def report_user_errors(function: Callable[ParamsT, Any]) -> Callable[ParamsT, Any]:
    """Ends a flow as Failed with its UserError's message; redacts every error. Goes below `@flow`."""

    @functools.wraps(function)
    def wrapped(*arguments: ParamsT.args, **named: ParamsT.kwargs) -> Any:
        try:
            return function(*arguments, **named)
        except Exception as error:
            problem = user_error_of(error)
            if problem is None:
                raise safe_error(error)  # noqa: B904  # with its cause, unless that holds a secret
            get_run_logger().error("%s", problem)
            return Failed(message=str(problem), data=UserError(str(problem)))  # a new one: Prefect prints its traceback

    return wrapped
