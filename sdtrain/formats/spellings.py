"""Names that other tools and other times gave to the tensors of SD v1, and the one name each has here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import torch

from sdtrain.errors import UserError
from sdtrain.formats.compvis_names import TEXT, TEXT_STAGE, VAE

_TRANSFORMER = TEXT_STAGE + "transformer."
_TEXT_MODULES = ("embeddings.", "encoder.", "final_layer_norm.")
# The VAE's two attention layers, leaf by leaf: CompVis', diffusers' of today, diffusers' before 2023.
_LEAVES = (
    ("norm", "group_norm", "group_norm"),
    ("q", "to_q", "query"),
    ("k", "to_k", "key"),
    ("v", "to_v", "value"),
    ("proj_out", "to_out.0", "proj_attn"),
)
_COMPVIS_LEAF = {name: leaf[0] for leaf in _LEAVES for name in leaf}
_DIFFUSERS_LEAF = {name: leaf[1] for leaf in _LEAVES for name in leaf}
_FORMER_LEAF = {leaf[1]: leaf[2] for leaf in _LEAVES}
_COMPVIS_ATTENTION, _DIFFUSERS_ATTENTION = ".mid.attn_1.", ".mid_block.attentions.0."


class Stored(Protocol):
    """Tensors in files, described without being read."""

    def __iter__(self) -> Iterator[str]: ...

    def __getitem__(self, name: str, /) -> torch.Tensor: ...

    def shape(self, name: str, /) -> tuple[int, ...]:
        """The shape of a tensor."""

    def is_floating(self, name: str, /) -> bool:
        """Whether its numbers are floating-point ones, of any width."""


class PartOf:
    """Those tensors of a file whose names begin with a prefix; all of them, where none does.

    Args:
        stored: the file.
        prefix: of one network's tensors in files that hold several.
    """

    def __init__(self, stored: Stored, prefix: str) -> None:
        own = [name for name in stored if name.startswith(prefix)]
        self._stored, self._names = stored, own or list(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stored[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._stored.shape(name)

    def is_floating(self, name: str) -> bool:
        """Whether its numbers are floating-point ones."""
        return self._stored.is_floating(name)


class Fitted(Mapping[str, torch.Tensor]):
    """A network's tensors by the names, and in the shapes, that the network has for them; read when asked for.

    Args:
        stored: the files.
        names: the network's name -> the name in the files.
        shapes: by the network's names.
        where: names the files in messages.

    Raises:
        UserError: a tensor of another shape, or of whole numbers; names the first.
    """

    def __init__(
        self, stored: Stored, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], where: str
    ) -> None:
        self._stored, self._names, self._shapes = stored, dict(names), shapes
        for name, there in self._names.items():
            found, wanted = stored.shape(there), tuple(shapes[name])
            # A convolution of one pixel is a matrix product: some tools write the one, some the other.
            if found != wanted and _without_ones(found) != _without_ones(wanted):
                raise UserError(f"{where} holds another network: {there} has shape {found}, and not {wanted}.")
            if not stored.is_floating(there):
                raise UserError(
                    f"{where} holds {there} as whole numbers: it was quantised. Take the file of fp32 or fp16."
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stored[self._names[name]].reshape(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def fit(
    stored: Stored,
    network: torch.nn.Module,
    spelling: Callable[[str], str | None],
    where: str,
) -> Fitted:
    """The tensors of one network, all of them, whatever they are called in its files.

    Args:
        stored: the files.
        network: what they belong to; its tensors may lie on `meta`.
        spelling: a name in the files -> the network's name for it, or None for what the network can do without.
        where: names the files in messages.

    Raises:
        UserError: a tensor that is missing, unknown, there twice, or of another shape; names the first.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: there for name, there in one_name_each(stored, spelling, where).items() if name is not None}
    missing = [name for name in shapes if name not in found]
    unknown = sorted(there for name, there in found.items() if name not in shapes)
    if missing or unknown:
        first = f"{missing[0]} is missing" if missing else f"{unknown[0]} is unknown"
        raise UserError(
            f"{where} does not hold {type(network).__name__} as its config describes it: of {len(shapes)} tensors "
            f"{len(missing)} are missing, and {len(unknown)} are unknown; {first}."
        )
    return Fitted(stored, {name: found[name] for name in shapes}, shapes, where)


def one_name_each(names: Iterable[str], spelling: Callable[[str], str | None], where: str) -> dict[str, str]:
    """The name here -> the name there.

    Raises:
        UserError: a tensor is there under two names: nobody can say which of them counts.
    """
    found: dict[str, str] = {}
    for there in names:
        here = spelling(there)
        if here is None:
            continue
        if here in found:
            raise UserError(f"{where} holds one tensor twice, as {found[here]} and as {there}; take another file.")
        found[here] = there
    return found


def compvis_name(name: str) -> str:
    """A tensor's name in a CompVis file, by whatever tool it was written, as CompVis itself writes it."""
    if name.startswith(VAE):
        return _with_leaf(name, _COMPVIS_ATTENTION, _COMPVIS_LEAF)
    rest = name.removeprefix(_TRANSFORMER)
    return TEXT + rest if rest != name and rest.startswith(_TEXT_MODULES) else name


def vae_name(modules: Mapping[str, str]) -> Callable[[str], str | None]:
    """For `fit`: any name that a VAE's tensor goes by -> diffusers' name of today.

    Args:
        modules: of the VAE, as `names.vae_modules` gives them.
    """
    to_diffusers = {theirs: ours for ours, theirs in modules.items()}

    def spelling(name: str) -> str | None:
        bare = name.removeprefix(VAE)
        if bare.startswith(("loss.", "model_ema.")) or bare in ("epoch", "global_step"):
            return None
        bare = _with_leaf(bare, _COMPVIS_ATTENTION, _COMPVIS_LEAF)
        module, _, last = bare.rpartition(".")
        if module in to_diffusers:
            return f"{to_diffusers[module]}.{last}"
        return _with_leaf(bare, _DIFFUSERS_ATTENTION, _DIFFUSERS_LEAF)

    return spelling


def former_vae_name(name: str) -> str:
    """What diffusers called a VAE's tensor before 2023."""
    return _with_leaf(name, _DIFFUSERS_ATTENTION, _FORMER_LEAF)


def text_name(is_nested: bool) -> Callable[[str], str | None]:
    """For `fit`: any name that a tensor of CLIP's text encoder goes by -> the name in this version of transformers.

    Args:
        is_nested: whether that begins with `text_model.`.
    """

    def spelling(name: str) -> str | None:
        bare = name.removeprefix(_TRANSFORMER).removeprefix(TEXT_STAGE).removeprefix("text_model.")
        if bare.endswith("embeddings.position_ids") or bare.startswith(
            ("vision_model.", "visual_projection.", "text_projection", "logit_scale")
        ):
            return None
        return f"text_model.{bare}" if is_nested else bare

    return spelling


def checker_name(is_nested: bool) -> Callable[[str], str | None]:
    """For `fit`: as `text_name`, of the safety checker, whose vision model some versions of transformers nest twice."""

    def spelling(name: str) -> str | None:
        if name.endswith("embeddings.position_ids"):
            return None
        bare = name.removeprefix("vision_model.")
        if bare == name:
            return name
        bare = bare.removeprefix("vision_model.")
        return f"vision_model.vision_model.{bare}" if is_nested else f"vision_model.{bare}"

    return spelling


def _with_leaf(name: str, attention: str, leaves: Mapping[str, str]) -> str:
    module, found, rest = name.partition(attention)
    leaf, dot, last = rest.rpartition(".")
    return f"{module}{found}{leaves.get(leaf, leaf)}{dot}{last}" if found else name
