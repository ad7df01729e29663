"""The linear map by which a feature tells a number."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm

from helpers.inside import LinearReadout


@pytest.mark.parametrize(("width", "pace"), [(2, 0.1), (100, 0.00625)])
def test_a_readout_is_a_linear_map_whose_gradient_is_scaled_down(width: int, pace: float) -> None:
    readout = LinearReadout(width, 5)
    with torch.no_grad():
        for parameter in readout.parameters():
            parameter.normal_()
    feature = torch.randn(4, width, requires_grad=True)
    norm, linear = readout.norm, readout.linear
    normalized = layer_norm(feature, (width,), norm.weight, norm.bias, norm.eps)
    plain = normalized @ linear.weight.T + linear.bias
    torch.testing.assert_close(readout(feature), plain)
    to = [feature, *readout.parameters()]
    of_feature, *scaled = torch.autograd.grad(readout(feature).square().sum(), to)
    expected, *gradients = torch.autograd.grad(plain.square().sum(), to)
    torch.testing.assert_close(of_feature, expected)
    for one, other in zip(scaled, gradients, strict=True):
        torch.testing.assert_close(one, other * (pace if one.ndim > 1 else 0.03))
