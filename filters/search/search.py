"""Search of a dataset by a caption's or image's embedding, by words, or by key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from filters.recipe import ScoreConfig
from filters.recipe_record import read_recipe
from filters.search.embeddings import kept_vectors
from filters.search.hits import Hit, look_up
from filters.search.index import ImageIndex, IndexInfo, open_index
from sdtrain.dataset.files import read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import selected_shards
from sdtrain.dataset.tables.columns import Scan, TableColumns
from sdtrain.dataset.tables.connection import connected
from sdtrain.errors import UserError
from sdtrain.images.decode import ImageError, upright_rgb
from sdtrain.images.header import read_header
from sdtrain.models.clip import clip_preprocess, clip_view, load_clip, normalised, pixels_of
from sdtrain.models.weights import RANDOM, RANDOM_FULL, clip_digest

MAX_PIXELS = 2**26
MAX_PICTURE_BYTES = 32 * 2**20
_IMAGES_AT_ONCE = 32
_MAX_LOOKED_AT = 1 << 14
_WORD = re.compile(r"\w+")
# Captions are split at anything but letters, digits and underscores, as `\w` has it.
_MATCHED = """
SELECT len(list_intersect(string_split_regex(lower(caption), '[^\\p{{L}}\\p{{N}}_]+'), $words)) AS matched, shard, uid,
       caption, source
FROM ({texts}) WHERE matched > 0"""
_OWN = """
SELECT uid, caption, key, parse_filename(filename, true)::INTEGER AS shard, NULL AS source
FROM ({images}) WHERE reason IS NULL AND caption IS NOT NULL"""
_OTHERS = """
SELECT i.uid, c.text, i.key, parse_filename(i.filename, true)::INTEGER, c.source
FROM ({images}) i JOIN read_parquet($captions) c USING (uid)
WHERE i.reason IS NULL AND c.text <> coalesce(i.caption, '')"""
# Of an image's captions the one that has most of the words.
_BEST = " QUALIFY row_number() OVER (PARTITION BY uid ORDER BY matched DESC, length(caption), caption) = 1"
_KEPT = " AND uid IN (SELECT uid FROM read_parquet($decisions) WHERE reason IS NULL)"
_FIRST = " ORDER BY matched DESC, length(caption), key LIMIT $top"


class Search:
    """A searchable dataset, which must stay locked (`lock_to_read`); the first query loads index and network.

    UserError if there is no dataset, or it cannot be searched.
    """

    def __init__(self, dataset: DatasetDir) -> None:
        self.dataset = dataset
        self._config = read_recipe(dataset).score
        self._lock = Lock()  # one thread at a time uses the network

    @property
    def is_stand_in(self) -> bool:
        """Whether the network's weights are random, so that captions find nothing sensible."""
        return is_stand_in(self._config)

    @property
    def num_images(self) -> int:
        """The number of searchable images."""
        return self._index.info.num_vectors

    @property
    def is_exact(self) -> bool:
        """Whether all images are compared."""
        return not self._index.info.num_lists

    def by_caption(self, caption: str, top: int, kept_only: bool = False) -> list[Hit]:
        """Returns the images whose embeddings are nearest to the caption's."""
        with self._lock:
            vectors = self._encoder.captions([caption])
        return self.nearest(vectors, top, kept_only)[0]

    def by_images(self, images: Sequence[Image.Image], top: int, kept_only: bool = False) -> list[list[Hit]]:
        """Returns the nearest images for each RGB image."""
        return self.nearest(self.embed(images), top, kept_only) if images else []

    def by_words(self, text: str, top: int, kept_only: bool = False) -> list[Hit]:
        """Returns the images of which any caption has most of the words."""
        self._require_decisions(kept_only)
        matches = {match.uid: match for match in by_words(self.dataset, text, top, kept_only)}
        hits = look_up(self.dataset, ((match.share, match.shard, match.uid) for match in matches.values()))
        return [replace(hit, found_in=matches[hit.uid].described()) for hit in hits]

    def by_key(self, key: str) -> Hit | None:
        """Returns the downloaded image with this key."""
        return next(iter(look_up(self.dataset, by_key(self.dataset, key))), None)

    def embed(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Returns (N, D) embeddings of RGB images."""
        with self._lock:
            return self._encoder.images(images)

    def nearest(self, vectors: NDArray[np.float32], top: int, kept_only: bool = False) -> list[list[Hit]]:
        """Returns at most `top` nearest images for each of (N, D) unit embeddings, nearest first.

        `kept_only` skips dropped images and fetches more to replace them, up to the nearest `_MAX_LOOKED_AT`; UserError
        before the dataset's decisions exist.
        """
        self._require_decisions(kept_only)
        fetched = top
        while True:
            cosines, numbers = self._index.nearest(vectors, min(fetched, self.num_images))
            found = self._hits(cosines, numbers, kept_only)
            ends = fetched >= min(self.num_images, _MAX_LOOKED_AT) or bool((numbers < 0).any())
            if ends or not kept_only or all(len(hits) >= top for hits in found):
                return [hits[:top] for hits in found]
            fetched *= 4

    def some_vectors(self, num: int) -> NDArray[np.float32]:
        """Returns (N, D) unit embeddings of about `num` evenly chosen kept images."""
        return kept_vectors(self.dataset, self._index.info.counts, num)

    def _require_decisions(self, kept_only: bool) -> None:
        if kept_only and not self.dataset.decisions.exists():
            raise UserError(f"{self.dataset.root} is not built as far as `decide`. Run `sdtrain build` again.")

    def _hits(self, cosines: NDArray[np.float32], numbers: NDArray[np.int64], kept_only: bool) -> list[list[Hit]]:
        places = [self._index.place(number) if number >= 0 else None for number in numbers.ravel().tolist()]
        shards = {place[0] for place in places if place}
        uids = {shard: read_parquet(self.dataset.scores(shard), ["uid"])["uid"] for shard in shards}
        asked = [
            (float(cosine), place[0], uids[place[0]][place[1]].as_py())
            for cosine, place in zip(cosines.ravel(), places, strict=True)
            if place
        ]
        known = {hit.uid: hit for hit in look_up(self.dataset, asked)}
        by_question: list[list[Hit]] = [[] for _ in numbers]
        questions = [number for number, row in enumerate(numbers) for _ in row]
        found = iter(asked)
        for question, place in zip(questions, places, strict=True):
            if place is None:
                continue
            similarity, _, uid = next(found)
            hit = known.get(uid)
            if hit is not None and not (kept_only and hit.reason is not None):
                by_question[question].append(replace(hit, similarity=similarity))
        return by_question

    @cached_property
    def _index(self) -> ImageIndex:
        return open_index(self.dataset)

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._config, self._index.info)


def read_image(content: bytes, name: str) -> Image.Image:
    """Decodes an external image to upright RGB; raises `UserError` if it is too large or not an image."""
    if len(content) > MAX_PICTURE_BYTES:
        raise UserError(f"{name} is larger than {MAX_PICTURE_BYTES // 2**20} MB. Make it smaller first.")
    try:
        return upright_rgb(read_header(content, MAX_PIXELS).image)
    except ImageError as error:
        raise UserError(f"{name} cannot be read as an image ({error}). Give a JPEG, PNG or WebP.") from error


def read_image_file(path: Path) -> Image.Image:
    """Reads an image file as upright RGB; raises `UserError` if it holds none."""
    try:
        return read_image(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


class WordMatch(NamedTuple):
    """An image of which a caption has a share of the words; `source` is None for its own alt text."""

    share: float
    shard: int
    uid: str
    caption: str
    source: str | None

    def described(self) -> str:
        """The caption with its source, if it is another than the alt text."""
        return "" if self.source is None else f"{self.source}: {self.caption}"


def by_words(dataset: DatasetDir, text: str, top: int, kept_only: bool = False) -> list[WordMatch]:
    """Returns downloaded images, most words first, then the shortest caption; captions of all sources are searched."""
    words = sorted(set(_WORD.findall(text.lower())))
    images = _images(dataset) if words else None
    if images is None:
        return []
    with connected() as connection:
        asked = {"words": words, "top": top, **images.values}
        asked |= {"decisions": str(dataset.decisions)} if kept_only else {}
        captions = _captions(dataset)
        asked |= {"captions": captions} if captions else {}
        texts = " UNION ALL ".join(part.format(images=images.sql) for part in (_OWN, _OTHERS)[: 1 + bool(captions)])
        best = _BEST if captions else ""
        query = _MATCHED.format(texts=texts) + (_KEPT if kept_only else "") + best + _FIRST
        rows = connection.execute(query, asked).fetchall()
    return [WordMatch(matched / len(words), *others) for matched, *others in rows]


def _captions(dataset: DatasetDir) -> list[str]:
    """The tables of all captions, of a dataset that has the stage `caption`."""
    if not read_recipe(dataset).caption.is_on:
        return []
    return [str(path) for shard in selected_shards(dataset) if (path := dataset.captions_table(shard)).exists()]


def by_key(dataset: DatasetDir, key: str) -> list[tuple[float, int, str]]:
    """Returns (1, shard, uid) of the downloaded image with this key, if any."""
    images = _images(dataset)
    if images is None:
        return []
    query = (
        "SELECT 1.0, parse_filename(filename, true)::INTEGER, uid "  # noqa: S608 - values are bound
        f"FROM ({images.sql}) WHERE key = $key AND reason IS NULL"
    )
    with connected() as connection:
        return connection.execute(query, {"key": key, **images.values}).fetchall()


def _images(dataset: DatasetDir) -> Scan | None:
    """Returns the tables of downloaded images; None if there are none."""
    paths = [path for shard in selected_shards(dataset) if (path := dataset.images_table(shard)).exists()]
    tables = TableColumns(dataset)
    scan = tables.scan(paths, "images") if paths else None
    tables.save()
    return scan


class Encoder:
    """CLIP as configured by a dataset's recipe, for comparison with the embeddings of index `info`.

    UserError if the recipe names other weights than the dataset was scored with, or they are unavailable.
    """

    def __init__(self, config: ScoreConfig, info: IndexInfo) -> None:
        weights = config.clip_weights
        if weights is None or (config.clip_model, clip_digest(config.clip_model, weights)) != (
            info.clip_model,
            info.clip_digest,
        ):
            raise UserError(
                f"The dataset was scored with CLIP {info.clip_model} ({info.clip_digest}), and its recipe.yaml names "
                f"{config.clip_model} ({weights}). Run `sdtrain build` again, which scores again, or undo the recipe."
            )
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        network, self._tokenizer = load_clip(config.clip_model, weights)
        self._preprocess = clip_preprocess(network, config.clip_model, weights)
        self._network = network.to(self._device)

    @torch.inference_mode()
    def captions(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """Returns unit vectors (N, D)."""
        return _unit(self._network.encode_text(self._tokenizer(list(captions)).to(self._device)))

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Returns unit vectors (N, D) of RGB images."""
        found = []
        for first in range(0, len(images), _IMAGES_AT_ONCE):
            views = [pixels_of(clip_view(image, self._preprocess)) for image in images[first : first + _IMAGES_AT_ONCE]]
            inputs = normalised(torch.stack(views).to(self._device), self._preprocess.mean, self._preprocess.std)
            found.append(_unit(self._network.encode_image(inputs)))
        return np.concatenate(found)


def is_stand_in(config: ScoreConfig) -> bool:
    """Returns whether CLIP has random weights: then equal images are similar, and captions are similar to nothing."""
    return (config.clip_weights or "").startswith((RANDOM, RANDOM_FULL))


def _unit(embeddings: torch.Tensor) -> NDArray[np.float32]:
    normal: NDArray[np.float32] = torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy()
    return normal
