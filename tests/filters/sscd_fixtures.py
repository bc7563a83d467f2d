"""A narrow network of SSCD's published structure, with random weights: the oracle, and its files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet


class Pool(nn.Module):
    """Generalised mean, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.pooling_param = 3.0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        flat = features.clamp(min=1e-6).reshape(features.size(0), features.size(1), -1)
        return (flat**self.pooling_param).sum(2).div(flat.size(2)).pow(1.0 / self.pooling_param)


class UnitLength(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values / values.square().sum(1, keepdim=True).sqrt()


class Published(nn.Module):
    """The modules of sscd-copy-detection's `Model` by name, with torchvision's trunk; one block a layer, 8 wide."""

    def __init__(self, seed: int = 0, groups: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=64, width_per_group=8, groups=groups)
            for name, buffer in self.backbone.named_buffers():
                if "running" in name:
                    buffer.copy_(torch.rand_like(buffer) + 0.5 if "var" in name else torch.rand_like(buffer) - 0.5)
        self.backbone.avgpool = Pool()
        self.embeddings = UnitLength()
        self.eval()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.embeddings(self.backbone(pixels))


def write_scripted(path: Path, network: Published) -> torch.jit.ScriptModule:
    """Writes and returns it as `sscd_disc_mixup.torchscript.pt` is published."""
    scripted = torch.jit.script(network)
    scripted.save(path)
    return scripted


def classy_names(network: Published) -> Iterator[tuple[str, torch.Tensor]]:
    """The state of the network by Classy Vision's names, as in `sscd_disc_mixup.classy.pt`."""
    parts = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6}
    for name, tensor in network.backbone.state_dict().items():
        first, *rest, kind = name.split(".")
        if first.startswith("layer"):
            number, part = rest[0], rest[1]
            stage = int(first[-1]) - 1
            inner = f"convolutional_block.{parts[part]}" if part in parts else part.replace("bn3", "bn")
            inner = ".".join([inner, *rest[2:]])
            yield f"backbone.blocks.{stage}.block{stage}-{number}.{inner}.{kind}", tensor
        elif first == "fc":
            yield f"embeddings.1.{kind}", tensor
        else:
            yield f"backbone.initial_block._module.{('conv1', 'bn1').index(first)}.{kind}", tensor
