"""A stage of the check, and its outcome."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

Status = Literal["passed", "failed", "timed out", "modules missing", "skipped", "running"]


@dataclass(frozen=True)
class Limits:
    """Seconds of a stage: it is not started with less than `least_s`, and ended after `most_s`."""

    least_s: float
    most_s: float


@dataclass(frozen=True)
class Stage:
    """A measurement that runs in a process of its own.

    Attributes:
        target: `module:function`, which takes a `Check`.
        modules: what it imports beyond torch; reported together if any is missing.
        on_gpu: its seconds where there is a GPU.
        small: its seconds without one, at small size.
    """

    name: str
    title: str
    target: str
    modules: tuple[str, ...] = ()
    on_gpu: Limits = Limits(20, 60)
    small: Limits = Limits(20, 400)

    def missing(self) -> list[str]:
        """Modules that are not installed."""
        return [name for name in self.modules if find_spec(name) is None]


@dataclass
class Outcome:
    """What became of a stage.

    Attributes:
        figures: what it measured, as far as it came.
        problem: a traceback, the missing modules, or why it was skipped.
    """

    name: str
    title: str
    status: Status
    seconds: float = 0.0
    limit_s: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The outcome as it is written."""
        return asdict(self)
