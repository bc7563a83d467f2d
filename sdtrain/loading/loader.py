"""Prepares training batches in the background."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPTokenizer

from sdtrain.config import TrainConfig
from sdtrain.diffusion import drop_captions, offset_noise
from sdtrain.errors import UserError
from sdtrain.loading.captions import Caption, CaptionMix
from sdtrain.loading.crops import Crop
from sdtrain.loading.image_store import OnlineVae
from sdtrain.loading.sample_plan import SampleIndices, SampleNoise, sample_noise
from sdtrain.loading.sample_store import Fetched, SampleStore
from sdtrain.loading.sources import make_plan
from sdtrain.loading.substitutes import SubstituteLog
from sdtrain.models.batch_rows import fill_rows
from sdtrain.models.text import CaptionTokens

_SUBSTITUTES = 16
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MicroBatch:
    """One rank's input for one forward pass."""

    moments: torch.Tensor
    """(B, 8, h, w) float16, unscaled."""
    posterior: torch.Tensor
    """(B, 4, h, w) float32 standard normal, for the VAE's posterior."""
    noise: torch.Tensor
    """(B, 4, h, w) float32, added to the latent; standard normal, unless offset noise is on."""
    timesteps: torch.Tensor
    """(B,) int64."""
    token_ids: torch.Tensor
    """(B, L) int64; dropped captions are the tokens of ""."""
    context: torch.Tensor | None = field(default=None, kw_only=True)
    """(B, L, width): the captions' cached embeddings, with that of "" for dropped ones; None: to be encoded."""

    def to(self, device: torch.device) -> MicroBatch:
        """The batch on `device`, without waiting for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """The batch in pinned memory, for asynchronous copies to the GPU."""
        return self._each(torch.Tensor.pin_memory)

    def filled(self, size: int) -> MicroBatch:
        """As many samples as a compiled network expects, the last one repeated."""
        return self._each(lambda tensor: fill_rows(tensor, size))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class PixelBatch(MicroBatch):
    """A batch of images: `moments` holds (B, 3, H, W) uint8 pixels until the batch moves to its device."""

    encoder: OnlineVae

    def to(self, device: torch.device) -> MicroBatch:
        """The batch on `device`, its images encoded there."""
        there = super().to(device)
        tensors = {name: value for name, value in vars(there).items() if name != "encoder"}
        return MicroBatch(**tensors | {"moments": self.encoder(there.moments)})


@dataclass(frozen=True)
class DrawnSample:
    """One sample of a batch, and what was drawn for it.

    `index` is its number in the store, `epoch` how often it was seen before; `source` is the caption's.
    A dropped caption trains as "".
    """

    index: int
    epoch: int
    uid: str
    caption: str
    source: str
    is_dropped: bool
    timestep: int
    crop: Crop | None


def captions_in_step(store: SampleStore, config: TrainConfig, step: int, indices: NDArray[np.int64]) -> list[Caption]:
    """The captions, with their sources, that samples train on in an optimizer step, unless dropped (`sample_noise`).

    `store` is that of `open_samples`. UserError if a sample is damaged.
    """
    fetched = store.fetch(indices, np.zeros_like(indices), config.seed)
    fetched.require_whole()
    return _chosen(CaptionMix(config.data.captions), config.seed, step, fetched)


def _chosen(mix: CaptionMix, seed: int, step: int, fetched: Fetched) -> list[Caption]:
    samples = zip(fetched.uids, fetched.captions, strict=True)
    return [
        mix.choose(seed, step, uid, own, fetched.choices.get(position, ()))
        for position, (uid, own) in enumerate(samples)
    ]


class BatchMaker:
    """Makes one rank's micro-batches, each a pure function of (seed, step).

    Attributes:
        accumulation: micro-batches of one optimizer step.
        num_substituted: damaged samples replaced in the batches made so far (`data.on_corrupt: skip`).
    """

    def __init__(
        self,
        store: SampleStore,
        tokenizer: CLIPTokenizer,
        config: TrainConfig,
        rank: int,
        world_size: int,
        empty_text: torch.Tensor | None = None,
    ):
        self._empty_text = empty_text
        self._store, self._config = store, config
        self._rank, self._world_size = rank, world_size
        self._plan = make_plan(store, config, config.validation.num_samples)
        self._tokens, self._mix = CaptionTokens(tokenizer), CaptionMix(config.data.captions)
        self.accumulation = config.accumulation(world_size)
        self.num_substituted = 0
        self._named = set[str]()
        self._naming = threading.Lock()

    def __len__(self) -> int:
        return len(self._store)

    def make(self, step: int, micro_step: int, log: SubstituteLog | None = None) -> MicroBatch:
        """The rank's share of micro-step `micro_step` of optimizer step `step`; `log` notes substitutes."""
        config = self._config
        samples = self._plan.micro_batch(step, micro_step, self._rank, self._world_size, config.micro_batch)
        return self.assemble(samples, step, config.caption_dropout, log)

    def drawn(self, step: int, position: int) -> tuple[MicroBatch, DrawnSample]:
        """One sample of optimizer step `step`, at a position of its batch, with what was drawn for it.

        The tensors, of a batch of one, are those that a rank trains on, however many ranks there are.
        """
        config = self._config
        samples = self._plan.at(np.array([step * config.global_batch_size + position], dtype=np.int64))
        index, epoch = int(samples.indices[0]), int(samples.epochs[0])
        fetched, substitutes = self._fetch(samples, self._store.buffer(1, self._store.size_number(index)))
        index = substitutes.get(0, index)
        caption = _chosen(self._mix, config.seed, step, fetched)[0]
        draw = sample_noise(config.seed, step, fetched.uids[0], config.diffusion.num_timesteps, (4, 1, 1))
        described = DrawnSample(
            index=index,
            epoch=epoch,
            uid=fetched.uids[0],
            caption=caption.text,
            source=caption.source,
            is_dropped=draw.drop < config.caption_dropout,
            timestep=draw.timestep,
            crop=self._store.crop(index, epoch, config.seed),
        )
        return self.assemble(samples, step, config.caption_dropout), described

    def assemble(
        self, samples: SampleIndices, step: int, caption_dropout: float, log: SubstituteLog | None = None
    ) -> MicroBatch:
        """The batch of some samples of one size, with their noise of optimizer step `step`."""
        config, num_samples = self._config, len(samples.indices)
        size_number = self._store.size_number(int(samples.indices[0]))
        rows = self._store.buffer(num_samples, size_number)
        fetched, substitutes = self._fetch(samples, rows)
        if log and substitutes:
            log.add(step, samples, substitutes)
        shape = (num_samples, 4, *self._store.sizes[size_number])
        posterior, noise = np.empty(shape, np.float32), np.empty(shape, np.float32)
        draws = self._draws(step, fetched.uids, posterior, noise)
        texts = [caption.text for caption in _chosen(self._mix, config.seed, step, fetched)]
        captions = drop_captions(texts, [draw.drop for draw in draws], caption_dropout)
        offsets = torch.from_numpy(np.stack([draw.offset for draw in draws]))
        batch = MicroBatch(
            moments=torch.from_numpy(rows),
            posterior=torch.from_numpy(posterior),
            noise=offset_noise(torch.from_numpy(noise), offsets, config.diffusion.offset_noise),
            timesteps=torch.tensor([draw.timestep for draw in draws]),
            token_ids=self._tokens(captions),
            context=self._context(captions, fetched),
        )
        return PixelBatch(**vars(batch), encoder=OnlineVae(config.vae)) if config.data.online_vae else batch

    def _context(self, captions: Sequence[str], fetched: Fetched) -> torch.Tensor | None:
        """The cached embeddings of captions, some of which were dropped."""
        if self._empty_text is None:
            return None
        bits = torch.from_numpy(np.stack([fetched.texts[position] for position in range(len(captions))]))
        context = bits.view(self._empty_text.dtype)
        context[[position for position, caption in enumerate(captions) if not caption]] = self._empty_text
        return context

    def _draws(
        self, step: int, uids: Sequence[str], posterior: NDArray[np.float32], noise: NDArray[np.float32]
    ) -> list[SampleNoise]:
        length, shape = self._config.diffusion.num_timesteps, posterior.shape[1:]
        return [
            sample_noise(self._config.seed, step, uid, length, shape, (posterior[position], noise[position]))
            for position, uid in enumerate(uids)
        ]

    def prefetch(
        self, first_step: int, last_step: int, pin_memory: bool, log: SubstituteLog | None = None
    ) -> Iterator[MicroBatch]:
        """All micro-batches of steps [first_step, last_step), prepared by threads during training."""
        wanted = ((step, k) for step in range(first_step, last_step) for k in range(self.accumulation))
        ahead: deque[Future[MicroBatch]] = deque()
        pool = ThreadPoolExecutor(self._config.data.num_workers, "latent-loader")
        try:
            for step, micro_step in wanted:
                ahead.append(pool.submit(self._make_pinned if pin_memory else self.make, step, micro_step, log))
                if len(ahead) > self._config.data.num_prefetch:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _make_pinned(self, step: int, micro_step: int, log: SubstituteLog | None) -> MicroBatch:
        return self.make(step, micro_step, log).pinned()

    def _fetch(self, samples: SampleIndices, rows: NDArray[Any]) -> tuple[Fetched, dict[int, int]]:
        """Reads samples into `rows`; `data.on_corrupt: skip` replaces damaged ones, by position by these numbers.

        A substitute is drawn from (seed, sample, attempt) within its dataset and size: equal on every rank and resume.
        """
        seed = self._config.seed
        fetched, substitutes = self._store.fetch(samples.indices, samples.epochs, seed, rows), dict[int, int]()
        for attempt in range(_SUBSTITUTES):
            if not fetched.damaged:
                return fetched, substitutes
            if self._config.data.on_corrupt == "stop":
                fetched.require_whole()
            self._note(fetched)
            positions = sorted(fetched.damaged)
            others = np.array([self._substitute(int(samples.indices[position]), attempt) for position in positions])
            spare = np.empty_like(rows[: len(positions)])
            fetched.put(positions, self._store.fetch(others, samples.epochs[positions], seed, spare))
            rows[positions] = spare
            substitutes |= zip(positions, others.tolist(), strict=True)
        raise UserError(
            f"A damaged sample's {_SUBSTITUTES} substitutes are damaged as well, so on_corrupt: skip cannot help; "
            f"repair its shard: {next(iter(fetched.damaged.values()))}"
        )

    def _substitute(self, index: int, attempt: int) -> int:
        first, size = self._plan.stream_of(index)
        name = f"substitute {self._config.seed} {index} {attempt}"
        return first + int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") % size

    def _note(self, fetched: Fetched) -> None:
        with self._naming:
            self.num_substituted += len(fetched.damaged)
            for sentence in set(fetched.damaged.values()) - self._named:
                self._named.add(sentence)
                _log.warning("Another sample takes the place of a damaged one. %s", sentence)
