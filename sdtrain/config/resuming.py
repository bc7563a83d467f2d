"""Marks in a setting's declaration whether a resumed run may change it, as in `lr: Tunable[float] = 1e-4`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

ValueT = TypeVar("ValueT")


class OnResume(Enum):
    """Effect of a changed setting on a run; the text completes "it decides ..."."""

    SAMPLES = "which samples, captions and noise a step sees"
    NETWORK = "which network is trained, or what it is trained on"
    OBJECTIVE = "what the network learns to predict"
    TUNES = "how the weights are learned from the same samples"
    ON_REQUEST = "in what precision they are learned"
    FREE = "nothing that makes two runs different"

    @property
    def is_fixed(self) -> bool:
        """Whether a resumed run keeps its old value."""
        return self in (OnResume.SAMPLES, OnResume.NETWORK, OnResume.OBJECTIVE)


DecidesSamples = Annotated[ValueT, OnResume.SAMPLES]
"""Fixed: otherwise a step would no longer be the same function of seed, step and sample."""
DecidesNetwork = Annotated[ValueT, OnResume.NETWORK]
"""Fixed: the checkpoint's weights belong to this value."""
DecidesObjective = Annotated[ValueT, OnResume.OBJECTIVE]
"""Fixed: the weights learned so far predict this."""
Tunable = Annotated[ValueT, OnResume.TUNES]
"""May change, but distinguishes runs and their digests."""
TunableOnRequest = Annotated[ValueT, OnResume.ON_REQUEST]
"""As Tunable, but only if the config names it: never because a default or a machine differs."""
Free = Annotated[ValueT, OnResume.FREE]
"""May change; does not distinguish runs."""

_ADDED = "added"
Added = Annotated[ValueT, _ADDED]
"""For a new setting, as in Added[Tunable[float]]: left out of digests at its default, so that old digests stay
valid."""


def rules_of(model: type[BaseModel], prefix: str = "") -> dict[str, OnResume]:
    """The mark of each setting of `model`, by dotted name; TypeError if a setting has none."""
    rules: dict[str, OnResume] = {}
    for name, field in model.model_fields.items():
        said = [mark for mark in field.metadata if isinstance(mark, OnResume)]
        kind = field.annotation
        if said:
            rules[prefix + name] = said[0]
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            rules |= rules_of(kind, f"{prefix}{name}.")
        else:
            raise TypeError(
                f"{model.__name__}.{name} does not say what may become of it when a run goes on: declare it as "
                "Free[...], Tunable[...] or one of the others in sdtrain/config/resuming.py"
            )
    return rules


def defaults_of_added(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """The JSON default of each setting marked Added, by dotted name."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if _ADDED in field.metadata:
            found[prefix + name] = to_jsonable_python(field.default)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= defaults_of_added(field.annotation, f"{prefix}{name}.")
    return found


def changeable(rules: Mapping[str, OnResume]) -> list[str]:
    """The settings that may change; a section stands for its settings if all may."""
    fixed = {part for name, rule in rules.items() if rule.is_fixed for part in (name, name.split(".")[0])}
    names = [name.split(".")[0] if name.split(".")[0] not in fixed else name for name in rules if name not in fixed]
    asked = {name for name, rule in rules.items() if rule is OnResume.ON_REQUEST}
    return [f"{name} (if the config names it)" if name in asked else name for name in dict.fromkeys(names)]


def flat(content: Mapping[str, Any], settings: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted name; those of `settings` whole, even where their value is a mapping."""
    for key, value in content.items():
        if isinstance(value, dict) and prefix + key not in settings:
            yield from flat(value, settings, f"{prefix}{key}.")
        else:
            yield prefix + key, value
