"""Reads packed images for training with the VAE in the loop."""

from __future__ import annotations

import json
import os
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from sdtrain.dataset.files import read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.lock import lock_to_read
from sdtrain.dataset.sync import fetch_shard_file
from sdtrain.dataset.tars import members_in, padded
from sdtrain.errors import UserError
from sdtrain.images.crops import resize_and_crop, seeded_uniform
from sdtrain.images.decode import decode_rgb, image_extension
from sdtrain.loading.captions import Caption
from sdtrain.loading.crops import Crop
from sdtrain.loading.sample_store import Fetched, SampleStore
from sdtrain.loading.shard_catalog import Catalogue
from sdtrain.pack.captions import CAPTIONS

_COLUMNS = ["uid", "key", "picture_offset", "picture_bytes"]
_OPEN_SHARDS = 256


class ImageStore(SampleStore):
    """The images of one packed dataset (with `dataset/`), as crops of `resolution` pixels, another in each epoch.

    Shards' tables are read when first needed: with a global shuffle over very many shards, one for nearly every sample;
    not with `data.shuffle: blocks`. `encoder` turns (B, 3, H, W) uint8 pixels into moments, for `get`.
    `reads_captions` reads all captions of each sample.
    """

    def __init__(self, root: Path, resolution: int, encoder: OnlineVae, reads_captions: bool = False):
        dataset = DatasetDir(root)
        self._folder, self._resolution, self.encoder = dataset.packed_table(0).parent, resolution, encoder
        self._lock = lock_to_read(dataset, "training")
        self.sizes = [(resolution // 8, resolution // 8)]
        self._catalogue = Catalogue(self._folder, self.sizes)
        self.digest, self.shards = self._catalogue.digest, self._catalogue.shards
        self.sources = self._catalogue.sources()
        self._reads_captions = reads_captions and bool(self.sources)
        self.counts = self._catalogue.counts().reshape(-1, 1)
        if self.counts.sum() == 0:
            raise no_images(self._folder)
        self._ends = np.cumsum(self.counts[:, 0])
        self._table = lru_cache(maxsize=_OPEN_SHARDS)(self._read_table)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def size_number(self, index: int) -> int:
        """All images have one size."""
        return 0

    def buffer(self, num_samples: int, size: int) -> NDArray[np.uint8]:
        """A buffer for pixels, (B, 3, H, W)."""
        return np.empty((num_samples, 3, self._resolution, self._resolution), np.uint8)

    def fetch(
        self, indices: NDArray[np.int64], epochs: NDArray[np.int64], seed: int, rows: NDArray[Any] | None = None
    ) -> Fetched:
        """Reads samples; the crop is drawn from (seed, sample, epoch)."""
        fetched = Fetched.blank(len(indices))
        for position, index in enumerate(indices.tolist()):
            try:
                uid, members = self._members(index)
                fetched.uids[position], fetched.captions[position] = uid, members["txt"].decode()
                if self._reads_captions:
                    captions = json.loads(members["json"])[CAPTIONS]
                    fetched.choices[position] = [Caption(each["source"], each["text"]) for each in captions]
                if rows is not None:
                    image = decode_rgb(members[image_extension(members)])
                    place = seeded_uniform("crop", seed, uid, int(epochs[position]))
                    crop = resize_and_crop(image, (self._resolution,) * 2, place)
                    rows[position] = crop.pixels.transpose(2, 0, 1)
            except (UserError, OSError, KeyError, ValueError, tarfile.TarError, pa.ArrowException) as error:
                shard = int(np.searchsorted(self._ends, index, side="right"))
                fetched.damaged[position] = (
                    f"{self._tar(shard)}: sample {index} cannot be read: {error}. Delete the file and run the build "
                    "again: it redoes lost shards."
                )
        return fetched

    def crop(self, index: int, epoch: int, seed: int) -> Crop | None:
        """The crop of a sample in one of its epochs, in pixels of the packed image."""
        uid, members = self._members(index)
        image = decode_rgb(members[image_extension(members)])
        cut = resize_and_crop(image, (self._resolution,) * 2, seeded_uniform("crop", seed, uid, epoch))
        return Crop(tuple(cut.box), tuple(cut.source_px))

    def get(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Posterior moments of samples, cropped as in the first epoch of seed 0: (B, 8, h, w) float16."""
        pixels = self.buffer(len(indices), 0)
        self.fetch(indices, np.zeros_like(indices), 0, pixels).require_whole()
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        return self.encoder(torch.from_numpy(pixels).to(device)).cpu()

    def _members(self, index: int) -> tuple[str, dict[str, bytes]]:
        """A sample's uid and its members, which lie between the preceding image and the next one."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[shard] - self.counts[shard, 0])
        table = self._table(shard)
        offsets, sizes = table["picture_offset"], table["picture_bytes"]
        begin = padded(offsets[row - 1].as_py() + sizes[row - 1].as_py()) if row else 0
        tar = self._tar(shard)
        fetch_shard_file(self._folder.parent, tar, "pack")
        with tar.open("rb", buffering=0) as file:
            last = row + 1 == len(table)
            end = os.fstat(file.fileno()).st_size if last else offsets[row + 1].as_py() - 512
            content = os.pread(file.fileno(), end - begin, begin)
        return table["uid"][row].as_py(), _members_of(table["key"][row].as_py(), content)

    def _read_table(self, shard: int) -> pa.Table:
        return read_parquet(self._folder / self._catalogue.shards[shard].table, _COLUMNS).combine_chunks()

    def _tar(self, shard: int) -> Path:
        return (self._folder / self._catalogue.shards[shard].table).with_suffix(".tar")


class OnlineVae:
    """A lazily loaded VAE that encodes on its input's device."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Moments of (B, 3, H, W) uint8 images: (B, 8, h, w) float16, unscaled as in the cache."""
        from sdtrain.encode.vae import posterior_moments, shared_vae

        return posterior_moments(shared_vae(self._name, pixels.device), pixels).half()


def no_images(folder: Path) -> UserError:
    """The error for a dataset that has not been packed."""
    return UserError(f"There are no packed images in {folder}: build the dataset as far as `pack` first.")


def _members_of(key: str, content: bytes) -> dict[str, bytes]:
    """The members of one sample in a piece of a tar that begins with a header."""
    return {extension: body for name, extension, body in members_in(content) if name == key}
