"""Finds model folders locally or on the hub, and checks that known files are the published ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from sdtrain.errors import UserError
from sdtrain.formats.part_files import files_of, find_part, published_names
from sdtrain.models.weights import DEMO_WEIGHTS

_V1_4 = """
08902f19b1cfebd7c989f152fc0507bef6898c706a91d666509383122324b511  safety_checker/model.fp16.safetensors
9d6a233ff6fd5ccb9f76fd99618d73369c52dd3d8222376384d0e601911089e8  safety_checker/model.safetensors
193490b58ef62739077262e833bf091c66c29488058681ac25cf7df3d8190974  safety_checker/pytorch_model.bin
22ba87205445ad5def13e54919b038dcfb7321ec1c3f4b12487d4fba6036125f  safety_checker/pytorch_model.fp16.bin
77795e2023adcf39bc29a884661950380bd093cf0750a966d473d1718dc9ef4e  text_encoder/model.fp16.safetensors
7b3a12df205cb3c74dd4eae4354d93f606ae6b3bc29d5d06fd97921cb9ad8a81  text_encoder/model.safetensors
770a47a9ffdcfda0b05506a7888ed714d06131d60267e6cf52765d61cf59fd67  text_encoder/pytorch_model.bin
05eee911f195625deeab86f0b22b115d7d8bc3adbfc1404f03557f7e4e6a8fd7  text_encoder/pytorch_model.fp16.bin
f5f12f7078f361f137f91edc270cb523208dc2322a597e07773eb3b1e5703850  unet/diffusion_pytorch_model.bin
3ac986370f51d806d2119577d5a66fbf6d3746e2356f45dc474e7561ce94bdbf  unet/diffusion_pytorch_model.fp16.bin
a35404d03ec8f977715a4d2a080ddf72e2144f2ee49bb1ee213258bc64f9cc87  unet/diffusion_pytorch_model.fp16.safetensors
f5f12f7078f361f137f91edc270cb523208dc2322a597e07773eb3b1e5703850  unet/diffusion_pytorch_model.non_ema.bin
ac3d1bff03f9e9a6f8671b5a7a3fd984f90185c84e407bc569f97c1cce7445fd  unet/diffusion_pytorch_model.non_ema.safetensors
145a07e0f05ec5bbe6e2e9faf608bdb311caf708895cac8c8ed713c59864e1e8  unet/diffusion_pytorch_model.safetensors
1b134cded8eb78b184aefb8805b6b572f36fa77b255c483665dda931fa0130c5  vae/diffusion_pytorch_model.bin
b7643b3e40b9f128eda5fe174fea73c3ef3903562651fb344a79439709c2e503  vae/diffusion_pytorch_model.fp16.bin
4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c  vae/diffusion_pytorch_model.fp16.safetensors
a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c  vae/diffusion_pytorch_model.safetensors
"""
_V1_5 = """
9d6a233ff6fd5ccb9f76fd99618d73369c52dd3d8222376384d0e601911089e8  safety_checker/model.safetensors
193490b58ef62739077262e833bf091c66c29488058681ac25cf7df3d8190974  safety_checker/pytorch_model.bin
d008943c017f0092921106440254dbbe00b6a285f7883ec8ba160c3faad88334  text_encoder/model.safetensors
770a47a9ffdcfda0b05506a7888ed714d06131d60267e6cf52765d61cf59fd67  text_encoder/pytorch_model.bin
c7da0e21ba7ea50637bee26e81c220844defdf01aafca02b2c42ecdadb813de4  unet/diffusion_pytorch_model.bin
19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1  unet/diffusion_pytorch_model.safetensors
cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516  v1-5-pruned-emaonly.ckpt
6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa  v1-5-pruned-emaonly.safetensors
e1441589a6f3c5a53f5f54d0975a18a7feb7cdf0b0dee276dfc3331ae376a053  v1-5-pruned.ckpt
1a189f0be69d6106a48548e7626207dddd7042a418dbf372cefd05e0cdba61b6  v1-5-pruned.safetensors
1b134cded8eb78b184aefb8805b6b572f36fa77b255c483665dda931fa0130c5  vae/diffusion_pytorch_model.bin
a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c  vae/diffusion_pytorch_model.safetensors
"""


def _table(lines: str) -> dict[str, str]:
    """Parses sha256sum's lines: file -> digest."""
    return {name: digest for digest, name in (line.split() for line in lines.split("\n") if line)}


# The last two mirror the first, which is gone.
_MIRRORS = ("runwayml", "stable-diffusion-v1-5", "sd-legacy")
SHA256: Mapping[str, Mapping[str, str]] = {
    "CompVis/stable-diffusion-v1-4": _table(_V1_4),
    **{f"{owner}/stable-diffusion-v1-5": _table(_V1_5) for owner in _MIRRORS},
}
"""Hex sha256 of each weights file, by hub id and path in the repository. A user's own path is not checked."""


def find_part_folder(name: str, part: str) -> Path:
    """The local folder of a model's part (`vae`, `text_encoder`, `tokenizer`), fetched from the hub if needed.

    UserError if it is neither a folder nor a model on the hub, or a fetched file is not the published one.
    """
    root = DEMO_WEIGHTS if name == "demo" else Path(name)
    if root.is_file():
        raise UserError(f"{root} is a file, and a {part} is taken from a folder. Give a diffusers folder or a hub id.")
    is_fetched = not root.is_dir()
    if is_fetched:
        if name == "demo" or name.startswith((".", "/")) or name.count("/") != 1:
            raise UserError(f"There is no folder {root} with a {part}. Give a diffusers folder or a hub id.")
        root = _download(name, part)
    folder = _part_folder(root, part)
    if not any(folder.glob("*.json")):
        raise UserError(f"The folder {folder} holds no {part}. Give a diffusers folder or a hub id.")
    if is_fetched and (found := _weights_in(folder, part)):
        for path in files_of(found):
            require_published(name, path.relative_to(root).as_posix(), path)
    return folder


def _part_folder(root: Path, part: str) -> Path:
    return root / part if (root / part).is_dir() else root


def _weights_in(folder: Path, part: str) -> Path | None:
    return None if part == "tokenizer" else find_part(folder, part)  # CLIP keeps its weights beside its tokenizer


def _download(name: str, part: str) -> Path:
    """Fetches full-precision safetensors, or else any other readable files."""
    wanted = [f"{part}/*.json", f"{part}/*.txt", "*.json", "*.txt"]
    if part == "tokenizer":
        return snapshot(name, part, wanted)
    for patterns in published_names(part):
        root = snapshot(name, part, [*wanted, *(f"{part}/{pattern}" for pattern in patterns), *patterns])
        if _weights_in(_part_folder(root, part), part):
            break
    return root


def snapshot(name: str, part: str, patterns: list[str], revision: str | None = None) -> Path:
    """The folder of a model on the hub, with those files; UserError if the hub does not give it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        if revision:
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise UserError(
            f"The {part} '{name}' is not a folder here and the hub did not give it ({type(error).__name__}). "
            "Check the name and the connection, or download it elsewhere and name the folder."
        ) from error


def require_published(repository: str, name: str, path: Path) -> None:
    """Checks `path`, fetched from a hub repository's file `name`; UserError if it is not the published file.

    Files whose digest is not known here pass.
    """
    expected = SHA256.get(repository, {}).get(name)
    if expected is None:
        return
    stat = path.stat()
    found = _sha256(path, stat.st_size, stat.st_mtime_ns)
    if found != expected:
        raise UserError(
            f"{path} is not the published {name} of {repository}, so it is not used: expected sha256 {expected}, found "
            f"{found}. Delete {path.resolve()} to fetch it again."
        )


@lru_cache(maxsize=64)
def _sha256(path: Path, num_bytes: int, changed_ns: int) -> str:
    """Cached for each state of a file: a process opens a network several times, and it has gigabytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
