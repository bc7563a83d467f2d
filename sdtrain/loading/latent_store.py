"""Reads a dataset's latents at random, and checks that they fit the run."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdtrain.dataset.files import sha256_of
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.lock import lock_to_read
from sdtrain.dataset.manifest import read_entry
from sdtrain.dataset.sync import fetch_shard_file
from sdtrain.dataset.tars import BLOCK_BYTES, padded
from sdtrain.encode.info import no_latents, require_latents
from sdtrain.errors import UserError
from sdtrain.loading.crops import Crop, crop_number, recorded_crops
from sdtrain.loading.sample_store import Fetched, SampleStore
from sdtrain.loading.shard_catalog import Catalogue, ShardIndex, read_index, whole_tables_digest

# Tars open, and indexes mapped, at once. Many systems allow a process 1024 open files.
OPEN_SHARDS = 256
# Up to here indexes stay in memory and nothing is written beside the tables.
_SMALL = 1_000_000
_SMALL_WITH_CAPTIONS = 100_000  # which take about 1 kB a sample
_EXPONENT = np.uint16(0x7C00)


class LatentStore(SampleStore):
    """The latents of one dataset, for training on images of `resolution` pixels a side.

    Opening reads only the tables' footers; a shard's rows are read when first needed, and at most `open_shards` are
    open at once. So start-up and memory depend on the number of shards, not of samples. `verify` compares each tar with
    its digest in the manifest before reading from it. `reads_texts` reads cached text embeddings too,
    and `reads_captions` all captions of each sample.

    Attributes:
        info: how the latents were made (`latents/info.json`).
        digest: identifies the dataset (`Catalogue.digest`).
        sizes: height and width of the latents; several with aspect-ratio buckets. Samples are numbered by size, and
            within a size in shard order.
        num_crops: crops of each image.
    """

    def __init__(
        self,
        root: Path,
        resolution: int,
        verify: bool = False,
        open_shards: int = OPEN_SHARDS,
        reads_texts: bool = False,
        reads_captions: bool = False,
    ):
        self._dataset, self._verify, self._reads_texts = DatasetDir(root), verify, reads_texts
        self._folder = self._dataset.latents_info.parent
        self.info = _read_info(self._dataset)
        # Held as long as this lives, because shards are opened when needed.
        self._lock = lock_to_read(self._dataset, "training")
        pixels = self.info.get("buckets") or [(resolution, resolution)]
        self.sizes = [(height // 8, width // 8) for width, height in pixels]
        self.num_crops = int(self.info.get("num_crops", 1))
        stored = self.info.get("text_embeddings") if reads_texts else None
        self.text_dtype = stored and stored["dtype"]
        self._catalogue = Catalogue(self._folder, self.sizes)
        self.digest, self.shards = self._catalogue.digest, self._catalogue.shards
        self.counts = self._catalogue.counts()
        self.sources = self._catalogue.sources()
        self._reads_captions = reads_captions
        if self.counts.sum() == 0:
            raise no_latents(root)
        self._ends = np.cumsum(self.counts, axis=0)
        self._size_ends = np.cumsum(self._ends[-1])
        self._index = lru_cache(maxsize=open_shards)(self._read_index)
        self._tar = lru_cache(maxsize=open_shards)(self._open_tar)

    def __len__(self) -> int:
        return int(self._size_ends[-1])

    def has_digest(self, digest: str) -> bool:
        """Whether a checkpoint's digest is this dataset's, by the current rule or the older one."""
        return digest == self.digest or digest == whole_tables_digest(self._folder)

    def check_shards(self) -> None:
        """Refuses mixed shards of two VAEs, left by a build killed while re-encoding; UserError names the shard."""
        for shard in self._catalogue.shards:
            if shard.made_by != self.info.get("vae_sha256"):
                raise UserError(
                    f"{(self._folder / shard.table).with_suffix('.tar')} was made with another VAE than "
                    f"{self._folder / 'info.json'} says. Run the build again to its end: it redoes what is not of the "
                    "present recipe."
                )
            if self._reads_texts and shard.text_by != self.info["text_embeddings"]["sha256"]:
                raise UserError(
                    f"{(self._folder / shard.table).with_suffix('.tar')} has text embeddings of another encoder than "
                    f"{self._folder / 'info.json'} says, or none. Run the build again to its end."
                )

    def size_number(self, index: int) -> int:
        """The index of a sample's size."""
        return int(np.searchsorted(self._size_ends, index, side="right"))

    def buffer(self, num_samples: int, size: int) -> NDArray[np.float16]:
        """A buffer for posterior mean and log-variance, (B, 8, h, w)."""
        return np.empty((num_samples, 8, *self.sizes[size]), np.float16)

    def fetch(
        self, indices: NDArray[np.int64], epochs: NDArray[np.int64], seed: int, rows: NDArray[Any] | None = None
    ) -> Fetched:
        """Reads samples; each epoch takes the next of an image's crops, from a random first one."""
        fetched = Fetched.blank(len(indices))
        for position, index in enumerate(indices.tolist()):
            try:
                shard, row = self._locate(index)
                described = self._index(shard)
                fetched.uids[position], fetched.captions[position] = described.uid(row), described.caption(row)
                if self._reads_captions and self._catalogue.shards[shard].sources:
                    fetched.choices[position] = described.captions(row)
                if rows is not None:
                    crop = crop_number(seed, fetched.uids[position], int(epochs[position]), self.num_crops)
                    self._read(shard, described, row, crop, rows[position])
                    if self._reads_texts:
                        fetched.texts[position] = self._read_text(shard, described, row)
            except UserError as error:
                fetched.damaged[position] = str(error)
        return fetched

    def crop(self, index: int, epoch: int, seed: int) -> Crop | None:
        """The crop of a sample in one of its epochs, as its shard records it beside the latent."""
        shard, row = self._locate(index)
        described = self._index(shard)
        begin = padded(sum(described.extent(row - 1))) if row else 0
        # The latent's numbers begin in the block of the array's header, and before that is the member's own.
        end = described.extent(row)[0] // BLOCK_BYTES * BLOCK_BYTES - BLOCK_BYTES
        content = os.pread(self._tar(shard).fileno(), max(0, end - begin), begin)
        crops = recorded_crops(content)
        return crops[crop_number(seed, described.uid(row), epoch, self.num_crops)] if crops else None

    def get(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Posterior mean and log-variance of samples of one size, unscaled, first crops: (B, 8, h, w) float16.

        UserError if a latent is damaged, missing or of another size.
        """
        moments = self.buffer(len(indices), self.size_number(int(indices[0])))
        self.fetch(indices, np.zeros_like(indices), 0, moments).require_whole()
        return torch.from_numpy(moments)

    def _locate(self, index: int) -> tuple[int, int]:
        """A sample's shard, and its row there."""
        size = self.size_number(index)
        index -= int(self._size_ends[size - 1]) if size else 0
        shard = int(np.searchsorted(self._ends[:, size], index, side="right"))
        rank = index - int(self._ends[shard, size] - self.counts[shard, size])
        if len(self.sizes) == 1:
            return shard, rank
        return shard, int(self._index(shard).rows_of(self.sizes[size])[rank])

    def _read(self, shard: int, index: ShardIndex, row: int, crop: int, out: NDArray[np.float16]) -> None:
        file, (offset, num_bytes) = self._tar(shard), index.extent(row)
        if num_bytes != self.num_crops * out.nbytes:
            raise UserError(
                f"{file.name} holds a latent of {num_bytes} bytes, but data.resolution {8 * out.shape[1]} needs "
                f"{self.num_crops * out.nbytes}. Set data.resolution to the recipe's encode.resolution."
            )
        if os.preadv(file.fileno(), [out.data], offset + crop * out.nbytes) < out.nbytes:
            raise UserError(
                f"{file.name} is shorter than its table says. Run the build again: it redoes damaged shards."
            )
        # Infinities and NaNs have all exponent bits set.
        if int((out.view(np.uint16) & _EXPONENT).max()) == _EXPONENT:
            raise UserError(
                f"{file.name}: the latent of {index.uid(row)} is not finite. Delete the file and run the build again: "
                "it redoes lost shards."
            )

    def _read_text(self, shard: int, index: ShardIndex, row: int) -> NDArray[np.uint16]:
        """The bits of a caption's embedding."""
        file, bits = self._tar(shard), np.empty(self.info["text_embeddings"]["shape"], np.uint16)
        if os.preadv(file.fileno(), [bits.data], index.text_offset(row)) < bits.nbytes:
            raise UserError(
                f"{file.name} is shorter than its table says. Run the build again: it redoes damaged shards."
            )
        return bits

    def _read_index(self, shard: int) -> ShardIndex:
        described = self._catalogue.shards[shard]
        table = self._folder / described.table
        with_captions = self._reads_captions and bool(described.sources)
        keep = len(self) > (_SMALL_WITH_CAPTIONS if with_captions else _SMALL)
        index = read_index(table, described.digest, keep, with_captions)
        if len(index) != sum(described.samples):
            raise UserError(f"{table} changed while it is in use. Start the training again.")
        return index

    def _open_tar(self, shard: int) -> IO[bytes]:
        path = (self._folder / self._catalogue.shards[shard].table).with_suffix(".tar")
        fetch_shard_file(self._dataset.root, path, "encode")
        try:
            if self._verify:
                self._check_digest(path)
            return path.open("rb", buffering=0)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}. Run the build again: it redoes lost shards.") from error

    def _check_digest(self, path: Path) -> None:
        entry = read_entry(self._dataset, "encode", int(path.stem))
        stated = entry.outputs.get(self._dataset.relative(path)) if entry else None
        if stated is None:
            raise UserError(f"{path} has no digest in the manifest that data.verify could compare it with.")
        if sha256_of(path) != stated.sha256:
            raise UserError(
                f"{path} is not what was written: its sha256 differs from the manifest's. Delete it and run the build "
                "again: it redoes lost shards."
            )


def check_cache(info: dict[str, Any], expected: dict[str, Any], where: Path) -> None:
    """Refuses latents made with other settings than training assumes; UserError shows each, found and expected."""
    wrong = [
        f"{key} is {info.get(key)!r} there and {value!r} here"
        for key, value in expected.items()
        if info.get(key) != value
    ]
    if wrong:
        raise UserError(
            f"The latents in {where} do not fit this training: {'; '.join(wrong)}. Encode them again with the VAE and "
            "resolution of the config, or train with theirs."
        )


def _read_info(dataset: DatasetDir) -> dict[str, Any]:
    require_latents(dataset.root)
    try:
        info = json.loads(dataset.latents_info.read_text())
    except ValueError as error:
        raise UserError(f"{dataset.latents_info} is damaged: {error}. Run the build again.") from error
    return dict(info)
