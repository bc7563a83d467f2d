"""Loads the rates and assumptions of plans, each with its source."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml

from sdtrain.errors import UserError
from sdtrain.plan.measured import current_rate, read_measured
from sdtrain.plan.speeds import TFLOP_PER_IMAGE, published_speeds
from sdtrain.settings import Settings, nearest

_FILE = Path(__file__).parent / "rates.yaml"
TO_STATE = {
    "caption_requests": "requests/s",
    "caption_model": "captions/GPU/s",
    "ask_requests": "requests/s",
    **dict.fromkeys(("caption_prompt_tokens", "caption_completion_tokens"), "tokens"),
    **dict.fromkeys(("ask_prompt_tokens", "ask_completion_tokens"), "tokens"),
}
"""Units of the rates of users' own networks and servers: there is no number that would do for all of them."""


class Rate(Settings):
    """One number."""

    value: float
    unit: str
    kind: Literal["measured", "published", "exact", "assumed", "stated"]
    source: str = ""
    """A reference, or the reason for an assumption."""
    section: str = ""
    """If measured: the command, in tests/benchmarks/RESULTS.md."""
    quote: str = ""
    """That file's words."""
    amount: float | None = None
    """If measured: the work done in `seconds` on `cores`."""
    seconds: float | None = None
    cores: float | None = None
    resolution: int | None = None
    """If measured on a GPU: of the images, in px, if the rate is proportional to their pixels."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.source or self.section}"


Rates = dict[str, Rate]


def load_rates(assumed: Iterable[str] = (), gpu: str = "") -> Rates:
    """All rates, with our measurements on `gpu`, overridden by `assumed`, as in "link_rot=0.4".

    UserError for an unknown rate, or one that is not a positive number.
    """
    content: dict[str, Any] = yaml.safe_load(_FILE.read_text())
    rates = {name: Rate.model_validate(rate) for name, rate in content.items()}
    for ours in read_measured().rates:
        if ours.gpu == gpu:
            found = {"value": ours.value, "resolution": ours.resolution, "source": ours.source}
            unit = TO_STATE.get(ours.name) or find_rate(ours.name, rates).unit
            rates[ours.name] = Rate(unit=unit, kind="measured", **found)
    speeds = {stated_speed(known, px): "images/GPU/s" for known in published_speeds() for px in TFLOP_PER_IMAGE}
    units = speeds | TO_STATE | {name: rate.unit for name, rate in rates.items()}
    for text in assumed:
        name, _, value = text.partition("=")
        name = current_rate(name)
        if name not in units:
            raise UserError(f"There is no assumption '{name}'.{nearest(name, list(units))}")
        rates[name] = Rate(value=_number(text, value, units[name]), unit=units[name], kind="stated", source="yours")
    return rates


def stated_speed(gpu: str, resolution: int) -> str:
    """The name of a user's own training speed of one GPU, which replaces that of speeds.yaml."""
    return f"train_{gpu}_{resolution}"


def find_rate(name: str, rates: Rates) -> Rate:
    """The rate of that name; UserError, with the nearest name, if there is none."""
    if name not in rates:
        raise UserError(f"There is no assumption '{name}'.{nearest(name, list(rates))}")
    return rates[name]


def _number(text: str, value: str, unit: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    is_fine = 0 <= number <= 1 if unit == "share" else 0 < number < float("inf")
    if not is_fine:
        form = "a share from 0 to 1" if unit == "share" else f"a number above 0, in {unit}"
        raise UserError(f"--assume {text}: write NAME=VALUE, the value being {form}.")
    return number
