"""safetensors files written in pieces: no second copy in memory, no lock held, the digest made on the way.

The format (https://github.com/huggingface/safetensors#format): the header's length as 8 bytes, the header as JSON
padded with spaces to a multiple of 8, the tensors one behind the other. The library's own writer copies every tensor
into Python bytes while it holds the interpreter's lock, which would stop the training thread for seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_CHUNK_BYTES = 16 * 2**20
_ALIGNMENT = 8


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Writes flat fp32 tensors of the host, waits until they are on the disk; returns the file's sha256.

    The digest is of what should be in the file, so reading it back finds what the disk got wrong.

    Raises:
        OSError: the disk is full, or fails.
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
    """The file's bytes, in order; the tensors' own memory, not copies."""
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
