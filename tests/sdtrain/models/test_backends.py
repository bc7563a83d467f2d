"""The levers change how fast a step is and nothing else."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdtrain.config import SpeedConfig, TrainConfig, load_config
from sdtrain.errors import UserError
from sdtrain.formats.checkpoint import find_checkpoint
from sdtrain.models.backends import attention_kernels, compile_unet, set_backends
from sdtrain.models.unet import build_unet, prepare_for
from sdtrain.settings import parse_settings
from sdtrain.train import train
from sdtrain.training.distributed import make_cublas_deterministic
from sdtrain.training.run_dir import RunDir
from tests.training_fixtures import write_config


def unet_config():
    return load_config("tiny").unet.model_copy(update={"block_out_channels": (16, 32), "cross_attention_dim": 16})


def gradients(speed):
    """Loss and gradients of a small UNet in float32, by parameter name."""
    torch.manual_seed(0)
    unet = build_unet(unet_config(), 8)
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    unet = prepare_for(unet, torch.device("cpu"), speed)
    compile_unet(unet, speed)
    with attention_kernels(speed):
        predicted = unet(torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.randn(2, 16, 16)).sample
    loss = predicted.square().mean()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in unet.named_parameters()}


def assert_same_gradients(speed):
    loss, expected = gradients(SpeedConfig(attention="plain"))
    ours, found = gradients(speed)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "speed", [{"channels_last": True}, {"attention": "sdpa"}, {"attention": "flash"}, {"attention": "cudnn"}], ids=str
)
def test_layout_and_attention_kernels_give_the_same_gradients(speed):
    assert_same_gradients(SpeedConfig(**speed))


@pytest.fixture
def traced(monkeypatch):
    """torch.compile traces and splits the graphs as ever, but leaves out Inductor, which takes minutes of a CPU."""
    torch.compiler.reset()
    compile_module = torch.nn.Module.compile

    def compile_quickly(module, mode=None, dynamic=None):
        assert (mode, dynamic) == (None, False)
        compile_module(module, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    yield
    torch.compiler.reset()


@pytest.mark.long
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("how", ["fused", "regional", "whole"])
def test_compiled_networks_give_the_same_gradients_under_the_same_names(traced, how, channels_last):
    assert_same_gradients(SpeedConfig(compile=how, channels_last=channels_last))


@pytest.mark.long
def test_what_inductor_makes_gives_the_same_gradients():
    torch.compiler.reset()
    assert_same_gradients(SpeedConfig(compile="regional"))


@pytest.mark.long
def test_a_compiled_run_has_the_losses_of_another_and_goes_on_from_its_checkpoint(tmp_path, world, ranks, traced):
    def run(name, steps, **changes):
        config = load_config(str(write_config(tmp_path / "c.yaml", *world, precision="fp32", steps=steps, **changes)))
        train(config, RunDir(tmp_path / name), ranks)
        return [float(row["loss"]) for row in RunDir(tmp_path / name).log.rows()]

    plain = run("plain", 6)
    assert run("compiled", 6, speed={"compile": "regional"}) == pytest.approx(plain, rel=1e-5)
    run("mixed", 3)
    assert run("mixed", 6, speed={"compile": "regional"}) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("speed", [{"channels_last": True}, {"fused_adamw": False}, {"attention": "sdpa"}], ids=str)
def test_deepspeed_trains_with_every_lever(tmp_path, world, ranks, speed):
    found = []
    for name, changes in {"plain": {}, "lever": {"speed": speed}}.items():
        config = load_config(str(write_config(tmp_path / "c.yaml", *world, steps=3, **changes)))
        train(config, RunDir(tmp_path / name), ranks)
        found.append([float(row["loss"]) for row in RunDir(tmp_path / name).log.rows()])
    assert found[1] == pytest.approx(found[0], rel=1e-2)


class _Reads(TorchDispatchMode):
    """Counts how often a number is fetched from the device, which waits for it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_a_training_step_never_reads_from_the_device(tmp_path, world, ranks):
    from sdtrain.training.state import TrainingState
    from sdtrain.training.throughput import Progress

    config, run_dir = load_config(str(write_config(tmp_path / "c.yaml", *world))), RunDir(tmp_path / "run")
    state = TrainingState(config, run_dir, ranks)
    progress, batches = Progress(run_dir, config, ranks, 0.0), state.batches(0)
    with _Reads() as reads:
        for step in range(3):
            seen = []
            for batch in state.micro_batches(batches):
                weighted, losses = state.losses(batch)
                state.engine.backward(weighted.mean())
                state.engine.step()
                seen.append((losses, batch.timesteps))
            progress.add(seen, state.step_was_applied(step))
    assert reads.count == 0
    batches.close()
    with _Reads() as reads:
        progress.check(3)
    assert reads.count > 0, "the counter counts"


def test_small_parts_are_not_given_graphs():
    content = {"name": "mine", "steps": 9, "speed": {"compile": "fused", "compile_mode": "reduce-overhead"}}
    with pytest.raises(UserError, match="replays CUDA graphs, which copy their inputs: too much for such small parts"):
        parse_settings(TrainConfig, content, "mine.yaml")


def test_a_mode_without_compilation_is_refused():
    content = {"name": "mine", "steps": 9, "speed": {"compile_mode": "max-autotune"}}
    with pytest.raises(UserError, match="compile_mode has no effect while compile is off; set compile to regional"):
        parse_settings(TrainConfig, content, "mine.yaml")


@pytest.mark.parametrize(
    ("speed", "why"),
    [
        ({"cudnn_benchmark": True}, "cudnn_benchmark takes whichever convolution was fastest this time"),
        ({"attention": "cudnn"}, "attention: cudnn has no deterministic backward pass"),
        ({"compile": "whole", "compile_mode": "max-autotune"}, "takes whichever kernel was fastest this time"),
        (
            {"compile": "regional", "compile_mode": "max-autotune-no-cudagraphs"},
            "takes whichever kernel was fastest this time",
        ),
    ],
)
def test_deterministic_refuses_what_contradicts_it(speed, why):
    content = {"name": "mine", "steps": 9, "speed": speed}
    parse_settings(TrainConfig, content, "mine.yaml")
    content["speed"] = speed | {"deterministic": True}
    with pytest.raises(UserError, match=why):
        parse_settings(TrainConfig, content, "mine.yaml")


@pytest.mark.parametrize("attention", ["auto", "plain", "sdpa", "flash", "efficient"])
def test_deterministic_goes_with_every_other_kernel_and_its_config_reads_back(attention):
    speed = SpeedConfig(deterministic=True, attention=attention)
    assert not speed.cudnn_benchmark
    assert SpeedConfig.model_validate(speed.model_dump()) == speed
    assert SpeedConfig().cudnn_benchmark


@pytest.fixture
def backends():
    """PyTorch's settings, put back afterwards."""
    yield
    set_backends(SpeedConfig())


def test_deterministic_reaches_pytorch_and_is_taken_back(backends):
    def now():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
        )

    set_backends(SpeedConfig(deterministic=True))
    assert now() == (True, False, False)
    set_backends(SpeedConfig().model_copy(update={"deterministic": True}))
    assert now() == (True, False, False)
    set_backends(SpeedConfig())
    assert now() == (False, False, True)


def test_compiled_code_is_deterministic_or_refused(monkeypatch):
    for wanted in (True, False):
        compile_unet(build_unet(unet_config(), 8), SpeedConfig(compile="regional", deterministic=wanted))
        assert torch._inductor.config.deterministic is wanted
    monkeypatch.setattr("torch._inductor.config", object())
    with pytest.raises(UserError, match=r"holds for compiled code from PyTorch 2\.10 on; set speed\.compile to off"):
        compile_unet(build_unet(unet_config(), 8), SpeedConfig(compile="regional", deterministic=True))


def test_cublas_is_told_before_cuda_starts_unless_the_environment_forbids_it(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    make_cublas_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    make_cublas_deterministic()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match=r"but it is ':0:0' in the environment\. Unset it"):
        make_cublas_deterministic()


def test_training_takes_no_operation_without_a_deterministic_algorithm(tmp_path, world, ranks, backends):
    config = load_config(str(write_config(tmp_path / "c.yaml", *world, steps=3, speed={"deterministic": True})))
    for name in ("first", "second"):
        train(config, RunDir(tmp_path / name), ranks)
    files = [find_checkpoint(tmp_path / name).layout.files for name in ("first", "second")]
    assert files[0] == files[1]
