"""The files of an evaluation's directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.errors import UserError
from sdtrain.evaluation.prompts import digest_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EvaluationDir(DatasetDir):
    """An evaluation's directory, with a dataset's manifest."""

    @property
    def prompts(self) -> Path:
        """The chosen prompts, a JSON list."""
        return self.root / "prompts.json"

    def contexts(self, text_encoder: str, part: int) -> Path:
        """Prompts, encoded by a model's text encoder."""
        return self.root / "contexts" / text_encoder / f"{part:05d}.safetensors"

    def captions(self, part: int) -> Path:
        """CLIP's embeddings of prompts."""
        return self.root / "captions" / f"{part:05d}.safetensors"

    def samples(self, model: str, scale: str, part: int) -> Path:
        """A model's images at one guidance scale."""
        return self.root / "samples" / model / scale / f"{part:05d}.tar"

    def features(self, model: str, scale: str, part: int, network: str = "") -> Path:
        """The metrics' arrays of those images: of the protocol's first network and of CLIP, or of a further network."""
        return self.root / "features" / model / scale / network / f"{part:05d}.safetensors"

    @property
    def images(self) -> Path:
        """A reference's list of image locations."""
        return self.root / "pictures.json"

    def reference(self, part: int) -> Path:
        """The metrics' arrays of a reference's images."""
        return self.root / "reference" / f"{part:05d}.safetensors"

    @property
    def protocol(self) -> Path:
        """The settings that this evaluation started with."""
        return self.root / "protocol.json"

    @property
    def results(self) -> Path:
        """Protocol and numbers."""
        return self.root / "results.json"

    @property
    def table(self) -> Path:
        """The numbers alone."""
        return self.root / "results.csv"

    @property
    def skills(self) -> Path:
        """Prompt following by skill."""
        return self.root / "skills.csv"

    @property
    def curve(self) -> Path:
        """The plot."""
        return self.root / "curve.png"


def key_of(scale: float) -> str:
    """Formats a guidance scale for file names."""
    return f"guidance-{scale:g}".replace(".", "-")


def write_json(path: Path, content: Any) -> None:
    """Publishes JSON."""
    with publish(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


@lru_cache(maxsize=2)
def read_texts(path: Path, digest: str) -> tuple[str, ...]:
    """Reads the prompts in a file; UserError if they do not match the digest."""
    texts = tuple(json.loads(path.read_text()))
    if digest_of(texts) != digest:
        raise UserError(
            f"{path} was changed by another evaluation while this one runs. Run them one after the other, or give each "
            "its own --output."
        )
    return texts


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Publishes tensors by name."""
    from safetensors.torch import save_file

    with publish(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def read_tensors(paths: list[Path], names: list[str] | None = None) -> dict[str, torch.Tensor]:
    """Concatenates tensors by name (default: all) over the files; UserError if a file is missing or damaged."""
    import torch
    from safetensors import SafetensorError, safe_open

    loaded: list[dict[str, torch.Tensor]] = []
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                loaded.append({name: file.get_tensor(name) for name in names or file.keys()})
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is missing or damaged. Delete it and run the evaluation again.") from error
    return {name: torch.cat([tensors[name] for tensors in loaded]) for name in loaded[0]}


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a file that `write_tensors` wrote."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())
