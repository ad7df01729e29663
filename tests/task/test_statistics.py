"""Statistics of a view: what they are, in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.features import smooth_pictures
from helpers.inside import PredictionTerm, Statistics, color_axes


def test_statistics_are_means_correlations_and_logarithms_of_energies() -> None:
    """Of pictures whose channels are the axes already."""
    torch.manual_seed(0)
    deviations = torch.tensor([1.0, 2.0, 3.0])
    images = torch.randn(512, 3, 16, 16) * deviations[:, None, None]
    statistics = Statistics(3)
    told = statistics(images)
    assert told.shape == (512, 21)
    torch.testing.assert_close(told.mean(0), torch.zeros(21), atol=1e-2, rtol=0)
    louder, plain = statistics.plain(1.5 * images), statistics.plain(images)
    # the axis of least variance comes first; a mean over 256 pixels varies by a sixteenth of each
    deviation = told[:, :3].std(0)
    # in units of 0.3 at least
    torch.testing.assert_close(deviation, deviations / 16 / 0.3, atol=0.02, rtol=0.1)
    # means and energies go up, correlations stay
    torch.testing.assert_close(louder[:, :3], 1.5 * plain[:, :3], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(louder[:, 3:6], plain[:, 3:6], atol=1e-2, rtol=0)
    gain = (louder - plain)[:, 6:].mean(0)
    torch.testing.assert_close(gain, torch.full((15,), 2 * math.log(1.5)), atol=0.02, rtol=0)
    expected = (deviations.square() + 1e-4).log()
    torch.testing.assert_close(plain[:, 6:9].mean(0), expected, atol=0.02, rtol=0)


def test_correlations_tell_which_colours_go_together() -> None:
    torch.manual_seed(0)
    independent, together = torch.randn(2, 8, 2, 16, 16)
    together[:, 1] = together[:, 0]
    together[:4, 1] *= -1
    statistics = Statistics(2)
    statistics(independent * torch.tensor([1.0, 2.0])[:, None, None])
    told = statistics.plain(together)
    assert told[:4, 2].mean() * told[4:, 2].mean() < -0.5
    assert told[:4, 2].std() < 0.1


def test_statistics_are_taken_along_the_axes_of_colour() -> None:
    torch.manual_seed(0)
    # a rotation that isn't its own inverse
    third, two_thirds = 1 / 3, 2 / 3
    axes = torch.tensor(
        [
            [two_thirds, -third, two_thirds],
            [two_thirds, two_thirds, -third],
            [-third, two_thirds, two_thirds],
        ]
    )
    deviations = torch.tensor([1.0, 2.0, 3.0])
    along = torch.randn(256, 3, 16, 16) * deviations[:, None, None]
    images = torch.einsum("cd,bdhw->bchw", axes, along)
    statistics = Statistics(3)
    statistics(images)
    plain = statistics.plain(images)
    torch.testing.assert_close(plain[:, :3].abs(), along.mean((2, 3)).abs(), atol=0.02, rtol=0)
    torch.testing.assert_close(plain[:, 3:6].mean(0), torch.zeros(3), atol=0.02, rtol=0)
    energies = plain[:, 6:9].exp().mean(0)
    torch.testing.assert_close(energies, deviations.square(), atol=0, rtol=0.02)


def test_units_are_the_spread_of_the_first_batch_but_not_less_than_0_3() -> None:
    # one grey each: the mean is the shade itself
    shades = torch.tensor([-2.0, -1.0, 1.0, 2.0]).view(4, 1, 1, 1)
    for scale, unit in ((1.0, 2.5**0.5), (0.1, 0.3)):
        statistics = Statistics(1)
        means = statistics((5 + scale * shades).expand(4, 1, 8, 8))[:, 0]
        torch.testing.assert_close(means, scale * shades.flatten() / unit)
        # later batches keep the units; four of them is the most
        later = statistics(
            (5 + unit * torch.tensor([3.0, -3.0, 9.0, -9.0]).view(4, 1, 1, 1)).expand(4, 1, 8, 8)
        )
        torch.testing.assert_close(later[:, 0], torch.tensor([3.0, -3.0, 4.0, -4.0]))


def test_axes_have_one_direction() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        mixed = torch.einsum("ij,bjhw->bihw", torch.randn(3, 3), torch.randn(4, 3, 8, 8))
        found = color_axes(mixed)
        assert found is not None
        axes = found[2]
        assert (axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_octaves_tell_sharp_from_blurred() -> None:
    fine = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 1.0
    coarse = (torch.arange(32)[:, None] // 4 + torch.arange(32) // 4) % 2 * 1.0
    boards = torch.stack([fine, coarse])[:, None]
    statistics = Statistics(1)
    statistics(boards)
    energies = statistics.plain(boards)[:, 2:]
    # mean, energy, octaves of 2, 4 and 8 pixels, the rest
    assert energies.shape == (2, 4)
    assert energies[0].argmax() == 0
    assert energies[1].argmax() == 2
    # nor does the rest depend on brightness
    brighter = statistics.plain(boards + 5)
    torch.testing.assert_close(brighter[:, 2:], energies, atol=1e-3, rtol=0)
    # the energy does: half of the pixels are 6, the others 5
    assert brighter[:, 1].tolist() == pytest.approx([math.log((36 + 25) / 2)] * 2, abs=1e-4)
    # an octave without energy is at the floor, also where rounding errors are larger than that
    flat = coarse * 10 ** torch.linspace(0, 6, 64)[:, None, None, None]
    assert statistics.plain(flat)[:, 2].isfinite().all()


def test_a_linear_feature_tells_all_statistics() -> None:
    torch.manual_seed(0)
    views = smooth_pictures(96) * torch.rand(96, 1, 1, 1) + torch.rand(96, 3, 1, 1)
    features = torch.cat([Statistics(3)(views), torch.randn(96, 3)], dim=1)
    statistics = PredictionTerm(24, Statistics(3))
    optimizer = torch.optim.Adam(statistics.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = statistics(features, views)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.7
    assert losses[-1] < 0.2


@pytest.mark.parametrize("side", [12, 28])
def test_a_blur_takes_most_from_the_finest_octave_of_images_of_any_side(side: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 3, side, side)
    statistics = Statistics(3)
    assert statistics(images).shape == (64, 21)
    blurred = (images + images.roll(1, -1)) / 2
    # columns: six means and correlations, three energies of the whole, then those of each octave
    lost = (statistics.plain(images) - statistics.plain(blurred))[:, 9:18]
    fine, middle, coarse = lost.view(64, 3, 3).mean(dim=(0, 2)).tolist()
    assert fine > middle > coarse > 0
