"""A run in channels_last keeps its weights in that layout, and all its files are those of a run without it."""

import hashlib

import pytest
import torch

from sdtrain.config import load_config
from sdtrain.formats.checkpoint import STATE, find_checkpoint
from sdtrain.formats.export import ExportSettings, export_model
from sdtrain.models.layout import ChannelsLastConv2d
from sdtrain.sampling.sampler import Sampler, SampleSettings, load_networks
from sdtrain.train import train
from sdtrain.training.run_dir import RunDir
from sdtrain.training.state import TrainingState
from tests.training_fixtures import write_config

STEPS = 3


def config_of(folder, world, channels_last, **changes):
    path = folder / f"config-{channels_last}.yaml"
    common = {"steps": STEPS, "checkpoint": {"every": 100, "keep_last": 9}, "precision": "fp32"}
    return load_config(str(write_config(path, *world, speed={"channels_last": channels_last}, **common | changes)))


@pytest.fixture(scope="module", params=[False, True], ids=["usual", "channels_last"])
def trained(request, tmp_path_factory, world, ranks):
    """Folder of a finished run, and whether it was in channels_last."""
    folder = tmp_path_factory.mktemp("trained")
    train(config_of(folder, world, request.param), RunDir(folder / "run"), ranks)
    return folder, request.param


def weights_of(run):
    checkpoint = find_checkpoint(run)
    return {name: dict(checkpoint.weights(name)) for name in STATE}


def assert_same(found, expected):
    for name in STATE:
        for parameter, tensor in expected[name].items():
            assert torch.equal(found[name][parameter], tensor), (name, parameter)


def shaped(slots, flat):
    return {slot.name: slot.shaped(flat[slot.offset : slot.offset + slot.numel].detach().clone()) for slot in slots}


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_run_goes_on_in_the_other_layout_bit_for_bit_and_its_exports_stay(tmp_path, world, ranks, trained):
    folder, was_channels_last = trained
    config = config_of(tmp_path, world, not was_channels_last, steps=STEPS + 1)
    run_dir = RunDir(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    newest = find_checkpoint(folder / "run").path
    (tmp_path / "run" / "checkpoints" / newest.name).symlink_to(newest)
    state = TrainingState(config, run_dir, ranks)
    assert state.checkpoints.restore() == STEPS
    state.begin(STEPS)
    state.checkpoints.save(STEPS + 1)
    state.checkpoints.finish(STEPS + 1, STEPS + 1)
    layouts = [find_checkpoint(run / "run").layout for run in (folder, tmp_path)]
    permuted = [any(slot.is_channels_last for slot in layout.parameters) for layout in layouts]
    assert permuted == [was_channels_last, not was_channels_last]
    assert [slot.shape for slot in layouts[0].parameters] == [slot.shape for slot in layouts[1].parameters]
    assert_same(weights_of(tmp_path / "run"), weights_of(folder / "run"))
    for name in ("model.safetensors", "model"):
        files = []
        for run in (folder, tmp_path):
            output = tmp_path / "exports" / f"{run.name}" / name
            output.parent.mkdir(parents=True, exist_ok=True)
            export_model(run / "run", output, ExportSettings(weights="both"))
            files.append(digests(output.parent))
        assert files[0] == files[1]


def test_it_begins_from_any_model_with_the_same_weights(tmp_path, world, ranks, trained):
    folder, _ = trained
    export_model(folder / "run", tmp_path / "export", ExportSettings(weights="both"))
    expected = weights_of(folder / "run")
    for source in (folder / "run", tmp_path / "export"):
        state = TrainingState(config_of(tmp_path, world, True, init_from=str(source)), RunDir(tmp_path / "new"), ranks)
        state.checkpoints.restore()
        for name, vector in {"master": state.partition.master, "ema": state.ema.average}.items():
            for parameter, tensor in shaped(state.partition.slots, vector).items():
                assert torch.equal(tensor, expected[name][parameter])
        for name, tensor in state.engine.module.state_dict().items():
            assert torch.equal(tensor, expected["master"][name])


def test_both_layouts_begin_with_the_same_weights_and_learn_the_same(tmp_path, world, ranks):
    initial = []
    for channels_last in (False, True):
        config, run_dir = config_of(tmp_path, world, channels_last), RunDir(tmp_path / str(channels_last))
        state = TrainingState(config, run_dir, ranks)
        convolutions = [m for m in state.engine.module.modules() if isinstance(m, torch.nn.Conv2d)]
        kinds = {type(convolution) for convolution in convolutions if convolution.kernel_size != (1, 1)}
        assert kinds == {ChannelsLastConv2d if channels_last else torch.nn.Conv2d}
        initial.append(shaped(state.partition.slots, state.partition.master))
        train(config, run_dir, ranks)
    assert all(torch.equal(initial[1][name], tensor) for name, tensor in initial[0].items())
    logs = [[float(row["loss"]) for row in RunDir(tmp_path / name).log.rows()] for name in ("False", "True")]
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)


def test_previews_and_validation_see_the_weights_that_the_export_has(tmp_path, world, ranks):
    previews = {"every": STEPS, "prompts": ["a red circle"], "num_steps": 2}
    for channels_last in (False, True):
        changes = {"previews": previews, "validation": {"num_samples": 8, "every": STEPS, "num_timesteps": 2}}
        config = config_of(tmp_path, world, channels_last, **changes)
        run_dir = RunDir(tmp_path / str(channels_last))
        train(config, run_dir, ranks)
        assert run_dir.preview(STEPS).exists()
    losses = [[float(row["loss"]) for row in RunDir(tmp_path / name).validation.rows()] for name in ("False", "True")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    state = TrainingState(config, run_dir, ranks)
    state.checkpoints.restore()
    settings = SampleSettings(num_steps=4)
    with state.averaged_weights():
        (ours,) = Sampler(state.networks()).sample(["a blue square"], [3], settings)
    networks = load_networks(run_dir.path, "cpu", torch.float32)
    (theirs,) = Sampler(networks).sample(["a blue square"], [3], settings)
    difference = torch.tensor(list(ours.tobytes())).int() - torch.tensor(list(theirs.tobytes())).int()
    assert difference.abs().max() <= 1
