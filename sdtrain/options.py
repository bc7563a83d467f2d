"""Options declared once, as the fields of a dataclass, for commands and flows alike, and names to choose from.

Bounds are annotations of `annotated_types`, which pydantic understands: every command imports this module, which
therefore does not import pydantic.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import Field, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, get_type_hints

Weights = Literal["ema", "raw"]
SamplerName = Literal["plms", "ddim", "dpm"]
Resize = Literal["pytorch-fid", "torch-fidelity", "clean-fid"]

ResultT = TypeVar("ResultT")
MakeParameter = Callable[["Field[Any]", Any], inspect.Parameter]
"""Makes the parameter of a command or flow from a field and its type."""


def option(default: Any, help_text: str, sets: Sequence[str] = (), sets_if_given: Sequence[str] = ()) -> Any:
    """Declares an option; its default is None if it leaves a setting as it is.

    `help_text` is for the command line and for Prefect's page. `sets` are dotted names of the settings that it
    overrides, `sets_if_given` those that it overrides only where they have a value.
    """
    return field(default=default, metadata={"help": help_text, "sets": sets, "sets_if_given": sets_if_given})


def with_options(
    make_parameter: MakeParameter, with_bounds: bool = True
) -> Callable[[Callable[..., ResultT]], Callable[..., ResultT]]:
    """Replaces a function's dataclass parameters by their fields as keyword parameters, with or without bounds."""

    def decorate(function: Callable[..., ResultT]) -> Callable[..., ResultT]:
        own = inspect.signature(function, eval_str=True)
        groups: dict[str, Any] = {
            name: p.annotation for name, p in own.parameters.items() if is_dataclass(p.annotation)
        }

        @functools.wraps(function)
        def flat(*arguments: Any, **given: Any) -> ResultT:
            for name, options in groups.items():
                known = {f.name: given.pop(f.name) for f in fields(options) if f.name in given}
                given[name] = options(**known)
            return function(*arguments, **given)

        parameters: list[inspect.Parameter] = []
        for name, parameter in own.parameters.items():
            if name in groups:
                hints = get_type_hints(groups[name], include_extras=with_bounds)
                parameters += [make_parameter(f, hints[f.name]) for f in fields(groups[name])]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        flat.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        flat.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": own.return_annotation}
        return flat

    return decorate
