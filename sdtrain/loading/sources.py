"""Opens, checks and combines a run's datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdtrain.config import TrainConfig
from sdtrain.config.data import DataConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.open import training_root
from sdtrain.encode.info import NORMALISATION, require_latents
from sdtrain.errors import UserError
from sdtrain.loading.captions import CaptionMix, require_sources
from sdtrain.loading.crops import Crop
from sdtrain.loading.image_store import ImageStore, OnlineVae, no_images
from sdtrain.loading.latent_store import OPEN_SHARDS, LatentStore, check_cache
from sdtrain.loading.planning import digest_of_sources, plan_samples
from sdtrain.loading.sample_plan import SamplePlan
from sdtrain.loading.sample_record import Origin, RecordedSource, SampleRecord, Stage
from sdtrain.loading.sample_store import Fetched, SampleStore


class MixedStore(SampleStore):
    """Several datasets of the same sizes as one, their samples numbered in turn; the digest includes the weights."""

    def __init__(self, stores: Sequence[SampleStore], weights: Sequence[float]) -> None:
        self.stores, self.sizes, self.text_dtype = tuple(stores), stores[0].sizes, stores[0].text_dtype
        self.counts = np.concatenate([store.counts for store in stores])
        self.sources = tuple(sorted({source for store in stores for source in store.sources}))
        self.digest = digest_of_sources([store.digest for store in stores], weights)
        self._ends = np.cumsum([len(store) for store in stores])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def size_number(self, index: int) -> int:
        """The index of a sample's size."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.stores[number].size_number(index - self._first(number))

    def buffer(self, num_samples: int, size: int) -> NDArray[Any]:
        """A buffer for `fetch` of samples of one size."""
        return self.stores[0].buffer(num_samples, size)

    def fetch(
        self, indices: NDArray[np.int64], epochs: NDArray[np.int64], seed: int, rows: NDArray[Any] | None = None
    ) -> Fetched:
        """Reads samples, each from its dataset."""
        fetched = Fetched.blank(len(indices))
        numbers = np.searchsorted(self._ends, indices, side="right")
        for position, number in enumerate(numbers.tolist()):
            here = slice(position, position + 1)
            own = self.stores[number].fetch(
                indices[here] - self._first(number), epochs[here], seed, None if rows is None else rows[here]
            )
            fetched.put([position], own)
        return fetched

    def crop(self, index: int, epoch: int, seed: int) -> Crop | None:
        """The crop of a sample in one of its epochs; None where its dataset does not record it."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.stores[number].crop(index - self._first(number), epoch, seed)

    def get(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Posterior mean and log-variance of samples of one size, unscaled: (B, 8, h, w) float16."""
        numbers = np.searchsorted(self._ends, indices, side="right").tolist()
        each = zip(numbers, indices, strict=True)
        return torch.cat([self.stores[n].get(np.array([index - self._first(n)])) for n, index in each])

    def _first(self, number: int) -> int:
        return int(self._ends[number - 1]) if number else 0


def open_samples(config: TrainConfig, scaling_factor: float) -> SampleStore:
    """The config's datasets, checked against it; UserError if they have no latents, or others, or lack captions."""
    data, mix = config.data, CaptionMix(config.data.captions)
    if data.online_vae:
        encoder, reads = OnlineVae(config.vae), bool(mix.sources)
        stores: list[SampleStore] = [
            ImageStore(training_root(s.root, True), data.resolution, encoder, reads) for s in data.all_sources
        ]
    else:
        stores = [_open_latents(training_root(s.root), config, scaling_factor) for s in data.all_sources]
    store = stores[0] if len(stores) == 1 else _mixed(stores, data)
    require_sources(mix, store.sources, data.name)
    return store


def _mixed(stores: Sequence[SampleStore], data: DataConfig) -> MixedStore:
    for source, store in zip(data.sources, stores, strict=True):
        if list(store.sizes) != list(stores[0].sizes):
            raise UserError(
                f"The latents in {source.root} have other sizes than those in {data.sources[0].root}. Encode all "
                "datasets with the same encode.resolution and encode.buckets."
            )
        if store.text_dtype != stores[0].text_dtype:
            raise UserError(
                f"The text embeddings in {source.root} are in {store.text_dtype}, and those in {data.sources[0].root} "
                f"in {stores[0].text_dtype}. Encode all datasets with the same encode.text_embeddings."
            )
    return MixedStore(stores, [source.weight for source in data.sources])


def require_samples(data: DataConfig) -> None:
    """Raises UserError at once if a dataset has no latents, or no images with `data.online_vae`."""
    for source in data.all_sources:
        root = training_root(source.root, data.online_vae)
        images = DatasetDir(root).packed_table(0).parent
        if not data.online_vae:
            require_latents(root)
        elif not any(images.glob("[0-9]*.parquet")):
            raise no_images(images)


def make_plan(store: SampleStore, config: TrainConfig, num_held_out: int = 0) -> SamplePlan:
    """Plans the order of a run's samples, leaving the last `num_held_out` out of all epochs.

    UserError if batches cannot be split into groups of one size, or nothing is left to train on.
    """
    return plan_samples([part.counts for part in parts_of(store)], config, _group(store, config), num_held_out)


def parts_of(store: SampleStore) -> tuple[SampleStore, ...]:
    """The stores of a run's datasets, in order."""
    return store.stores if isinstance(store, MixedStore) else (store,)


def sample_record(store: SampleStore, config: TrainConfig, origin: Origin | None = None) -> SampleRecord:
    """What the numbers of a run's samples mean; the run began with the weights of `origin`, if that is a run."""
    sources = [
        RecordedSource.of(source.root, part.shards)
        for source, part in zip(config.data.all_sources, parts_of(store), strict=True)
    ]
    stage: Stage = "pack" if config.data.online_vae else "encode"
    sizes = tuple((height, width) for height, width in store.sizes)
    return SampleRecord(stage, sizes, tuple(sources), origin)


def _group(store: SampleStore, config: TrainConfig) -> int:
    group, whole = config.data.bucket_group, config.global_batch_size
    micro = 1 if config.micro_batch_size == "auto" else config.micro_batch  # auto takes one that divides the group
    if len(store.sizes) > 1 and not group:
        raise UserError(
            f"The latents in {config.data.name} have {len(store.sizes)} sizes. Set data.bucket_group to a multiple of "
            f"micro_batch_size that divides global_batch_size, such as {micro}."
        )
    if group and len(store.sizes) == 1:
        raise UserError(f"The latents in {config.data.name} have one size: set data.bucket_group to 0.")
    if group and (group % micro or whole % group):
        raise UserError(
            f"data.bucket_group {group} has to be a multiple of micro_batch_size {micro} and to divide "
            f"global_batch_size {whole}, so that every micro-batch is of one size; {micro} would be."
        )
    return max(1, group)


def _require_texts(store: LatentStore, config: TrainConfig, root: Path) -> None:
    """Refuses latents without text embeddings, or with those of another text encoder or tokenizer."""
    from sdtrain.formats.frozen import text_encoder_digest  # late, as below

    stored = store.info.get("text_embeddings")
    if stored is None:
        raise UserError(
            f"The latents in {root} have no text embeddings. Encode with `encode: {{text_embeddings: bf16}}`, or set "
            "data.text_embeddings to online."
        )
    if stored["sha256"] != text_encoder_digest(config.text_encoder):
        raise UserError(
            f"The text embeddings in {root} are of another text encoder or tokenizer ({stored['text_encoder']}) than "
            f"the config's text_encoder, {config.text_encoder}. Encode again, or set data.text_embeddings to online."
        )


def _open_latents(root: Path, config: TrainConfig, scaling_factor: float) -> LatentStore:
    from sdtrain.formats.frozen import (
        recorded_vae_digest,  # late: DeepSpeed must not be imported before the ranks join
    )

    open_shards = max(1, OPEN_SHARDS // len(config.data.all_sources))
    is_cached = config.data.text_embeddings == "cached"
    reads_captions = config.data.captions is not None
    store = LatentStore(root, config.data.resolution, config.data.verify, open_shards, is_cached, reads_captions)
    expected = {
        "vae_sha256": recorded_vae_digest(config.vae, store.info.get("vae_sha256")),
        "resolution": config.data.resolution,
        "scaling_factor": scaling_factor,
        "normalisation": NORMALISATION,
    }
    check_cache(store.info, expected, root / "latents")
    if is_cached:
        _require_texts(store, config, root)
    store.check_shards()
    return store
