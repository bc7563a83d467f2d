"""Defines the loader's interface to a dataset of latents or images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sdtrain.errors import UserError
from sdtrain.loading.captions import Caption
from sdtrain.loading.crops import Crop
from sdtrain.loading.shard_catalog import Shard


@dataclass(frozen=True)
class Fetched:
    """Some samples, read or damaged.

    `damaged` has, by position, a sentence for each unreadable sample, whose other fields are meaningless.
    """

    uids: list[str]
    captions: list[str]
    damaged: dict[int, str]
    texts: dict[int, NDArray[np.uint16]] = field(default_factory=dict)
    """By position, the captions' cached embeddings, (L, width) bits, where the store reads them."""
    choices: dict[int, list[Caption]] = field(default_factory=dict)
    """By position, all captions of the sample, its alt text included, where the store reads them."""

    @staticmethod
    def blank(num_samples: int) -> Fetched:
        """An empty result for samples still to be fetched."""
        return Fetched([""] * num_samples, [""] * num_samples, {})

    def put(self, positions: Sequence[int], other: Fetched) -> None:
        """Replaces the samples at some positions, in order."""
        for number, position in enumerate(positions):
            self.uids[position], self.captions[position] = other.uids[number], other.captions[number]
            self.damaged.pop(position, None)
            if number in other.texts:
                self.texts[position] = other.texts[number]
            if number in other.choices:
                self.choices[position] = other.choices[number]
            if number in other.damaged:
                self.damaged[position] = other.damaged[number]

    def require_whole(self) -> None:
        """Raises the first damage as a UserError."""
        for sentence in self.damaged.values():
            raise UserError(sentence)


class SampleStore(ABC):
    """Samples, numbered size by size.

    Attributes:
        sizes: height and width of the latents.
        counts: samples of each size in each shard, (shards, sizes).
        digest: identifies the dataset.
        shards: the dataset's, in order; none for several datasets as one.
        text_dtype: of the cached text embeddings that `fetch` reads; None if it reads none.
        sources: of the samples' captions; none if they have only alt texts.
    """

    sizes: Sequence[tuple[int, int]]
    counts: NDArray[np.int64]
    digest: str
    shards: Sequence[Shard] = ()
    text_dtype: Literal["fp16", "bf16"] | None = None
    sources: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    def has_digest(self, digest: str) -> bool:
        """Whether a checkpoint's digest is this dataset's."""
        return digest == self.digest

    @abstractmethod
    def size_number(self, index: int) -> int:
        """The index of a sample's size."""

    @abstractmethod
    def buffer(self, num_samples: int, size: int) -> NDArray[Any]:
        """A buffer for `fetch` of samples of one size."""

    @abstractmethod
    def fetch(
        self, indices: NDArray[np.int64], epochs: NDArray[np.int64], seed: int, rows: NDArray[Any] | None = None
    ) -> Fetched:
        """Reads samples by their numbers, `indices` (B,).

        `epochs` (B,), how often each was seen before, with the seed determines its crop. `rows` is part of a `buffer`
        that takes the latents or images; None for captions and uids alone.
        """

    @abstractmethod
    def get(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Posterior mean and log-variance of samples of one size, unscaled: (B, 8, h, w) float16.

        UserError if one cannot be read.
        """

    @abstractmethod
    def crop(self, index: int, epoch: int, seed: int) -> Crop | None:
        """The crop of a sample in one of its epochs; None where the dataset does not record it."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the last samples' moments: (8, h, w)."""
        return (8, *self.sizes[-1])

    def uids(self, indices: NDArray[np.int64]) -> list[str]:
        """The samples' uids."""
        return self._described(indices).uids

    def captions(self, indices: NDArray[np.int64]) -> list[str]:
        """The samples' captions."""
        return self._described(indices).captions

    def _described(self, indices: NDArray[np.int64]) -> Fetched:
        fetched = self.fetch(indices, np.zeros_like(indices), 0)
        fetched.require_whole()
        return fetched
