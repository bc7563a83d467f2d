"""Random access to the latents of a dataset, and the check that they are the right ones."""

from __future__ import annotations

import hashlib
import json
import mmap
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from sdtrain.data.dataset import DatasetDir
from sdtrain.errors import UserError

_COLUMNS = ["uid", "caption", "offset", "num_bytes"]
_OPEN_SHARDS = 512

VAE_KEY = "sdtrain.vae_sha256"
"""In the tables' metadata: digest of the VAE that made the shard."""

NORMALISATION = "x / 127.5 - 1"
"""What pixels 0..255 must have gone through before the VAE: forgetting it spoils latents without any error."""


class LatentStore:
    """The latents of one dataset by index, in the order of their shards.

    Attributes:
        info: what the latents were made with (`latents/info.json`).
        digest: sha256 over the shards' tables, which tells one dataset from another.
    """

    def __init__(self, root: Path, resolution: int):
        dataset = DatasetDir(root)
        self._folder = dataset.latents_info.parent
        self.shape = (8, resolution // 8, resolution // 8)
        self.info = _read_info(dataset)
        tables, digest = [], hashlib.sha256()
        self._made_by: list[str] = []
        self._shards = sorted(self._folder.glob("[0-9]*.parquet"))
        for number, path in enumerate(self._shards):
            content = path.read_bytes()
            digest.update(content)
            table = pq.read_table(pa.BufferReader(content), columns=_COLUMNS)
            self._made_by.append((table.schema.metadata or {}).get(VAE_KEY.encode(), b"").decode())
            tables.append(table.append_column("shard", pa.array(np.full(len(table), number, np.int32))))
        if sum(map(len, tables)) == 0:
            raise _no_latents(root)
        self._rows = pa.concat_tables(tables).combine_chunks()
        self.digest = digest.hexdigest()
        self._open = lru_cache(maxsize=_OPEN_SHARDS)(self._map_shard)

    def __len__(self) -> int:
        return len(self._rows)

    def check_shards(self) -> None:
        """Refuses a mixture: shards of another VAE, left over from a build that was killed while it encoded anew.

        Raises:
            UserError: naming the shard.
        """
        for path, made_by in zip(self._shards, self._made_by, strict=True):
            if made_by != self.info.get("vae_sha256"):
                raise UserError(
                    f"{path.with_suffix('.tar')} was made with another VAE than {self._folder / 'info.json'} says. Run "
                    "the build again to its end: it redoes what is not of the present recipe."
                )

    def uids(self, indices: NDArray[np.int64]) -> list[str]:
        """Identities of samples."""
        return self._rows["uid"].take(pa.array(indices)).to_pylist()

    def captions(self, indices: NDArray[np.int64]) -> list[str]:
        """Captions of samples."""
        return self._rows["caption"].take(pa.array(indices)).to_pylist()

    def get(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Posterior mean and log-variance of samples, unscaled: (B, 8, h, w) float16.

        Raises:
            UserError: a latent of another size, or a shard that is shorter than its table says.
        """
        rows = self._rows.select(["shard", "offset", "num_bytes"]).take(pa.array(indices)).to_pydict()
        moments = np.empty((len(indices), *self.shape), np.float16)
        for i, (shard, offset, num_bytes) in enumerate(
            zip(rows["shard"], rows["offset"], rows["num_bytes"], strict=True)
        ):
            moments[i] = self._read(shard, offset, num_bytes)
        return torch.from_numpy(moments)

    def _read(self, shard: int, offset: int, num_bytes: int) -> NDArray[np.float16]:
        path = self._shards[shard].with_suffix(".tar")
        count = int(np.prod(self.shape))
        if num_bytes != 2 * count:
            raise UserError(
                f"{path} holds a latent of {num_bytes} bytes, but data.resolution {8 * self.shape[1]} needs "
                f"{2 * count}. Set data.resolution to the recipe's encode.resolution."
            )
        mapped = self._open(shard)
        if offset + num_bytes > len(mapped):
            raise UserError(f"{path} is shorter than its table says. Run the build again: it redoes damaged shards.")
        return np.frombuffer(mapped, np.float16, count, offset).reshape(self.shape)

    def _map_shard(self, shard: int) -> mmap.mmap:
        path = self._shards[shard].with_suffix(".tar")
        try:
            with path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}. Run the build again: it redoes lost shards.") from error


def check_cache(info: dict[str, Any], expected: dict[str, Any], where: Path) -> None:
    """Refuses latents that were made with other settings than training assumes.

    Raises:
        UserError: naming every value that differs, both as found and as expected.
    """
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


def require_latents(root: Path) -> None:
    """Says so at once where a dataset has no latents.

    Raises:
        UserError: it has none.
    """
    if not DatasetDir(root).latents_info.exists():
        raise _no_latents(root)


def _read_info(dataset: DatasetDir) -> dict[str, Any]:
    require_latents(dataset.root)
    try:
        info = json.loads(dataset.latents_info.read_text())
    except ValueError as error:
        raise UserError(f"{dataset.latents_info} is damaged: {error}. Run the build again.") from error
    return dict(info)


def _no_latents(root: Path) -> UserError:
    return UserError(f"There are no latents in {root / 'latents'}: run `make demo` first, or pass --data DIR.")
