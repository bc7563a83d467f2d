"""SD v1 in one file, in every spelling that tools write, and the identity of the VAE in them."""

import re

import pytest
import torch
from safetensors.torch import save_file

from sdtrain.config import TrainConfig
from sdtrain.errors import UserError
from sdtrain.formats.any_model import open_model, training_weights
from sdtrain.formats.export import ExportSettings, export_model
from sdtrain.formats.frozen import load_vae, vae_digest, vae_digests, vae_scaling_factor
from sdtrain.formats.tensor_file import NOTES, TensorFile
from sdtrain.loading.sources import open_samples
from tests.sdtrain.formats.published.published_fixtures import (
    former,
    halved,
    save,
    text_state,
    unet_state,
    vae_state,
    write_json,
    write_published,
)
from tests.training_fixtures import write_latents

TEXT, ATTENTION = "cond_stage_model.transformer.text_model.", re.compile(r"\.mid\.attn_1\.(q|k|v|proj_out)\.")
LEAVES = {
    "compvis": ("q", "k", "v", "proj_out"),
    "today": ("to_q", "to_k", "to_v", "to_out.0"),
    "former": ("query", "key", "value", "proj_attn"),
}


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("public") / "v1-5", "v1-5")


@pytest.fixture(scope="module")
def stored(public, tmp_path_factory):
    """The folder as one file that sdtrain wrote: its tensors by CompVis' names, and what says how narrow they are."""
    path = export_model(public, tmp_path_factory.mktemp("file") / "model.safetensors")
    file = TensorFile(path)
    return dict(file), file.notes


def write(state, notes, path, wrapped=True):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, {NOTES: notes, "format": "pt"})
    else:
        inner = {"state_dict": state, "global_step": 840_000, "epoch": 3} if wrapped else state
        torch.save({**inner, NOTES: notes}, path)
    return path


def spelt(state, leaves="compvis", linear=False, text="text_model."):
    """The same tensors as other tools would call them, and with matrices for the VAE's convolutions of one pixel."""
    renamed = {}
    for name, tensor in state.items():
        found = ATTENTION.search(name)
        if found:
            leaf = LEAVES[leaves][LEAVES["compvis"].index(found[1])]
            name = name.replace(found[0], f".mid.attn_1.{leaf}.")
            tensor = tensor.flatten(1) if linear and tensor.dim() == 4 else tensor
        renamed[name.replace(TEXT, "cond_stage_model.transformer." + text)] = tensor
    return renamed


def with_averages(state):
    names = [name for name in state if name.startswith("model.diffusion_model.")]
    averages = {"model_ema." + name.removeprefix("model.").replace(".", ""): 3 * state[name] for name in names}
    return state | averages | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def bare(state):
    """Without anything that is no weight."""
    return {name: tensor for name, tensor in state.items() if name.endswith((".weight", ".bias"))}


JUNK = {
    "cond_stage_model.logit_scale": torch.tensor(4.6),
    "cond_stage_model.text_projection": torch.zeros(4, 4),
    "cond_stage_model.transformer.text_projection.weight": torch.zeros(4, 4),
    "first_stage_model.loss.logvar": torch.zeros(()),
    "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(2, 3, 4, 4),
    "embedding_manager.embedder.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    "logvar": torch.zeros(1000),
    "scale_factor": torch.tensor(0.18215),
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.num_updates": torch.tensor(3, dtype=torch.int32),
}


def mixed(state):
    """fp16 here, bf16 there, fp32 elsewhere, as merged models have it; whole numbers in the shape of floats too."""
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    return {name: tensor.to(kinds[number % 3]) for number, (name, tensor) in enumerate(sorted(state.items()))}


SPELLINGS = {
    "as-compvis": lambda s: spelt(s),
    "no-text-model": lambda s: spelt(s, text=""),
    "linear": lambda s: spelt(s, linear=True),
    "today": lambda s: spelt(s, "today"),
    "today-linear": lambda s: spelt(s, "today", linear=True),
    "former": lambda s: spelt(s, "former"),
    "former-linear-no-text-model": lambda s: spelt(s, "former", linear=True, text=""),
    "weights-alone": bare,
    "junk": lambda s: s | JUNK,
    "full": with_averages,
}


def agree(model, stored, public, scale=1):
    frozen = model.frozen()
    wanted = {
        "unet": {name: scale * tensor for name, tensor in unet_state("v1-5").items()},
        "vae": vae_state("v1-5"),
        "text": {n.removeprefix("text_model."): t for n, t in text_state("v1-5").items() if "position_ids" not in n},
    }
    text = {name.removeprefix("text_model."): t for name, t in frozen.text_encoder.state_dict().items()}
    for found, theirs in (
        (model.state("ema"), wanted["unet"]),
        (frozen.vae.state_dict(), wanted["vae"]),
        (text, wanted["text"]),
    ):
        assert found.keys() == theirs.keys()
        assert all(torch.equal(tensor.float(), theirs[name]) for name, tensor in found.items())


# Names are told apart behind what reads the two formats, so that each spelling need not come in both.
@pytest.mark.parametrize(("spelling", "suffix"), zip(SPELLINGS, ["ckpt", "safetensors"] * 5, strict=True))
def test_a_file_loads_however_its_tensors_are_called(stored, public, tmp_path, spelling, suffix):
    tensors, notes = stored
    path = write(SPELLINGS[spelling](tensors), notes, tmp_path / f"model.{suffix}")
    model = open_model(path, str(public))
    agree(model, stored, public, 3 if spelling == "full" else 1)
    assert ("raw" in model.states) == (spelling == "full")
    assert vae_digest(str(path)) == vae_digest(str(public))
    assert vae_scaling_factor(str(path)) == 0.18215


def test_a_state_dict_at_the_top_loads(stored, public, tmp_path):
    agree(open_model(write(*stored, tmp_path / "model.ckpt", wrapped=False), str(public)), stored, public)


def test_a_file_of_the_average_alone_loads(stored, public, tmp_path):
    tensors, notes = stored
    alone = {n: t for n, t in with_averages(tensors).items() if not n.startswith("model.diffusion_model.")}
    model = open_model(write(alone, notes, tmp_path / "model.ckpt"), str(public))
    assert set(model.states) == {"ema"}
    agree(model, stored, public, 3)


@pytest.mark.parametrize(("change", "suffix"), [(halved, "safetensors"), (mixed, "ckpt")])
def test_a_file_of_halves_or_of_mixed_dtypes_loads_and_is_exported(stored, public, tmp_path, change, suffix):
    tensors, notes = stored
    path = write(change(bare(tensors)), notes, tmp_path / f"model.{suffix}")
    model = open_model(path, str(public))
    frozen = model.frozen()
    for network in (model.unet("ema"), frozen.vae, frozen.text_encoder):
        assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}
    raw, average, _ = training_weights(path)
    assert raw.keys() == average.keys() == unet_state("v1-5").keys()
    again = TensorFile(export_model(path, tmp_path / "again.safetensors", ExportSettings(tokenizer=str(public))))
    for name, tensor in change(bare(tensors)).items():
        assert torch.equal(again[name], tensor.float()), name
    assert vae_digest(str(tmp_path / "again.safetensors")) in vae_digests(str(path))
    assert vae_digest(str(public)) not in vae_digests(str(path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s | {"first_stage_model.encoder.odd.weight": torch.zeros(1)}, r"encoder\.odd\.weight is unknown"),
        (
            lambda s: s | {n: t.clone() for n, t in spelt(s, "today").items()},
            r"one tensor twice, as .*attn_1.* and as ",
        ),
        (
            lambda s: {n: t for n, t in s.items() if "attn_1.q.weight" not in n},
            r"decoder\.mid\.attn_1\.q\.weight is miss",
        ),
        (
            lambda s: s | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)},
            r"input_blocks\.0\.0\.weight has shape \(32, 9, 3, 3\)",
        ),
        (
            lambda s: s | {"model.diffusion_model.out.2.bias": torch.zeros(4, dtype=torch.int8)},
            r"out\.2\.bias as whole numbers: it was quantised",
        ),
        (
            lambda _: {"conditioner.embedders.0.x": torch.zeros(1)},
            r"Stable Diffusion XL.* holds conditioner\.embedders",
        ),
        (lambda _: {"down_blocks.0.x.weight": torch.zeros(1)}, r"name the folder.* holds down_blocks\.0\.x\.weight"),
    ],
)
def test_a_file_of_something_else_is_a_sentence_that_names_a_tensor(stored, public, tmp_path, change, said):
    tensors, notes = stored
    path = write(change(tensors), notes, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=said):
        open_model(path, str(public))


def test_the_vae_is_the_same_under_any_names_in_any_file(stored, public, tmp_path):
    tensors, notes = stored
    state, config = vae_state("v1-5"), (public / "vae" / "config.json").read_text()
    alone = {n.removeprefix("first_stage_model."): t for n, t in tensors.items() if n.startswith("first_stage_model.")}
    places = [
        write(alone, notes, tmp_path / "vae.ckpt"),
        write(spelt(tensors, "former", linear=True), notes, tmp_path / "vae.safetensors"),
        write(state, notes, tmp_path / "single.safetensors"),
    ]
    for name, content in (
        ("a/diffusion_pytorch_model.safetensors", state),
        ("b/diffusion_pytorch_model.safetensors", former(state)),
        ("c/diffusion_pytorch_model.bin", former(state)),
        ("d/diffusion_pytorch_model.fp16.safetensors", state),
    ):
        place = save(content, tmp_path / name).parent
        (place / "config.json").write_text(config)
        places.append(place)
    assert {vae_digest(str(place)) for place in places} == {vae_digest(str(public))}
    wanted = load_vae(str(public)).state_dict()
    for place in places:
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in load_vae(str(place)).state_dict().items())


def test_a_vae_of_fp16_is_another_function_and_known_when_its_numbers_are_stored_in_fp32(public, tmp_path):
    digests = []
    for name, state in (
        ("half", halved(vae_state("v1-5"))),
        ("again", {n: t.half().float() for n, t in vae_state("v1-5").items()}),
    ):
        save(state, tmp_path / name / "diffusion_pytorch_model.safetensors")
        (tmp_path / name / "config.json").write_text((public / "vae" / "config.json").read_text())
        digests.append(vae_digest(str(tmp_path / name)))
    assert len({*digests, vae_digest(str(public))}) == 3
    assert digests[1] in vae_digests(str(tmp_path / "half"))
    assert vae_digest(str(public)) not in vae_digests(str(tmp_path / "half"))


def earlier_digest(state):
    """As versions before this one reckoned it: over the names and dtypes of the file."""
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def test_the_digest_of_a_file_that_names_its_tensors_as_today_is_what_it_was(public, tmp_path):
    state = vae_state("v1-5")
    save(state, tmp_path / "diffusion_pytorch_model.safetensors")
    write_json(tmp_path / "config.json", {"block_out_channels": [32, 64, 96, 96]} | _levels())
    assert vae_digest(str(tmp_path)) == earlier_digest(state)


def _levels():
    return {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    }


@pytest.mark.parametrize("change", [former, lambda state: state, lambda state: halved(former(state)), halved])
def test_digests_of_earlier_versions_are_still_known(public, tmp_path, change):
    state = change(vae_state("v1-5"))
    save(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((public / "vae" / "config.json").read_text())
    assert earlier_digest(state) in set(vae_digests(str(tmp_path)))


def train_config(vae, data):
    return TrainConfig(name="toy", steps=1, vae=str(vae), data={"root": str(data), "resolution": 64})


def test_latents_of_one_file_are_accepted_with_another_and_with_the_digest_of_an_earlier_version(
    public, stored, tmp_path, monkeypatch
):
    file = write(spelt(stored[0], "today"), stored[1], tmp_path / "model.safetensors")
    data = write_latents(tmp_path / "data", public)
    assert len(open_samples(train_config(file, data), 0.18215)) == 50
    before = earlier_digest(former(vae_state("v1-5")))
    monkeypatch.setattr("tests.training_fixtures.vae_digest", lambda name: before)
    old = write_latents(tmp_path / "old", public)
    for vae in (file, public):
        assert len(open_samples(train_config(vae, old), 0.18215)) == 50
    other = tmp_path / "other"
    save(vae_state("v1-5", seed=9), other / "diffusion_pytorch_model.safetensors")
    (other / "config.json").write_text((public / "vae" / "config.json").read_text())
    with pytest.raises(UserError, match=r"vae_sha256 is .* there and .* here"):
        open_samples(train_config(other, old), 0.18215)
