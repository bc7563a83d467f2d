from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from sdtrain.config import TrainConfig, load_config
from sdtrain.errors import UserError
from sdtrain.models import device as device_module
from sdtrain.models.device import available_memory_bytes
from sdtrain.models.group_norm import GroupNormSilu
from sdtrain.models.unet import build_unet, prepare_for
from sdtrain.settings import dump_settings, load_settings
from sdtrain.train import train
from sdtrain.training import micro_batch
from sdtrain.training.micro_batch import activation_bytes, decide_micro_batch, largest_fitting, state_bytes
from sdtrain.training.run_dir import RunDir
from tests.training_fixtures import write_config


def config_of(folder, world, **changes):
    models, latents = world
    return load_config(str(write_config(folder / "run.yaml", models, latents, **changes)))


def attempts_until(limit, tried):
    def attempt(size):
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError(f"no room for {size}")

    return attempt


def test_sizes_grow_until_one_does_not_fit(ranks):
    tried = []
    assert largest_fitting([1, 2, 4, 8, 16], attempts_until(5, tried), ranks) == 4
    assert tried == [1, 2, 4, 8]
    assert largest_fitting([1, 2], attempts_until(5, tried), ranks) == 2
    assert largest_fitting([8, 16], attempts_until(5, tried), ranks) is None


def test_what_does_not_fit_one_rank_fits_none(ranks):
    class TwoRanks(type(ranks)):
        def any(self, flag):
            return flag or len(tried) == 2  # the other rank's second attempt fails

    tried = []
    both = TwoRanks(**vars(ranks))
    assert largest_fitting([1, 2, 4], attempts_until(100, tried), both) == 1


def test_every_other_error_is_raised(ranks):
    def attempt(size):
        raise RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR")

    with pytest.raises(RuntimeError, match="CUDNN_STATUS"):
        largest_fitting([1, 2], attempt, ranks)


def test_a_trial_is_a_pass_each_way_that_leaves_no_gradients(tmp_path, world, ranks):
    trial = micro_batch._Trial(config_of(tmp_path, world), ranks, reserve_bytes=0)
    kept = []
    handle = next(trial._unet.parameters()).register_post_accumulate_grad_hook(lambda p: kept.append(p.grad.shape))
    trial(2)
    trial(4)
    handle.remove()
    assert len(kept) == 2
    assert all(parameter.grad is None for parameter in trial._unet.parameters())
    assert trial._ballast.nbytes == state_bytes(trial._config, trial._unet.num_parameters(), 1)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_activations_are_counted_without_memory_as_they_are_with_it(tmp_path, world, precision):
    config = config_of(tmp_path, world, precision=precision)
    unet = prepare_for(build_unet(config.unet, config.latent_size), torch.device("cpu"), config.speed)
    unet = torch.nn.Module.to(unet, torch.bfloat16 if precision == "bf16" else torch.float32)
    own, kept = {parameter.data_ptr() for parameter in unet.parameters()}, {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = micro_batch._loss(unet, config, 3, torch.device("cpu"), next(unet.parameters()).dtype)
    real = sum(storage.nbytes() for address, storage in kept.items() if address not in own)
    assert loss.requires_grad
    assert activation_bytes(config, 3) == pytest.approx(real, rel=0.01)  # bf16's GroupNorm keeps some in float32
    one, two, three = (activation_bytes(config, size) for size in (1, 2, 3))
    assert three - two == two - one > 0


def test_norms_for_a_compiler_are_not_tried_without_one(tmp_path, world, ranks):
    plain, fused = (
        config_of(tmp_path, world, speed=speed) for speed in ({}, {"compile": "fused", "channels_last": True})
    )
    assert activation_bytes(fused, 2) == activation_bytes(plain, 2)
    unet = micro_batch._Trial(fused, ranks, reserve_bytes=0)._unet
    assert not any(norm.is_fused for norm in unet.modules() if isinstance(norm, GroupNormSilu))


def test_a_cpus_free_memory_bounds_the_size(tmp_path, world, ranks, monkeypatch, capsys):
    config = config_of(tmp_path, world, micro_batch_size="auto", global_batch_size=64)
    run, each = RunDir(tmp_path / "run"), 1.6 * activation_bytes(config, 1)
    with torch.device("meta"):
        num_parameters = build_unet(config.unet, config.latent_size).num_parameters()
    state = state_bytes(config, num_parameters, 1) + 4 * num_parameters
    for room, size in ((1.5, 1), (9, 8), (31, 16), (1000, 64)):
        monkeypatch.setattr(micro_batch, "available_memory_bytes", lambda room=room: int((state + room * each) / 0.8))
        assert decide_micro_batch(config, run, ranks).micro_batch == size
        assert f"micro_batch_size {size} (auto): " in capsys.readouterr().out
    monkeypatch.setattr(micro_batch, "available_memory_bytes", lambda: 10**6)
    with pytest.raises(UserError, match="Not even a micro-batch of 1 fits"):
        decide_micro_batch(config, run, ranks)


def test_a_run_keeps_its_size_where_it_fits(tmp_path, world, ranks, monkeypatch):
    config = config_of(tmp_path, world, micro_batch_size="auto")
    run = RunDir(tmp_path / "run")
    assert decide_micro_batch(config, run, ranks).micro_batch == 8
    run.begin(config.model_copy(update={"micro_batch_size": 2}), 0)
    assert decide_micro_batch(config, run, ranks).micro_batch == 2
    monkeypatch.setattr(micro_batch, "available_memory_bytes", lambda: 10**9)
    with monkeypatch.context() as little:
        little.setattr(micro_batch, "_TEMPORARIES", 5e8 / activation_bytes(config, 1))  # one fits, two do not
        assert decide_micro_batch(config, run, ranks).micro_batch == 1
    run.begin(config.model_copy(update={"micro_batch_size": 8}), 0)  # more than each of four ranks has
    monkeypatch.setattr(type(ranks), "smallest", lambda self, value: value)
    assert decide_micro_batch(config, run, replace(ranks, world_size=4)).micro_batch == 2


def test_a_run_that_decides_for_itself_trains_on_the_same_samples(tmp_path, world, ranks):
    logs = {}
    for size in ("auto", 2):
        run = RunDir(tmp_path / str(size))
        train(config_of(tmp_path, world, micro_batch_size=size, steps=3, precision="fp32"), run, ranks)
        logs[size] = [float(row["loss"]) for row in run.log.rows()]
        kept = load_settings(TrainConfig, run.path / "config.yaml")
        assert kept.micro_batch == (8 if size == "auto" else 2)
    assert logs["auto"] == pytest.approx(logs[2], rel=1e-5)
    train(config_of(tmp_path, world, micro_batch_size="auto", steps=4, precision="fp32"), run, ranks)
    assert load_settings(TrainConfig, run.path / "config.yaml").micro_batch == 2  # went on with what it had


@pytest.mark.parametrize(
    ("changes", "bytes_each"),
    [
        ({"precision": "bf16"}, 20),  # with 2 for the network 22 a parameter; 2 more while a backward pass ends
        ({"precision": "fp32"}, 20),
        ({"precision": "bf16", "optimizer": {"moments": "int8"}}, 14),
        ({"precision": "bf16", "speed": {"fp32_gradients": False}}, 18),
        ({"precision": "bf16", "ema": {"post_hoc": [0.05, 0.1]}}, 28),
    ],
)
def test_the_state_takes_as_much_as_the_readme_says(tmp_path, world, changes, bytes_each):
    config = config_of(tmp_path, world, **changes)
    assert state_bytes(config, 1000, 1) == 1000 * bytes_each
    assert state_bytes(config, 1000, 4) < 1000 * bytes_each
    assert state_bytes(config.model_copy(update={"zero_stage": 2}), 1000, 1) >= 1000 * bytes_each


def test_what_it_cannot_foresee_is_refused(tmp_path, world):
    auto = {"micro_batch_size": "auto"}
    with pytest.raises(UserError, match="cannot foresee the memory that the CUDA graphs"):
        config_of(tmp_path, world, **auto, speed={"compile": "regional", "compile_mode": "reduce-overhead"})
    with pytest.raises(UserError, match="does not count the VAE"):
        config_of(tmp_path, world, **auto, data={"online_vae": True})
    for wrong in (0, "many", 1.5):
        with pytest.raises((UserError, ValidationError), match="micro_batch_size"):
            config_of(tmp_path, world, micro_batch_size=wrong)


def test_it_is_free_to_change_and_divides_every_group(tmp_path, world):
    config = config_of(tmp_path, world, micro_batch_size="auto", global_batch_size=96, data={"bucket_group": 12})
    assert config.micro_batches(2) == [1, 2, 3, 4, 6, 12]
    assert config.digest() == config.model_copy(update={"micro_batch_size": 4}).digest()
    assert "micro_batch_size: auto" in dump_settings(config)
    with pytest.raises(UserError, match=r"cannot be shared by 5 ranks. Use global_batch_size 95 or 100, or another"):
        config.require_share(5)


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/job/step\n", {"job/memory.max": "5000", "job/step/memory.max": "max"}, 5000 - 1000 + 200),
        ("4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "3000"}, 3000 - 1000 + 200),
        ("0::/\n", {}, None),
    ],
)
def test_a_containers_limit_counts(tmp_path, monkeypatch, lines, files, expected):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(lines)
    groups = tmp_path / "groups"
    for name, content in files.items():
        place = groups / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{content}\n")
        place.with_name("memory.usage_in_bytes" if "limit" in name else "memory.current").write_text("1000\n")
        place.with_name("memory.stat").write_text("anon 800\ninactive_file 200\n")
    monkeypatch.setattr(device_module, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(device_module, "_CGROUPS", groups)
    free = available_memory_bytes()
    assert free == expected if expected is not None else free > 10**8
