"""ENCODE: packed pictures -> the VAE's posterior moments, with captions and provenance."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from sdtrain.data.config import EncodeConfig, PictureRecipe
from sdtrain.data.dataset import DatasetDir
from sdtrain.data.files import publish
from sdtrain.data.latent_store import NORMALISATION, VAE_KEY
from sdtrain.data.manifest import ShardReport, describe_outputs, fingerprint, require_entry
from sdtrain.data.pictures import decode_rgb, picture_extension
from sdtrain.data.stage import Stage
from sdtrain.data.tars import SampleIndex, read_samples, write_samples
from sdtrain.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

INFO_SCHEMA_VERSION = 1
_MOMENTS = "moments.npy"
# Shards may be encoded by several threads of a process: they decode side by side and take turns at the VAE.
_ONE_AT_A_TIME = Lock()
_TABLE = pa.schema(
    [
        *((name, pa.string()) for name in ("uid", "key", "caption", "url")),
        ("offset", pa.int64()),
        ("num_bytes", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Crop:
    """A picture as the VAE sees it.

    Attributes:
        pixels: (resolution, resolution, 3) uint8.
        box: left, top, right, bottom of the visible part, in pixels of the source.
        source_px: width and height of the source.
    """

    pixels: NDArray[np.uint8]
    box: tuple[float, float, float, float]
    source_px: tuple[int, int]


def crop_center(picture: Image.Image, resolution: int) -> Crop:
    """Resizes the shorter side to `resolution` (bicubic, antialiased) and cuts out the centre.

    The original runs cropped at random (pesser/stable-diffusion, ldm/data/laion.py); a cached latent fixes the crop.
    """
    scale = resolution / min(picture.size)
    width, height = (max(resolution, round(side * scale)) for side in picture.size)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    cut = resized.crop((left, top, left + resolution, top + resolution))
    box = (left / scale, top / scale, (left + resolution) / scale, (top + resolution) / scale)
    return Crop(np.asarray(cut), tuple(round(edge, 2) for edge in box), picture.size)  # type: ignore[arg-type]


def encode_pixels(vae: AutoencoderKL, pixels: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Posterior moments of (B, H, W, 3) uint8 pictures: (B, 8, H/8, W/8), mean and log-variance, unscaled.

    Raises:
        UserError: the VAE gives numbers that float16 cannot hold.
    """
    import torch

    with _ONE_AT_A_TIME, torch.inference_mode():
        inputs = torch.from_numpy(pixels).to(vae.device, torch.float32).permute(0, 3, 1, 2) / 127.5 - 1
        moments = vae.encode(inputs.to(vae.dtype)).latent_dist.parameters
    encoded: NDArray[np.float16] = moments.cpu().numpy().astype(np.float16)
    if not np.isfinite(encoded).all():
        raise UserError("The VAE gives latents that are not finite; its weights are damaged or not for this use.")
    return encoded


def encode_shard(dataset: DatasetDir, config: EncodeConfig, shard: int) -> ShardReport:
    """Writes the latents of one packed shard.

    Raises:
        UserError: the packed shard, or the VAE, cannot be read.
    """
    source = dataset.packed_tar(shard)
    require_entry(dataset, "pack", shard)
    rows: list[dict[str, Any]] = []
    with publish(dataset.latents_tar(shard)) as temporary:
        index = write_samples(temporary, _encoded(read_samples(source), config, source, rows))
        placed = [row | latent_place(temporary, sample) for row, sample in zip(rows, index, strict=True)]
    table = pa.Table.from_pylist(placed, _TABLE.with_metadata({VAE_KEY: _digest(config.vae)}))
    with publish(dataset.latents_table(shard)) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    _write_info(dataset, config)
    outputs = describe_outputs(dataset, [dataset.latents_tar(shard), dataset.latents_table(shard)])
    return ShardReport(stage="encode", shard=shard, num_in=len(rows), num_out=len(table), outputs=outputs)


def _encoded(
    samples: Iterable[tuple[str, dict[str, bytes]]], config: EncodeConfig, source: Path, rows: list[dict[str, Any]]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The latents' members, batch by batch; what the table needs of each sample goes into `rows`."""
    vae = _vae(config.vae)

    def prepare(sample: tuple[str, dict[str, bytes]]) -> Crop:
        key, members = sample
        try:
            return crop_center(decode_rgb(members[picture_extension(members)]), config.resolution)
        except OSError as error:
            raise UserError(f"{source}: the picture of {key} cannot be decoded. Delete it and build again.") from error

    with ThreadPoolExecutor(2) as pool:
        # Batches end with the shard, so that a shard's bytes do not depend on what else is encoded.
        for batch in _batches(samples, config.batch_size):
            crops = list(pool.map(prepare, batch))
            moments = encode_pixels(vae, np.stack([crop.pixels for crop in crops]))
            for (key, members), crop, array in zip(batch, crops, moments, strict=True):
                provenance = json.loads(members["json"])
                rows.append({name: provenance[name] for name in ("uid", "caption", "url")} | {"key": key})
                rows[-1] |= {"height": array.shape[1], "width": array.shape[2], "num_bytes": array.nbytes}
                described = provenance | {"crop_box": crop.box, "source_px": crop.source_px}
                yield key, {_MOMENTS: _npy(array), "txt": members["txt"], "json": _json(described)}


def _batches(samples: Iterable[Any], size: int) -> Iterator[list[Any]]:
    remaining = iter(samples)
    while batch := list(islice(remaining, size)):
        yield batch


def latent_place(tar: Path, sample: SampleIndex) -> dict[str, int]:
    """Where the raw numbers begin: behind the npy header, whose length its bytes 8 and 9 tell."""
    member = sample.members[_MOMENTS]
    with tar.open("rb") as file:
        file.seek(member.offset + 8)
        header_bytes = int.from_bytes(file.read(2), "little")
    return {"offset": member.offset + 10 + header_bytes}


def latents_info(config: EncodeConfig) -> dict[str, Any]:
    """What training must know of the latents, and checks."""
    from sdtrain.model import vae_digest, vae_scaling_factor

    return {
        "schema_version": INFO_SCHEMA_VERSION,
        "vae": config.vae,
        "vae_sha256": vae_digest(config.vae),
        "scaling_factor": vae_scaling_factor(config.vae),
        "resolution": config.resolution,
        "normalisation": NORMALISATION,
        "resize": "shorter side, bicubic, centre crop",
        "content": "posterior mean and log-variance, unscaled",
        "dtype": "float16",
    }


def _write_info(dataset: DatasetDir, config: EncodeConfig) -> None:
    with publish(dataset.latents_info) as temporary:
        temporary.write_text(json.dumps(latents_info(config), indent=1) + "\n")


def _npy(array: NDArray[np.float16]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, sort_keys=True).encode()


def _vae(name: str) -> AutoencoderKL:
    # Two loads at once leave accelerate's patch of nn.Module behind: every later network is then made without weights.
    with _ONE_AT_A_TIME:
        return _loaded_vae(name)


@lru_cache(maxsize=1)
def _loaded_vae(name: str) -> AutoencoderKL:
    import torch

    from sdtrain.model import load_vae

    return load_vae(name).to("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache(maxsize=4)
def _digest(name: str) -> str:
    from sdtrain.model import vae_digest

    return vae_digest(name)


def _shards(dataset: DatasetDir, recipe: PictureRecipe) -> list[int]:
    from sdtrain.data.pack import PACK

    return PACK.shards(dataset, recipe)


def _fingerprint(dataset: DatasetDir, recipe: PictureRecipe, shard: int) -> str:
    config = recipe.encode.model_dump(mode="json", exclude={"vae"})
    return fingerprint("encode/1", config, [require_entry(dataset, "pack", shard)], [_digest(recipe.encode.vae)])


def _run(dataset: DatasetDir, recipe: PictureRecipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    for shard in shards:
        yield encode_shard(dataset, recipe.encode, shard)


ENCODE: Stage[PictureRecipe] = Stage("encode", _shards, _fingerprint, _run)
