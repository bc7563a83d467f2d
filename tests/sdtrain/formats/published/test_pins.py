"""Downloads from the hub: what is fetched, and what has to be what was published."""

import re
from hashlib import sha256

import pytest

from sdtrain.errors import UserError
from sdtrain.formats.frozen import load_text_encoder, load_vae, vae_digest
from sdtrain.formats.hub import SHA256, find_part_folder
from tests.sdtrain.formats.published.published_fixtures import PUBLISHED, save, text_state, vae_state, write_published

V1_5 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TABLE = PUBLISHED / "README.md"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that holds one folder; it gives what its patterns ask for, and remembers them."""
    root, asked = write_published(tmp_path / "hub", "v1-5"), []

    def download(name, allow_patterns):
        asked.append(allow_patterns)
        cache = tmp_path / "cache"
        for pattern in allow_patterns:
            for path in root.glob(pattern):
                (cache / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
                (cache / path.relative_to(root)).write_bytes(path.read_bytes())
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return root, asked


def pin(monkeypatch, *paths, root):
    table = {path.relative_to(root).as_posix(): sha256(path.read_bytes()).hexdigest() for path in paths}
    monkeypatch.setattr("sdtrain.formats.hub.SHA256", {V1_5: table})


@pytest.mark.skipif(not TABLE.exists(), reason="the real table is not beside this checkout")
def test_the_table_is_the_published_one():
    rows = re.findall(r"^\| v(1-[45])/(\S+) \| ([0-9a-f]{64}) \|", TABLE.read_text(), re.MULTILINE)
    assert len(rows) == 30
    for version, name, digest in rows:
        assert SHA256[{"1-4": "CompVis/stable-diffusion-v1-4", "1-5": V1_5}[version]][name] == digest
    assert sum(map(len, (SHA256["CompVis/stable-diffusion-v1-4"], SHA256[V1_5]))) == 30


def test_a_download_that_is_what_was_published_loads(hub, monkeypatch):
    root, asked = hub
    pin(monkeypatch, root / "vae" / "diffusion_pytorch_model.safetensors", root=root)
    assert vae_digest(V1_5) == vae_digest(str(root))
    assert len(asked) == 1
    assert not any(pattern.endswith(".bin") for pattern in asked[0])


@pytest.mark.parametrize("part", ["vae", "text_encoder", "safety_checker"])
def test_a_download_of_other_bytes_is_refused_with_both_digests(hub, tmp_path, monkeypatch, part):
    root, _ = hub
    stem = "diffusion_pytorch_model" if part == "vae" else "model"
    path = root / part / f"{stem}.safetensors"
    if part == "safety_checker":
        save(text_state(), path)
        (path.parent / "config.json").write_text("{}")
    pin(monkeypatch, path, root=root)
    expected = sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes() + b"x")
    found = sha256(path.read_bytes()).hexdigest()
    said = rf"{stem}\.safetensors of {V1_5}, so it is not used: expected sha256 {expected}, found {found}"
    with pytest.raises(UserError, match=said):
        find_part_folder(V1_5, part)
    if part == "vae":
        with pytest.raises(UserError, match=said):
            load_vae(V1_5)
        # What a user names as a folder is free.
        assert find_part_folder(str(tmp_path / "cache"), part) == tmp_path / "cache" / part


@pytest.mark.parametrize("form", ["bin", "fp16.safetensors", "fp16.bin"])
def test_other_forms_are_fetched_where_the_preferred_one_is_not_there(hub, form):
    root, asked = hub
    (root / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    save(vae_state("v1-5"), root / "vae" / f"diffusion_pytorch_model.{form}")
    assert vae_digest("someone/else") == vae_digest(str(root))
    assert len(asked) == {"bin": 2, "fp16.safetensors": 3, "fp16.bin": 4}[form]


def test_a_repository_without_weights_is_a_sentence(hub):
    root, _ = hub
    (root / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights of a text_encoder: neither model\.safetensors nor"):
        load_text_encoder(V1_5)
