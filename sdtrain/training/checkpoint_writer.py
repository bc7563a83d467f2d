"""Writes the checkpoints of a run, by all ranks together, synchronously or in a thread, and purges old ones.

The files are safetensors (https://github.com/huggingface/safetensors#format). The library's writer copies every tensor
into Python bytes under the GIL, which would stop the training thread for seconds; ours writes in pieces, without a
second copy, and computes the digest on the way.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sdtrain.config.sections import CheckpointConfig
from sdtrain.dataset.files import publish
from sdtrain.errors import UserError
from sdtrain.formats.checkpoint import STATE, Checkpoint, Layout, ParameterSlot, finished, folder_of, newest_whole
from sdtrain.training.guards import ADVICE

_CHUNK = 2**24
_MEANINGS = {
    "master": "The weight",
    "exp_avg": "Adam's first moment",
    "exp_avg_sq": "Adam's second moment",
    "ema": "The average",
}
_CHUNK_BYTES = 16 * 2**20
_ALIGNMENT = 8


class CheckpointStore:
    """Reads and writes a run's checkpoints. All ranks call every method together, one at a time.

    `group` is a gloo group for this class alone, because its threads communicate while the main threads do.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, rank: int, world_size: int, group: Any = None):
        self.run_dir = run_dir
        self._config, self._group = config, group
        self._rank, self._world_size = rank, world_size

    def save(self, step: int, state: Mapping[str, torch.Tensor], **layout: Any) -> Path:
        """Writes this rank's part of the state, equal-length flat vectors in host memory; returns the finished folder.

        UserError for a value that is not finite, or a full disk, on any rank; the previous checkpoint stays.
        """
        self._all_ranks(lambda: self._require_finite(state, layout["parameters"]))
        final = folder_of(self.run_dir) / f"step-{step:08d}"
        partial = _partial(final)
        self._on_first_rank(lambda: _fresh(partial))
        names = [f"rank-{rank:05d}-of-{self._world_size:05d}.safetensors" for rank in range(self._world_size)]
        digests = self._all_ranks(lambda: _write(partial / names[self._rank], state))
        files = dict(zip(names, digests, strict=True))
        size = len(state["master"])
        description = Layout(step=step, world_size=self._world_size, partition_numel=size, files=files, **layout)
        self._on_first_rank(lambda: self._finish(partial, final, description))
        return final

    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint, or None; warns of damaged ones."""

        def choose() -> str | None:
            found = newest_whole(self.run_dir)
            return str(found.path) if found else None

        path = self._on_first_rank(choose)
        return Checkpoint(Path(path)) if path else None

    def _require_finite(self, state: Mapping[str, torch.Tensor], parameters: Sequence[ParameterSlot]) -> None:
        for name in STATE:
            if (position := first_nonfinite(state[name])) is not None:
                place = position + self._rank * len(state[name])
                inside = (slot.name for slot in parameters if slot.offset <= place < slot.offset + slot.numel)
                raise UserError(
                    f"{_MEANINGS[name]} of {next(inside, 'the padding')} is {float(state[name][position])}, so this "
                    f"state was not written; the checkpoint before it is whole. {ADVICE}"
                )

    def _finish(self, partial: Path, final: Path, layout: Layout) -> None:
        with publish(partial / "layout.json") as temporary:
            temporary.write_text(layout.model_dump_json(indent=1) + "\n")
        if final.exists():  # damaged, or it would have been resumed from
            _remove(final)
        partial.replace(final)
        with publish(self.run_dir / "latest") as temporary:
            temporary.write_text(f"{final.name}\n")
        self._purge(final)

    def _purge(self, newest: Path) -> None:
        """Removes old checkpoints that are not permanent. Newer ones are damaged and do not count."""
        for path in [p for p in finished(newest.parent) if p <= newest][self._config.keep_last :]:
            step = int(path.name.removeprefix("step-"))
            if not self._config.keep_every or step % self._config.keep_every:
                _remove(path)

    def _on_first_rank(self, action: Callable[[], Any]) -> Any:
        return self._all_ranks(action if self._rank == 0 else lambda: None)[0]

    def _all_ranks(self, action: Callable[[], Any]) -> list[Any]:
        """Results of `action` on all ranks; an error on one is raised on all, so that none waits for ever."""
        try:
            outcome, failure = action(), None
        except (UserError, OSError) as error:
            outcome, failure = None, f"rank {self._rank}: {error}" if self._world_size > 1 else str(error)
        if self._world_size == 1:
            outcomes: list[Any] = [(outcome, failure)]
        else:
            outcomes = [None] * self._world_size
            dist.all_gather_object(outcomes, (outcome, failure), group=self._group)
        if failures := [failed for _, failed in outcomes if failed]:
            raise UserError(f"The checkpoint failed. {failures[0]}")
        return [result for result, _ in outcomes]


def first_nonfinite(vector: torch.Tensor) -> int | None:
    """Position of the first NaN or infinity of a flat vector, or None, without a second vector of its size."""
    for number, chunk in enumerate(vector.split(_CHUNK)):
        if not all(math.isfinite(extreme) for extreme in torch.aminmax(chunk)):
            return number * _CHUNK + int((~torch.isfinite(chunk)).nonzero()[0])
    return None


class CheckpointSaver:
    """Saves synchronously or in a thread, as configured; at most one save is pending."""

    def __init__(self, store: CheckpointStore, mode: str):
        self._store, self._is_async = store, mode == "async"
        self._host: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._error: BaseException | None = None
        self._step = -1

    @property
    def has_failed(self) -> bool:
        """Whether the pending save has failed on this rank; `wait` raises the error."""
        return self._error is not None

    def start(self, step: int, state: Mapping[str, torch.Tensor], **layout: Any) -> None:
        """Saves the state after `step`, once the previous save is done; async: returns after the copy.

        UserError if the previous save failed, or this one if it is not async.
        """
        self.wait()
        if step == self._step:
            return
        self._step = step
        if not self._is_async:
            self._path = self._store.save(step, {name: state[name].detach().cpu() for name in STATE}, **layout)
            return
        copied = self._copy(state)
        work = threading.Thread(target=self._save, args=(step, copied, layout), name="checkpoint", daemon=True)
        self._thread = work
        work.start()

    def wait(self) -> Path | None:
        """Waits for the pending save; returns this process's last checkpoint, or None.

        UserError if it could not be written, on any rank.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._path

    def _save(self, step: int, copied: torch.cuda.Event | None, layout: Mapping[str, Any]) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            self._path = self._store.save(step, self._host, **layout)
        except BaseException as error:  # handed to the main thread, which raises it
            self._error = error

    def _copy(self, state: Mapping[str, torch.Tensor]) -> torch.cuda.Event | None:
        """Copies the state to reused host memory; returns an event if the copy is not done yet.

        Copies from a GPU are queued before the next step's kernels: they see this step's state without waiting.
        """
        on_gpu = state["master"].is_cuda
        for name in STATE:
            source = state[name].detach()
            if name not in self._host:
                self._host[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=on_gpu)
            self._host[name].copy_(source, non_blocking=on_gpu)
        if not on_gpu:
            return None
        copied = torch.cuda.Event()
        copied.record()
        return copied


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _fresh(folder: Path) -> None:
    for leftover in folder.parent.glob(".step-*.partial"):
        shutil.rmtree(leftover)
    folder.mkdir(parents=True)


def _remove(folder: Path) -> None:
    """Renames before deleting, so that a kill leaves no partial checkpoint."""
    doomed = folder.with_name(f".{folder.name}.purged.partial")
    folder.replace(doomed)
    shutil.rmtree(doomed)


def _write(path: Path, state: Mapping[str, torch.Tensor]) -> str:
    with publish(path) as temporary:
        return write_tensors(temporary, {name: state[name] for name in STATE})


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Writes flat fp32 tensors and syncs them to disk; returns the file's intended sha256, which exposes disk errors.

    OSError if the disk is full, or fails.
    """
    with ThreadPoolExecutor(1) as hasher, path.open("wb") as file:
        digest = hasher.submit(_sha256, tensors)
        for piece in _pieces(tensors):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return digest.result()


def _sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(tensors):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """Yields the file's bytes in order, without copying tensors."""
    yield _header(tensors)
    for tensor in tensors.values():
        content = tensor.detach().numpy().data.cast("B")
        for start in range(0, len(content), _CHUNK_BYTES):
            yield content[start : start + _CHUNK_BYTES]


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype is not torch.float32 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(f"{name} is not a flat fp32 tensor")
        end = offset + 4 * tensor.numel()
        entries[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
