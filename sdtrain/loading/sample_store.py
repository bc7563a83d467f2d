"""The interface through which the loader reads a dataset of latents or images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdtrain.errors import UserError


@dataclass(frozen=True)
class Fetched:
    """Some samples.

    Attributes:
        uids: identities.
        captions: captions.
        damaged: what is wrong with those that could not be read, as a sentence by position; their other fields say
            nothing.
    """

    uids: list[str]
    captions: list[str]
    damaged: dict[int, str]

    @staticmethod
    def blank(num_samples: int) -> Fetched:
        """Room for samples that are still to be fetched."""
        return Fetched([""] * num_samples, [""] * num_samples, {})

    def put(self, positions: Sequence[int], other: Fetched) -> None:
        """Replaces the samples at some positions by others, in order."""
        for number, position in enumerate(positions):
            self.uids[position], self.captions[position] = other.uids[number], other.captions[number]
            self.damaged.pop(position, None)
            if number in other.damaged:
                self.damaged[position] = other.damaged[number]

    def require_whole(self) -> None:
        """Makes an error of the first damage.

        Raises:
            UserError: a sample could not be read.
        """
        for sentence in self.damaged.values():
            raise UserError(sentence)


class SampleStore(ABC):
    """Samples by number.

    Attributes:
        sizes: height and width of the latents; samples are numbered size by size.
        counts: samples of each size in each shard, (shards, sizes).
        digest: tells one dataset from another.
    """

    sizes: Sequence[tuple[int, int]]
    counts: NDArray[np.int64]
    digest: str

    @abstractmethod
    def __len__(self) -> int: ...

    def has_digest(self, digest: str) -> bool:
        """Whether a checkpoint's digest is this dataset's."""
        return digest == self.digest

    @abstractmethod
    def size_number(self, index: int) -> int:
        """Which of the sizes a sample has."""

    @abstractmethod
    def buffer(self, num_samples: int, size: int) -> NDArray[Any]:
        """Room for what `fetch` reads of samples of one size."""

    @abstractmethod
    def fetch(
        self, indices: NDArray[np.int64], epochs: NDArray[np.int64], seed: int, rows: NDArray[Any] | None = None
    ) -> Fetched:
        """Reads samples.

        Args:
            indices: (B,), their numbers.
            epochs: (B,), how often each was seen before, which with the seed decides its crop.
            seed: of the run.
            rows: part of a `buffer` that takes the latents or images; None for captions and identities alone.
        """

    @abstractmethod
    def get(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Posterior mean and log-variance of samples of one size, unscaled: (B, 8, h, w) float16.

        Raises:
            UserError: one cannot be read.
        """

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the last samples' moments: (8, h, w)."""
        return (8, *self.sizes[-1])

    def uids(self, indices: NDArray[np.int64]) -> list[str]:
        """Identities of samples."""
        return self._described(indices).uids

    def captions(self, indices: NDArray[np.int64]) -> list[str]:
        """Captions of samples."""
        return self._described(indices).captions

    def _described(self, indices: NDArray[np.int64]) -> Fetched:
        fetched = self.fetch(indices, np.zeros_like(indices), 0)
        fetched.require_whole()
        return fetched
