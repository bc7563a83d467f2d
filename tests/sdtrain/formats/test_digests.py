import json
import os
import time
from pathlib import Path

import pytest

from sdtrain.formats import digests


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of VAEs whose tensors were read, in a process and with a cache that know nothing yet."""
    names: list[str] = []
    forget(monkeypatch)
    monkeypatch.setenv("SDTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_SETTLED_S", 0.0)
    monkeypatch.setattr("sdtrain.formats.frozen.vae_digest", lambda name: names.append(name) or f"{len(names):064x}")
    return names


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the next process."""
    monkeypatch.setattr(digests, "_computed", {})
    monkeypatch.setattr(digests, "_remembered", {})


def write_vae(folder: Path, weights: bytes = b"weights") -> str:
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "config.json").write_text(json.dumps({"scaling_factor": 1.0}))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    time.sleep(0.02)  # files that are younger than the clock's steps are not trusted
    return str(folder)


def test_a_vae_that_did_not_change_is_read_once_by_all_processes(tmp_path, asked, monkeypatch):
    name = write_vae(tmp_path / "model")
    first = digests.vae_digest(name)
    forget(monkeypatch)
    assert digests.vae_digest(name) == first
    assert asked == [name]


@pytest.mark.parametrize("file", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_vae_whose_files_changed_is_read_again_even_with_their_old_size_and_time(tmp_path, asked, monkeypatch, file):
    name = write_vae(tmp_path / "model")
    digests.vae_digest(name)
    forget(monkeypatch)
    path = tmp_path / "model" / "vae" / file
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    digests.vae_digest(name)
    assert asked == [name, name]


def test_files_that_may_still_be_written_are_not_remembered(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(digests, "_SETTLED_S", 60.0)
    name = write_vae(tmp_path / "model")
    digests.vae_digest(name)
    forget(monkeypatch)
    digests.vae_digest(name)
    assert asked == [name, name]


def test_who_loads_the_vae_trusts_no_memory(tmp_path, asked, monkeypatch):
    name = write_vae(tmp_path / "model")
    remembered = digests.vae_digest(name)
    forget(monkeypatch)
    assert digests.vae_digest(name) == remembered
    loaded = digests.compute_vae_digest(name)
    assert loaded != remembered
    assert digests.vae_digest(name) == loaded


def test_a_damaged_note_is_not_believed(tmp_path, asked, monkeypatch):
    name = write_vae(tmp_path / "model")
    digests.vae_digest(name)
    forget(monkeypatch)
    for note in (tmp_path / "cache" / "digests").iterdir():
        note.write_text("<html>")
    digests.vae_digest(name)
    assert asked == [name, name]
