"""The vector index of a dataset's embeddings, stored in the dataset and rebuilt when they change.

| images | index | memory while searching | disk | finds |
|---|---|---|---|---|
| up to 1,000,000 | all are compared, in fp16 | the whole file: 1.5 kB an image of ViT-L/14 | the same | all |
| more | 2 sqrt(N) lists by k-means, `PROBES` are compared | centres, and what is read | 1.5 kB an image | most |

For 170 million images of ViT-L/14 the file has 262 GB (768 numbers in fp16 and 8 bytes each), as much as the embeddings
in the scores; 26,000 centres take 80 MB of memory, and a search reads 64 lists of 6,500 images: 0.65 GB. Building needs
twice the disk space. The index is faiss's (Johnson et al. 2017, arXiv 1702.08734); the lists are memory-mapped.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from filters.dedup.clusters import learn_centers, load_faiss, unit
from filters.search.embeddings import Block, Embeddings, embeddings_digest, embeddings_of
from sdtrain.dataset.files import publish, raise_if_disk_full, scratch
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.progress import report_progress
from sdtrain.errors import UserError

EXACT_UP_TO = 1_000_000
PROBES = 64
"""Lists read per search; a test on planted clusters pins the recall."""
_BLOCK_ROWS = 1 << 20  # rows of lists in memory during a build: 1.6 GB
_SEED = 42


class IndexInfo(BaseModel):
    """The contents of an index, with `num_lists` 0 if all images are compared.

    `clip_model` is open_clip's name of the embeddings' network, `clip_digest` its weights'; `counts` are (shard, rows
    of its score table), in order.
    """

    clip_model: str
    clip_digest: str
    counts: list[tuple[int, int]]
    num_vectors: int
    num_lists: int


class ImageIndex:
    """An open index; threads may query it concurrently."""

    def __init__(self, folder: Path) -> None:
        faiss = load_faiss()
        self.info = IndexInfo.model_validate_json((folder / "info.json").read_bytes())
        # Lists in their own file are mapped without IO_FLAG_MMAP; with it, they are not opened at all.
        flags = faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR if self.info.num_lists else 0
        self._index = faiss.read_index(str(folder / "index.faiss"), flags)
        if self.info.num_lists:
            self._index.nprobe = min(PROBES, self.info.num_lists)
        self._ends = np.cumsum([num for _, num in self.info.counts])

    def nearest(self, vectors: NDArray[np.float32], top: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Returns cosines and numbers of the images nearest to `vectors` (Q, D) of length 1.

        Both are (Q, top), nearest first; missing ones have number -1.
        """
        cosines, numbers = self._index.search(np.ascontiguousarray(vectors, np.float32), top)
        return cosines, numbers

    def place(self, number: int) -> tuple[int, int]:
        """Returns an image's (shard, row of its score table)."""
        at = int(np.searchsorted(self._ends, number, side="right"))
        shard, num_rows = self.info.counts[at]
        return shard, number - int(self._ends[at] - num_rows)


def open_index(dataset: DatasetDir) -> ImageIndex:
    """Opens a dataset's index, building it if it is missing or out of date.

    UserError if there are no embeddings, faiss is not installed, or the index cannot be written.
    """
    load_faiss("Searching a dataset", otherwise="")
    folder = dataset.search / embeddings_digest(dataset)[:16]
    if not (folder / "info.json").exists():
        _build(dataset, folder)
    try:
        return ImageIndex(folder)
    except (RuntimeError, OSError, ValidationError) as error:
        raise UserError(
            f"The index in {folder} cannot be read ({error}). Delete it: the next search makes it."
        ) from error


def forget_index(dataset: DatasetDir) -> None:
    """Deletes all indices of a dataset; they hold the embeddings of removed samples."""
    shutil.rmtree(dataset.search, ignore_errors=True)


def _build(dataset: DatasetDir, folder: Path) -> None:
    embeddings = embeddings_of(dataset)
    if embeddings.images.num == 0:
        raise UserError(f"{dataset.root} holds no images that could be searched.")
    try:
        with scratch(dataset.root, "search") as work:
            made = work / "index"
            made.mkdir()
            info = _write_index(embeddings, made, work)
            with publish(made / "info.json") as temporary:
                temporary.write_text(info.model_dump_json(indent=1) + "\n")
            forget_index(dataset)
            folder.parent.mkdir(exist_ok=True)
            made.rename(folder)
    except (OSError, RuntimeError) as error:
        if (folder / "info.json").exists():
            return  # another search was faster
        raise_if_disk_full(error, folder)
        raise UserError(f"The index cannot be written to {dataset.search}: {error}.") from error


def _write_index(embeddings: Embeddings, made: Path, work: Path) -> IndexInfo:
    num_lists = 0 if embeddings.images.num <= EXACT_UP_TO else round(2 * math.sqrt(embeddings.images.num))
    write = _write_lists if num_lists else _write_exact
    return IndexInfo(
        clip_model=embeddings.clip_model,
        clip_digest=embeddings.clip_digest,
        counts=list(embeddings.counts),
        num_vectors=write(embeddings, num_lists, made, work),
        num_lists=num_lists,
    )


def _write_exact(embeddings: Embeddings, num_lists: int, made: Path, work: Path) -> int:
    faiss = load_faiss()
    kind, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIDMap(faiss.IndexScalarQuantizer(embeddings.width, kind, metric))
    for block in _with_progress(embeddings):
        index.add_with_ids(unit(block.vectors), block.numbers)
    faiss.write_index(index, str(made / "index.faiss"))
    return int(index.ntotal)


def _write_lists(embeddings: Embeddings, num_lists: int, made: Path, work: Path) -> int:
    """Builds lists larger than memory: parts of the index, a file each, are merged on disk."""
    faiss = load_faiss()
    from faiss.contrib.ondisk import merge_ondisk

    centers = learn_centers(embeddings.images, num_lists, _SEED)
    quantizer = faiss.IndexFlatIP(embeddings.width)
    quantizer.add(centers)
    kind, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFScalarQuantizer(quantizer, embeddings.width, len(centers), kind, metric, False)
    index.train(centers)
    parts = list[str]()
    for block in _with_progress(embeddings):
        index.add_with_ids(unit(block.vectors), block.numbers)
        if index.ntotal >= _BLOCK_ROWS:
            parts.append(_write_part(index, work, len(parts)))
    parts.append(_write_part(index, work, len(parts)))
    merge_ondisk(index, parts, str(made / "lists.bin"))
    faiss.write_index(index, str(made / "index.faiss"))
    return int(index.ntotal)


def _write_part(index: Any, work: Path, number: int) -> str:
    path = str(work / f"part{number:05d}.faiss")
    load_faiss().write_index(index, path)
    index.reset()
    return path


def _with_progress(embeddings: Embeddings) -> Iterator[Block]:
    return report_progress(
        embeddings.blocks(), "search: index", embeddings.images.num, "images", lambda b: len(b.numbers)
    )
