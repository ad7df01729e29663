"""The feature, cut in two along its channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.features import SHAPES, few
from recon_aux import FeatureSplitter, ReconAux


@few
@given(
    shape=st.sampled_from(list(SHAPES.values())),
    equivariant_dim=st.integers(0, 12),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_the_parts_are_the_feature_cut_in_two(
    shape: tuple[int, ...], equivariant_dim: int, dtype: torch.dtype
) -> None:
    feature = torch.rand(shape).to(dtype)
    dim = 2 if len(shape) == 3 else 1
    invariant, equivariant = FeatureSplitter(12, equivariant_dim)(feature)
    assert equivariant.shape[dim] == equivariant_dim
    assert torch.equal(torch.cat([invariant, equivariant], dim), feature)
    assert invariant.dtype == dtype


@pytest.mark.parametrize("kind", SHAPES)
def test_each_part_gives_its_channels_their_gradient(kind: str) -> None:
    feature, aux = torch.rand(SHAPES[kind], requires_grad=True), ReconAux(12, equivariant_dim=5)
    parts = aux.invariant(feature), aux.equivariant(feature)
    (2 * parts[0].sum() + 3 * parts[1].sum()).backward()
    assert feature.grad is not None
    expected = torch.tensor([2.0] * 7 + [3.0] * 5)
    channels = feature.grad.movedim(2 if kind == "tokens" else 1, -1)
    assert torch.equal(channels, expected.expand_as(channels))


def test_half_is_the_default_and_odd_widths_favour_the_invariant_part() -> None:
    assert FeatureSplitter(7).equivariant_dim == 3
    assert FeatureSplitter(7).invariant_dim == 4


@pytest.mark.parametrize("dim", [-1, 13])
def test_an_equivariant_dim_out_of_range_is_named(dim: int) -> None:
    with pytest.raises(ValueError, match=rf"equivariant_dim from 0 to .*12 channels, got {dim}"):
        FeatureSplitter(12, dim)


@pytest.mark.parametrize("shape", [(12,), (4, 11), (4, 11, 3, 3), (4, 12, 5), (4, 12, 1, 1, 1)])
def test_features_of_another_rank_or_width_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected features \(B, 12\).* feature_dim="):
        FeatureSplitter(12)(torch.rand(shape))


def test_a_feature_of_one_channel_can_be_split_and_one_of_none_is_refused() -> None:
    assert FeatureSplitter(1).equivariant_dim == 0
    assert FeatureSplitter(1, 1).invariant_dim == 0
    with pytest.raises(ValueError, match="feature_dim"):
        FeatureSplitter(0)
