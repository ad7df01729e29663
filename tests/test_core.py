"""Splitter, decoder, loss and ReconAux: against closed forms, over shapes and types."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recon_aux import CrossAttentionDecoder, FeatureSplitter, ReconAux, ReconstructionLoss
from recon_aux.task import finite
from recon_aux.task.calibration import ChannelWhitening
from recon_aux.task.terms.reconstruction import resize_view

few = settings(max_examples=25, deadline=None)
SHAPES = {"vector": (4, 12), "map": (4, 12, 3, 2), "tokens": (4, 7, 12)}


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


def test_pixels_are_whitened_over_channels_by_the_first_batch() -> None:
    mixing = torch.tensor([[1.0, 0.9, 0.8], [0.0, 0.2, 0.0], [0.0, 0.0, 0.3]])
    views = torch.einsum("ij,bjhw->bihw", mixing, torch.randn(16, 3, 8, 8)) * 50 + 100
    scale = ChannelWhitening(3, floor=0.0)
    white = scale.whiten(views).transpose(0, 1).flatten(1)
    assert torch.allclose(torch.cov(white), torch.eye(3), atol=1e-2)
    assert white.mean().abs() < 1e-3
    before = scale.state_dict()["to_white"].clone()
    scale.whiten(views * 3)
    assert torch.equal(before, scale.to_white)
    floored = ChannelWhitening(3, floor=0.5)
    quiet = floored.whiten(views).transpose(0, 1).flatten(1)
    assert torch.linalg.eigvalsh(torch.cov(quiet)).min() < 0.2


def test_an_unknown_loss_and_unlike_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"loss= .*mse.*got 'huber'"):
        ReconstructionLoss("huber")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\), got \(1, 3, 4, 4\)"):
        ReconstructionLoss()(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 8, 8))


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


@few
@given(
    batch=st.integers(1, 3),
    patches=st.integers(1, 4),
    patch=st.sampled_from([1, 2, 4]),
    channels=st.integers(1, 5),
    depth=st.integers(1, 2),
    kind=st.sampled_from(["vector", "map", "tokens"]),
)
def test_the_decoder_gives_an_image_of_any_size(
    batch: int, patches: int, patch: int, channels: int, depth: int, kind: str
) -> None:
    decoder = CrossAttentionDecoder(
        12, 6, target_size=patch * patches, patch_size=patch, image_channels=channels,
        dim=16, depth=depth, heads=4, tokens=2, spatial=kind != "vector",
    )  # fmt: skip
    own = torch.rand(batch, *SHAPES[kind][1:])
    other = own.narrow(2 if kind == "tokens" else 1, 0, 6)
    assert decoder(own, other).shape == (batch, channels, patch * patches, patch * patches)


def test_both_features_reach_every_patch() -> None:
    decoder = CrossAttentionDecoder(12, 6)
    own = torch.rand(1, 12, requires_grad=True)
    other = torch.rand(1, 6, requires_grad=True)
    image = decoder(own, other)
    for corner in (image[..., :2, :2], image[..., -2:, -2:]):
        gradients = torch.autograd.grad(corner.sum(), [own, other], retain_graph=True)
        assert all(g.any() for g in gradients)


def test_patches_land_where_their_query_stands() -> None:
    decoder = CrossAttentionDecoder(4, 4, target_size=8, patch_size=4, image_channels=1)
    with torch.no_grad():
        decoder.queries.zero_()
        decoder.queries[1, 0] = 1.0  # the patch right of the first
        image = decoder(torch.rand(1, 4), torch.rand(1, 4))[0, 0]
    others = [image[:4, :4], image[4:, :4], image[4:, 4:]]
    assert torch.equal(others[0], others[1])
    assert torch.equal(others[0], others[2])
    assert not torch.allclose(image[:4, 4:], others[0])


def test_the_decoder_names_sizes_that_do_not_divide_and_features_of_another_rank() -> None:
    with pytest.raises(ValueError, match=r"divides target_size=32, got 5"):
        ReconAux(8, patch_size=5)
    with pytest.raises(ValueError, match=r"decoder_heads .* decoder_dim=32, got 5"):
        ReconAux(8, decoder_dim=32, decoder_heads=5)
    for option in ("decoder_depth", "decoder_heads", "decoder_tokens", "patch_size"):
        with pytest.raises(ValueError, match=rf"{option}= of 1 or more, got 0"):
            ReconAux(8, **{option: 0})
    views = torch.rand(2, 4, 3, 32, 32)
    with pytest.raises(ValueError, match=r"pooled, \(B, D\), got \(4, 4, 2, 2\); spatial=True"):
        ReconAux(8)(views, torch.rand(2, 4, 8, 2, 2))


def views_and_features(batch: int = 4, dim: int = 8) -> tuple[Tensor, Tensor]:
    return torch.rand(2, batch, 3, 32, 32), torch.rand(2, batch, dim)


def test_the_weight_is_applied_and_the_target_is_the_view() -> None:
    views, features = views_and_features()
    aux = ReconAux(8, weight=7.0, registration=2.0, statistics=3.0, edges=5.0)
    output = aux(views, features)
    losses = output.registration_loss, output.statistics_loss, output.edges_loss
    expected = output.reconstruction_loss + torch.tensor([2.0, 3.0, 5.0]) @ torch.stack(losses)
    assert min(losses) > 0
    assert output.unweighted_loss.item() == pytest.approx(expected.item())
    assert output.loss.item() == pytest.approx(7 * output.unweighted_loss.item())
    assert torch.equal(output.target, views[output.rebuilt[0]])


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_the_loss_does_not_depend_on_the_views_units(scale: float) -> None:
    views, features = views_and_features()
    expected = ReconAux(8, seed=0)(views, features).loss.item()
    scaled = ReconAux(8, seed=0)(views * scale + 3, features)
    assert scaled.loss.item() == pytest.approx(expected, rel=1e-3)
    assert scaled.reconstruction.mean().item() == pytest.approx(scale / 2 + 3, rel=0.2)


def test_blank_views_are_no_division_by_zero_and_do_not_set_the_scale() -> None:
    aux = ReconAux(8)
    output = aux(torch.ones(2, 4, 3, 32, 32), torch.rand(2, 4, 8))
    assert math.isfinite(output.loss.item())
    views, features = views_and_features()
    assert aux(views * 255, features).reconstruction_loss < 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_whole_model_in_another_type(dtype: torch.dtype) -> None:
    views, features = views_and_features()
    output = ReconAux(8).to(dtype)(views.to(dtype), features.to(dtype))
    assert output.loss.dtype == torch.float32
    mixed = ReconAux(8)(views, features.to(dtype).requires_grad_())
    mixed.loss.backward()


def rebuilt(aux: ReconAux, calls: int) -> list[tuple[int, ...]]:
    return [aux(*views_and_features(2)).rebuilt for _ in range(calls)]


def test_views_take_turns_are_drawn_or_both() -> None:
    assert rebuilt(ReconAux(8), 4) == [(0,), (1,), (0,), (1,)]
    assert rebuilt(ReconAux(8, reconstruct="both"), 2) == [(0, 1), (0, 1)]
    drawn = rebuilt(ReconAux(8, reconstruct="random", seed=1), 30)
    assert {(0,), (1,)} == set(drawn)
    assert drawn == rebuilt(ReconAux(8, reconstruct="random", seed=1), 30)


@pytest.mark.parametrize("reconstruct", ["alternate", "random"])
def test_the_choice_of_view_goes_on_from_a_checkpoint(reconstruct: Any) -> None:
    aux = ReconAux(8, reconstruct=reconstruct, seed=3)
    rebuilt(aux, 5)
    resumed = ReconAux(8, reconstruct=reconstruct, seed=4)
    resumed.load_state_dict(copy.deepcopy(aux.state_dict()))
    assert rebuilt(resumed, 12) == rebuilt(aux, 12)


def test_a_frozen_decoder_is_not_given_a_weight() -> None:
    views, features = views_and_features()
    aux = ReconAux(8, weight=0)
    assert not aux(views, features).loss
    aux.weight = 1.0
    with pytest.raises(ValueError, match="expected the weight to stay 0"):
        aux(views, features)


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
    kinds = {"invariant": [0, 4], "equivariant": [4, 8], "both": [0, 8], "none": [0, 0]}
    for context, kept in kinds.items():
        y0, y1 = (y.clone().requires_grad_() for y in features)
        none = {"registration": 0, "statistics": 0, "edges": 0}
        aux = ReconAux(8, context=context, **none)  # type: ignore[arg-type]
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


def test_a_decoder_that_expects_context_says_so() -> None:
    with pytest.raises(ValueError, match="expected context from the other view"):
        CrossAttentionDecoder(8, 8)(torch.rand(2, 8))


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


@pytest.mark.parametrize(
    ("views", "features", "message"),
    [
        ([(4, 3, 32, 32), (3, 3, 32, 32)], [(4, 8), (3, 8)], r"batches of 4 and 3 views"),
        ([(4, 3, 32, 32)] * 2, [(4, 8), (2, 8)], r"4 and 2 features"),
        ([(4, 1, 32, 32)] * 2, [(4, 8)] * 2, r"views \(B, 3, H, W\).* image_channels="),
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


def test_both_rebuilt_need_features_of_one_shape() -> None:
    views, features = [torch.rand(4, 3, 8, 8)] * 2, [torch.rand(4, 8, 2, 2), torch.rand(4, 8, 3, 3)]
    ReconAux(8, spatial=True)(views, features)
    with pytest.raises(ValueError, match="features of one shape"):
        ReconAux(8, spatial=True, reconstruct="both")(views, features)


@pytest.mark.parametrize(
    ("view", "feature"), [(torch.complex64, torch.float32), (torch.uint8, torch.int64)]
)
def test_types_that_are_no_image_or_no_feature_are_named(
    view: torch.dtype, feature: torch.dtype
) -> None:
    views = [torch.ones(4, 3, 8, 8, dtype=view)] * 2
    with pytest.raises(TypeError, match=r"floating-point type, got \['torch"):
        ReconAux(8)(views, [torch.ones(4, 8, dtype=feature)] * 2)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("broken", "where"), [("view", "the data"), ("feature", "the encoder")])
def test_a_loss_that_is_not_finite_is_named_with_what_went_in(
    broken: str, where: str, which: int
) -> None:
    views, features = views_and_features()
    (views if broken == "view" else features)[which, 0] = float("nan")
    with pytest.raises(
        FloatingPointError,
        match=rf"finite reconstruction loss, got nan in step 1; .*range.* infinity in {where}",
    ):
        ReconAux(8)(views, features)


class Sent:
    """Numbers on their way from a GPU, which arrive when they are told to."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers.clone().fill_(float("nan"))
        self.there = numbers
        self.arrived = False

    def query(self) -> bool:
        if self.arrived:
            self.numbers.copy_(self.there)
        return self.arrived

    def synchronize(self) -> None:
        self.arrived = True
        assert self.query()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Sent]:
    sent: list[Sent] = []

    def send(numbers: Tensor) -> tuple[Tensor, Sent]:
        sent.append(Sent(numbers))
        return sent[-1].numbers, sent[-1]

    monkeypatch.setattr(finite, "_send", send)
    return sent


def test_a_loss_that_is_not_finite_is_told_when_a_gpu_has_sent_it(sent: list[Sent]) -> None:
    views, features = views_and_features()
    aux = ReconAux(8)
    aux(views, features)
    aux(views, [features[0], features[1] * float("nan")])
    sent[0].arrived = True
    copied = copy.deepcopy(aux)
    aux(views, features)
    sent[1].arrived = True
    with pytest.raises(FloatingPointError, match=r"got nan in step 2; .* and nan to nan\. Look"):
        aux(views, features)
    # nor is it told again, or in a copy
    for model in (aux, copied):
        model(views, features)
        model.state_dict()


def test_it_is_told_before_weights_are_saved(sent: list[Sent]) -> None:
    views, features = views_and_features()
    aux = ReconAux(8)
    saved = aux.state_dict()
    aux(views, features * float("nan"))
    with pytest.raises(FloatingPointError, match=r"got nan in step 1; "):
        aux.state_dict()
    # a step that was taken back is forgotten
    for state in (saved, {"recon_aux." + key: value for key, value in saved.items()}, {}):
        model = torch.nn.ModuleDict({"recon_aux": aux}) if state is not saved else aux
        aux(views, features * float("nan"))
        with warnings.catch_warnings():
            # of a bare model's
            warnings.simplefilter("ignore")
            model.load_state_dict(state)
    aux(views, features)
    aux.state_dict()
    assert all(step.arrived for step in sent[-1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, r"weight= as a finite number of 0 or more, got -1"),
        ({"weight": float("nan")}, r"weight= as a finite"),
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


def test_the_core_imports_no_framework() -> None:
    frameworks = "{'lightly', 'lightning', 'pytorch_lightning', 'torchvision', 'kornia', 'sklearn'}"
    code = f"import sys, recon_aux; print(sorted({frameworks} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert printed.stdout.decode().strip() == "[]"


def test_a_cut_resnets_feature_is_taken_as_it_is() -> None:
    aux = ReconAux(16, seed=0)
    views, features = torch.rand(2, 4, 3, 32, 32), torch.rand(2, 4, 16)
    maps = [feature[..., None, None] for feature in features]
    assert torch.equal(aux.rebuild(*maps), aux.rebuild(*features))
    twin = copy.deepcopy(aux)
    assert torch.equal(twin(views, maps).loss, aux(views, features).loss)
