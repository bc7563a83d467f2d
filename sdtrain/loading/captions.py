"""Chooses the caption that a sample trains on in a step, a pure function of (seed, step, sample)."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from sdtrain.errors import UserError
from sdtrain.pack.captions import ALT

_ONE = 2.0**-64


class Caption(NamedTuple):
    """One caption of a sample, and where it comes from: `alt`, or the prompt that a network answered."""

    source: str
    text: str


class CaptionMix:
    """Chooses by `data.captions`: shares of sources, or the first of an order; None: always the alt text.

    The choice has random numbers of its own: it changes no noise, no timestep and no dropout, which comes after.
    """

    def __init__(self, wanted: Mapping[str, float | Sequence[str]] | None) -> None:
        wanted = wanted or {}
        order = wanted.get("first")
        self._order = tuple(order) if isinstance(order, Sequence) else ()
        # Sorted, as the order in which a file names them says nothing.
        self._shares = {source: share for source, share in sorted(wanted.items()) if not isinstance(share, Sequence)}

    @property
    def sources(self) -> tuple[str, ...]:
        """Those that the setting names; none if it chooses nothing."""
        return self._order or tuple(self._shares)

    def choose(self, seed: int, step: int, uid: str, own: str, captions: Sequence[Caption]) -> Caption:
        """The caption of sample `uid` in optimizer step `step`; `own` is its alt text, `captions` are all that it has.

        A sample with no caption of the sources that are asked for has `own`.
        """
        texts = {source: [text for from_, text in captions if from_ == source] for source in self.sources}
        texts = {source: found for source, found in texts.items() if found}
        if not texts:
            return Caption(ALT, own)
        first, second = _uniform(seed, step, uid)
        source = next(iter(texts)) if self._order else self._drawn(list(texts), first)
        return Caption(source, texts[source][int(second * len(texts[source]))])

    def _drawn(self, sources: Sequence[str], uniform: float) -> str:
        left = uniform * sum(self._shares[source] for source in sources)
        for source in sources:
            left -= self._shares[source]
            if left < 0:
                return source
        return sources[-1]  # by rounding


def require_sources(mix: CaptionMix, known: Collection[str], name: str) -> None:
    """Raises UserError if no sample of the data `name` has a caption of a source that the mix names."""
    if unknown := [source for source in mix.sources if source not in {ALT, *known}]:
        raise UserError(
            f"data.captions names {', '.join(unknown)}, and no sample in {name} has a caption of it. There are: "
            f"{', '.join(sorted({ALT, *known}))}. (The stage `caption` of a recipe makes others.)"
        )


def _uniform(seed: int, step: int, uid: str) -> tuple[float, float]:
    """Two numbers in [0, 1), apart from those of `sample_noise`."""
    digest = hashlib.blake2b(f"caption {seed} {step} {uid}".encode(), digest_size=16).digest()
    first, second = (int.from_bytes(part, "little") for part in (digest[:8], digest[8:]))
    return min(first * _ONE, 1 - 2**-53), min(second * _ONE, 1 - 2**-53)
