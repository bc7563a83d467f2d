"""The reference set of real images, and its features."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from sdtrain.dataset.files import numbered_files, read_parquet, sha256_of
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, entries
from sdtrain.dataset.open import open_to_ask
from sdtrain.dataset.progress import report_progress
from sdtrain.dataset.s3.url import is_s3
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import Stage, plain_stage
from sdtrain.dataset.sync import read_part
from sdtrain.dataset.tars import SampleIndex, index_samples
from sdtrain.errors import UserError
from sdtrain.evaluation.distances import Gaussian
from sdtrain.evaluation.layout import EvaluationDir, write_json, write_tensors
from sdtrain.evaluation.metrics import arrays_needed
from sdtrain.evaluation.networks import BATCH_SIZE, agreement_digest, embed_images, feature_config, features_of
from sdtrain.evaluation.protocol import Protocol
from sdtrain.images.decode import decode_rgb, image_extension
from sdtrain.models.clip import Preprocess, clip_view
from sdtrain.models.weights import cache_dir

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff")
_THUMBNAILS = "@eaDir"
"""Where Synology's storage keeps small copies of a folder's images."""
_PART_SIZE = 512
_PLACE = ["picture_offset", "picture_bytes"]
_MOST_PERMUTED = 1 << 27  # a permutation of more takes gigabytes


class Place(NamedTuple):
    """A byte range that holds an image; a `size` of -1 is the whole file."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """Reads the bytes, fetching the shard from S3 if necessary."""
        path = Path(self.path)
        if self.size < 0:
            return path.read_bytes()
        return read_part(DatasetDir(path.parent.parent), path, self.offset, self.size)


@dataclass(frozen=True)
class Reference:
    """Chosen real images, or published statistics: `places` is empty, or `statistics` None.

    `digest` is the sha256 of the images in order (of their bytes, or of their places in shards whose digests the
    manifest has), or of the file of statistics.
    """

    source: str
    digest: str
    places: tuple[Place, ...] = ()
    statistics: Gaussian | None = None


@dataclass(frozen=True)
class ReferenceJob:
    """The input of a reference's stage; `size_px` is the side of the drawn images, `network` whose features are taken.

    CLIP's embeddings, if they are needed, go with the first of the protocol's networks.
    """

    protocol: Protocol
    digest: str
    size_px: int
    num: int
    network: str

    @property
    def embeds(self) -> bool:
        """Whether CLIP embeds the images too."""
        return self.network == self.protocol.networks[0] and "clip" in arrays_needed(self.protocol, "real")


def open_reference(name: str | Path, num: int, seed: int = 0) -> Reference:
    """At most `num` images of a dataset, a folder, a WebDataset tar or a folder of such, or the statistics in an .npz.

    Folders and tars are those of others, read whole, with folders in them, but for hidden files (`._a.jpg`). UserError
    if there is no such reference, or fewer than two images.
    """
    path = open_to_ask(str(name), "the evaluation").root if is_s3(str(name)) else Path(name)
    if path.suffix == ".npz":
        return Reference(f"{path.name}: statistics", sha256_of(_file(path)), statistics=_statistics(path))
    if not path.is_dir() and not (path.is_file() and _is_tar(path)):
        raise UserError(
            f"There is no {path}. A reference is a dataset, a folder of images or of WebDataset's tars, one such "
            "tar, or an .npz."
        )
    dataset = DatasetDir((path if path.is_dir() else path.parent).absolute())
    picked, num_all, kind = *(_of_dataset(dataset, num, seed) if path.is_dir() else ([], 0)), "dataset"
    if not num_all and dataset.recipe.exists():
        raise UserError(f"{path} is a dataset that holds no images yet. Run its build first.")
    if not num_all:
        places, kind = _places_of_others(path)
        picked, num_all = [places[number] for number in _chosen(len(places), num, seed)], len(places)
    if num_all < 2:
        raise UserError(f"{path} holds {num_all} images; a reference needs two at least, and better thousands.")
    source = f"{path.name}: {kind}, {len(picked):,} of {num_all:,} images, seed {seed}"
    return Reference(source, _digest(picked, dataset), tuple(picked))


def _chosen(num_all: int, num: int, seed: int) -> NDArray[np.int64]:
    """The numbers of a seeded choice, ascending; of very many images in memory for the chosen ones alone."""
    random = np.random.default_rng(seed)
    if num_all > _MOST_PERMUTED:
        return np.sort(random.choice(num_all, min(num, num_all), replace=False))
    return np.sort(random.permutation(num_all)[:num])


def _places_of_others(path: Path) -> tuple[list[Place], str]:
    """The images of a folder or, if it has none, of the tars in it, or of a tar; and what `path` is."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _is_shown(file, path))
    images = [Place(str(file.absolute())) for file in files if file.suffix.lower() in _SUFFIXES]
    tars = [file for file in files if _is_tar(file)]
    if images or not tars:
        return images, "folder"
    samples = [(tar, sample) for tar in tars for sample in index_samples(tar)]
    places = [Place(str(tar.absolute()), *member) for tar, sample in samples if (member := _image_of(sample))]
    if samples and not places:
        raise UserError(
            f"{path} holds {len(samples):,} samples and no image: they have "
            f"{', '.join(sorted(samples[0][1].members))}. Images end in {', '.join(_SUFFIXES)}."
        )
    return places, f"{len(tars):,} tars"


def _is_shown(file: Path, folder: Path) -> bool:
    parts = file.relative_to(folder).parts
    return not any(part.startswith(".") or part == _THUMBNAILS for part in parts) and file.is_file()


def _is_tar(file: Path) -> bool:
    return file.suffix.lower() == ".tar"


def _image_of(sample: SampleIndex) -> tuple[int, int] | None:
    """Offset and size of a sample's image.

    As in WebDataset a key ends at the name's first dot, so an extension may have several parts, of which the last one
    counts, and a name that begins with a dot has no key.
    """
    if not sample.key.rpartition("/")[2]:
        return None
    by_parts = sorted(sample.members, key=lambda extension: extension.count("."))
    found = next((name for name in by_parts if f".{name}".lower().endswith(_SUFFIXES)), None)
    return None if found is None else (sample.members[found].offset, sample.members[found].size)


def _digest(places: Sequence[Place], dataset: DatasetDir) -> str:
    shards = {
        str(dataset.root / name): output.sha256
        for stage in ("pack", "download")
        for entry in entries(dataset, stage)
        for name, output in entry.outputs.items()
    }
    digest = hashlib.sha256()
    for place in places:
        shard = shards.get(place.path)
        known = f"{shard} {place.offset} {place.size}" if shard else hashlib.sha256(place.read()).hexdigest()
        digest.update(f"{known}\n".encode())
    return digest.hexdigest()


def _file(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"There is no file {path} with statistics of a reference.")
    return path


def _statistics(path: Path) -> Gaussian:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, covariance = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} does not hold `mu` and `sigma` as pytorch-fid writes them: {error}") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: mu {mean.shape} and sigma {covariance.shape} do not fit each other.")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path} holds numbers that are not finite.")
    return Gaussian(mean, covariance)


def _of_dataset(dataset: DatasetDir, num: int, seed: int) -> tuple[list[Place], int]:
    """Chosen images of a dataset, and the number of all: the packed ones, else the downloaded, local or remote.

    Only the shards of chosen images are looked into, where the footers of tables tell how many each has.
    """
    tars = _tars(dataset)
    ends = np.cumsum([_num_images(tar) for tar in tars], dtype=np.int64)
    num_all = int(ends[-1]) if tars else 0
    chosen = _chosen(num_all, num, seed)
    shards = np.searchsorted(ends, chosen, side="right")
    found: list[Place] = []
    for shard in np.unique(shards).tolist():
        places, first = list(_images_in(tars[shard])), int(ends[shard - 1]) if shard else 0
        found += [Place(str(tars[shard]), *places[number - first]) for number in chosen[shards == shard].tolist()]
    return found, num_all


def _tars(dataset: DatasetDir) -> list[Path]:
    """Of finished shards."""
    for stage, folder in (("pack", dataset.packed_tar(0).parent), ("download", dataset.images_tar(0).parent)):
        finished = [name for entry in entries(dataset, stage) for name in entry.outputs if name.endswith(".tar")]
        if tars := [dataset.root / name for name in finished] or list(numbered_files(folder, ".tar").values()):
            return tars
    return []


def _num_images(tar: Path) -> int:
    """As many as `_images_in` yields."""
    if (table := _own_table(tar)) is None:
        return sum(1 for _ in _images_in(tar))
    metadata = pq.read_metadata(table)
    place = metadata.schema.to_arrow_schema().get_field_index(_PLACE[1])
    columns = [metadata.row_group(number).column(place).statistics for number in range(metadata.num_row_groups)]
    if all(column is not None and column.has_null_count for column in columns):
        return metadata.num_rows - sum(column.null_count for column in columns)
    return sum(1 for _ in _images_in(tar))


def _own_table(tar: Path) -> Path | None:
    """Our table beside a tar; img2dataset's has no offsets."""
    table = tar.with_suffix(".parquet")
    return table if table.exists() and set(_PLACE) <= set(pq.read_schema(table).names) else None


def _images_in(tar: Path) -> Iterator[tuple[int, int]]:
    """Offset and size of each image in order, from our table beside the tar, else from its headers."""
    if table := _own_table(tar):
        rows = read_parquet(table, _PLACE).to_pylist()
        yield from sorted((row[_PLACE[0]], row[_PLACE[1]]) for row in rows if row[_PLACE[1]] is not None)
        return
    for sample in index_samples(tar):
        with suppress(KeyError):  # a sample without an image
            member = sample.members[image_extension(sample.members)]
            yield member.offset, member.size


def prepare_reference(
    reference: Reference, protocol: Protocol, size_px: int, network: str
) -> tuple[EvaluationDir, ReferenceJob]:
    """The cache directory for a network's features, and the job that fills it.

    It is named by a digest of all inputs, so evaluations with the same reference share it. UserError: no such weights.
    """
    job = ReferenceJob(protocol, reference.digest, size_px, len(reference.places), network)
    folder = EvaluationDir(cache_dir() / "references" / _job_digest(job)[:16])
    write_json(folder.images, [list(place) for place in reference.places])
    return folder, job


def reference_stage(job: ReferenceJob) -> Stage[ReferenceJob]:
    """The stage that extracts the features of the real images."""
    return plain_stage("reference", _parts, _fingerprint, _extract_parts, uses_gpu=True)


def reference_parts(job: ReferenceJob) -> list[int]:
    """The parts of a reference, by number."""
    return list(range(-(-job.num // _PART_SIZE)))


def _parts(dataset: DatasetDir, job: ReferenceJob) -> list[int]:
    return reference_parts(job)


def _fingerprint(dataset: DatasetDir, job: ReferenceJob, part: int) -> str:
    return _job_digest(job)


def _job_digest(job: ReferenceJob) -> str:
    size_px = job.size_px if job.protocol.reference_view == "as_samples" else None
    embedded_by = agreement_digest(job.protocol) if job.embeds else None
    features_by = feature_config(job.protocol, job.network)
    return fingerprint("reference/1", [features_by, size_px, embedded_by, job.digest, _PART_SIZE])


def _extract_parts(dataset: DatasetDir, job: ReferenceJob, parts: Sequence[int]) -> Iterator[ShardReport]:
    directory = EvaluationDir(dataset.root)
    places = [Place(*place) for place in json.loads(directory.images.read_text())]
    for part in parts:
        some = places[part * _PART_SIZE : (part + 1) * _PART_SIZE]
        tensors = _extract(report_progress(some, f"reference, part {part}", len(some), "images"), job)
        path = directory.reference(part)
        write_tensors(path, tensors)
        outputs = describe_outputs(dataset, [path])
        yield ShardReport(stage="reference", shard=part, num_in=len(some), num_out=len(some), outputs=outputs)


def _extract(places: Iterable[Place], job: ReferenceJob) -> dict[str, torch.Tensor]:
    features, embeddings, rest = [], [], iter(places)
    while images := [_as_compared(place, job) for place in islice(rest, BATCH_SIZE)]:
        features.append(features_of(images, job.protocol, job.network))
        embeddings += [embed_images(images, job.protocol)] if job.embeds else []
    return {"features": torch.cat(features)} | ({"clip": torch.cat(embeddings)} if embeddings else {})


def _as_compared(place: Place, job: ReferenceJob) -> Image.Image:
    try:
        image = decode_rgb(place.read())
    except OSError as error:
        raise UserError(f"{place.path} at byte {place.offset} is no image that can be read: {error}") from error
    return clip_view(image, Preprocess(job.size_px)) if job.protocol.reference_view == "as_samples" else image
