"""Reads foreign files of tensors without running any code in them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from sdtrain.errors import UserError
from sdtrain.formats.torchscript import is_torchscript, read_torchscript

SUFFIXES = (".ckpt", ".safetensors")
NOTES = "sdtrain"
"""The key of a file's JSON of what its tensors cannot say: in safetensors' metadata, or beside `state_dict`."""

# What public files' trainers left beside the tensors: callbacks, settings, a best score.
_LEFT_BEHIND = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.", "_codecs.encode")
_LEFT_BEHIND_EXACTLY = ("typing.Any", "collections.defaultdict", "builtins.dict", "builtins.list", "builtins.int")


class _Nothing:
    """Replaces a foreign object while a file is read: accepts any call and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Nothing:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of a `.safetensors`, `.ckpt` or TorchScript file by name, read on access.

    `notes` is its text under `NOTES`, or None. UserError if it is missing, damaged,
    without tensors, or asks to run code.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise UserError(f"There is no file {path}.")
        if _is_pointer(path):
            raise UserError(f"{path} is what Git keeps in the place of a large file. Fetch the file: `git lfs pull`.")
        is_pickle = path.suffix != ".safetensors"
        self._tensors, self.notes = _read_pickle(path) if is_pickle else _open_safetensors(path)
        if not self._tensors:
            raise UserError(f"{path} holds no tensors, so it is no model.")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        if isinstance(self._tensors, _Lazy):
            return self._tensors.described(name)[0]
        return tuple(self._tensors[name].shape)

    def is_floating(self, name: str) -> bool:
        """Whether the dtype is floating-point, of any width."""
        if isinstance(self._tensors, _Lazy):
            return self._tensors.described(name)[1].startswith(("F", "BF"))
        return self._tensors[name].is_floating_point()


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(24) == b"version https://git-lfs."


class _Lazy(Mapping[str, torch.Tensor]):
    """Tensors of an open safetensors file, read on access."""

    def __init__(self, file: Any):
        self._file, self._names = file, dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def described(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape, and dtype in safetensors' terms."""
        part = self._file.get_slice(name)
        return tuple(part.get_shape()), str(part.get_dtype())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


_Content = tuple[Mapping[str, torch.Tensor], str | None]


def _open_safetensors(path: Path) -> _Content:
    try:
        file = safe_open(path, "pt").__enter__()
    except (SafetensorError, OSError) as error:
        raise UserError(_damaged(path, error)) from error
    return _Lazy(file), (file.metadata() or {}).get(NOTES)


def _read_pickle(path: Path) -> _Content:
    """The tensors stay memory-mapped in the file if its format allows."""
    try:
        if is_torchscript(path):
            return read_torchscript(path), None
        with safe_globals([(_Nothing, name) for name in _left_behind(path)]):
            content = _load(path)
    except pickle.UnpicklingError as error:
        raise UserError(_unreadable(path, str(error))) from error
    except (
        BadZipFile,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
    ) as error:
        raise UserError(_damaged(path, error)) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not a dictionary of tensors, so it is no model.")
    notes = content.get(NOTES)
    tensors = content.get("state_dict", content)
    named = tensors.items() if isinstance(tensors, dict) else ()
    tensors = {name: value for name, value in named if isinstance(name, str) and isinstance(value, torch.Tensor)}
    return tensors, notes if isinstance(notes, str) else None


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6


def _left_behind(path: Path) -> list[str]:
    """The known, harmless objects that a file names beside tensors; UserError if it names any other."""
    try:
        names = sorted(get_unsafe_globals_in_checkpoint(str(path)))
    except ValueError:
        return []  # the format before PyTorch 1.6, read without stand-ins
    foreign = [name for name in names if not name.startswith(_LEFT_BEHIND) and name not in _LEFT_BEHIND_EXACTLY]
    if foreign:
        raise UserError(_refusal(path, f"It asks for {', '.join(foreign[:3])}."))
    return names


def _unreadable(path: Path, error: str) -> str:
    reason = error.rsplit("WeightsUnpickler error:", 1)[-1].split("Please")[0].strip().split("\n")[0]
    is_foreign = any(word in reason.lower() for word in ("global", "class", "instantiate", "blocked", "asks for"))
    return _refusal(path, reason) if is_foreign else f"{path} is cut short or damaged, or no file that PyTorch wrote."


def _refusal(path: Path, reason: str) -> str:
    return (
        f"{path} holds more than tensors, and reading the rest could run someone's code, so it is not read. {reason} "
        "Take the model's .safetensors file, or another source."
    )


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} is cut short or damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}."
