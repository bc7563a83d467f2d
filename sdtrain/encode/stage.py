"""The stage ENCODE: packed images -> the VAE's posterior moments, with captions and provenance."""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sdtrain.dataset.config import EncodeConfig, ImageRecipe
from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir, delete_index
from sdtrain.dataset.manifest import describe_outputs, require_entry
from sdtrain.dataset.rewriting import Removed, Rewriting, count_rows, drop_members
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import Needs, Openers, Stage, Table, no_openers
from sdtrain.dataset.sync import fetch_shard_file
from sdtrain.dataset.tars import SampleIndex, read_samples, write_samples
from sdtrain.dataset.work import WORK
from sdtrain.encode.check import DecodeQuality, chosen_rows, measure, require_good
from sdtrain.encode.info import (
    CHECK_KEY,
    ROWS_KEY,
    SIZES_KEY,
    TEXT_KEY,
    VAE_KEY,
    describe_rows,
    sizes_px,
    vae_digest_in,
    write_info,
)
from sdtrain.encode.text import check_text_embedder, shared_text_embedder
from sdtrain.encode.vae import PendingMoments, check_vae, shared_vae, start_encoding
from sdtrain.errors import UserError
from sdtrain.formats.digests import compute_vae_digest
from sdtrain.images.crops import Crop, bucket_of, resize_and_crop, seeded_uniform
from sdtrain.images.decode import decode_rgb, image_extension
from sdtrain.images.prefetch import prefetch
from sdtrain.models.device import cores_of_process
from sdtrain.pack.plan import expected_shards
from sdtrain.pack.stage import PACK

T = TypeVar("T")
Sample = tuple[str, dict[str, bytes]]

_MOMENTS = "moments.npy"
_TEXT = "text.npy"
_DECODED_AHEAD, _STARTED_AHEAD = 2, 1
_DECIDE_BYTES = {"text_embeddings", "precision", "crop", "num_crops", "buckets", "bucket_step_px", "bucket_max_aspect"}
_TABLE = pa.schema(
    [
        *((name, pa.string()) for name in ("uid", "key", "caption", "url")),
        ("offset", pa.int64()),
        ("num_bytes", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)


def encode_shard(dataset: DatasetDir, config: EncodeConfig, shard: int) -> ShardReport:
    """Writes and checks the latents of one packed shard.

    UserError if the packed shard or the VAE cannot be read, or the latents do not reproduce their images.
    """
    source = dataset.packed_tar(shard)
    entry = require_entry(dataset, "pack", shard)
    fetch_shard_file(dataset.root, source, "pack")
    encoder = _ShardEncoder(config, source, chosen_rows(entry.num_out, config, shard))
    with publish(dataset.latents_tar(shard)) as temporary:
        index = write_samples(temporary, encoder.encoded(read_samples(source)))
        placed = [row | latent_offset(temporary, sample) for row, sample in zip(encoder.rows, index, strict=True)]
        quality = _checked(temporary, placed, encoder, config)
    table = pa.Table.from_pylist(placed, _schema(config).with_metadata(_described(dataset, placed, config, quality)))
    with publish(dataset.latents_table(shard)) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    delete_index(dataset.latents_table(shard))
    write_info(dataset, config, shard)
    outputs = describe_outputs(dataset, [dataset.latents_tar(shard), dataset.latents_table(shard)])
    return ShardReport(stage="encode", shard=shard, num_in=len(placed), num_out=len(table), outputs=outputs)


def _schema(config: EncodeConfig) -> pa.Schema:
    return _TABLE if config.text_embeddings == "none" else _TABLE.append(pa.field("text_offset", pa.int64()))


class _ShardEncoder:
    """Encodes one shard of the packed `source`, and collects the data for its table and its check.

    `rows` are the table's, without the latents' offsets; `pixels` the chosen rows' first crops.
    """

    def __init__(self, config: EncodeConfig, source: Path, chosen: Container[int]) -> None:
        self._config, self.source, self._chosen = config, source, chosen
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
        self.rows.append({name: provenance[name] for name in ("uid", "caption", "url")} | {"key": key})
        self.rows[-1] |= {"height": height, "width": width, "num_bytes": array.nbytes}
        boxes = {"crop_box": crops[0].box} if len(crops) == 1 else {"crop_boxes": [crop.box for crop in crops]}
        described = provenance | boxes | {"source_px": crops[0].source_px}
        return key, {_MOMENTS: _npy(array), "txt": members["txt"], "json": _json(described)}


def _checked(
    tar: Path, rows: Sequence[dict[str, Any]], encoder: _ShardEncoder, config: EncodeConfig
) -> DecodeQuality | None:
    """Decodes the chosen latents as stored in the file."""
    if not encoder.pixels:
        return None
    moments = []
    with tar.open("rb") as file:
        for row in (rows[number] for number in encoder.pixels):
            file.seek(row["offset"])
            content = file.read(row["num_bytes"] // config.num_crops)
            moments.append(np.frombuffer(content, np.float16).reshape(-1, row["height"], row["width"]))
    quality = measure(encoder.vae, moments, list(encoder.pixels.values()))
    require_good(quality, config, encoder.vae, str(encoder.source))
    return quality


def _described(
    dataset: DatasetDir, rows: Sequence[dict[str, Any]], config: EncodeConfig, quality: DecodeQuality | None
) -> dict[str, str]:
    """The table's own metadata."""
    columns = ([row[name] for row in rows] for name in ("uid", "caption", "offset"))
    described = {VAE_KEY: vae_digest_in(dataset, config.vae), ROWS_KEY: describe_rows(*columns)}
    if digests := _text_digests(config):
        described[TEXT_KEY] = digests[0]
    if len(sizes := sizes_px(config)) > 1:
        sides = [(8 * row["width"], 8 * row["height"]) for row in rows]
        described[SIZES_KEY] = json.dumps([sides.count(size) for size in sizes])
    if quality:
        described[CHECK_KEY] = json.dumps(quality.as_dict())
    return described


def _parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    remaining = iter(items)
    while part := list(islice(remaining, size)):
        yield part


def latent_offset(tar: Path, sample: SampleIndex) -> dict[str, int]:
    """The offsets of the raw numbers, after the npy header, whose length is in its bytes 8 and 9."""
    columns = {"offset": _MOMENTS} | ({"text_offset": _TEXT} if _TEXT in sample.members else {})
    with tar.open("rb") as file:
        return {column: _behind_header(file, sample.members[name].offset) for column, name in columns.items()}


def _behind_header(file: IO[bytes], offset: int) -> int:
    file.seek(offset + 8)
    return offset + 10 + int.from_bytes(file.read(2), "little")


def drop_latents(table: Path, uids: Collection[str]) -> None:
    """Takes samples out of a shard of latents; see `sdtrain.dataset.rewriting`."""
    drop_members(table, uids, latent_offset)
    delete_index(table)


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, sort_keys=True).encode()


def _shards(dataset: DatasetDir, recipe: ImageRecipe) -> list[int]:
    return PACK.shards(dataset, recipe)


def _fingerprint(dataset: DatasetDir, recipe: ImageRecipe, shard: int) -> str:
    # Only set options: those added later must not make finished shards pending.
    config = {"resolution": recipe.encode.resolution, "batch_size": recipe.encode.batch_size}
    config |= recipe.encode.model_dump(mode="json", include=_DECIDE_BYTES, exclude_defaults=True)
    digests = [vae_digest_in(dataset, recipe.encode.vae), *_text_digests(recipe.encode)]
    return fingerprint("encode/1", config, [require_entry(dataset, "pack", shard)], digests)


def _text_digests(config: EncodeConfig) -> list[str]:
    """The digest of the text encoder, where it is used."""
    if config.text_embeddings == "none":
        return []
    from sdtrain.formats.frozen import text_encoder_digest  # late: it brings torch

    return [text_encoder_digest(config.text_encoder)]


def _run(dataset: DatasetDir, recipe: ImageRecipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    compute_vae_digest(recipe.encode.vae)  # from here on, fingerprints are of the loaded VAE, not of the cached digest
    for shard in shards:
        yield encode_shard(dataset, recipe.encode, shard)


def _info(dataset: DatasetDir, shard: int) -> list[Path]:
    return [dataset.latents_info]


def _drop(dataset: DatasetDir, recipe: ImageRecipe, shard: int, removed: Removed) -> None:
    drop_latents(removed.table, removed.uids)


def _networks(recipe: ImageRecipe) -> Openers:
    encode = recipe.encode
    openers: Openers = {"encode.vae": partial(check_vae, encode.vae)}
    if encode.text_embeddings != "none":
        openers["encode.text_encoder"] = partial(check_text_embedder, encode.text_encoder, encode.text_embeddings)
    return openers


ENCODE: Stage[ImageRecipe] = Stage(
    *("encode", _shards, _fingerprint, _run),
    # Separate, because latents/info.json holds the first shard's quality, whichever process encodes the others.
    inputs={"pack": "same shard", "encode": "first shard"},
    planned_by="decide",
    num_shards=expected_shards,
    beside=_info,
    table=Table(
        view="latents",
        comment="Encoded samples, and where their moments lie in the latents shards",
        columns={
            **dict.fromkeys(("uid", "key", "caption", "url"), "VARCHAR"),
            **dict.fromkeys(("offset", "num_bytes"), "BIGINT"),
            **dict.fromkeys(("height", "width"), "INTEGER"),
            "shard": "INTEGER",
            "tar": "VARCHAR",
        },
        path=DatasetDir.latents_table,
        rewriting=Rewriting(has_tar=True, drop=_drop, recount=count_rows),
    ),
    drops=None,
    uses_gpu=True,
    needs=Needs(files=no_openers, networks=_networks, sized=no_openers),
    work=WORK["encode"],
)
