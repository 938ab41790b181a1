"""The bricks of the networks: shapes, boundaries, and that blocks start as the identity."""

import pytest
import torch

from appa_lite.nn.blocks import Attention, ConvolutionBlock, SpaceTimeBlock, SpaceTimeConv, SpatialConv, TemporalConv, pad, shift


def test_shift_looks_ahead_and_repeats_the_ends():
    x = torch.arange(5.0).reshape(1, 5, 1)
    assert shift(x, 0).flatten().tolist() == [0, 1, 2, 3, 4]
    assert shift(x, 1).flatten().tolist() == [1, 2, 3, 4, 4]
    assert shift(x, -2).flatten().tolist() == [0, 0, 0, 1, 2]
    assert shift(x, 7).flatten().tolist() == [4] * 5
    assert shift(x, -7).flatten().tolist() == [0] * 5


def test_padding_wraps_a_periodic_axis_and_repeats_a_wall():
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    both = pad(x, (1, 1), (False, True))[0, 0]
    assert both.tolist() == [[2, 0, 1, 2, 0], [2, 0, 1, 2, 0], [5, 3, 4, 5, 3], [5, 3, 4, 5, 3]]
    assert pad(x, (0, 0), (True, True)) is x
    other = pad(x, (1, 1), (True, False))[0, 0]
    assert other[:, 0].tolist() == [3, 0, 3, 0] and other[:, 4].tolist() == [5, 2, 5, 2]


@pytest.mark.parametrize("periodic", [(False, False), (True, True), (False, True)])
def test_a_spatial_convolution_keeps_the_shape_and_knows_where_it_wraps(periodic):
    torch.manual_seed(0)
    layer = SpatialConv(3, 5, (3, 5), periodic).double()
    x = torch.randn(2, 4, 6, 8, 3, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (2, 4, 6, 8, 5)
    for axis, wraps in ((2, periodic[0]), (3, periodic[1])):
        agrees = torch.allclose(layer(x.roll(2, axis)), y.roll(2, axis))
        assert agrees == wraps


def test_a_temporal_convolution_sees_its_neighbours_in_time_only():
    torch.manual_seed(0)
    layer = TemporalConv(4)
    x = torch.randn(1, 7, 2, 2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0, 3, 0, 1].sum(), x)
    seen = gradient.abs().sum(-1)[0].nonzero().tolist()
    assert seen == [[2, 0, 1], [3, 0, 1], [4, 0, 1]]


def test_attention_bias_has_one_number_per_head_and_distance():
    layer = Attention(8, 2, distances=4)
    assert layer.bias.shape == (2, 9)
    assert Attention(8, 2).bias is None
    x = torch.randn(2, 3, 5, 8)
    assert layer(x).shape == x.shape
    assert layer(torch.randn(1, 12, 8)).shape == (1, 12, 8)  # longer than the distances: the last one serves
    with pytest.raises(ValueError, match="multiple of the heads"):
        Attention(9, 2)


def test_attention_without_bias_does_not_know_the_order_and_with_bias_does():
    torch.manual_seed(0)
    x, order = torch.randn(1, 6, 8, dtype=torch.float64), torch.randperm(6)
    plain, biased = Attention(8, 2).double(), Attention(8, 2, distances=5).double()
    assert torch.allclose(plain(x)[:, order], plain(x[:, order]))
    assert torch.allclose(biased(x)[:, order], biased(x[:, order]))  # the bias starts at zero
    torch.nn.init.normal_(biased.bias)
    assert not torch.allclose(biased(x)[:, order], biased(x[:, order]), atol=1e-3)


def test_the_bias_favours_what_it_is_large_for():
    layer = Attention(4, 1, distances=3).double()
    with torch.no_grad():
        layer.qkv.weight[:8].zero_()  # queries and keys are zero: only the bias decides
        layer.qkv.bias[:8].zero_()
        layer.bias[0, 3 + 1] = 50.0  # i - j = 1: the frame before
        layer.out.weight.copy_(torch.eye(4))
        layer.out.bias.zero_()
    x = torch.randn(1, 4, 4, dtype=torch.float64)
    values = torch.nn.functional.linear(x, layer.qkv.weight[8:], layer.qkv.bias[8:])
    assert torch.allclose(layer(x)[:, 1:], values[:, :-1])


@pytest.mark.parametrize("spatial", [True, False])
def test_a_block_starts_as_the_identity(spatial):
    torch.manual_seed(0)
    block = SpaceTimeBlock(8, 2, (3, 3), (False, True), frames=5, spatial_attention=spatial)
    x, condition = torch.randn(2, 5, 4, 6, 8), torch.randn(2, 1, 8)
    assert torch.equal(block(x, condition), x)
    assert block.temporal.bias.shape == (2, 9) and (block.spatial is not None) == spatial
    gates = block.modulation.weight.reshape(3, 3, 8, 8)[:, 2]
    assert not gates.any()
    block(x, condition).square().sum().backward()
    assert block.modulation.bias.grad.reshape(3, 3, 8)[:, 2].abs().amin() > 0  # the gates can open


def test_a_block_takes_a_condition_per_frame():
    torch.manual_seed(0)
    block = SpaceTimeBlock(8, 2, (1, 3), (False, True), frames=5, spatial_attention=False)
    torch.nn.init.normal_(block.modulation.weight)
    x, one = torch.randn(2, 5, 1, 6, 8), torch.randn(2, 1, 8)
    torch.testing.assert_close(block(x, one), block(x, one.expand(2, 5, 8)))
    assert not torch.allclose(block(x, torch.randn(2, 5, 8)), block(x, one), atol=1e-2)


def test_a_joint_convolution_is_the_space_time_sum_with_its_boundaries():
    torch.manual_seed(0)
    layer = SpaceTimeConv(2, 3, (3, 3, 3), (False, True)).double()
    x = torch.randn(1, 2, 4, 5, 6, dtype=torch.float64)
    rows, frames = (torch.arange(-1, n + 1).clamp(0, n - 1) for n in (5, 4))
    padded = x[:, :, frames][:, :, :, rows][..., torch.arange(-1, 7) % 6]
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)
    expected = torch.einsum("bcthwijk,ocijk->bothw", windows, layer.conv.weight) + layer.conv.bias[:, None, None, None]
    torch.testing.assert_close(layer(x), expected)


def test_a_convolution_block_starts_as_the_identity_and_moves_with_a_periodic_axis():
    torch.manual_seed(0)
    block = ConvolutionBlock(6, (1, 5), (False, True)).double()
    x, condition = torch.randn(2, 5, 1, 8, 6, dtype=torch.float64), torch.randn(2, 1, 6, dtype=torch.float64)
    assert torch.equal(block(x, condition), x)
    block(x, condition).square().sum().backward()
    assert block.modulation.bias.grad.reshape(3, 6)[2].abs().amin() > 0  # the gate can open
    torch.nn.init.normal_(block.modulation.weight)
    torch.testing.assert_close(block(x.roll(3, -2), condition), block(x, condition).roll(3, -2))
    torch.testing.assert_close(block(x, condition.expand(2, 5, 6)), block(x, condition))


def test_a_convolution_block_holds_advection_exactly():
    """x_k' = (x_{k+1} - x_{k-2}) x_{k-1}, Lorenz-96's: one product of two linear maps of neighbours."""
    block = ConvolutionBlock(1, (1, 5), (False, True)).double()
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        first, second = block.first.conv.weight, block.second.conv.weight
        first[0, 0, 1, 0, 3], first[0, 0, 1, 0, 0], first[2, 0, 1, 0, 1] = 1.0, -1.0, 1.0  # channels 0, 1 times 2, 3
        second[0, 0, 1, 0, 2] = 1.0
    y = torch.randn(1, 3, 1, 40, 1, dtype=torch.float64)
    a, b = block.first(y.movedim(-1, 1)).chunk(2, dim=1)
    tendency = (y.roll(-1, -2) - y.roll(2, -2)) * y.roll(1, -2)
    torch.testing.assert_close(block.second(a * b).movedim(1, -1), tendency)
