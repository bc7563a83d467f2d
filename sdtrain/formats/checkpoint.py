"""Reads checkpoints: flat fp32 partitions as safetensors, for any number of ranks and without DeepSpeed.

    checkpoints/step-00000200/layout.json              names, shapes, offsets, digests; written last
                              rank-00000-of-00002.safetensors   master, exp_avg, exp_avg_sq, ema
    latest                                             name of the newest checkpoint

All ranks share one file system. A folder gets its final name only once every file in it is whole.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from pydantic import Field, ValidationError
from safetensors import safe_open

from sdtrain.dataset.files import sha256_of
from sdtrain.errors import UserError
from sdtrain.models.layout import stored_layout, usual_layout
from sdtrain.settings import Settings

FORMAT = 1
STATE = ("master", "exp_avg", "exp_avg_sq", "ema")


class ParameterSlot(Settings):
    """One parameter's position in the flat vector."""

    name: str
    shape: tuple[int, ...]
    """The usual one, (O, I, kH, kW) for a convolution."""
    offset: int
    is_channels_last: bool = False
    """Its elements lie in the order of (O, kH, kW, I)."""

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)

    def flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of `shape` as the vector has it."""
        return (stored_layout(tensor) if self.is_channels_last else tensor).reshape(-1)

    def shaped(self, flat: torch.Tensor) -> torch.Tensor:
        """The inverse of `flat`: of `shape`, contiguous."""
        if not self.is_channels_last:
            return flat.reshape(self.shape)
        outputs, inputs, *kernel = self.shape
        return usual_layout(flat.reshape(outputs, *kernel, inputs))


class GuardState(Settings):
    """The step guard's state, saved so that a resumed run makes the same decisions."""

    num_skipped: int = 0
    """Skipped optimizer steps since the start of the run."""
    num_in_a_row: int = 0
    """Consecutive skips up to now."""
    recent_norms: tuple[float, ...] = ()
    """Gradient norms of the last applied steps; kept only if spikes are checked."""


class Layout(Settings):
    """A checkpoint's contents."""

    format: int = FORMAT
    step: int
    """Optimizer steps done, including skipped ones."""
    world_size: int
    partition_numel: int
    """Elements in each rank's file, including the last one's padding."""
    config_digest: str
    data_digest: str
    files: dict[str, str]
    """File name -> sha256, in rank order."""
    parameters: list[ParameterSlot]
    guard: GuardState = GuardState()
    loss_scaler: dict[str, float] = Field(default={})
    """fp16's dynamic loss scaler; empty for other precisions."""
    post_hoc: tuple[float, ...] = ()
    """Lengths of the averages besides `ema`, under `average_name`; a snapshot holds these alone."""
    num_ema_updates: int | None = Field(default=None, ge=0)
    """Updates of the average, including those of the runs it continues; None in old checkpoints."""

    @property
    def num_applied(self) -> int:
        """Optimizer steps that changed the weights."""
        return self.step - self.guard.num_skipped

    @property
    def ema_updates(self) -> int:
        """Updates of the average; old checkpoints count only their own run's."""
        return self.num_applied if self.num_ema_updates is None else self.num_ema_updates


def slots_of(
    parameters: Iterable[tuple[str, Iterable[int]]], channels_last: Container[str] = frozenset()
) -> list[ParameterSlot]:
    """Lays parameters, given by name and usual shape, one after another; `channels_last` ones as (O, kH, kW, I)."""
    slots, offset = [], 0
    for name, shape in parameters:
        is_channels_last = name in channels_last
        slots.append(ParameterSlot(name=name, shape=tuple(shape), offset=offset, is_channels_last=is_channels_last))
        offset += slots[-1].numel
    return slots


class Checkpoint:
    """A finished checkpoint folder; UserError if its layout is missing, damaged or of another format."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.layout = Layout.model_validate_json((path / "layout.json").read_bytes())
        except (OSError, ValidationError) as error:
            raise UserError(f"{path} is not a checkpoint that this version can read.") from error
        if self.layout.format != FORMAT:
            raise UserError(f"{path} has format {self.layout.format}; this sdtrain reads {FORMAT}.")

    def verify(self) -> None:
        """Compares every file with its digest; UserError if one is missing or changed."""
        for name, digest in self.layout.files.items():
            file = self.path / name
            if not file.is_file() or sha256_of(file) != digest:
                raise UserError(f"{file} is missing or damaged.")

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of one flat vector, fp32, however sharded; zeros past its end."""
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

    def read_as(self, slots: Sequence[ParameterSlot], name: str, start: int, stop: int) -> torch.Tensor:
        """As `read`, of the same parameters in the memory layouts of `slots`."""
        result = self.read(name, start, stop)
        for slot, stored in zip(slots, self.layout.parameters, strict=True):
            first, last = max(start, slot.offset), min(stop, slot.offset + slot.numel)
            if first < last and slot.is_channels_last != stored.is_channels_last:
                whole = slot.flat(self._whole(name, stored))
                result[first - start : last - start] = whole[first - slot.offset : last - slot.offset]
        return result

    def holds(self, slots: Sequence[ParameterSlot]) -> bool:
        """Whether its parameters are these, in whatever memory layout."""
        own, others = (
            [slot.model_copy(update={"is_channels_last": False}) for slot in each]
            for each in (self.layout.parameters, slots)
        )
        return own == others

    def weights(self, which: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole fp32 parameters by name, one at a time; `which` is "master" or "ema"."""
        for slot in self.layout.parameters:
            yield slot.name, self._whole(which, slot)

    def _whole(self, name: str, slot: ParameterSlot) -> torch.Tensor:
        return slot.shaped(self.read(name, slot.offset, slot.offset + slot.numel))


def folder_of(run_dir: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def snapshots_of(run_dir: Path) -> Path:
    """The folder of a run's snapshots of averages; each is written as a checkpoint is, and never purged."""
    return run_dir / "averages"


def average_name(length: float) -> str:
    """A power-function average's vector in checkpoints and snapshots, by its length."""
    return f"ema_{length:g}"


def finished(folder: Path) -> list[Path]:
    """The folders with a final name, newest first."""
    return sorted(folder.glob("step-[0-9]*"), reverse=True)


def newest_whole(run_dir: Path) -> Checkpoint | None:
    """A run's newest whole checkpoint, or None; logs a warning for each damaged one that it skips."""
    for path in finished(folder_of(run_dir)):
        try:
            checkpoint = Checkpoint(path)
            checkpoint.verify()
            return checkpoint
        except UserError as error:
            print(f"warning: {error} Going on from the checkpoint before it.", flush=True)
    return None


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest whole one of a run directory; UserError if there is none."""
    if (path / "layout.json").exists():
        return Checkpoint(path)
    found = newest_whole(path)
    if found is None:
        raise UserError(f"There is no finished checkpoint in {path}. Name a run directory or one of its checkpoints.")
    return found
