"""The error of rebuilding a view: in closed form, over types and sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from helpers.features import few
from helpers.inside import ChannelWhitening, resize_view
from helpers.weights import assert_same
from recon_aux import ReconstructionLoss


@pytest.mark.parametrize(
    ("kind", "expected"), [("mse", 0.25), ("l1", 0.5), ("smooth_l1", 0.5 * 0.25)]
)
def test_losses_in_closed_form(kind: Any, expected: float) -> None:
    target = torch.rand(2, 3, 8, 8)
    loss = ReconstructionLoss(kind)(target + 0.5, target)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_loss_is_float32_even_under_autocast_and_for_half_inputs() -> None:
    x = torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ReconstructionLoss()(x.bfloat16(), x)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((x.bfloat16().float() - x).square().mean().item())


def test_patch_normalisation_ignores_brightness_and_contrast_of_each_patch() -> None:
    target = torch.rand(2, 3, 8, 8)
    loss = ReconstructionLoss(normalize_patches=True, patch_size=4)
    guess = torch.rand(2, 3, 8, 8)
    factor = torch.tensor([1.0, 5.0, 0.5, 3.0]).view(2, 2).repeat_interleave(4, 0)
    factor = factor.repeat_interleave(4, 1)
    assert loss(guess, target * factor + factor).item() == pytest.approx(
        loss(guess, target).item(), rel=1e-3
    )
    # one patch by hand
    patch = target[:1, :, :4, :4]
    normal = (patch - patch.mean()) / patch.std()
    assert ReconstructionLoss(normalize_patches=True, patch_size=4)(
        normal, patch
    ).item() == pytest.approx(0, abs=1e-6)


def test_the_structure_term_sees_neither_colour_nor_contrast_of_a_patch() -> None:
    target = torch.rand(2, 3, 8, 8)
    plain = ReconstructionLoss(patch_size=8)
    both = ReconstructionLoss(patch_size=8, structure=2.0)
    brighter = target + 1
    assert both(brighter, target).item() == pytest.approx(plain(brighter, target).item(), rel=1e-4)
    inverted = 2 * target.mean((1, 2, 3), keepdim=True) - target
    spread = target.var((1, 2, 3)) / (target.var((1, 2, 3)) + 0.01)
    expected = plain(inverted, target) + 2.0 * 4 * spread.mean()
    assert both(inverted, target).item() == pytest.approx(expected.item(), rel=1e-2)


def test_an_unknown_loss_and_unlike_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"loss= .*mse.*got 'huber'"):
        ReconstructionLoss("huber")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\), got \(1, 3, 4, 4\)"):
        ReconstructionLoss()(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 8, 8))


def test_pixels_are_whitened_over_channels_by_the_first_batch() -> None:
    mixing = torch.tensor([[1.0, 0.9, 0.8], [0.0, 0.2, 0.0], [0.0, 0.0, 0.3]])
    views = torch.einsum("ij,bjhw->bihw", mixing, torch.randn(16, 3, 8, 8)) * 50 + 100
    scale = ChannelWhitening(3, floor=0.0)
    white = scale.whiten(views).transpose(0, 1).flatten(1)
    assert torch.allclose(torch.cov(white), torch.eye(3), atol=1e-2)
    assert white.mean().abs() < 1e-3
    torch.testing.assert_close(scale.restore(scale.whiten(views)), views, atol=1e-2, rtol=1e-4)
    before = {name: value.clone() for name, value in scale.state_dict().items()}
    loaded = ChannelWhitening(3)
    loaded.load_state_dict(before)
    for later in (scale, loaded):
        later.whiten(views * 3)
        assert_same(later.state_dict(), before)
    floored = ChannelWhitening(3, floor=0.5)
    quiet = floored.whiten(views).transpose(0, 1).flatten(1)
    assert torch.linalg.eigvalsh(torch.cov(quiet)).min() < 0.2


def test_resizing_averages_areas_and_leaves_the_right_size_alone() -> None:
    view = torch.rand(2, 3, 64, 64)
    constant = resize_view(torch.full((1, 3, 50, 70), 0.3), 16)
    assert torch.allclose(constant, torch.full((1, 3, 16, 16), 0.3))
    # a checkerboard finer than the target is grey only if antialiased
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    assert (resize_view(board[None, None].float(), 16) - 0.5).abs().max() < 0.05
    # a pixel between the sampled ones counts, too
    point = torch.zeros(1, 1, 64, 64)
    point[..., 0, 0] = 1
    assert resize_view(point, 16)[0, 0, 0, 0] > 0
    assert resize_view(view, 64).data_ptr() == view.data_ptr()
    assert not resize_view(view.requires_grad_(), 16).requires_grad


@few
@given(
    sides=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    target_size=st.integers(1, 40),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    channels_last=st.booleans(),
)
def test_resizing_is_torchs_under_autocast_too(
    sides: tuple[int, int], target_size: int, dtype: torch.dtype, channels_last: bool
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    view = torch.randn(2, 3, *sides).to(dtype, memory_format=layout)
    size = (target_size, target_size)
    wanted = F.interpolate(view.float(), size, mode="bilinear", antialias=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(resize_view(view, target_size), wanted, rtol=1e-5, atol=1e-5)
