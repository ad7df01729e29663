"""Registration and statistics: what they ask for, in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from recon_aux import ReconAux
from recon_aux.probe import transform
from recon_aux.task.calibration import color_axes
from recon_aux.task.terms.edges import Edges
from recon_aux.task.terms.prediction import LinearReadout, PredictionTerm
from recon_aux.task.terms.registration import (
    Registration,
    _affine,
    _compose,
    _inverse,
    _likeness,
    _standardized,
)
from recon_aux.task.terms.statistics import Statistics


def smooth(count: int, seed: int = 0) -> Tensor:
    """Pictures without detail, which move smoothly."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, 32, mode="bicubic").clamp(0, 1)


def posed(registration: Registration, *poses: list[float]) -> Tensor:
    """Features of which the module reads these poses."""
    registration.pose.norm = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        registration.pose.linear.weight.copy_(torch.eye(6))
    return torch.atanh(torch.tensor(poses)) / 0.3


MOVES: list[tuple[dict[str, float], list[float]]] = [
    ({}, [0, 0, 0, 0, 0, 0]),
    ({"translation_x": 0.2}, [0, 0, 0, 0, 0.4, 0]),
    ({"translation_y": -0.1}, [0, 0, 0, 0, 0, -0.2]),
    ({"scale": 1.3}, [math.log(1.3), 0, 0, 0, 0, 0]),
    ({"rotation": 25.0}, [0, math.radians(25), 0, 0, 0, 0]),
    ({"scale": 0.8, "rotation": 10.0}, [math.log(0.8), math.radians(10), 0, 0, 0, 0]),
]


@pytest.mark.parametrize(("move", "pose"), MOVES)
def test_the_right_pose_explains_a_known_motion(move: dict[str, float], pose: list[float]) -> None:
    view = smooth(1)
    moved = transform(view, {name: torch.tensor([value]) for name, value in move.items()})
    registration, both = Registration(6), torch.cat([view, moved])
    none = [0.0] * 6
    right = registration(posed(registration, none, pose), both)
    wrong = registration(posed(registration, pose, none), both)
    unmoved = registration(posed(registration, none, none), both)
    # what has left the picture can't be told
    assert right < 0.4
    assert not move or (right < 0.6 * unmoved and wrong > unmoved)
    # as well where one of them is mirrored
    for mirrored in ((view.flip(-1), moved), (view, moved.flip(-1))):
        first, second = none, pose
        if mirrored[1] is not moved:
            second = [pose[0], -pose[1], pose[2], -pose[3], -pose[4], pose[5]]
        explained = registration(posed(registration, first, second), torch.cat(mirrored))
        assert explained.item() == pytest.approx(right.item(), abs=1e-3)


def test_a_mirrored_view_is_known() -> None:
    view = smooth(1)
    registration = Registration(6)
    none = posed(registration, [0.0] * 6, [0.0] * 6)
    assert registration(none, torch.cat([view, view.flip(-1)])) < 0.03
    assert registration(none, torch.cat([view, smooth(1, seed=1)])) > 0.5


def test_views_with_nothing_in_common_err_by_two_whatever_their_colours() -> None:
    views = torch.randn(128, 3, 32, 32)
    registration = Registration(8)
    features = torch.zeros(128, 8)
    error = registration(features, views).item()
    assert error == pytest.approx(2, abs=0.15)
    assert registration(features, views * 50 + 7).item() == pytest.approx(error, abs=1e-2)


def test_affine_maps_invert_and_never_turn_an_image_over() -> None:
    torch.manual_seed(0)
    affine = _affine(torch.randn(50, 6) * 20)
    assert (torch.linalg.det(affine[0]) > 0).all()
    matrix, shift = _compose(affine, _inverse(affine))
    torch.testing.assert_close(matrix, torch.eye(2).expand(50, 2, 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(shift, torch.zeros(50, 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("far", [0, 2])
@pytest.mark.parametrize("side", [8, 16])
def test_likeness_is_what_torchs_own_sampling_gives_and_so_is_its_gradient(
    side: int, far: float
) -> None:
    torch.manual_seed(0)
    images, targets = torch.randn(2, 5, 3, side, side), _standardized(torch.randn(5, 3, side, side))
    matrix, shift = _affine(torch.randn(10, 6) * far)
    motion = torch.cat([matrix, shift[:, :, None]], dim=2).requires_grad_()
    ours, gradient = _likeness(images, targets, motion.detach().view(2, 5, 2, 3))
    places = torch.nn.functional.affine_grid(motion, [10, 3, side, side], align_corners=False)
    moved = torch.nn.functional.grid_sample(images.flatten(0, 1), places, align_corners=False)
    theirs = (_standardized(moved).view(2, *targets.shape) * targets).mean(dim=(2, 3, 4))
    torch.testing.assert_close(ours, theirs)
    (expected,) = torch.autograd.grad(theirs.sum(), motion)
    torch.testing.assert_close(gradient, expected.view(2, 5, 2, 3), rtol=1e-4, atol=1e-4)


def test_registrations_gradient_is_what_small_steps_show() -> None:
    torch.manual_seed(0)
    registration, images = Registration(8), smooth(6)
    features, steps = torch.randn(6, 8, requires_grad=True), 1e-2 * torch.randn(20, 6, 8)
    (gradient,) = torch.autograd.grad(registration(features, images), features)
    found = [registration(features + s, images) - registration(features - s, images) for s in steps]
    expected = 2 * (gradient * steps).sum(dim=(1, 2))
    assert (torch.stack(found) - expected).norm() < 0.03 * expected.norm()


def test_poses_are_learned_without_being_told() -> None:
    """Features that hold the motion linearly, among others: it is read off them."""
    torch.manual_seed(0)
    views, motion = smooth(128), (torch.rand(2, 128) - 0.5) * 0.4
    moved = [transform(views, {"translation_x": motion[i]}) for i in (0, 1)]
    mixing = torch.randn(4, 16)
    features = [torch.stack([m * 5, *torch.randn(3, 128)], dim=1) @ mixing for m in motion]
    registration = Registration(16)
    optimizer = torch.optim.Adam(registration.parameters(), lr=1e-2)
    errors = []
    for _ in range(150):
        optimizer.zero_grad()
        error = registration(torch.cat(features), torch.cat(moved))
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0]
    with torch.no_grad():
        read = [_affine_shift(registration, x) for x in features]
    told = torch.corrcoef(torch.stack([read[1] - read[0], motion[1] - motion[0]]))[0, 1]
    assert told > 0.9


def _affine_shift(registration: Registration, feature: Tensor) -> Tensor:
    return _affine(registration.pose(feature))[1][:, 0]


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
    spread = plain.std(0).clamp(min=0.3)
    assert spread.max() > 0.5
    expected = ((plain - plain.mean(0)) / spread).clamp(-4, 4)
    torch.testing.assert_close(told, expected, atol=1e-2, rtol=1e-2)
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
    ramp = (torch.arange(32.0)[:, None] * math.tan(math.pi / 8) + torch.arange(32.0)) / 32
    steep = Edges().plain(ramp.expand(1, 3, 32, 32)).exp().view(8, 8, 8)[:, 4, 4] - 0.01
    torch.testing.assert_close(steep[0], steep[1])
    assert steep[2:].max() < 1e-6


def test_edges_are_those_of_the_steepest_channel() -> None:
    image = torch.zeros(1, 3, 32, 32)
    image[:, 2, :, 18:] = 1.0
    image[:, 0, 18:] = 0.5
    # they would cancel each other in an average
    image[:, 1] = -image[:, 2]
    image[:, 1, :, 18:] *= 0.9
    steep = Edges().plain(image).exp().view(8, 8, 8) - 0.01
    assert (steep > 1e-6).nonzero()[:, 0].unique().tolist() == [0, 2]
    assert steep[0, 0, 4] == pytest.approx(0.5)


def test_edges_are_in_units_of_their_spread_and_plain_images_set_none() -> None:
    edges = Edges()
    plain = torch.rand(16, 3, 1, 1).expand(-1, -1, 32, 32)
    assert not edges(plain).any()
    assert not edges.calibrated
    told = edges(torch.randn(64, 3, 32, 32))
    assert edges.calibrated
    assert told.mean().item() == pytest.approx(0, abs=0.02)
    # noise varies less than the least unit
    assert told.std() < 1.1
    stripes = torch.randn(64, 3, 1, 32).expand(-1, -1, 32, -1) * torch.rand(64, 1, 1, 1)
    again = Edges()
    assert again(stripes).view(64, 8, 64).std(dim=(0, 2))[[0, 4]] == pytest.approx(1, abs=0.1)
    assert torch.equal(Edges()(stripes), again(stripes))


def test_large_views_are_seen_small() -> None:
    images = torch.rand(2, 3, 32, 32)
    large = images.repeat_interleave(3, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(Edges().plain(large), Edges().plain(images))


def test_contrast_changes_all_edges_alike() -> None:
    edges, images = Edges(), smooth(16)
    once, twice = (edges.plain(images * by) for by in (100, 200))
    steep = once > 0
    assert steep.float().mean() > 0.2
    gain = (twice - once)[steep]
    torch.testing.assert_close(gain, torch.full_like(gain, math.log(2)), atol=0.02, rtol=0)


def test_a_linear_feature_tells_all_statistics() -> None:
    torch.manual_seed(0)
    views = smooth(96) * torch.rand(96, 1, 1, 1) + torch.rand(96, 3, 1, 1)
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


@pytest.mark.parametrize("features", [(4, 8), (4, 8, 3, 2), (4, 6, 8)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_every_feature_and_number_of_channels(features: tuple[int, ...], channels: int) -> None:
    aux = ReconAux(8, spatial=len(features) > 2, image_channels=channels)
    own = torch.rand(features, requires_grad=True)
    output = aux(torch.rand(2, 4, channels, 20, 28), (own, torch.rand(features)))
    output.loss.backward()
    assert 0 < output.registration_loss < 3
    assert 0 < output.statistics_loss < 5
    assert 0 < output.edges_loss < 5
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in aux.parameters())


@pytest.mark.parametrize("gone", ["registration", "statistics", "edges"])
def test_a_term_without_weight_is_not_there(gone: str) -> None:
    options: dict[str, Any] = {gone: 0}
    aux = ReconAux(8, **options)
    output = aux(torch.rand(2, 4, 3, 8, 8), torch.rand(2, 4, 8))
    for name in ("registration", "statistics", "edges"):
        assert (getattr(output, f"{name}_loss") == 0) == (name == gone)
    assert not any(gone in name for name, _ in aux.named_parameters())


def test_a_momentum_encoders_feature_is_read_without_gradient() -> None:
    aux = ReconAux(8)
    own = torch.rand(4, 8, requires_grad=True)
    views = torch.rand(2, 4, 3, 8, 8)
    aux(views, (own, torch.rand(4, 8))).loss.backward()
    assert own.grad is not None
    assert own.grad[:, 4:].any()


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_small_first_batch_does_not_make_the_rest_extreme(count: int) -> None:
    views = smooth(64, seed=1) * torch.rand(64, 1, 1, 1) + torch.rand(64, 3, 1, 1)
    aux = ReconAux(8)
    aux(smooth(2 * count).view(2, count, 3, 32, 32), torch.rand(2, count, 8))
    output = aux((views, views), torch.rand(2, 64, 8))
    assert output.statistics_loss < 17
    assert output.edges_loss < 3


@pytest.mark.parametrize("shade", [0.0, 0.1, 1.0])
def test_blank_views_set_no_units(shade: float) -> None:
    aux = ReconAux(8)
    views, features = torch.full((2, 4, 3, 32, 32), shade), torch.rand(2, 4, 8)
    assert aux(views, features).unweighted_loss < 40
    assert not aux.pixel_scale.calibrated
    assert not aux.statistics.told.calibrated
    assert not aux.edges.told.calibrated
    assert aux(smooth(8).view(2, 4, 3, 32, 32), features).unweighted_loss < 60


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


def test_dead_features_get_no_burst_of_gradient() -> None:
    views = smooth(8).view(2, 4, 3, 32, 32)
    feature = torch.zeros(4, 64, requires_grad=True)
    aux = ReconAux(64)
    aux(views, (feature, torch.rand(4, 64))).loss.backward()
    assert feature.grad is not None
    assert feature.grad.abs().max() < 20


def test_the_weight_of_a_term_may_change() -> None:
    saved = ReconAux(8).state_dict()
    with pytest.warns(UserWarning, match=r"other options: registration=4\.0, not 2\.0"):
        ReconAux(8, registration=2.0).load_state_dict(saved)


def test_one_equivariant_channel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"equivariant_dim of 2 or more.* got 1 of 8 channels"):
        ReconAux(8, equivariant_dim=1)


def test_nothing_is_read_from_the_device() -> None:
    """But whether the loss is finite, which isn't waited for; counted here without a GPU."""
    aux, views = ReconAux(8), torch.rand(2, 4, 3, 32, 32)
    features = torch.rand(2, 4, 8, requires_grad=True)
    aux(views, features)
    with torch.profiler.profile() as profile:
        aux(views, features).loss.backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert "aten::item" not in counts
    assert "aten::lift_fresh" not in counts


def test_features_without_positions_are_named() -> None:
    with pytest.raises(ValueError, match=r"features with positions, got \(4, 0, 8\)"):
        ReconAux(8, spatial=True)(torch.rand(2, 4, 3, 8, 8), torch.rand(2, 4, 0, 8))
