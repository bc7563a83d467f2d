"""TorchScript files: their tensors by name, and nothing else of them."""

import pickle
import zipfile

import pytest
import torch
from torch import nn

from sdtrain.errors import UserError
from sdtrain.formats.tensor_file import TensorFile


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.sizes, self.power, self.name = [1, 2, 3], 3.0, "small"
        half = torch.arange(12, dtype=torch.float16).reshape(3, 4)
        self.register_buffer("turned", half.t())  # not contiguous
        self.register_buffer("part", half[1:2])  # of a storage that another shares
        self.register_buffer("nothing", torch.empty(0))

    def forward(self, x):
        return self.layers(x) * self.power + self.sizes[0]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "module.pt"


@pytest.mark.parametrize("kind", ["scripted", "traced"])
def test_the_tensors_are_those_of_the_state_dict(path, kind):
    module = Small().eval()
    made = torch.jit.script(module) if kind == "scripted" else torch.jit.trace(module, torch.rand(1, 3, 8, 8))
    made.save(path)
    found, expected = TensorFile(path), made.state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def changed(path, change) -> None:
    """Rewrites the file with other members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_code_that_the_pickle_asks_for_is_not_run(path, tmp_path):
    torch.jit.script(Small()).save(path)
    trace = tmp_path / "trace"

    class Payload:
        def __reduce__(self):
            return open, (str(trace), "w")

    changed(path, lambda members: members.update({"module/data.pkl": pickle.dumps(Payload(), protocol=2)}))
    with pytest.raises(UserError, match=r"holds more than tensors.*asks for"):
        TensorFile(path)
    assert not trace.exists()


def test_the_program_is_not_even_read(path):
    module = torch.jit.script(Small())
    module.save(path)

    def spoil(members):
        code = [name for name in members if "/code/" in name]
        assert code
        members.update(dict.fromkeys(code, b"import os; os.abort()"))

    changed(path, spoil)
    assert torch.equal(TensorFile(path)["layers.0.weight"], module.state_dict()["layers.0.weight"])


@pytest.mark.parametrize(
    "change",
    [
        lambda members: members.update({"module/data/0": members["module/data/0"][:-4]}),
        lambda members: members.pop("module/data/0"),
        lambda members: members.update({"module/data.pkl": members["module/data.pkl"][:99]}),
        lambda members: members.pop("module/data.pkl"),
    ],
    ids=["short", "no bytes", "cut", "no tree"],
)
def test_damage_is_a_sentence(path, change):
    torch.jit.script(Small()).save(path)
    changed(path, change)
    with pytest.raises(UserError, match="cut short or damaged"):
        TensorFile(path)


def test_a_tensor_larger_than_its_bytes_is_damage(path):
    torch.jit.script(Small()).save(path)
    # The shape's first number, 4 of the convolution's (4, 3, 3, 3), as a one-byte integer before three others.
    before, after = b"K\x04K\x03K\x03K\x03", b"K\x7fK\x03K\x03K\x03"

    def enlarge(members):
        assert before in members["module/data.pkl"]
        members["module/data.pkl"] = members["module/data.pkl"].replace(before, after)

    changed(path, enlarge)
    with pytest.raises(UserError, match="cut short or damaged"):
        TensorFile(path)
