"""Checkpoints: flat fp32 partitions as safetensors, readable by any number of ranks and without DeepSpeed.

    checkpoints/step-00000200/layout.json              names, shapes, offsets, digests; written last
                              rank-00000-of-00002.safetensors   master, exp_avg, exp_avg_sq, ema
    latest                                             name of the newest checkpoint

All ranks see one file system. A folder has its final name only when every file in it is whole.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sdtrain.data.files import publish, raise_if_disk_full, sha256_of
from sdtrain.errors import UserError
from sdtrain.settings import Settings

FORMAT = 1
STATE = ("master", "exp_avg", "exp_avg_sq", "ema")


class ParameterSlot(Settings):
    """Where one parameter lies in the flat vector."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


class Layout(Settings):
    """What a checkpoint holds."""

    format: int = FORMAT
    step: int
    """Optimizer steps done."""
    world_size: int
    partition_numel: int
    """Elements in each rank's file, padding of the last one included."""
    config_digest: str
    data_digest: str
    files: dict[str, str]
    """File name -> sha256, in the order of the ranks."""
    parameters: list[ParameterSlot]


def slots_of(parameters: Iterable[tuple[str, Iterable[int]]]) -> list[ParameterSlot]:
    """Parameters laid one behind the other in the given order."""
    slots, offset = [], 0
    for name, shape in parameters:
        slots.append(ParameterSlot(name=name, shape=tuple(shape), offset=offset))
        offset += slots[-1].numel
    return slots


class Checkpoint:
    """A finished checkpoint folder.

    Raises:
        UserError: its layout is missing, damaged or of another format.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.layout = Layout.model_validate_json((path / "layout.json").read_bytes())
        except (OSError, ValidationError) as error:
            raise UserError(f"{path} is not a checkpoint that this version can read.") from error
        if self.layout.format != FORMAT:
            raise UserError(f"{path} has format {self.layout.format}; this sdtrain reads {FORMAT}.")

    def verify(self) -> None:
        """Compares every file with its digest.

        Raises:
            UserError: a file is missing or was changed.
        """
        for name, digest in self.layout.files.items():
            file = self.path / name
            if not file.is_file() or sha256_of(file) != digest:
                raise UserError(f"{file} is missing or damaged.")

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of one of STATE's flat vectors, however it was cut; zeros past its end."""
        result, size = torch.zeros(stop - start), self.layout.partition_numel
        last_slot = self.layout.parameters[-1]
        stop = min(stop, last_slot.offset + last_slot.numel)
        for rank, file_name in enumerate(self.layout.files):
            first, last = max(start, rank * size), min(stop, (rank + 1) * size)
            if first < last:
                with safe_open(self.path / file_name, "pt") as file:
                    part = file.get_slice(name)[first - rank * size : last - rank * size]
                result[first - start : last - start] = part
        return result

    def weights(self, which: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole parameters by name, fp32, one after the other; `which` is "master" or "ema"."""
        for slot in self.layout.parameters:
            yield slot.name, self.read(which, slot.offset, slot.offset + slot.numel).reshape(slot.shape)


class CheckpointStore:
    """The checkpoints of one run. Every method is called by all ranks together.

    Args:
        run_dir: the run's output directory.
        keep_last: how many stay.
        rank, world_size: this process among the ranks.
        group: a group of all ranks for Python objects (gloo).
    """

    def __init__(self, run_dir: Path, keep_last: int, rank: int, world_size: int, group: Any = None):
        self.folder, self._latest = run_dir / "checkpoints", run_dir / "latest"
        self._keep_last, self._group = keep_last, group
        self._rank, self._world_size = rank, world_size

    def save(self, step: int, state: Mapping[str, torch.Tensor], **layout: Any) -> Path:
        """Writes this rank's part of the state; returns the finished folder.

        Args:
            step: optimizer steps done.
            state: flat vectors of equal length by the names in STATE.
            layout: the other fields of Layout (config_digest, data_digest, parameters).

        Raises:
            UserError: the disk is full, on any rank.
        """
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".{final.name}.partial"
        self._on_first_rank(lambda: _fresh(partial))
        name = f"rank-{self._rank:05d}-of-{self._world_size:05d}.safetensors"
        digests = self._all_ranks(lambda: _write_state(partial / name, state))
        names = [f"rank-{rank:05d}-of-{self._world_size:05d}.safetensors" for rank in range(self._world_size)]
        files = dict(zip(names, digests, strict=True))
        size = len(state["master"])
        description = Layout(step=step, world_size=self._world_size, partition_numel=size, files=files, **layout)
        self._on_first_rank(lambda: self._finish(partial, final, description))
        return final

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None; damaged ones are passed over with a warning."""

        def choose() -> str | None:
            for path in _newest_first(self.folder):
                try:
                    Checkpoint(path).verify()
                    return str(path)
                except UserError as error:
                    print(f"warning: {error} Going on from the checkpoint before it.", flush=True)
            return None

        path = self._on_first_rank(choose)
        return Checkpoint(Path(path)) if path else None

    def _finish(self, partial: Path, final: Path, layout: Layout) -> None:
        with publish(partial / "layout.json") as temporary:
            temporary.write_text(layout.model_dump_json(indent=1) + "\n")
        if final.exists():  # damaged, or it would have been resumed from
            shutil.rmtree(final)
        partial.replace(final)
        with publish(self._latest) as temporary:
            temporary.write_text(f"{final.name}\n")
        for path in _newest_first(self.folder)[self._keep_last :]:
            shutil.rmtree(path)

    def _on_first_rank(self, action: Callable[[], Any]) -> Any:
        return self._all_ranks(action if self._rank == 0 else lambda: None)[0]

    def _all_ranks(self, action: Callable[[], Any]) -> list[Any]:
        """Results of `action` on all ranks; if it fails on one, every rank raises, so that none waits for ever."""
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


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: itself, or the newest whole one of a run directory.

    Raises:
        UserError: there is none.
    """
    if (path / "layout.json").exists():
        return Checkpoint(path)
    found = CheckpointStore(path, 2, 0, 1).newest()
    if found is None:
        raise UserError(f"There is no finished checkpoint in {path}. Name a run directory or one of its checkpoints.")
    return found


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-[0-9]*"), reverse=True)


def _fresh(folder: Path) -> None:
    for leftover in folder.parent.glob(".step-*.partial"):
        shutil.rmtree(leftover)
    folder.mkdir(parents=True)


def _write_state(path: Path, state: Mapping[str, torch.Tensor]) -> str:
    with publish(path) as temporary:
        try:
            save_file({name: state[name].detach().cpu().contiguous() for name in STATE}, temporary)
        except SafetensorError as error:
            if "os error 28" in str(error):
                raise_if_disk_full(OSError(28, str(error)), path)
            raise OSError(str(error)) from error
    return sha256_of(path)
