"""User errors become the message of a failed state, not a traceback in the log."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

from prefect.logging import get_run_logger
from prefect.states import Failed

from sdtrain.errors import UserError
from sdtrain.redaction import safe_error

ParamsT = ParamSpec("ParamsT")


def fails_with_a_sentence(function: Callable[ParamsT, Any]) -> Callable[ParamsT, Any]:
    """Lets a flow end as Failed with the sentence of a UserError, and never with a secret. Goes below `@flow`."""

    @functools.wraps(function)
    def wrapped(*arguments: ParamsT.args, **named: ParamsT.kwargs) -> Any:
        try:
            return function(*arguments, **named)
        except UserError as error:
            get_run_logger().error("%s", error)
            return Failed(message=str(error), data=UserError(str(error)))  # anew: Prefect prints its traceback
        except Exception as error:
            raise safe_error(error)  # noqa: B904  # with its cause, unless that holds a secret

    return wrapped
