"""Edges of a view, by direction and place: what they are, in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.features import smooth_pictures
from helpers.inside import Edges, has_units


def test_edges_are_told_by_direction_and_place() -> None:
    dark_left = torch.zeros(1, 3, 32, 32)
    dark_left[..., 18:] = 1.0
    turns = [dark_left, dark_left.mT, dark_left.flip(-1), dark_left.mT.flip(-2)]
    for turn, image in enumerate(turns):
        steep = Edges().plain(image).exp().view(8, 8, 8) - 0.01
        # brightness grows to the right, down, left, up: every second of eight directions
        assert (steep > 1e-6).nonzero()[:, 0].unique().tolist() == [2 * turn]
        # the cell's eight pixels at the edge, of sixteen, are as steep as can be
        row, column = [(3, 4), (4, 3), (3, 3), (3, 3)][turn]
        assert steep[2 * turn, row, column] == pytest.approx(0.5)
        along = steep[2 * turn].sum(dim=turn % 2)
        assert (along > 0).sum() == 1
    # half-way between two directions, both have half
    for turn in range(8):
        angle = (turn + 0.5) * math.pi / 4
        ramp = torch.arange(32.0)[:, None] * math.sin(angle) + torch.arange(32.0) * math.cos(angle)
        steep = Edges().plain(ramp.expand(1, 3, 32, 32) / 32).exp().view(8, 8, 8)[:, 4, 4] - 0.01
        both = [turn, (turn + 1) % 8]
        torch.testing.assert_close(steep[both], torch.full((2,), 1 / 32), atol=1e-4, rtol=0)
        steep[both] = 0
        assert steep.max() < 1e-5


def test_edges_are_those_of_the_steepest_channel() -> None:
    image = torch.zeros(1, 3, 32, 32)
    image[:, 2, :, :18] = 1.0
    image[:, 0, 18:] = 0.8
    # they would cancel each other in an average
    image[:, 1] = -0.9 * image[:, 2]
    steep = Edges().plain(image).exp().view(8, 8, 8) - 0.01
    # to the left, and down
    assert (steep > 1e-6).nonzero()[:, 0].unique().tolist() == [2, 4]
    assert steep[4, 0, 4] == pytest.approx(0.5)


def test_edges_are_in_units_of_their_spread_and_plain_images_set_none() -> None:
    edges = Edges()
    plain = torch.rand(16, 3, 1, 1).expand(-1, -1, 32, 32)
    assert not edges(plain).any()
    assert not has_units(edges)
    told = edges(torch.randn(64, 3, 32, 32))
    assert has_units(edges)
    assert told.mean().item() == pytest.approx(0, abs=0.02)
    # noise varies less than the least unit
    assert told.std() < 1.1
    stripes = torch.randn(64, 3, 1, 32).expand(-1, -1, 32, -1) * torch.rand(64, 1, 1, 1)
    again = Edges()
    assert again(stripes).view(64, 8, 64).std(dim=(0, 2))[[0, 4]] == pytest.approx(1, abs=0.1)
    assert torch.equal(Edges()(stripes), again(stripes))


def test_a_direction_has_one_unit_for_all_places() -> None:
    # steeper on the right
    images = smooth_pictures(16) * torch.linspace(0.1, 9, 32)
    plain = Edges().plain(images).view(16, 8, 64)
    deviation, mean = torch.std_mean(plain, dim=(0, 2), correction=0, keepdim=True)
    expected = ((plain - mean) / deviation.clamp(min=0.3)).clamp(-4, 4)
    torch.testing.assert_close(Edges()(images).view(16, 8, 64), expected, atol=1e-4, rtol=1e-4)


def test_large_views_are_seen_small() -> None:
    images = torch.rand(2, 3, 32, 32)
    large = images.repeat_interleave(3, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(Edges().plain(large), Edges().plain(images))


def test_contrast_changes_all_edges_alike() -> None:
    edges, images = Edges(), smooth_pictures(16)
    once, twice = (edges.plain(images * by) for by in (100, 200))
    steep = once > 0
    assert steep.float().mean() > 0.2
    gain = (twice - once)[steep]
    torch.testing.assert_close(gain, torch.full_like(gain, math.log(2)), atol=0.02, rtol=0)
