"""Reports a user's mistake as the message of a failed state, without a traceback."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

from prefect.logging import get_run_logger
from prefect.states import Failed

from sdtrain.errors import UserError
from sdtrain.redaction import safe_error

ParamsT = ParamSpec("ParamsT")


def report_user_errors(function: Callable[ParamsT, Any]) -> Callable[ParamsT, Any]:
    """Ends a flow as Failed with its UserError's message; redacts every error. Goes below `@flow`."""

    @functools.wraps(function)
    def wrapped(*arguments: ParamsT.args, **named: ParamsT.kwargs) -> Any:
        try:
            return function(*arguments, **named)
        except UserError as error:
            get_run_logger().error("%s", error)
            return Failed(message=str(error), data=UserError(str(error)))  # a new one: Prefect prints its traceback
        except Exception as error:
            raise safe_error(error)  # noqa: B904  # with its cause, unless that holds a secret

    return wrapped
