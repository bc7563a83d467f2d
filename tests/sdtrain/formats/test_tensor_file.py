"""Files from strangers: nothing in them is run, and a sentence says what is wrong."""

import os
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdtrain.errors import UserError
from sdtrain.formats.tensor_file import TensorFile


class Payload:
    """Runs a command when it is unpickled, and could run anything."""

    def __init__(self, trace: Path):
        self._trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self._trace}",)


@pytest.fixture
def trace(tmp_path):
    return tmp_path / "trace"


def as_zip(content, path):
    torch.save(content, path)


def as_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_plain_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [as_zip, as_legacy, as_plain_pickle])
@pytest.mark.parametrize("where", ["beside", "within", "instead"])
def test_code_in_a_file_is_not_run(tmp_path, trace, write, where):
    payload = Payload(trace)
    content = {
        "beside": {"state_dict": {}, "callbacks": payload},
        "within": {"state_dict": {"x": payload}},
        "instead": payload,
    }
    path = tmp_path / "bad.ckpt"
    write(content[where], path)
    with pytest.raises(
        UserError, match=r"bad\.ckpt (holds more than tensors, and reading the rest could run|is cut short)"
    ):
        TensorFile(path)
    assert not trace.exists()
    if write is not as_plain_pickle:
        torch.load(path, weights_only=False)
        assert trace.exists(), "the payload works, where it is let"


def test_code_under_a_harmless_looking_name_is_not_run(tmp_path, trace):
    """NumPy's names are passed over, for public files have some; but one of its functions runs the text it is given."""
    text = f"open({str(trace)!r}, 'w')".encode()
    body = b"\x80\x02}X\x01\x00\x00\x00acnumpy.testing._private.utils\nrunstring\n"
    body += b"X" + len(text).to_bytes(4, "little") + text + b"}\x86Rs."
    with zipfile.ZipFile(tmp_path / "bad.ckpt", "w") as file:
        file.writestr("archive/data.pkl", body)
        file.writestr("archive/version", "3\n")
    with pytest.raises(UserError, match="holds no tensors"):
        TensorFile(tmp_path / "bad.ckpt")
    assert not trace.exists()
    pickle.loads(body)
    assert trace.exists(), "the payload works, where it is let"


def test_what_trainers_leave_behind_is_passed_over(tmp_path, monkeypatch):
    """A public file has a callback's state, a NumPy score and the like beside its tensors."""
    names = {"__module__": "pytorch_lightning.callbacks", "__qualname__": "ModelCheckpoint"}
    stand_in = ModuleType("pytorch_lightning.callbacks")
    stand_in.ModelCheckpoint = type("ModelCheckpoint", (), names)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks", stand_in)
    callbacks = {stand_in.ModelCheckpoint: {"best": np.float64(0.5)}}
    torch.save({"state_dict": {"x": torch.arange(3)}, "callbacks": callbacks, "epoch": 3}, tmp_path / "old.ckpt")
    monkeypatch.undo()
    assert torch.equal(TensorFile(tmp_path / "old.ckpt")["x"], torch.arange(3))


def test_both_forms_of_pytorch_and_safetensors_are_read(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16)}
    as_zip({"state_dict": tensors, "sdtrain": "notes"}, tmp_path / "a.ckpt")
    as_legacy(tensors, tmp_path / "b.ckpt")
    save_file(tensors, tmp_path / "c.safetensors", {"sdtrain": "notes"})
    for name, notes in (("a.ckpt", "notes"), ("b.ckpt", None), ("c.safetensors", "notes")):
        file = TensorFile(tmp_path / name)
        assert file.notes == notes
        assert all(torch.equal(file[key], tensor) for key, tensor in tensors.items())
        assert set(file) == {"a", "b"}
        with pytest.raises(KeyError):
            file["c"]


def damaged(tmp_path):
    as_zip({"state_dict": {"x": torch.zeros(1000)}}, tmp_path / "whole.ckpt")
    save_file({"x": torch.zeros(1000)}, tmp_path / "whole.safetensors")
    for name in ("whole.ckpt", "whole.safetensors"):
        content = (tmp_path / name).read_bytes()
        yield f"half-{name}", content[: len(content) // 2]
        yield f"start-{name}", content[:5]
    yield "empty.ckpt", b""
    yield "empty.safetensors", b""
    yield "text.ckpt", b"<!DOCTYPE html><html>not found</html>"
    yield "noise.ckpt", bytes(range(256)) * 20


def test_damage_is_a_sentence(tmp_path):
    for name, content in damaged(tmp_path):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match="is cut short or damaged") as caught:
            TensorFile(path)
        assert str(path) in str(caught.value)
    with tarfile.open(tmp_path / "tar.ckpt", "w") as tar:
        tar.add(tmp_path / "whole.ckpt", "x")
    with pytest.raises(UserError, match=r"tar\.ckpt"):
        TensorFile(tmp_path / "tar.ckpt")


def test_no_file_and_no_tensors_are_sentences(tmp_path):
    with pytest.raises(UserError, match=r"There is no file .*none\.ckpt"):
        TensorFile(tmp_path / "none.ckpt")
    as_zip([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(UserError, match="holds list, not a dictionary"):
        TensorFile(tmp_path / "list.ckpt")
    as_zip({"state_dict": {"epoch": 3}}, tmp_path / "numbers.ckpt")
    with pytest.raises(UserError, match="holds no tensors"):
        TensorFile(tmp_path / "numbers.ckpt")
    as_zip({"state_dict": [1]}, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match="holds no tensors"):
        TensorFile(tmp_path / "odd.ckpt")
