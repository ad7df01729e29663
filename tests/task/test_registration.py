"""Registration: which motion it asks for, in closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from helpers.features import smooth_pictures
from helpers.inside import (
    Registration,
    feature_of_poses,
    likeness,
    motions,
    shift_read_from,
)
from recon_aux.probe import transform

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
    view = smooth_pictures(1)
    moved = transform(view, {name: torch.tensor([value]) for name, value in move.items()})
    registration, both = Registration(6), torch.cat([view, moved])
    none = [0.0] * 6
    right = registration(feature_of_poses(registration, none, pose), both)
    wrong = registration(feature_of_poses(registration, pose, none), both)
    unmoved = registration(feature_of_poses(registration, none, none), both)
    # what has left the picture can't be told
    assert right < 0.4
    assert not move or (right < 0.6 * unmoved and wrong > unmoved)
    # as well where one of them is mirrored
    for mirrored in ((view.flip(-1), moved), (view, moved.flip(-1))):
        first, second = none, pose
        if mirrored[1] is not moved:
            second = [pose[0], -pose[1], pose[2], -pose[3], -pose[4], pose[5]]
        explained = registration(feature_of_poses(registration, first, second), torch.cat(mirrored))
        assert explained.item() == pytest.approx(right.item(), abs=1e-3)


# forward motions in the picture's coordinates from -1 to 1, with the poses that they are
TURN = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
MOTIONS = {
    "turned, moved": (TURN, [0.3, -0.1], [0, math.atan2(0.6, 0.8), 0, 0, 0.3, -0.1]),
    "sheared": (torch.tensor([[1.0, 0.6], [0.0, 1.0]]), [0.0, 0.0], [0, 0, 0, 0.6, 0, 0]),
    "stretched, moved": (
        torch.tensor([[1.25, 0.0], [0.0, 0.8]]), [-0.2, 0.2], [0, 0, math.log(1.25), 0, -0.2, 0.2],
    ),
    "sheared, then turned": (
        TURN @ torch.tensor([[1.0, -0.4], [0.0, 1.0]]), [0.0, 0.1],
        [0, math.atan2(0.6, 0.8), 0, -0.4, 0, 0.1],
    ),
}  # fmt: skip


def in_motion(view: Tensor, matrix: Tensor, shift: list[float]) -> Tensor:
    back = torch.linalg.inv(matrix)
    places = torch.cat([back, -back @ torch.tensor(shift)[:, None]], dim=1)[None]
    grid = torch.nn.functional.affine_grid(places, list(view.shape), align_corners=False)
    return torch.nn.functional.grid_sample(view, grid, align_corners=False)


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(MOTIONS, 2)))
def test_two_views_that_both_moved_are_explained_by_both_poses(one: str, other: str) -> None:
    view, registration = smooth_pictures(1), Registration(6)
    moved = [in_motion(view, *MOTIONS[name][:2]) for name in (one, other)]
    poses = [[float(x) for x in MOTIONS[name][2]] for name in (one, other)]
    features = feature_of_poses(registration, *poses)
    right = registration(features, torch.cat(moved))
    assert right < 0.5
    assert right < 0.6 * registration(features.flip(0), torch.cat(moved))
    assert right < 0.6 * registration(torch.zeros(2, 6), torch.cat(moved))
    # a mirrored view's pose is mirrored: angle, shear and shift to the right change their signs
    mirrored = torch.cat([moved[0], moved[1].flip(-1)])
    poses[1] = [x * sign for x, sign in zip(poses[1], (1, -1, 1, -1, -1, 1), strict=True)]
    explained = registration(feature_of_poses(registration, *poses), mirrored)
    assert explained.item() == pytest.approx(right.item(), abs=1e-3)


def test_a_mirrored_view_is_known() -> None:
    view = smooth_pictures(1)
    registration = Registration(6)
    none = feature_of_poses(registration, [0.0] * 6, [0.0] * 6)
    assert registration(none, torch.cat([view, view.flip(-1)])) < 0.03
    assert registration(none, torch.cat([view, smooth_pictures(1, seed=1)])) > 0.5


def test_views_are_compared_at_sixteen_and_at_eight_pixels() -> None:
    torch.manual_seed(0)
    # grain of two pixels is gone in the coarser one
    grain = torch.randn(2, 3, 16, 16).repeat_interleave(2, -1).repeat_interleave(2, -2)
    views, registration = smooth_pictures(1) + 0.3 * grain, Registration(6)
    none = feature_of_poses(registration, [0.0] * 6, [0.0] * 6)
    alike = []
    for side in (16, 8):
        small = torch.nn.functional.adaptive_avg_pool2d(views, side).flatten(2)
        small = (small - small.mean(2, keepdim=True)).flatten(1)
        alike.append(torch.cosine_similarity(small[0], small[1], dim=0))
    assert alike[1] > alike[0] + 0.1
    expected = 2 - (alike[0] + alike[1])
    torch.testing.assert_close(registration(none, views), expected, atol=0.02, rtol=0)


def test_views_with_nothing_in_common_err_by_two_whatever_their_colours() -> None:
    views = torch.randn(128, 3, 32, 32)
    registration = Registration(8)
    features = torch.zeros(128, 8)
    error = registration(features, views).item()
    assert error == pytest.approx(2, abs=0.15)
    assert registration(features, views * 50 + 7).item() == pytest.approx(error, abs=1e-2)


def test_maps_undo_one_pose_and_apply_the_other_and_never_turn_an_image_over() -> None:
    torch.manual_seed(0)
    poses = torch.randn(100, 6) * 20
    assert (torch.linalg.det(motions(poses)[..., :2]) > 0).all()
    # the map of a pose to itself, and there and back again
    nowhere = torch.eye(2, 3).expand(100, 2, 3)
    torch.testing.assert_close(motions(poses[:50].repeat(2, 1))[:, 0], nowhere, atol=1e-4, rtol=0)
    there, back = motions(poses)[:, 0].split(50)
    last = torch.tensor([[[0.0, 0.0, 1.0]]]).expand(50, -1, -1)
    again = there @ torch.cat([back, last], dim=1)
    torch.testing.assert_close(again, nowhere[:50], atol=1e-3, rtol=0)


def standardized(images: Tensor) -> Tensor:
    images = images - images.mean(dim=(2, 3), keepdim=True)
    return images * (images.square().mean(dim=(1, 2, 3), keepdim=True) + 1e-3).rsqrt()


@pytest.mark.parametrize("far", [0.1, 2])
@pytest.mark.parametrize("size", [32, 24])
def test_likeness_is_what_torchs_own_sampling_gives_and_so_is_its_gradient(
    size: int, far: float
) -> None:
    torch.manual_seed(0)
    images, maps = torch.randn(10, 3, size, size), motions(torch.randn(10, 6) * far)
    maps.requires_grad_()
    ours, gradient = likeness(maps.detach(), images)
    theirs = []
    for side in (16, 8):
        targets = standardized(torch.nn.functional.adaptive_avg_pool2d(images, side))
        others = targets.roll(5, 0)
        others = torch.stack([others, others.flip(-1)], dim=1).flatten(0, 1)
        places = torch.nn.functional.affine_grid(
            maps.flatten(0, 1), list(others.shape), align_corners=False
        )
        moved = torch.nn.functional.grid_sample(others, places, align_corners=False)
        moved = standardized(moved).unflatten(0, (10, 2))
        theirs.append((moved * targets[:, None]).mean(dim=(2, 3, 4)))
    expected = torch.stack(theirs).mean(dim=0)
    torch.testing.assert_close(ours, expected)
    (expected,) = torch.autograd.grad(expected.sum(), maps)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_registrations_gradient_is_what_small_steps_show() -> None:
    torch.manual_seed(0)
    registration, images = Registration(8), smooth_pictures(6)
    features, steps = torch.randn(6, 8, requires_grad=True), 1e-2 * torch.randn(20, 6, 8)
    (gradient,) = torch.autograd.grad(registration(features, images), features)
    found = [registration(features + s, images) - registration(features - s, images) for s in steps]
    expected = 2 * (gradient * steps).sum(dim=(1, 2))
    assert (torch.stack(found) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.slow
def test_poses_are_learned_without_being_told() -> None:
    """Features that hold the motion linearly, among others: it is read off them."""
    torch.manual_seed(0)
    views, motion = smooth_pictures(128), (torch.rand(2, 128) - 0.5) * 0.4
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
        read = [shift_read_from(registration, x) for x in features]
    told = torch.corrcoef(torch.stack([read[1] - read[0], motion[1] - motion[0]]))[0, 1]
    assert told > 0.9
