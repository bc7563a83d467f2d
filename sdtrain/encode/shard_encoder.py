"""Encodes the images of a packed shard into the members of its latents' tar, and locates the numbers in them."""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sdtrain.dataset.config import EncodeConfig
from sdtrain.dataset.tars import SampleIndex
from sdtrain.encode.info import sizes_px
from sdtrain.encode.text import shared_text_embedder
from sdtrain.encode.vae import PendingMoments, shared_vae, start_encoding
from sdtrain.errors import UserError
from sdtrain.images.crops import Crop, bucket_of, resize_and_crop, seeded_uniform
from sdtrain.images.decode import decode_rgb, image_extension
from sdtrain.images.prefetch import prefetch
from sdtrain.models.device import cores_of_process
from sdtrain.pack.captions import CAPTIONS

T = TypeVar("T")
Sample = tuple[str, dict[str, bytes]]

_MOMENTS = "moments.npy"
_TEXT = "text.npy"
_DECODED_AHEAD, _STARTED_AHEAD = 2, 1


class ShardEncoder:
    """Encodes one shard of the packed `source`, and collects the data for its table and its check.

    `rows` are the table's, without the latents' offsets; `pixels` the chosen rows' first crops. `with_captions`: the
    samples' JSON holds several captions of each.
    """

    def __init__(self, config: EncodeConfig, source: Path, chosen: Container[int], with_captions: bool) -> None:
        self._config, self.source, self._chosen = config, source, chosen
        self._columns = ("uid", "caption", "url", *((CAPTIONS,) if with_captions else ()))
        self._sizes = sizes_px(config)
        self.vae = shared_vae(config.vae, precision=config.precision)
        self.rows: list[dict[str, Any]] = []
        self.pixels: dict[int, NDArray[np.uint8]] = {}

    def encoded(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yields the latents' tar members in chunks; the next images are decoded while the VAE encodes.

        A GPU has the next chunk before the last one's moments are read, so that neither copies nor writing stop it.
        """
        started: deque[tuple[Any, ...]] = deque()
        with closing(prefetch(self._decoded(samples), _DECODED_AHEAD)) as parts:
            for part, crops in parts:
                started.append((part, crops, self._started(crops)))
                if len(started) > _STARTED_AHEAD:
                    yield from self._finished(*started.popleft())
        for chunk in started:
            yield from self._finished(*chunk)

    def _decoded(self, samples: Iterable[Sample]) -> Iterator[tuple[list[Sample], list[list[Crop]]]]:
        with ThreadPoolExecutor(cores_of_process()) as pool:
            # Batches end with the shard, so that its bytes do not depend on what else is encoded.
            for part in _parts(samples, self._config.batch_size * len(self._sizes)):
                yield part, list(pool.map(self._prepare, part))

    def _prepare(self, sample: Sample) -> list[Crop]:
        key, members = sample
        try:
            image = decode_rgb(members[image_extension(members)])
        except OSError as error:
            raise UserError(
                f"{self.source}: the image of {key} cannot be decoded. Delete it and build again."
            ) from error
        size, number = bucket_of(image.size, self._sizes), self._config.num_crops
        if number == 1 and self._config.crop == "centre":
            return [resize_and_crop(image, size, None)]
        # One in each of `number` equal intervals, so that no two coincide.
        return [
            resize_and_crop(image, size, (crop + seeded_uniform("crop", key, crop)) / number) for crop in range(number)
        ]

    def _texts(self, samples: Sequence[Sample]) -> list[dict[str, bytes]]:
        """The member with each caption's embedding, where the recipe asks for it."""
        if self._config.text_embeddings == "none":
            return [{} for _ in samples]
        embed = shared_text_embedder(self._config.text_encoder, self._config.text_embeddings)
        captions = [json.loads(members["json"])["caption"] or "" for _, members in samples]
        batches = (embed(batch) for batch in _parts(captions, self._config.batch_size))
        return [{_TEXT: _npy(bits)} for batch in batches for bits in batch]

    def _started(self, crops: Sequence[Sequence[Crop]]) -> list[tuple[list[int], PendingMoments]]:
        """Begins to encode all crops of all samples; each batch has one size, and the samples' numbers."""
        started = []
        for size in self._sizes:
            wanted = [(n, crop) for n, own in enumerate(crops) for crop in own if crop.pixels.shape[1::-1] == size]
            for batch in _parts(wanted, self._config.batch_size):
                pixels = np.stack([crop.pixels for _, crop in batch])
                started.append(([number for number, _ in batch], start_encoding(self.vae, pixels)))
        return started

    def _finished(
        self, part: Sequence[Sample], crops: Sequence[Sequence[Crop]], started: list[tuple[list[int], PendingMoments]]
    ) -> Iterator[Sample]:
        found: list[list[NDArray[np.float16]]] = [[] for _ in part]
        for numbers, pending in started:
            for number, array in zip(numbers, pending.wait(), strict=True):
                found[number].append(array)
        for sample, cut_out, moments, text in zip(part, crops, found, self._texts(part), strict=True):
            key, members = self._member(sample, cut_out, moments)
            yield key, members | text

    def _member(self, sample: Sample, crops: Sequence[Crop], moments: Sequence[NDArray[np.float16]]) -> Sample:
        key, members = sample
        array = moments[0] if len(moments) == 1 else np.stack(moments)
        if len(self.rows) in self._chosen:
            self.pixels[len(self.rows)] = crops[0].pixels
        provenance = json.loads(members["json"])
        height, width = array.shape[-2:]
        self.rows.append({name: provenance[name] for name in self._columns} | {"key": key})
        self.rows[-1] |= {"height": height, "width": width, "num_bytes": array.nbytes}
        boxes = {"crop_box": crops[0].box} if len(crops) == 1 else {"crop_boxes": [crop.box for crop in crops]}
        described = provenance | boxes | {"source_px": crops[0].source_px}
        return key, {_MOMENTS: _npy(array), "txt": members["txt"], "json": _json(described)}


def latent_offset(tar: Path, sample: SampleIndex) -> dict[str, int]:
    """The offsets of the raw numbers, after the npy header, whose length is in its bytes 8 and 9."""
    columns = {"offset": _MOMENTS} | ({"text_offset": _TEXT} if _TEXT in sample.members else {})
    with tar.open("rb") as file:
        return {column: _behind_header(file, sample.members[name].offset) for column, name in columns.items()}


def _behind_header(file: IO[bytes], offset: int) -> int:
    file.seek(offset + 8)
    return offset + 10 + int.from_bytes(file.read(2), "little")


def _parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    remaining = iter(items)
    while part := list(islice(remaining, size)):
        yield part


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, sort_keys=True).encode()
