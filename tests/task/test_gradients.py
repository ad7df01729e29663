"""Gradients that the forward pass computes, and the backward pass only hands out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18

from benchmarks.methods import SimCLR
from helpers.counting import operations_begun
from helpers.features import smooth_pictures, views_and_features
from recon_aux import ReconAux
from recon_aux.integrations.lightly import attach


@pytest.mark.parametrize(("images", "most"), [(8, 300), (4, 320)])
def test_a_step_of_resnet18_begins_few_operations_more(images: int, most: int) -> None:
    def encoder() -> nn.Module:
        return nn.Sequential(*list(resnet18().children())[:-1])

    pictures = smooth_pictures(images)
    bare, attached = (
        operations_begun(make(SimCLR(encoder(), 512, lr=0.1)), pictures)
        for make in (lambda model: model, attach)
    )
    added = [new - old for old, new in zip(bare, attached, strict=True)]
    assert 0 < added[1] <= 20
    assert sum(added) <= most


def gradients(aux: ReconAux, views: Any, features: Any, scale: float = 1.0) -> list[Tensor]:
    (scale * aux(views, features).loss).backward()
    trained = [*aux.parameters(), *features]
    found = [x.grad for x in trained if x.requires_grad]
    assert None not in found
    return [x for x in found if x is not None]


def leaves(features: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [y.detach().to(dtype).requires_grad_() for y in features]


def test_the_gradients_are_what_small_steps_show() -> None:
    torch.manual_seed(0)
    views, features = smooth_pictures(8).view(2, 4, 3, 32, 32), torch.randn(2, 4, 16)
    aux = ReconAux(16, reconstruct="both", weight=0.5, seed=0)
    aux(views, features)
    inner = leaves(features)
    found = gradients(aux, views, inner)[-2:]
    with torch.no_grad():
        steps = [1e-3 * torch.randn_like(y) for y in inner]
        up = aux(views, [y + s for y, s in zip(inner, steps, strict=True)]).loss
        down = aux(views, [y - s for y, s in zip(inner, steps, strict=True)]).loss
    expected = sum((2 * (g * s).sum() for g, s in zip(found, steps, strict=True)), torch.zeros(()))
    assert (up - down).item() == pytest.approx(expected.item(), rel=0.05)


def test_a_users_hook_on_a_parameter_runs_once() -> None:
    torch.manual_seed(0)
    views, features = smooth_pictures(8).view(2, 4, 3, 32, 32), torch.randn(2, 4, 16)
    plain, hooked = (ReconAux(16, seed=0) for _ in range(2))
    seen: list[Tensor] = []

    def halved(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return 0.5 * gradient

    for parameter in hooked.parameters():
        parameter.register_hook(halved)
    whole, half = (gradients(aux, views, leaves(features)) for aux in (plain, hooked))
    ours = len(list(hooked.parameters()))
    assert len(seen) == ours
    for got, expected in zip(half[:ours], whole[:ours], strict=True):
        assert torch.allclose(got, 0.5 * expected)


def test_a_view_may_be_encoded_in_inference_mode() -> None:
    torch.manual_seed(0)
    views, features = smooth_pictures(8).view(2, 4, 3, 32, 32), torch.randn(2, 4, 16)
    with torch.inference_mode():
        other = features[1].clone()
    losses = [
        ReconAux(16, seed=0)(views, [features[0].requires_grad_(), y]).loss
        for y in (features[1], other)
    ]
    losses[1].backward()
    assert torch.equal(*losses)


def test_a_step_along_each_parameters_gradient_lowers_the_loss() -> None:
    torch.manual_seed(0)
    views, features = smooth_pictures(8).view(2, 4, 3, 32, 32), torch.randn(2, 4, 16)
    aux = ReconAux(16, reconstruct="both", context="both", seed=0)
    before = aux(views, features).loss
    gradients(aux, views, leaves(features))
    for name, parameter in aux.named_parameters():
        assert parameter.grad is not None
        step = 1e-2 * parameter.grad / (parameter.grad.norm() + 1e-12)
        with torch.no_grad():
            parameter.sub_(step)
            assert aux(views, features).loss < before, name
            parameter.add_(step)


def test_a_loss_scale_and_the_weight_multiply_them_and_half_precision_keeps_the_small_ones() -> (
    None
):
    views, features = views_and_features(dim=16)
    plain = gradients(ReconAux(16, seed=0), views, leaves(features))
    scaled = gradients(ReconAux(16, seed=0, weight=0.5), views, leaves(features), 2.0**14)
    for one, other in zip(scaled, plain, strict=True):
        torch.testing.assert_close(one, 2.0**13 * other)
    # so small that they are zero in half precision, but for the loss scale
    rounded = features.half().float()
    plain = gradients(ReconAux(16, seed=0), views, leaves(rounded))
    aux, half = ReconAux(16, seed=0, weight=1e-6), leaves(features, torch.float16)
    *_, own, other = gradients(aux, views, half, 2.0**16)
    expected = [2.0**16 * 1e-6 * x for x in plain[-2:]]
    for got, wanted in zip((own, other), expected, strict=True):
        assert got.dtype == torch.float16
        torch.testing.assert_close(got.float(), wanted, rtol=1e-3, atol=1e-6)


def test_the_weight_of_the_forward_pass_counts_and_a_graph_may_be_kept() -> None:
    views, features = views_and_features(dim=16)
    expected = gradients(ReconAux(16, seed=0), views, leaves(features))
    aux, inner = ReconAux(16, seed=0), leaves(features)
    loss = aux(views, inner).loss
    aux.weight = 100.0
    loss.backward(retain_graph=True)
    loss.backward()
    found = [x.grad for x in (*aux.parameters(), *inner)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, 2 * other)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    views, features = views_and_features(dim=16)
    inner = leaves(features)
    of_method = inner[0].square().sum()
    loss = ReconAux(16)(views, inner).loss + of_method
    with pytest.raises(RuntimeError, match=r"create_graph=True\. Pass create_graph=False, or diff"):
        torch.autograd.grad(loss, inner, create_graph=True)
    # its advice
    torch.autograd.grad(loss, inner, create_graph=False, retain_graph=True)
    (penalty,) = torch.autograd.grad(of_method, inner[0], create_graph=True)
    (loss + penalty.square().sum()).backward()
    assert all(y.grad is not None for y in inner)


def test_it_may_be_computed_again_in_the_backward_pass() -> None:
    views, features = views_and_features(dim=16)
    expected = gradients(ReconAux(16, seed=0, reconstruct="both"), views, leaves(features))
    aux, inner = ReconAux(16, seed=0, reconstruct="both"), leaves(features)
    run = lambda *ys: aux(views, ys).loss  # noqa: E731
    checkpoint(run, *inner, use_reentrant=False).backward()
    for x, wanted in zip((*aux.parameters(), *inner), expected, strict=True):
        torch.testing.assert_close(x.grad, wanted)


def test_parameters_that_are_made_of_others_are_trained() -> None:
    views, features = views_and_features(dim=16)
    aux = ReconAux(16)
    layer = aux.get_submodule("decoder.to_patch.1")
    assert isinstance(layer, nn.Linear)
    parametrizations.weight_norm(layer)
    gradients(aux, views, leaves(features))
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_a_feature_that_is_given_twice_gets_both_gradients() -> None:
    (view, _), (feature, _) = views_and_features(dim=16)
    once, twice = leaves(torch.stack([feature, feature])), leaves(feature[None])[0]
    gradients(ReconAux(16, seed=0), (view, view), once)
    ReconAux(16, seed=0)((view, view), (twice, twice)).loss.backward()
    torch.testing.assert_close(twice.grad, once[0].grad + once[1].grad)  # type: ignore[operator]


def test_a_parameter_that_no_loss_uses_is_refused() -> None:
    views, features = views_and_features(dim=16)
    aux = ReconAux(16)
    aux.decoder.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    with pytest.raises(RuntimeError, match=r"but 1 aren't in its graph.* fully_shard\(model.recon"):
        aux(views, features)
