"""ReconAux: splitter, decoder and terms behind one module."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import inside
from helpers.features import smooth_pictures, views_and_features
from recon_aux import ReconAux, ReconstructionLoss


def test_the_weight_is_applied_and_the_target_is_the_view() -> None:
    views, features = views_and_features()
    aux = ReconAux(8, weight=7.0, registration=2.0, statistics=3.0, edges=5.0)
    output = aux(views, features)
    losses = output.registration_loss, output.statistics_loss, output.edges_loss
    expected = output.reconstruction_loss + torch.tensor([2.0, 3.0, 5.0]) @ torch.stack(losses)
    assert min(losses) > 0
    assert output.unweighted_loss.item() == pytest.approx(expected.item())
    assert output.loss.item() == pytest.approx(7 * output.unweighted_loss.item())
    assert not output.unweighted_loss.requires_grad
    assert torch.equal(output.target, views[0])
    assert torch.equal(aux(views, features).target, views[1])
    both = ReconAux(8, reconstruct="both")(views, features)
    assert torch.equal(both.target, views.flatten(0, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"structure": 0.0},
        {"structure": 2.0, "patch_size": 4},
        {"loss": "l1", "structure": 0.5},
        {"loss": "smooth_l1", "structure": 0.0, "normalize_patches": True},
    ],
)
def test_a_reconstruction_is_compared_as_the_options_say(options: dict[str, Any]) -> None:
    views, features = views_and_features()
    aux = ReconAux(8, **options)
    output = aux(views, features)
    white = inside.whitening_of(aux).whiten
    kind, patch_size = options.get("loss", "mse"), options.get("patch_size", 8)
    rest = {x: options[x] for x in ("structure", "normalize_patches") if x in options}
    compare = ReconstructionLoss(kind, patch_size=patch_size, **rest)
    expected = compare(white(output.reconstruction), white(output.target))
    torch.testing.assert_close(output.reconstruction_loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("term", ["statistics", "edges"])
def test_each_view_is_described_by_its_own_feature(term: str) -> None:
    torch.manual_seed(0)
    aux = ReconAux(8)
    views = smooth_pictures(16).view(2, 2, 4, 3, 32, 32)
    features = torch.randn(2, 2, 4, 8)

    @torch.no_grad()
    def loss(view: tuple[int, int], feature: tuple[int, int]) -> Tensor:
        # of two choices for each of the two
        given = (
            [x[i][j] for j, i in enumerate(chosen)]
            for x, chosen in ((views, view), (features, feature))
        )
        found: Tensor = getattr(aux(*given), f"{term}_loss")
        return found

    def entangled(view: tuple[int, int]) -> float:
        """By how much changing this view changes what changing the first feature does."""
        now, then = (loss(v, (1, 0)) - loss(v, (0, 0)) for v in ((0, 0), view))
        return (then - now).abs().item()

    loss((0, 0), (0, 0))
    assert entangled((0, 1)) < 1e-5
    assert entangled((1, 0)) > 1e-4


def test_registration_reads_each_views_pose_from_its_own_feature() -> None:
    view = smooth_pictures(1)
    moved = view.roll(6, -1)
    aux = ReconAux(12, equivariant_dim=6)
    assert aux.registration is not None
    poses = inside.feature_of_poses(aux.registration, [0.0] * 6, [0.0] * 4 + [12 / 32, 0.0])
    first, second = torch.cat([torch.zeros(2, 6), poses], dim=1).split(1)
    right = aux((view, moved), (first, second)).registration_loss
    wrong = aux((view, moved), (second, first)).registration_loss
    assert right < 0.5 * wrong


def test_a_term_may_be_frozen_for_a_while() -> None:
    views, features = views_and_features()
    features.requires_grad_()
    aux = ReconAux(8, registration=0, statistics=0)
    assert aux.edges is not None
    optimizer = torch.optim.SGD(aux.parameters(), lr=0.1)
    for trains in (True, False, False, True, True):
        aux.edges.requires_grad_(trains)
        before = {name: p.detach().clone() for name, p in aux.named_parameters()}
        optimizer.zero_grad()
        output = aux(views, features)
        output.loss.backward()
        optimizer.step()
        moved = {name: not torch.equal(p, before[name]) for name, p in aux.named_parameters()}
        assert moved["decoder.queries"]
        assert {moved[name] for name in moved if name.startswith("edges.")} == {trains}
        # the encoder is trained by it all the while, in the view that isn't rebuilt, too
        assert output.edges_loss > 0
        assert features.grad is not None
        assert features.grad[1 - output.rebuilt[0], :, 4:].any()
        features.grad = None


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_the_loss_does_not_depend_on_the_views_units(scale: float) -> None:
    views, features = views_and_features()
    expected = ReconAux(8, seed=0)(views, features).loss.item()
    scaled = ReconAux(8, seed=0)(views * scale + 3, features)
    assert scaled.loss.item() == pytest.approx(expected, rel=1e-3)
    assert scaled.reconstruction.mean().item() == pytest.approx(scale / 2 + 3, rel=0.2)


def test_a_channel_that_is_blank_keeps_no_units_from_the_others() -> None:
    views = smooth_pictures(8).view(2, 4, 3, 32, 32)
    views[:, :, 1] = 0.5
    aux = ReconAux(8)
    aux(views, torch.rand(2, 4, 8))
    assert inside.units_are_set(aux) == [True] * 3


def test_blank_views_are_no_division_by_zero_and_do_not_set_the_scale() -> None:
    aux = ReconAux(8)
    output = aux(torch.ones(2, 4, 3, 32, 32), torch.rand(2, 4, 8))
    assert math.isfinite(output.loss.item())
    views, features = views_and_features()
    assert aux(views * 255, features).reconstruction_loss < 5


@pytest.mark.parametrize("shade", [0.0, 0.1, 1.0])
def test_blank_views_set_no_units(shade: float) -> None:
    aux = ReconAux(8)
    views, features = torch.full((2, 4, 3, 32, 32), shade), torch.rand(2, 4, 8)
    assert aux(views, features).unweighted_loss < 40
    assert inside.units_are_set(aux) == [False] * 3
    assert aux(smooth_pictures(8).view(2, 4, 3, 32, 32), features).unweighted_loss < 60


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_small_first_batch_does_not_make_the_rest_extreme(count: int) -> None:
    views = smooth_pictures(64, seed=1) * torch.rand(64, 1, 1, 1) + torch.rand(64, 3, 1, 1)
    aux = ReconAux(8)
    aux(smooth_pictures(2 * count).view(2, count, 3, 32, 32), torch.rand(2, count, 8))
    output = aux((views, views), torch.rand(2, 64, 8))
    assert output.statistics_loss < 17
    assert output.edges_loss < 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_whole_model_in_another_type(dtype: torch.dtype) -> None:
    views, features = views_and_features()
    output = ReconAux(8).to(dtype)(views.to(dtype), features.to(dtype))
    assert output.loss.dtype == torch.float32
    mixed = ReconAux(8)(views, features.to(dtype).requires_grad_())
    mixed.loss.backward()


def rebuilt_in(aux: ReconAux, calls: int) -> list[tuple[int, ...]]:
    return [aux(*views_and_features(2)).rebuilt for _ in range(calls)]


def test_views_take_turns_are_drawn_or_both() -> None:
    assert rebuilt_in(ReconAux(8), 4) == [(0,), (1,), (0,), (1,)]
    assert rebuilt_in(ReconAux(8, reconstruct="both"), 2) == [(0, 1), (0, 1)]
    drawn = rebuilt_in(ReconAux(8, reconstruct="random", seed=1), 30)
    assert {(0,), (1,)} == set(drawn)
    assert drawn == rebuilt_in(ReconAux(8, reconstruct="random", seed=1), 30)


@pytest.mark.parametrize("reconstruct", ["alternate", "random"])
def test_the_choice_of_view_goes_on_from_a_checkpoint(reconstruct: Any) -> None:
    aux = ReconAux(8, reconstruct=reconstruct, seed=3)
    rebuilt_in(aux, 5)
    resumed = ReconAux(8, reconstruct=reconstruct, seed=4)
    resumed.load_state_dict(copy.deepcopy(aux.state_dict()))
    assert rebuilt_in(resumed, 12) == rebuilt_in(aux, 12)


def test_loading_starts_a_step_anew() -> None:
    aux = ReconAux(8)
    optimizer = torch.optim.SGD(aux.parameters(), lr=0.1)
    saved = copy.deepcopy(aux.state_dict())
    # all of the first step
    assert rebuilt_in(aux, 3) == [(0,)] * 3
    aux.load_state_dict(saved)
    assert rebuilt_in(aux, 3) == [(0,)] * 3
    optimizer.step()
    assert rebuilt_in(aux, 3) == [(1,)] * 3


def test_a_frozen_decoder_is_not_given_a_weight() -> None:
    views, features = views_and_features()
    aux = ReconAux(8, weight=0)
    assert not aux(views, features).loss
    aux.weight = 1.0
    with pytest.raises(ValueError, match="expected the weight to stay 0"):
        aux(views, features)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None, 1j])
def test_a_weight_is_set_to_a_finite_number(weight: Any) -> None:
    aux = ReconAux(8)
    with pytest.raises(TypeError, match=r"weight as a finite number, got .*; pass a float"):
        aux.weight = weight
    assert aux.weight == 1


def test_an_evaluation_takes_no_turn() -> None:
    views, features = views_and_features()
    aux = ReconAux(8)
    rebuilt = []
    for _ in range(3):
        rebuilt.append(aux(views, features).rebuilt)
        with torch.no_grad():
            aux(views, features)
    assert rebuilt == [(0,), (1,), (0,)]


def test_the_rebuilt_view_gives_its_equivariant_part_and_the_other_its_context() -> None:
    views, features = views_and_features(dim=8)
    options: dict[str, Any] = {"registration": 0, "statistics": 0, "edges": 0}
    kinds: dict[Any, list[int]] = {"invariant": [0, 4], "equivariant": [4, 8]}
    for context, kept in {**kinds, "both": [0, 8], "none": [0, 0]}.items():
        y0, y1 = (y.clone().requires_grad_() for y in features)
        aux = ReconAux(8, context=context, **options)
        aux(views, (y0, y1)).loss.backward()
        grads = [torch.zeros_like(y) if y.grad is None else y.grad for y in (y0, y1)]
        used = [[bool(column.any()) for column in grad.T] for grad in grads]
        assert used[0] == [False] * 4 + [True] * 4
        assert used[1] == [kept[0] <= i < kept[1] for i in range(8)]


@pytest.mark.parametrize("context", ["invariant", "equivariant", "both"])
def test_a_view_is_drawn_as_training_rebuilds_it_and_in_any_context(context: Any) -> None:
    views, (y0, y1) = views_and_features(dim=8)
    aux = ReconAux(8, context=context)
    output = aux(views, (y0, y1))
    assert output.rebuilt == (0,)
    state = {name: value.clone() for name, value in aux.state_dict().items()}
    drawn = aux.rebuild(y0, y1)
    torch.testing.assert_close(drawn, output.reconstruction)
    assert not torch.allclose(aux.rebuild(y0, y1 + torch.randn_like(y1)), drawn)
    assert all(torch.equal(value, aux.state_dict()[name]) for name, value in state.items())
    with pytest.raises(ValueError, match="as many other features"):
        aux.rebuild(y0, y1[:1])


def test_without_context_a_view_is_drawn_alike_next_to_any_other() -> None:
    views, (y0, y1) = views_and_features(dim=8)
    aux = ReconAux(8, context="none")
    drawn = aux(views, (y0, y1)).reconstruction
    torch.testing.assert_close(aux.rebuild(y0, torch.randn_like(y1)), drawn)
    assert len(list(aux.decoder.parameters())) < len(list(ReconAux(8).decoder.parameters()))


def test_without_a_split_the_decoder_sees_the_whole_feature() -> None:
    views, features = views_and_features()
    y0 = features[0].requires_grad_()
    aux = ReconAux(8, equivariant_dim=0)
    aux(views, (y0, features[1])).loss.backward()
    assert y0.grad is not None
    assert y0.grad.any(dim=0).all()
    assert aux.invariant(y0).shape == (4, 8)


def test_building_and_running_leave_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    aux = ReconAux(8, reconstruct="random")
    assert torch.equal(state, torch.random.get_rng_state())
    views, features = views_and_features()
    state = torch.random.get_rng_state()
    aux(views, features)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_decoder_follows_the_users_seed_or_its_own() -> None:
    def weights(**options: Any) -> Tensor:
        return ReconAux(8, **options).decoder.queries

    torch.manual_seed(5)
    first = weights()
    torch.rand(3)
    assert torch.equal(first, weights())
    torch.manual_seed(6)
    assert not torch.equal(first, weights())
    assert torch.equal(weights(seed=5), first)


@pytest.mark.slow
def test_it_learns_to_rebuild_a_view_that_the_feature_describes() -> None:
    torch.manual_seed(0)
    features = torch.randn(64, 8)
    paint = torch.randn(4, 3 * 64) / 2
    views = (features[:, 4:] @ paint).view(64, 3, 8, 8)
    aux = ReconAux(8, target_size=8, decoder_dim=64)
    optimizer = torch.optim.Adam(aux.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        output = aux((views, views), (features, features))
        output.loss.backward()
        optimizer.step()
    assert output.reconstruction_loss < 0.1  # 1 is what predicting the mean gives


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


def test_a_cut_resnets_feature_is_taken_as_it_is() -> None:
    aux = ReconAux(16, seed=0)
    views, features = torch.rand(2, 4, 3, 32, 32), torch.rand(2, 4, 16)
    maps = [feature[..., None, None] for feature in features]
    assert torch.equal(aux.rebuild(*maps), aux.rebuild(*features))
    twin = copy.deepcopy(aux)
    assert torch.equal(twin(views, maps).loss, aux(views, features).loss)


def test_a_map_of_one_position_may_be_kept_as_one_and_a_line_is_no_pooled_feature() -> None:
    views, (first, second) = torch.rand(2, 4, 3, 32, 32), torch.rand(2, 4, 8)
    aux = ReconAux(8, spatial=True)
    maps, tokens = (
        [y[..., None, None] for y in (first, second)],
        [y[:, None] for y in (first, second)],
    )
    twin = copy.deepcopy(aux)
    assert torch.equal(aux(views, maps).loss, twin(views, tokens).loss)
    with pytest.raises(ValueError, match=r"pooled, \(B, D\), got \(4, 4, 1, 3\)"):
        ReconAux(8)(views, torch.rand(2, 4, 8, 1, 3))


@pytest.mark.parametrize("shape", [(4, 8, 3, 2), (4, 6, 8)])
def test_of_features_with_positions_the_terms_see_the_average(shape: tuple[int, ...]) -> None:
    views = smooth_pictures(8).view(2, 4, 3, 32, 32)
    features = torch.randn(2, *shape)
    average = features.mean(dim=2 if len(shape) == 3 else (3, 4))
    aux, pooled = ReconAux(8, spatial=True, seed=0), ReconAux(8, seed=0)
    for term in ("registration", "statistics", "edges"):
        getattr(pooled, term).load_state_dict(getattr(aux, term).state_dict())
    found, expected = aux(views, features), pooled(views, average)
    for term in ("registration_loss", "statistics_loss", "edges_loss"):
        torch.testing.assert_close(getattr(found, term), getattr(expected, term))


@pytest.mark.parametrize("gone", ["registration", "statistics", "edges"])
def test_a_term_without_weight_is_not_there(gone: str) -> None:
    options: dict[str, Any] = {gone: 0}
    aux = ReconAux(8, **options)
    output = aux(torch.rand(2, 4, 3, 8, 8), torch.rand(2, 4, 8))
    for name in ("registration", "statistics", "edges"):
        assert (getattr(output, f"{name}_loss") == 0) == (name == gone)
    assert not any(gone in name for name, _ in aux.named_parameters())


def test_the_weight_of_a_term_may_change() -> None:
    saved = ReconAux(8).state_dict()
    with pytest.warns(UserWarning, match=r"other options: registration=4\.0, not 2\.0"):
        ReconAux(8, registration=2.0).load_state_dict(saved)


@pytest.mark.parametrize("reconstruct", ["alternate", "random", "both"])
@pytest.mark.parametrize("trained", [0, 1])
def test_next_to_a_momentum_encoders_feature_the_other_is_trained(
    trained: int, reconstruct: Any
) -> None:
    aux = ReconAux(8, reconstruct=reconstruct)
    own = torch.rand(4, 8, requires_grad=True)
    features = [torch.rand(4, 8), torch.rand(4, 8)]
    features[trained] = own
    for _ in range(3):
        output = aux(torch.rand(2, 4, 3, 8, 8), features)
        assert output.rebuilt == (trained,)
        output.loss.backward()
        assert own.grad is not None
        assert own.grad[:, 4:].any()
        own.grad = None


def test_dead_features_get_no_burst_of_gradient() -> None:
    views = smooth_pictures(8).view(2, 4, 3, 32, 32)
    feature = torch.zeros(4, 64, requires_grad=True)
    aux = ReconAux(64)
    aux(views, (feature, torch.rand(4, 64))).loss.backward()
    assert feature.grad is not None
    assert feature.grad.abs().max() < 20


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


@pytest.mark.parametrize(
    ("views", "features", "message"),
    [
        ([(4, 3, 32, 32), (3, 3, 32, 32)], [(4, 8), (3, 8)], r"batches of 4 and 3 views"),
        ([(4, 3, 32, 32)] * 2, [(4, 8), (2, 8)], r"4 and 2 features"),
        ([(4, 1, 32, 32)] * 2, [(4, 8)] * 2, r"views \(B, 3, H, W\).* image_channels="),
        ([(4, 3, 32, 32), (4, 1, 32, 32)], [(4, 8)] * 2, r"got .* and \(4, 1, 32, 32\)"),
        ([(4, 3, 32)] * 2, [(4, 8)] * 2, r"views \(B, 3, H, W\), got \(4, 3, 32\)"),
        ([(4, 3, 32, 32)], [(4, 8)], r"two views and their two features, got 1 and 1"),
        ([(4, 3, 32, 32)] * 2, [(4, 9)] * 2, r"features \(B, 8\).* got \(4, 9\); feature_dim="),
        ([(0, 3, 32, 32)] * 2, [(0, 8)] * 2, r"batches of 0 and 0"),
        ([(4, 3, 0, 32)] * 2, [(4, 8)] * 2, r"views \(B, 3, H, W\), got \(4, 3, 0, 32\)"),
        ([(4, 3, 32, 32)] * 2, [(4, 8), (4, 8, 2, 2)], r"one shape, got \(4, 8\) and \(4, 8, 2"),
    ],
)
def test_views_and_features_that_do_not_fit_are_named(
    views: Any, features: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ReconAux(8)([torch.rand(s) for s in views], [torch.rand(s) for s in features])


def test_features_without_positions_are_named() -> None:
    with pytest.raises(ValueError, match=r"features with positions, got \(4, 0, 8\)"):
        ReconAux(8, spatial=True)(torch.rand(2, 4, 3, 8, 8), torch.rand(2, 4, 0, 8))


def test_both_rebuilt_need_features_of_one_shape() -> None:
    views, features = [torch.rand(4, 3, 8, 8)] * 2, [torch.rand(4, 8, 2, 2), torch.rand(4, 8, 3, 3)]
    ReconAux(8, spatial=True)(views, features)
    with pytest.raises(ValueError, match="features of one shape"):
        ReconAux(8, spatial=True, reconstruct="both")(views, features)


@pytest.mark.parametrize(
    ("view", "feature"), [(torch.complex64, torch.float32), (torch.uint8, torch.int64)]
)
@pytest.mark.parametrize("both", [True, False])
def test_types_that_are_no_image_or_no_feature_are_named(
    view: torch.dtype, feature: torch.dtype, both: bool
) -> None:
    views, features = torch.ones(4, 3, 8, 8), torch.ones(4, 8)
    first = (views.to(view), features.to(feature)) if both else (views, features)
    given = [list(pair) for pair in zip(first, (views.to(view), features.to(feature)), strict=True)]
    with pytest.raises(TypeError, match=r"floating-point type, got \['torch"):
        ReconAux(8)(*given)


def test_one_equivariant_channel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"equivariant_dim of 2 or more.* got 1 of 8 channels"):
        ReconAux(8, equivariant_dim=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, r"weight= as a finite number of 0 or more, got -1"),
        ({"weight": float("nan")}, r"weight= as a finite"),
        ({"edges": float("inf")}, r"edges= as a finite"),
        ({"context": "all"}, r"context= to be one of .*invariant.* got 'all'"),
        ({"reconstruct": "none"}, r"reconstruct= to be one of"),
        ({"equivariant_dim": 8}, r"context= .*'invariant', which has none .*equivariant_dim=8"),
        ({"patch_size": 1, "image_channels": 1}, r"got patch_size=1 and image_channels=1"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReconAux(8, **options)


def test_a_printout_shows_the_options_and_the_weight_as_it_is_now() -> None:
    aux = ReconAux(8, edges=0, weight=2.0)
    aux.weight = 0.5
    assert aux.options["weight"] == 2.0
    aux.options["edges"] = 16
    shown = str(aux).splitlines()[1]
    assert "equivariant_dim=4" in shown
    assert "weight=0.5" in shown
    assert "edges=0" in shown


def test_an_unknown_option_is_named_with_the_likely_one() -> None:
    with pytest.raises(TypeError, match=r"got the option wieght=; did you mean weight="):
        ReconAux(8, wieght=2)  # type: ignore[call-arg]


def test_a_preset_is_options_under_a_name_and_those_beside_it_win() -> None:
    paper = ReconAux(8, preset="paper").options
    assert [paper[name] for name in ("registration", "statistics", "edges")] == [0, 0, 0]
    assert paper["weight"] == 4
    assert ReconAux(8, preset="paper", weight=1, edges=16).options == {
        **ReconAux(8).options, "registration": 0, "statistics": 0,
    }  # fmt: skip
    assert ReconAux(8, preset="geometry").options == {**ReconAux(8).options, "edges": 64}
    # a checkpoint doesn't ask how the options were named
    saved = ReconAux(8, preset="geometry").state_dict()
    ReconAux(8, edges=64).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"preset= to be one of .*'paper'.* got 'papers'"):
        ReconAux(8, preset="papers")  # type: ignore[arg-type]
