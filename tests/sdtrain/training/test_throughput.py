import pytest
import torch

from sdtrain.config import load_config
from sdtrain.training.throughput import forward_flops, peak_flops


def test_sd_v1_costs_what_is_published():
    for name, gflop in {"sd-v1-3": 803.3, "sd-v1-1-256": 180.1}.items():
        config = load_config(name)
        assert forward_flops(config.unet, config.latent_size) / 1e9 == pytest.approx(gflop, abs=0.05)


def test_only_gpus_of_the_table_have_a_peak(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    names = {"NVIDIA H200": 989.4e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12, "Some GPU": None}
    for name, peak in names.items():
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == peak
