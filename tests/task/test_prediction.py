"""The linear map by which a feature tells a number."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm

from helpers import inside
from helpers.features import views_and_features
from helpers.inside import LinearReadout
from recon_aux import ReconAux


@pytest.mark.parametrize("width", [2, 100])
def test_a_readout_is_a_linear_map_of_the_normalised_feature(width: int) -> None:
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
    gradients = torch.autograd.grad(readout(feature).square().sum(), to)
    expected = torch.autograd.grad(plain.square().sum(), to)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("width", "pace"), [(4, 0.1), (200, 21 / 800)])
def test_a_readouts_parameters_get_a_gradient_that_is_scaled_down(width: int, pace: float) -> None:
    aux = ReconAux(width, weight=3.0, registration=0, edges=0, statistics=2.0)
    views, features = views_and_features(dim=width)
    pair = features.requires_grad_().unbind()
    output = aux(views, pair)
    readout = inside.readout_of(aux, "statistics")
    to = [*pair, *readout.parameters()]
    scaled = torch.autograd.grad(output.loss, to)
    # the other losses don't reach the readout
    assert aux.statistics is not None
    equivariant = torch.cat([aux.equivariant(y) for y in pair])
    white = inside.whitening_of(aux).whiten(torch.cat(list(views)))
    plain = 6 * aux.statistics(readout(equivariant), white)
    for one, other in zip(scaled[2:], torch.autograd.grad(plain, to)[2:], strict=True):
        torch.testing.assert_close(one, other * (pace if one.ndim > 1 else 0.03))
