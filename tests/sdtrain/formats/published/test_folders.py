"""The public folders, as published, through the code that loads them for users."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdtrain.config import load_config
from sdtrain.errors import UserError
from sdtrain.formats.any_model import open_model
from sdtrain.formats.export import ExportSettings, export_model
from sdtrain.formats.frozen import load_text_encoder, load_tokenizer, load_vae, vae_digest, vae_scaling_factor
from sdtrain.sampling.safety import load_safety_checker
from sdtrain.sampling.sampler import Sampler, SampleSettings, load_networks
from sdtrain.training.run_dir import RunDir
from tests.sdtrain.formats.published.published_fixtures import (
    PREPROCESSOR,
    PUBLISHED,
    TEXT_CONFIGS,
    UNET_CONFIGS,
    VAE_CONFIGS,
    VERSIONS,
    config_of,
    former,
    halved,
    save,
    text_state,
    unet_state,
    vae_state,
    write_checker,
    write_json,
    write_published,
    write_vae,
)
from tests.training_fixtures import write_config, write_latents

real = pytest.mark.skipif(not PUBLISHED.exists(), reason="the real configs are not beside this checkout")


@pytest.fixture(scope="module", params=VERSIONS)
def public(request, tmp_path_factory):
    """A folder of each version."""
    return write_published(tmp_path_factory.mktemp("public") / request.param, request.param)


@pytest.fixture(scope="module")
def v1_5(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("public") / "v1-5", "v1-5")


@real
@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_written_down_of_the_configs_is_what_was_published(version):
    written = {"vae": VAE_CONFIGS, "unet": UNET_CONFIGS, "text_encoder": TEXT_CONFIGS}
    for part, configs in written.items():
        theirs = config_of(version, part)
        assert {name: theirs.get(name) for name in configs[version]} == configs[version] | {
            name: theirs[name] for name in configs[version] if name in ("_diffusers_version", "_class_name")
        }
    has = {name: "scaling_factor" in config_of(name, "vae") for name in VERSIONS}
    assert has == {"v1-4": True, "v1-5": False}


@pytest.mark.parametrize(("part", "names"), [("vae", 248), ("unet", 686), ("text_encoder", 37)])
def test_the_folders_have_the_published_number_of_tensors(public, part, names):
    """Two layers of the text encoder here, 12 there: 16 tensors each, beside five of its own."""
    tensors = load_file(next((public / part).glob("*.safetensors")))
    assert len(tensors) == names
    assert all(tensor.dtype == torch.float32 for name, tensor in tensors.items() if "position_ids" not in name)
    if part == "vae":
        assert sum(".query." in name for name in tensors) == 4


def test_the_frozen_networks_hold_the_numbers_of_the_files(public):
    vae, (tokenizer, encoder) = load_vae(str(public)), load_text_encoder(str(public))
    stored = load_file(public / "vae" / "diffusion_pytorch_model.safetensors")
    for half in ("encoder", "decoder"):
        attention = getattr(vae, half).mid_block.attentions[0]
        assert torch.equal(attention.to_q.weight, stored[f"{half}.mid_block.attentions.0.query.weight"])
        assert torch.equal(attention.to_out[0].bias, stored[f"{half}.mid_block.attentions.0.proj_attn.bias"])
    text = load_file(public / "text_encoder" / "model.safetensors")
    ours = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    assert all(torch.equal(tensor, text[f"text_model.{name}"]) for name, tensor in ours.items())
    assert len(tokenizer("a b").input_ids) == 4
    with torch.no_grad():
        assert encoder(torch.tensor([[52, 0, 26, 53]])).last_hidden_state.isfinite().all()


def test_diffusers_computes_the_same_with_the_folders_vae(public):
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(public / "vae").eval()
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(
            load_vae(str(public)).encode(pixels).latent_dist.parameters, theirs.encode(pixels).latent_dist.parameters
        )


def test_a_public_folder_is_sampled_from_and_exported_and_back(public, tmp_path):
    drawn = Sampler(load_networks(public, "cpu", torch.float32)).sample(["a b"], [1], SampleSettings(2.0, 2))[0]
    file = export_model(public, tmp_path / "model.safetensors")
    networks = load_networks(file, "cpu", torch.float32, tokenizer=str(public))
    again = Sampler(networks).sample(["a b"], [1], SampleSettings(2.0, 2))[0]
    # The weights are the same to the bit, see below; where they lie in memory decides the last bit of a product.
    assert np.abs(np.asarray(drawn, int) - np.asarray(again, int)).max() <= 1
    folder = export_model(file, tmp_path / "folder", ExportSettings(tokenizer=str(public)))
    assert vae_digest(str(public)) == vae_digest(str(file)) == vae_digest(str(folder))
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] == 0.18215
    ours, theirs = open_model(folder).state("ema"), load_file(public / "unet" / "diffusion_pytorch_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_training_starts_from_a_public_folder(v1_5, tmp_path, ranks):
    from sdtrain.training.state import TrainingState

    unet = {
        "block_out_channels": [32, 64, 96, 96],
        "layers_per_block": 2,
        "down_block_types": UNET_CONFIGS["v1-5"]["down_block_types"],
        "up_block_types": UNET_CONFIGS["v1-5"]["up_block_types"],
        "num_heads": 8,
        "norm_num_groups": 32,
        "cross_attention_dim": 64,
    }
    data = write_latents(tmp_path / "data", v1_5)
    path = write_config(tmp_path / "c.yaml", v1_5, data, unet=unet, init_from=str(v1_5))
    state = TrainingState(load_config(str(path)), RunDir(tmp_path / "run"), ranks)
    assert state.checkpoints.restore() == 0
    assert state.scaling_factor == 0.18215
    published = load_file(v1_5 / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(state.partition.master, state.partition.shard(published))


@pytest.mark.parametrize("version", VAE_CONFIGS)
def test_a_config_without_a_scaling_factor_means_the_default(tmp_path, version):
    folder = write_vae(tmp_path / "vae", version)
    assert vae_scaling_factor(str(folder)) == 0.18215
    assert load_vae(str(folder)).config.scaling_factor == 0.18215


@pytest.mark.parametrize("factor", ["0.18", 0, -1.0, True, float("nan")])
def test_a_scaling_factor_that_is_no_number_above_0_is_named(tmp_path, factor):
    folder = write_vae(tmp_path / "vae")
    write_json(folder / "config.json", VAE_CONFIGS["v1-5"] | {"scaling_factor": factor})
    for load in (vae_scaling_factor, vae_digest):
        with pytest.raises(UserError, match=r"config\.json: scaling_factor is .*, and has to be a number above 0"):
            load(str(folder))


def test_another_kind_of_autoencoder_is_named(tmp_path):
    folder = write_vae(tmp_path / "vae")
    write_json(folder / "config.json", VAE_CONFIGS["v1-5"] | {"_class_name": "AutoencoderTiny"})
    with pytest.raises(UserError, match="it is AutoencoderTiny, and not AutoencoderKL"):
        load_vae(str(folder))


PARTS = {
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model", lambda: former(vae_state())),
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model", unet_state),
    "text_encoder": ("model", "pytorch_model", text_state),
}


def loaded(root, part):
    if part == "unet":
        return open_model(root).unet("ema")
    return load_vae(str(root)) if part == "vae" else load_text_encoder(str(root))[1]


def with_only(root, folder, part, **files):
    """The public folder, with other files in the place of one part's weights."""
    shutil.copytree(root, folder)
    for path in (folder / part).glob("*.safetensors"):
        path.unlink()
    for name, state in files.items():
        save(state, folder / part / name)
    return folder


def close(network, wanted):
    """Whether the weights are `wanted`, at fp32, whatever they are called."""
    total = sum(float(tensor.double().sum()) for tensor in network.state_dict().values())
    there = sum(float(tensor.double().sum()) for tensor in wanted.values() if tensor.is_floating_point())
    return {t.dtype for t in network.state_dict().values()} == {torch.float32} and abs(total - there) < 1e-6 * abs(
        there
    )


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("form", ["fp16", "bin", "fp16-bin", "shards", "bin-shards", "fp16-shards"])
def test_a_folder_of_any_published_form_loads(v1_5, tmp_path, part, form, caplog):
    safe, pickled, make = PARTS[part]
    state, half = make(), halved(make())
    names = sorted(state)
    halves = ({n: state[n] for n in names[::2]}, {n: state[n] for n in names[1::2]})
    files = {
        "fp16": {f"{safe}.fp16.safetensors": half},
        "bin": {f"{pickled}.bin": state},
        "fp16-bin": {f"{pickled}.fp16.bin": half},
        "shards": {f"{safe}-0000{n}-of-00002.safetensors": halves[n - 1] for n in (1, 2)},
        "bin-shards": {f"{pickled}-0000{n}-of-00002.bin": halves[n - 1] for n in (1, 2)},
        "fp16-shards": {f"{safe}.fp16-0000{n}-of-00002.safetensors": halved(halves[n - 1]) for n in (1, 2)},
    }[form]
    folder = with_only(v1_5, tmp_path / "folder", part, **files)
    if "shards" in form:
        places = {name: file for file, content in files.items() for name in content}
        stem, mark = (pickled + ".bin", "") if form == "bin-shards" else (safe + ".safetensors", "")
        mark = ".fp16" if form == "fp16-shards" else ""
        write_json(folder / part / f"{stem}.index{mark}.json", {"metadata": {}, "weight_map": places})
    with caplog.at_level(logging.WARNING):
        network = loaded(folder, part)
    assert close(network, half if "fp16" in form else state)
    assert ("full precision are not there" in caplog.text) == ("fp16" in form)


@pytest.mark.parametrize("part", PARTS)
def test_full_precision_comes_first_and_safetensors_before_pickles(v1_5, tmp_path, part):
    safe, pickled, make = PARTS[part]
    state, other = make(), {name: 2 * tensor for name, tensor in make().items()}
    folder = with_only(
        v1_5, tmp_path / "folder", part, **{f"{safe}.fp16.safetensors": halved(other), f"{pickled}.bin": state}
    )
    assert close(loaded(folder, part), state)
    save(state, folder / part / f"{safe}.safetensors")
    save(other, folder / part / f"{pickled}.bin")
    assert close(loaded(folder, part), state)


@pytest.mark.parametrize("part", PARTS)
def test_a_folder_with_another_variant_only_or_none_is_a_sentence(v1_5, tmp_path, part):
    safe, _, make = PARTS[part]
    folder = with_only(v1_5, tmp_path / "folder", part, **{f"{safe}.int8.safetensors": make()})
    with pytest.raises(UserError, match=rf"{part} only as variant 'int8' \({safe}\.int8\.safetensors\)"):
        loaded(folder, part)
    (folder / part / f"{safe}.int8.safetensors").unlink()
    with pytest.raises(UserError, match=rf"holds no weights of a {part}: neither {safe}\.safetensors nor"):
        loaded(folder, part)


def test_raw_weights_beside_the_average_are_found_in_either_format(v1_5, tmp_path):
    raw = {name: 2 * tensor for name, tensor in unet_state("v1-5").items()}
    for name in ("diffusion_pytorch_model.non_ema.bin", "diffusion_pytorch_model.non_ema.safetensors"):
        folder = with_only(v1_5, tmp_path / name, "unet", **{"diffusion_pytorch_model.bin": unet_state("v1-5")})
        save(raw, folder / "unet" / name)
        model = open_model(folder)
        assert close(model.unet("raw"), raw)
        assert close(model.unet("ema"), unet_state("v1-5"))


@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_that_is_missing_unknown_or_of_another_shape_is_named(v1_5, tmp_path, part):
    safe, _, make = PARTS[part]
    state = make()
    name = sorted(n for n in state if n.endswith(".weight") and state[n].dim() == 2)[0]
    for number, (changed, said) in enumerate(
        (
            ({n: t for n, t in state.items() if n != name}, "1 are missing"),
            (state | {"odd.one.weight": torch.zeros(2)}, "odd.one.weight is unknown"),
            (state | {name: torch.zeros(3, 5)}, rf"{name} has shape \(3, 5\)"),
            (state | {name: state[name].to(torch.int8)}, f"{name} as whole numbers"),
        )
    ):
        folder = with_only(v1_5, tmp_path / str(number), part, **{f"{safe}.safetensors": changed})
        with pytest.raises(UserError, match=said):
            loaded(folder, part)


def test_a_list_of_files_that_leads_elsewhere_or_lies_is_a_sentence(v1_5, tmp_path):
    folder = with_only(v1_5, tmp_path / "folder", "vae")
    index = folder / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    save({"x": torch.zeros(1)}, folder / "vae" / "part.safetensors")
    for content, said in (
        ({"weight_map": {"x": "../../secret.safetensors"}}, "which is no file beside it"),
        ({"weight_map": {"x": "gone.safetensors"}}, r"There is no file .*gone\.safetensors"),
        ({"weight_map": {"y": "part.safetensors"}}, "says that part.safetensors holds y, and it does not"),
        ({"metadata": {}}, "it has no weight_map"),
    ):
        write_json(index, content)
        with pytest.raises(UserError, match=said):
            load_vae(str(folder))


def test_what_git_keeps_in_the_place_of_a_large_file_is_named(v1_5, tmp_path):
    folder = with_only(v1_5, tmp_path / "folder", "vae")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:a2b5\nsize 334643276\n"
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_text(pointer)
    with pytest.raises(UserError, match="Fetch the file: `git lfs pull`"):
        load_vae(str(folder))


@pytest.mark.parametrize("form", ["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"])
def test_the_safety_checker_loads_as_published(tmp_path, form):
    state = write_checker(tmp_path / "safety_checker")
    write_json(tmp_path / "feature_extractor" / "preprocessor_config.json", json.loads(json.dumps(PREPROCESSOR)))
    (tmp_path / "safety_checker" / "model.safetensors").unlink()
    save(halved(state) if "fp16" in form else state, tmp_path / "safety_checker" / form)
    judge = load_safety_checker(str(tmp_path))
    assert len(judge([Image.new("RGB", (64, 48), "red")])) == 1
    ours = judge._network.state_dict()
    wanted = state["vision_model.vision_model.embeddings.patch_embedding.weight"]
    found = next(tensor for name, tensor in ours.items() if name.endswith("patch_embedding.weight"))
    assert torch.equal(found, wanted.half().float() if "fp16" in form else wanted)


def test_a_safety_checker_that_lacks_a_tensor_is_a_sentence(tmp_path):
    state = write_checker(tmp_path / "safety_checker")
    del state["special_care_embeds"]
    save(state, tmp_path / "safety_checker" / "model.safetensors")
    with pytest.raises(UserError, match=r"is not a safety checker .*special_care_embeds is missing"):
        load_safety_checker(str(tmp_path))


@real
def test_the_real_tokenizer_gives_the_known_tokens():
    tokenizer = load_tokenizer(str(PUBLISHED / "stable-diffusion-v1-4"))
    ids = tokenizer("a photograph of an astronaut riding a horse").input_ids
    assert ids == [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]
    assert tokenizer.model_max_length == 77
    assert set(tokenizer("", padding="max_length").input_ids[1:]) == {49407}
