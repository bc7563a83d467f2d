"""Weights stored as (O, kH, kW, I) reach the convolution in channels_last, and files in the usual layout."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdtrain.models.layout import ChannelsLastConv2d, channels_last_names, store_channels_last, usual_shapes

ATEN = torch.ops.aten
COPIES = (ATEN.clone.default, ATEN.copy_.default, ATEN._to_copy.default)


def small_network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 1), torch.nn.Conv2d(8, 16, 3, stride=2)
    )


class Convolutions(TorchDispatchMode):
    """The weights that convolutions are handed, forward and backward, and all copies made meanwhile."""

    def __init__(self):
        super().__init__()
        self.weights, self.copies = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is ATEN.convolution.default:
            self.weights.append(args[1])
        elif func is ATEN.convolution_backward.default:
            self.weights.append(args[2])
        elif func in COPIES:
            self.copies.append(args)
        return func(*args, **(kwargs or {}))


def passed(network):
    images = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)
    with Convolutions() as seen:
        network(images).square().sum().backward()
    return seen, {name: parameter.grad for name, parameter in network.named_parameters()}


def test_convolutions_get_channels_last_weights_and_give_contiguous_gradients_without_a_copy():
    usual, network = small_network(), small_network()
    store_channels_last(network)
    seen, gradients = passed(network)
    assert len(seen.weights) == 6
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in seen.weights)
    assert seen.copies == []
    expected, permuted = passed(usual)[1], channels_last_names(network)
    assert permuted == {"0.weight", "2.weight"}, "1 x 1 has the same bytes in both layouts"
    for name, gradient in gradients.items():
        assert gradient.is_contiguous()
        found = gradient.permute(0, 3, 1, 2) if name in permuted else gradient
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-4)


def test_the_counter_sees_what_the_usual_layout_costs():
    seen, _ = passed(small_network())
    three_by_three = [weight for weight in seen.weights if weight.shape[-1] == 3]
    assert not any(weight.is_contiguous(memory_format=torch.channels_last) for weight in three_by_three)


def test_state_dicts_and_shapes_are_those_of_the_usual_layout():
    usual, network = small_network(), small_network()
    store_channels_last(network)
    for (name, tensor), (other_name, other) in zip(
        usual.state_dict().items(), network.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert other.is_contiguous()
        assert torch.equal(tensor, other)
    assert dict(usual_shapes(network)) == {name: parameter.shape for name, parameter in usual.named_parameters()}


@pytest.mark.parametrize("assign", [False, True])
def test_it_loads_what_any_network_saved(assign):
    torch.manual_seed(5)
    source = {name: torch.randn_like(tensor) for name, tensor in small_network().state_dict().items()}
    network = small_network()
    store_channels_last(network)
    network.load_state_dict(source, assign=assign)
    assert isinstance(network[0], ChannelsLastConv2d)
    assert network[0].weight.is_contiguous()
    assert all(torch.equal(tensor, source[name]) for name, tensor in network.state_dict().items())


def test_a_lone_convolution_and_grouped_ones_are_named_rightly():
    network = torch.nn.Conv2d(4, 8, 3)
    store_channels_last(network)
    assert channels_last_names(network) == {"weight"}
    grouped = torch.nn.Conv2d(4, 8, 3, groups=2)
    store_channels_last(grouped)
    assert type(grouped) is torch.nn.Conv2d
