"""Our forms of diffusers' blocks compute what diffusers' do, and leave channels_last nowhere."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch.utils._python_dispatch import TorchDispatchMode

from sdtrain.config.sections import SpeedConfig, UNetConfig
from sdtrain.models.backends import compile_unet
from sdtrain.models.group_norm import GroupNormSilu, group_norm
from sdtrain.models.layout_blocks import keep_layout
from sdtrain.models.unet import build_unet, prepare_for

CPU = torch.device("cpu")
SD_V1 = UNetConfig(block_out_channels=(16, 32, 48, 48), num_heads=2, norm_num_groups=8, cross_attention_dim=32)
"""SD v1's topology, narrow."""
ATEN = torch.ops.aten


def unet_of(speed=None, for_training=True):
    torch.manual_seed(0)
    unet = build_unet(SD_V1, 16)
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return unet if speed is None else prepare_for(unet, CPU, speed, for_training)


def inputs(batch=2, layout=torch.channels_last, size=16):
    torch.manual_seed(1)
    noisy, context = torch.randn(batch, 4, size, size), torch.randn(batch, 7, 32)
    return noisy.to(memory_format=layout), torch.arange(batch) * 99, context


class Transposes(TorchDispatchMode):
    """Counts where 4-D activations and their gradients are not, or do not stay, channels_last.

    PyTorch's GroupNorm on CUDA makes its input, its output and both gradients contiguous. It cannot be run here, so
    each of its calls on channels_last counts as the two transposes that it makes there.
    """

    def __init__(self):
        super().__init__()
        self.norms, self.convolutions, self.copies = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (ATEN.native_group_norm.default, ATEN.native_group_norm_backward.default):
            self.norms += 2 * is_channels_last(args[0])
        elif func is ATEN.convolution.default:
            self.convolutions += sum(not is_channels_last(tensor) for tensor in args[:2])
        elif func is ATEN.convolution_backward.default:
            self.convolutions += sum(not is_channels_last(tensor) for tensor in args[:3])
        elif func in (ATEN.clone.default, ATEN.copy_.default, ATEN._to_copy.default):
            source = args[func is ATEN.copy_.default]
            self.copies += source.dim() >= 3 and source.stride() != result.stride()
        return result


def is_channels_last(tensor):
    """Slices of channels, as behind a concatenation, are too: their rows of channels are whole."""
    return tensor.stride(1) == 1 or tensor.shape[1] == 1 or tensor.is_contiguous(memory_format=torch.channels_last)


def transposes(unet, batch=2, size=16):
    noisy, timesteps, context = inputs(batch, size=size)
    upstream = torch.randn_like(noisy)  # a loss gives it in the usual layout, which for 4 channels costs nothing
    with Transposes() as seen:
        unet(noisy, timesteps, context).sample.backward(upstream)
    return seen


def test_with_norms_for_the_compiler_nothing_leaves_channels_last():
    plain = transposes(prepare_for(unet_of(), CPU, SpeedConfig(attention="sdpa")))
    assert plain.norms + plain.convolutions + plain.copies > 300
    compiled = SpeedConfig(attention="sdpa", channels_last=True, compile="fused")
    seen = transposes(unet_of(compiled))
    assert (seen.norms, seen.convolutions, seen.copies) == (0, 0, 0)
    eager = transposes(unet_of(compiled.model_copy(update={"compile": "off"})))
    assert (eager.convolutions, eager.copies) == (0, 0)
    assert eager.norms == 2 * 2 * 61, "what PyTorch's norms cost on CUDA, once forward and once backward"


def test_nor_in_batches_where_diffusers_fears_for_its_upsampling():
    seen = transposes(unet_of(SpeedConfig(attention="sdpa", channels_last=True, compile="fused")), batch=64)
    assert (seen.norms, seen.convolutions, seen.copies) == (0, 0, 0)


def result_of(unet, layout):
    noisy, timesteps, context = inputs(layout=layout)
    predicted = unet(noisy, timesteps, context).sample
    predicted.square().mean().backward()
    return predicted.detach(), {name: parameter.grad for name, parameter in unet.named_parameters()}


@pytest.mark.parametrize("is_fused", [False, True])
def test_blocks_compute_what_diffusers_blocks_do(is_fused):
    theirs, ours = unet_of(), unet_of()
    names = list(ours.state_dict())
    keep_layout(ours, is_fused)
    assert list(ours.state_dict()) == names
    predicted, gradients = result_of(theirs, torch.contiguous_format)
    found, found_gradients = result_of(ours, torch.contiguous_format)
    torch.testing.assert_close(found, predicted, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-3, atol=1e-6)
    in_channels_last, _ = result_of(ours, torch.channels_last)
    torch.testing.assert_close(in_channels_last, predicted, rtol=1e-4, atol=1e-5)


def test_blocks_that_sd_v1_has_not_stay():
    resampling = ResnetBlock2D(in_channels=8, groups=4, temb_channels=8, down=True)
    unet = unet_of()
    unet.mid_block.resnets.append(resampling)
    keep_layout(unet, is_fused=True)
    assert type(resampling) is ResnetBlock2D
    assert type(resampling.norm1) is torch.nn.GroupNorm


def test_an_odd_size_is_upsampled_to_what_the_way_down_had():
    theirs, ours = unet_of(), unet_of()
    keep_layout(ours, is_fused=False)
    with torch.no_grad():
        expected, found = (unet(*inputs(layout=torch.contiguous_format, size=12)).sample for unet in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["usual", "channels_last"])
@pytest.mark.parametrize("with_silu", [False, True])
def test_the_norm_is_pytorchs(layout, with_silu):
    torch.manual_seed(0)
    images = (3 + 2 * torch.randn(2, 24, 5, 7)).to(memory_format=layout).requires_grad_()
    weight, bias = torch.randn(24, requires_grad=True), torch.randn(24, requires_grad=True)
    leaves, upstream = [images, weight, bias], torch.randn(2, 24, 5, 7).to(memory_format=layout)
    expected = F.group_norm(images, 8, weight, bias, 1e-5)
    expected = F.silu(expected) if with_silu else expected
    found = group_norm(images, weight, bias, 8, 1e-5, with_silu)
    assert found.stride() == images.stride()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_norm_loses_nothing_to_a_mean_far_from_zero_and_rounds_halves_once():
    torch.manual_seed(0)
    images = 1000 + torch.randn(2, 16, 8, 8)
    weight, bias = torch.ones(16), torch.zeros(16)
    exact = F.silu(F.group_norm(images.double(), 4, weight.double(), bias.double()))
    torch.testing.assert_close(group_norm(images, weight, bias, 4, 1e-5, True).double(), exact, rtol=0, atol=5e-4)
    half = torch.randn(2, 16, 8, 8).bfloat16()
    exact = F.silu(F.group_norm(half.double(), 4, weight.double(), bias.double()))
    ours = group_norm(half, weight.bfloat16(), bias.bfloat16(), 4, 1e-5, True)
    assert ours.dtype == torch.bfloat16
    theirs = F.silu(F.group_norm(half, 4, weight.bfloat16(), bias.bfloat16()))
    assert (ours.double() - exact).abs().max() <= (theirs.double() - exact).abs().max()


@pytest.fixture
def compiled(monkeypatch):
    """The modules that were compiled."""
    seen, before = [], torch._inductor.config.force_layout_optimization
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: seen.append(module))
    yield seen
    torch._inductor.config.force_layout_optimization = before


@pytest.mark.parametrize(("mode", "number"), [("fused", 61 + 16), ("regional", 22 + 16 + 17), ("whole", 1)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_each_part_is_compiled_once_and_inductor_told_of_the_layout(compiled, mode, number, channels_last):
    speed = SpeedConfig(compile=mode, channels_last=channels_last)
    unet = unet_of(speed)
    compile_unet(unet, speed)
    kinds = {
        "fused": (GroupNormSilu, GEGLU),
        "regional": (ResnetBlock2D, BasicTransformerBlock, GroupNormSilu),
        "whole": (type(unet),),
    }
    assert all(isinstance(module, kinds[mode]) for module in compiled)
    assert len(compiled) == (number if mode != "regional" or channels_last else 22 + 16)
    assert torch._inductor.config.force_layout_optimization is channels_last
    norms = [module for module in unet.modules() if isinstance(module, GroupNormSilu)]
    assert len(norms) == (61 if channels_last or mode == "fused" else 0)
    assert all(norm.is_fused for norm in norms)


@pytest.mark.long
def test_what_inductor_fuses_is_what_pytorch_computes():
    """GroupNorm with SiLU, and GEGLU, forward and backward."""
    torch.compiler.reset()
    torch.manual_seed(0)
    norm, gated = torch.nn.GroupNorm(4, 16), GEGLU(16, 24)
    torch.nn.init.normal_(norm.weight)
    images = torch.randn(2, 16, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    tokens = torch.randn(2, 5, 16, requires_grad=True)

    def result():
        outputs = norm(images), gated(tokens)
        leaves = [images, tokens, *norm.parameters(), *gated.parameters()]
        return [*outputs, *torch.autograd.grad(sum(output.square().sum() for output in outputs), leaves)]

    eager_norm = norm.forward
    norm.forward = lambda images: F.silu(eager_norm(images))
    expected = result()
    del norm.forward
    GroupNormSilu.replace(norm, with_silu=True, is_fused=True)
    norm.compile(dynamic=False)
    gated.compile(dynamic=False)
    for found, wanted in zip(result(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert found.stride() == wanted.stride()
