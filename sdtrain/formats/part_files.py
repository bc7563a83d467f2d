"""The files of weights in the folder of one network, as diffusers and transformers publish them."""

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
"""Variants that stand for the network itself, at another precision; the full one first."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Form:
    """The names of a network's files, for one variant.

    Attributes:
        stem: of safetensors files.
        pickle_stem: of PyTorch's.
        variant: such as fp16; None where the name has none.
    """

    stem: str
    pickle_stem: str
    variant: str | None

    @staticmethod
    def of(part: str, variant: str | None) -> _Form:
        """Networks of diffusers (UNet, VAE) and of transformers are named differently."""
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
        """Of a whole file or of a list of parts, the preferred one first."""
        lists = (f"{name}.index{self._mark}.json" for name in (f"{self.stem}.safetensors", f"{self.pickle_stem}.bin"))
        safe_list, pickled_list = lists
        return self.safe, safe_list, self.pickled, pickled_list


class Shards(Mapping[str, torch.Tensor]):
    """Tensors of several files, of which a list says what is in which.

    Raises:
        UserError: the list is damaged, or a file or a tensor that it names is not there.
    """

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
        """Those that are listed."""
        return sorted({file.path for file in self._file_of.values()})

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file_of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        return self._file_of[name].shape(name)

    def is_floating(self, name: str) -> bool:
        """Whether its numbers are floating-point ones."""
        return self._file_of[name].is_floating(name)


def find_part(folder: Path, part: str, variant: str | None = None) -> Path | None:
    """The file of a network's weights, or the list of its files; None where there is none.

    Args:
        folder: of the network.
        part: which network it is: `unet`, `vae`, `text_encoder`, `safety_checker`.
        variant: such as `non_ema`; by default the full precision, or else fp16 or bf16.
    """
    for wanted in _LOADABLE if variant is None else (variant,):
        for name in _Form.of(part, wanted).names:
            if (folder / name).is_file():
                return folder / name
    return None


def open_part(folder: Path, part: str, variant: str | None = None) -> TensorFile | Shards:
    """The tensors of a network, of the file that `find_part` finds.

    Raises:
        UserError: there is none, or only a variant that is not the network itself; the file is damaged or no tensors.
    """
    path = find_part(folder, part, variant)
    if path is None:
        raise UserError(_nothing_in(folder, part))
    if variant is None and path.name not in _Form.of(part, None).names:
        _log.warning("%s: weights of full precision are not there, so %s is used.", folder, path.name)
    return Shards(path) if path.suffix == ".json" else TensorFile(path)


def files_of(path: Path) -> list[Path]:
    """The files that hold the tensors: one, or those of a list.

    Raises:
        UserError: the list is damaged.
    """
    return Shards(path).files if path.suffix == ".json" else [path]


def published_names(part: str) -> list[list[str]]:
    """Patterns of file names, to be fetched in this order until a group gives something."""
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
