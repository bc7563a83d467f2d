"""Reads the tensors of a TorchScript file, whose code is left unread and whose pickle can build nothing else.

`torch.jit.save` writes a zip file: `data.pkl` holds the module as a tree of objects with their attributes, `data/N` the
bytes of tensors, and `code/` the program (pytorch, torch/csrc/jit/docs/serialization.md).
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import torch

_DTYPES = {
    **{"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16},
    **{"DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
}
# Lists of numbers and the like, which the file wraps in a call; the list itself is all that is needed.
_WRAPPED = "torch.jit._pickle"


def is_torchscript(path: Path) -> bool:
    """Returns whether a file is a zip file as `torch.jit.save` writes it; what `torch.save` writes lacks constants."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return _root(archive) is not None


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a module by their names in its state dict.

    A frozen module has none: its numbers are part of its code. `pickle.UnpicklingError` if the file asks for anything
    but tensors; `KeyError`, `ValueError`, `RuntimeError` or `zipfile.BadZipFile` if it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        root = _root(archive)
        if root is None:
            raise ValueError("no TorchScript")
        with archive.open(str(root / "data.pkl")) as file:
            module = _Unpickler(file, archive, root).load()
    return dict(_named(module, ""))


def _root(archive: zipfile.ZipFile) -> PurePosixPath | None:
    names = [PurePosixPath(name) for name in archive.namelist()]
    return next((name.parent for name in names if name.name == "constants.pkl" and len(name.parts) == 2), None)


class _Module:
    """An object of the file: its attributes, and nothing that could be called."""

    attributes: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, attributes: Any) -> None:
        if isinstance(attributes, dict):
            self.attributes = attributes


class _Unpickler(pickle.Unpickler):
    """Builds modules without code, plain values, and tensors from the archive."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, root: PurePosixPath) -> None:
        super().__init__(file)
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        """Returns a stand-in for what the file names; raises `pickle.UnpicklingError` for what is no part of one."""
        if module.split(".")[0] == "__torch__":
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == _WRAPPED:
            return _plain
        raise pickle.UnpicklingError(f"It asks for {module}.{name}.")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """Returns the storage, flat, that ("storage", dtype, name, device, number of values) describes."""
        kind, dtype, name, _, num = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"It asks for a {kind}.")
        member = self._archive.getinfo(str(self._root / "data" / str(name)))
        if member.file_size != num * dtype.itemsize:
            raise ValueError(f"{member.filename} has another size than its tensor")
        return (
            torch.frombuffer(bytearray(self._archive.read(member)), dtype=dtype) if num else torch.empty(0, dtype=dtype)
        )


def _tensor(storage: torch.Tensor, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any) -> torch.Tensor:
    return storage.as_strided(tuple(shape), tuple(strides), offset)


def _plain(value: Any = None, *_: Any) -> Any:
    return value


def _named(value: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, _Module):
        for name, inner in value.attributes.items():
            yield from _named(inner, f"{prefix}.{name}" if prefix else str(name))
