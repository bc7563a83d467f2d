"""The section of RESULTS.md, and the classes of kernels that it names."""

from typing import Any

import pytest

from tests.gpu_check.kernels import class_of, losses
from tests.gpu_check.results import section

# As profilers of an H200 with PyTorch 2.11 and of a CPU call them.
KERNELS = {
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64": "convolution",
    "sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc": "convolution",
    "void cudnn::cnn::dgrad2d_grouped_direct_kernel<float, int>": "convolution",
    "aten::mkldnn_convolution": "convolution",
    "aten::convolution_backward": "convolution",
    "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT": "matmul",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_nn_align8>": "matmul",
    "aten::addmm": "matmul",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3_64x64x64_cga1x1x1_kernel0_0": "attention",
    "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<96, 128, 64, 4>>": "attention",
    "fmha_cutlassB_bf16_aligned_64x64_k64_dropout_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)": "attention",
    "aten::_softmax": "attention",
    "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16>": "norm",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>": "norm",
    "triton_red_fused_native_group_norm_silu_3": "norm",
    "aten::native_group_norm": "norm",
    "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>": "copy",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIterator&)>": "copy",
    "Memcpy DtoD (Device -> Device)": "copy",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<c10::BFloat16>": "copy",
    "aten::cat": "copy",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "communication",
    "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::silu_kernel>": "elementwise",
    "triton_poi_fused_gelu_mul_7": "elementwise",
    "a_kernel_of_tomorrow": "other",
}


@pytest.mark.parametrize(("name", "expected"), KERNELS.items())
def test_kernels_are_of_the_class_that_their_names_say(name: str, expected: str) -> None:
    assert class_of(name) == expected


def test_what_a_class_loses_is_what_it_takes_beyond_its_flop_at_the_peak() -> None:
    lost = losses(
        {"convolution": 50.0, "copy": 14.0, "matmul": 30.0}, 6.0, {"convolution": 40e12, "matmul": 20e12}, 1e15
    )
    assert lost == {"copy": 14.0, "convolution": 10.0, "matmul": 10.0, "idle": 6.0}


def result(gpu: str, rate: float, mfu: float | None) -> dict[str, Any]:
    """A made-up result, of a machine that nobody measured."""
    machine = {"versions": {"torch": "2.11.0"}, "gpu": {"name": gpu}, "matmul_tflops": 700.0, "copy_gb_per_s": 4000.0}
    run = {"images_per_s": rate, "mfu": mfu, "of_matmul": 0.5, "memory_gb": 99.0, "data_wait": 0.0, "micro_batch": 32}
    profile = run | {
        "profile": {"wall_ms": 100.0, "by_class_ms": {"convolution": 60.0, "copy": 30.0}, "idle_ms": 10.0},
        "num_micro_steps": 2,
        "lost_ms": {"copy": 30.0, "convolution": 20.0, "idle": 10.0, "norm": 1.0},
        "syncs": {"per_optimizer_step": 3, "places": {"a.py:7": 3}},
    }
    figures = {"machine": machine, "profile": profile, "best": {"settings": "all", "512px": run, "256px": run}}
    stages = [
        {"name": name, "status": "passed", "seconds": 9.0, "problem": None, "figures": found}
        for name, found in figures.items()
    ]
    stages.append(
        {"name": "score", "status": "failed", "seconds": 1.0, "problem": "A\nValueError: no | b", "figures": {}}
    )
    about = {"command": "python -m tests.gpu_check", "started": "2026-11-29T00:00:00+00:00", "commit": "abc"}
    return about | {"device": "cuda", "budget_s": 500, "stages": stages}


def test_a_known_gpu_has_mfu_targets_and_its_largest_losses() -> None:
    text = section(result("NVIDIA H200", 147.6, 0.36))
    assert "## GPU check: NVIDIA H200" in text
    assert "989.4 TFLOP/s by its data sheet" in text
    assert "| 512px | 147.6 | 0.36 | 0.5 | 99.0 | 0.0 | 32 |" in text
    assert "164 missed by 10.0%, 180 missed by 18.0%; 1.03 of the best published" in text
    assert "Largest losses against the peak: copy 30.0 ms (30%); convolution 20.0 ms (20%); idle 10.0 ms (10%)." in text
    assert "Host syncs in an optimizer step: 3 ({'a.py:7': 3})" in text
    assert "| score | failed | 1 | ValueError: no \\| b |" in text


def test_an_unknown_gpu_has_no_mfu() -> None:
    text = section(result("NVIDIA Unheard Of", 200.0, None))
    assert "no data sheet known, so no MFU" in text
    assert "| 512px | 200.0 |  | 0.5 |" in text
    assert "180 reached by 11.1%" in text
