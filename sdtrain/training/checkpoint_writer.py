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
from sdtrain.formats.checkpoint import (
    STATE,
    Checkpoint,
    Layout,
    ParameterSlot,
    average_name,
    finished,
    folder_of,
    newest_whole,
    snapshots_of,
)
from sdtrain.training.guards import ADVICE

_CHUNK = 2**24
_MEANINGS = {
    "master": "The weight",
    "exp_avg": "Adam's first moment",
    "exp_avg_sq": "Adam's second moment",
    "ema": "The average",
}
_DTYPES = {torch.float32: "F32", torch.float16: "F16"}
_CHUNK_BYTES = 16 * 2**20
_ALIGNMENT = 8


class CheckpointStore:
    """Reads and writes a run's checkpoints. All ranks call every method together, one at a time.

    `group` is a gloo group for this class alone, because its threads communicate while the main threads do.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        rank: int,
        world_size: int,
        group: Any = None,
        snapshots: torch.dtype = torch.float16,
    ):
        self.run_dir, self._snapshots = run_dir, snapshots
        self._config, self._group = config, group
        self._rank, self._world_size = rank, world_size

    def save(self, step: int, state: Mapping[str, torch.Tensor], **layout: Any) -> Path:
        """Writes this rank's part of the state, equal-length flat vectors in host memory; returns the finished folder.

        UserError for a value that is not finite, or a full disk, on any rank; the previous checkpoint stays.
        """
        self._all_ranks(lambda: self._require_finite(state, layout["parameters"]))
        names = [average_name(length) for length in layout.get("post_hoc", ())]
        if names:  # first, so that every checkpoint has its snapshot
            self._write_folder(snapshots_of(self.run_dir), step, lambda: self._rounded(state, names), layout)
        order = (*STATE, *names)
        final = self._write_folder(folder_of(self.run_dir), step, lambda: {name: state[name] for name in order}, layout)
        self._on_first_rank(lambda: self._announce(final))
        return final

    def forget_snapshots_after(self, step: int) -> None:
        """Removes snapshots of later steps, which are trained again."""

        def forget() -> None:
            for path in finished(snapshots_of(self.run_dir)):
                if int(path.name.removeprefix("step-")) > step:
                    _remove(path)

        self._on_first_rank(forget)

    def _write_folder(
        self, folder: Path, step: int, state: Callable[[], Mapping[str, torch.Tensor]], layout: Mapping[str, Any]
    ) -> Path:
        """Writes this rank's part, and a layout when all have; returns the finished folder."""
        final = folder / f"step-{step:08d}"
        partial = _partial(final)
        self._on_first_rank(lambda: _fresh(partial))
        names = [f"rank-{rank:05d}-of-{self._world_size:05d}.safetensors" for rank in range(self._world_size)]
        parts = self._all_ranks(lambda: _write(partial / names[self._rank], state()))
        files = {name: digest for name, (digest, _) in zip(names, parts, strict=True)}
        size = parts[self._rank][1]
        description = Layout(step=step, world_size=self._world_size, partition_numel=size, files=files, **layout)
        self._on_first_rank(lambda: _finish(partial, final, description))
        return final

    def _rounded(self, state: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, torch.Tensor]:
        rounded = {name: state[name].to(self._snapshots) for name in names}
        for name, tensor in rounded.items():
            if first_nonfinite(tensor) is not None:
                raise UserError(f"{name} has numbers that fp16 cannot hold. Set ema.snapshots to fp32.")
        return rounded

    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint, or None; warns of damaged ones."""

        def choose() -> str | None:
            found = newest_whole(self.run_dir)
            return str(found.path) if found else None

        path = self._on_first_rank(choose)
        return Checkpoint(Path(path)) if path else None

    def _require_finite(self, state: Mapping[str, torch.Tensor], parameters: Sequence[ParameterSlot]) -> None:
        for name in state:
            if (position := first_nonfinite(state[name])) is not None:
                place = position + self._rank * len(state[name])
                inside = (slot.name for slot in parameters if slot.offset <= place < slot.offset + slot.numel)
                what = _MEANINGS.get(name, "The average")
                raise UserError(
                    f"{what} of {next(inside, 'the padding')} is {float(state[name][position])}, so this "
                    f"state was not written; the checkpoint before it is whole. {ADVICE}"
                )

    def _announce(self, final: Path) -> None:
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
            on_host = {name: tensor.detach().cpu() for name, tensor in state.items()}
            self._path = self._store.save(step, on_host, **layout)
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
        for name, tensor in state.items():
            source = tensor.detach()
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


def _write(path: Path, state: Mapping[str, torch.Tensor]) -> tuple[str, int]:
    """Returns the file's digest, and the number of elements in each of its vectors."""
    with publish(path) as temporary:
        return write_tensors(temporary, state), len(next(iter(state.values())))


def _finish(partial: Path, final: Path, layout: Layout) -> None:
    with publish(partial / "layout.json") as temporary:
        temporary.write_text(layout.model_dump_json(indent=1) + "\n")
    if final.exists():  # damaged, or it would have been resumed from
        _remove(final)
    partial.replace(final)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Writes flat fp32 or fp16 tensors and syncs them to disk.

    Returns the file's intended sha256, which exposes disk errors. OSError if the disk is full, or fails.
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
        if tensor.dtype not in _DTYPES or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(f"{name} is not a flat fp32 or fp16 tensor")
        end = offset + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
