"""Finds and opens one network's weights files, as diffusers and transformers publish them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sdtrain.errors import UserError
from sdtrain.formats.tensor_file import TensorFile

_LOADABLE = (None, "fp16", "bf16")
"""Variants that hold the network itself in another precision, full precision first."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Form:
    """A network's file names for one variant, such as fp16, or None: the stems of safetensors and PyTorch's files."""

    stem: str
    pickle_stem: str
    variant: str | None

    @staticmethod
    def of(part: str, variant: str | None) -> _Form:
        """Diffusers (UNet, VAE) and transformers name their files differently."""
        if part in ("unet", "vae"):
            return _Form("diffusion_pytorch_model", "diffusion_pytorch_model", variant)
        return _Form("model", "pytorch_model", variant)

    @property
    def _mark(self) -> str:
        return f".{self.variant}" if self.variant else ""

    @property
    def safe(self) -> str:
        return f"{self.stem}{self._mark}.safetensors"

    @property
    def pickled(self) -> str:
        return f"{self.pickle_stem}{self._mark}.bin"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of a single file or of a shard index, the preferred one first."""
        lists = (f"{name}.index{self._mark}.json" for name in (f"{self.stem}.safetensors", f"{self.pickle_stem}.bin"))
        safe_list, pickled_list = lists
        return self.safe, safe_list, self.pickled, pickled_list


class Shards(Mapping[str, torch.Tensor]):
    """Tensors of several files with an index; UserError if it is damaged or names a missing file or tensor."""

    def __init__(self, index: Path):
        self.path = index
        try:
            file_of = dict(json.loads(index.read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{index} is no list of a network's files: it has no weight_map that can be read."
            ) from error
        names = sorted(set(file_of.values()), key=str)
        outside = [name for name in names if not isinstance(name, str) or name != Path(name).name]
        if outside:
            raise UserError(f"{index} names {outside[0]!r}, which is no file beside it.")
        files = {name: TensorFile(index.parent / name) for name in names}
        self._file_of: dict[str, TensorFile] = {tensor: files[name] for tensor, name in file_of.items()}
        for tensor, file in self._file_of.items():
            if tensor not in file:
                raise UserError(f"{index} says that {file.path.name} holds {tensor}, and it does not.")

    @property
    def files(self) -> list[Path]:
        """The indexed files."""
        return sorted({file.path for file in self._file_of.values()})

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file_of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self._file_of[name].shape(name)

    def is_floating(self, name: str) -> bool:
        """Whether the dtype is floating-point."""
        return self._file_of[name].is_floating(name)


def find_part(folder: Path, part: str, variant: str | None = None) -> Path | None:
    """The file of a network's weights, or their index; None if there is none.

    `part` is `unet`, `vae`, `text_encoder` or `safety_checker`. `variant` is one such as `non_ema`; None takes full
    precision, or else fp16 or bf16.
    """
    for wanted in _LOADABLE if variant is None else (variant,):
        for name in _Form.of(part, wanted).names:
            if (folder / name).is_file():
                return folder / name
    return None


def open_part(folder: Path, part: str, variant: str | None = None) -> TensorFile | Shards:
    """Opens the tensors of a network in the file that `find_part` finds.

    UserError if there is none, or only a variant other than the network itself, or the file is damaged or not tensors.
    """
    path = find_part(folder, part, variant)
    if path is None:
        raise UserError(_nothing_in(folder, part))
    if variant is None and path.name not in _Form.of(part, None).names:
        _log.warning("%s: weights of full precision are not there, so %s is used.", folder, path.name)
    return Shards(path) if path.suffix == ".json" else TensorFile(path)


def files_of(path: Path) -> list[Path]:
    """The files with the tensors: one, or those of an index; UserError if the index is damaged."""
    return Shards(path).files if path.suffix == ".json" else [path]


def published_names(part: str) -> list[list[str]]:
    """Patterns of file names, to fetch in this order until one group matches."""
    full, half = (_Form.of(part, variant) for variant in (None, "fp16"))
    return [
        [full.safe, f"{full.stem}-*-of-*.safetensors"],
        [full.pickled, f"{full.pickle_stem}-*-of-*.bin"],
        [half.safe, f"{full.stem}.fp16-*-of-*.safetensors"],
        [half.pickled],
    ]


def _nothing_in(folder: Path, part: str) -> str:
    form = _Form.of(part, None)
    wanted = f"neither {form.safe} nor {form.pickled}, nor an fp16 variant of them"
    others = sorted(
        path.name
        for stem in {form.stem, form.pickle_stem}
        for suffix in ("safetensors", "bin")
        for path in folder.glob(f"{stem}.*.{suffix}")
    )
    if others:
        variant = others[0].split(".")[-2]
        return (
            f"{folder} holds the weights of the {part} only as variant '{variant}' ({others[0]}), which is not read; "
            f"{wanted} is there."
        )
    return f"{folder} holds no weights of a {part}: {wanted} is there."
