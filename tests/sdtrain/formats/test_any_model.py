"""What can be opened, and what training can begin from."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdtrain.config import load_config
from sdtrain.dataset.files import sha256_of
from sdtrain.errors import UserError
from sdtrain.formats.any_model import open_model, training_weights
from sdtrain.formats.checkpoint import STATE, find_checkpoint
from sdtrain.formats.export import ExportSettings, export_model
from sdtrain.formats.hub import find_part_folder
from sdtrain.training.run_dir import RunDir
from tests.training_fixtures import write_config


def begun_from(source, tmp_path, world, ranks, **changes):
    from sdtrain.training.state import TrainingState

    path = write_config(tmp_path / "config.yaml", *world, init_from=str(source), **changes)
    state = TrainingState(load_config(str(path)), RunDir(tmp_path / "begun"), ranks)
    assert state.checkpoints.restore() == 0
    return state.partition, state.ema


@pytest.mark.parametrize("name", ["both.ckpt", "both.safetensors", "both"])
def test_training_begins_with_both_kinds_of_weights_of_a_published_model(run, name, tmp_path, world, ranks):
    source = export_model(run, tmp_path / name, ExportSettings("both"))
    partition, ema = begun_from(source, tmp_path, world, ranks)
    weights = {which: dict(find_checkpoint(run).weights(which)) for which in ("master", "ema")}
    assert torch.equal(partition.master, partition.shard(weights["master"]))
    assert torch.equal(ema.average, partition.shard(weights["ema"]))
    # A folder has no place for the number of updates; then the warm-up is over, (1 + 80) / (10 + 80) being 0.9.
    assert ema.num_updates == (80 if name == "both" else find_checkpoint(run).layout.step)
    assert (partition.moments()["exp_avg"] == 0).all()


def test_a_published_model_of_one_kind_begins_both(run, tmp_path, world, ranks):
    source = export_model(run, tmp_path / "half.safetensors", ExportSettings("ema", "fp16"))
    partition, ema = begun_from(source, tmp_path, world, ranks)
    wanted = {name: tensor.half() for name, tensor in find_checkpoint(run).weights("ema")}
    assert torch.equal(partition.master, partition.shard(wanted))
    assert torch.equal(ema.average, partition.master)
    assert ema.num_updates == 0


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (torch.tensor(470_000, dtype=torch.int32), 470_000),
        (torch.tensor(470_000.0), 470_000),
        (torch.tensor(60_000.0).half(), 60_000),
        (torch.tensor(470_000.0).half(), None),  # infinite
        (torch.tensor(-1, dtype=torch.int32), None),  # CompVis' own word for an average that does not count
        (torch.tensor(0), 0),
        (None, None),
    ],
    ids=str,
)
def test_the_number_of_updates_is_read_however_a_file_has_it(run, tokenizer, tmp_path, stored, expected):
    source = export_model(run, tmp_path / "both.safetensors", ExportSettings("both"))
    with safe_open(source, "pt") as file:
        notes = file.metadata()
    tensors = load_file(source)
    del tensors["model_ema.num_updates"]
    save_file(tensors if stored is None else tensors | {"model_ema.num_updates": stored}, source, metadata=notes)
    assert training_weights(source)[2] == expected
    again = export_model(source, tmp_path / "again.safetensors", ExportSettings("both", tokenizer=tokenizer))
    assert int(load_file(again)["model_ema.num_updates"]) == (-1 if expected is None else expected)


def test_weights_that_are_not_finite_begin_nothing(run, tmp_path, world, ranks):
    source = export_model(run, tmp_path / "both.safetensors", ExportSettings("both"))
    with safe_open(source, "pt") as file:
        notes = file.metadata()
    for prefix in ("model.diffusion_model.", "model_ema.diffusion_model"):
        tensors = load_file(source)
        name = next(name for name in tensors if name.startswith(prefix))
        tensors[name].view(-1)[-1] = torch.nan
        save_file(tensors, tmp_path / "bad.safetensors", metadata=notes)
        with pytest.raises(UserError, match=r"bad\.safetensors holds weights that are not finite"):
            begun_from(tmp_path / "bad.safetensors", tmp_path, world, ranks)


def test_another_unet_is_a_sentence(run, tmp_path, world, ranks):
    source = export_model(run, tmp_path / "model.ckpt")
    wider = load_config(str(run / "config.yaml")).unet.model_dump() | {"block_out_channels": [16, 48]}
    with pytest.raises(UserError, match=r"model\.ckpt holds another UNet than the config's `unet`"):
        begun_from(source, tmp_path, world, ranks, unet=wider)


def test_a_checkpoint_that_two_ranks_wrote_gives_the_same_file(run, tmp_path):
    """Whatever the stage of ZeRO, each rank writes its part of the flat vectors; see test_checkpoint_ranks."""
    whole = find_checkpoint(run)
    folder = tmp_path / "two" / "checkpoints" / whole.path.name
    folder.mkdir(parents=True)
    (folder.parents[1] / "config.yaml").write_text((run / "config.yaml").read_text())
    half, files = -(-whole.layout.partition_numel // 2), {}
    for rank in range(2):
        path = folder / f"rank-{rank:05d}-of-00002.safetensors"
        save_file({name: whole.read(name, rank * half, (rank + 1) * half).contiguous() for name in STATE}, path)
        files[path.name] = sha256_of(path)
    layout = whole.layout.model_copy(update={"world_size": 2, "partition_numel": half, "files": files})
    (folder / "layout.json").write_text(layout.model_dump_json())
    one, two = (export_model(path, tmp_path / f"{path.name}.ckpt", ExportSettings("both")) for path in (run, folder))
    assert one.read_bytes() == two.read_bytes()


def test_what_is_no_model_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="neither a diffusers folder with a Stable Diffusion pipeline nor"):
        open_model(tmp_path)
    with pytest.raises(UserError, match="neither a diffusers folder"):
        open_model(tmp_path / "nothing")
    (tmp_path / "noise.ckpt").write_bytes(b"noise")
    with pytest.raises(UserError, match="cut short or damaged"):
        open_model(tmp_path / "noise.ckpt")


def test_a_folder_with_damaged_weights_is_a_sentence(run, tmp_path):
    folder = export_model(run, tmp_path / "folder")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="is not a UNet that diffusers can load"):
        open_model(folder).unet("ema")


@pytest.mark.parametrize(("part", "with_weights"), [("tokenizer", False), ("text_encoder", True)])
def test_a_tokenizer_comes_from_the_hub_without_the_weights_beside_it(tokenizer, monkeypatch, part, with_weights):
    asked = []

    def download(name, allow_patterns):
        asked.extend(allow_patterns)
        return tokenizer

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    find_part_folder("openai/clip-vit-large-patch14", part)
    assert ("model.safetensors" in asked) == with_weights
    assert {"*.json", "*.txt"} < set(asked)
