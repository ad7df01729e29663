"""Every shape of method, attached by the one line."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import recon_aux
from helpers.data import shaded_views
from helpers.inside import hooked, reached
from helpers.methods import (
    DIM,
    METHODS,
    Head,
    Masked,
    Method,
    Momentum,
    MomentumWithGradient,
    MultiCrop,
    ShuffledMomentum,
    map_encoder,
    mixed_by,
)
from helpers.models import tiny_encoder
from helpers.training import trainer
from helpers.watching import rebuilt_by, rebuilt_from
from helpers.weights import assert_trained, decoder_of
from recon_aux.integrations.lightly import attach

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


def built(method: type[Method], **options: Any) -> Any:
    torch.manual_seed(0)
    return attach(method(), **options)


def built_with_outputs(method: type[Method], **options: Any) -> tuple[Any, list[Tensor]]:
    """An attached method, and what its encoder gives with gradient, from here on."""
    torch.manual_seed(0)
    model = method()
    outputs: list[Tensor] = []
    encoder = model.get_submodule(model.trained)
    called = "encode" if isinstance(model, Masked) else "forward"
    call = getattr(encoder, called)

    def note(*args: Any, **kwargs: Any) -> Tensor:
        output = call(*args, **kwargs)
        outputs.extend([output] if output.requires_grad else [])
        return output

    setattr(encoder, called, note)
    return attach(model, **options), outputs


@every_method
def test_the_methods_loss_leaves_the_equivariant_channels_alone(method: type[Method]) -> None:
    model, outputs = built_with_outputs(method, weight=0, equivariant_dim=6)
    loss = model.training_step(model.batch(), 0)
    gradients = torch.autograd.grad(loss, outputs)
    parts = [model.recon_aux.splitter(g) for g in gradients]
    assert len(outputs) > 0
    assert not any(equivariant.any() for _, equivariant in parts)
    assert all(invariant.any() for invariant, _ in parts)


@every_method
def test_the_two_views_are_found_with_their_features(method: type[Method]) -> None:
    model = built(method)
    seen = rebuilt_from(model)
    batch = model.batch()
    model.training_step(batch, 0)
    ((views, features),) = seen
    assert all(torch.equal(a, b) for a, b in zip(views, model.expected(batch), strict=True))
    assert features[0].requires_grad
    # of the evaluated encoder, so that a view's feature doesn't depend on the rest of its batch
    model.eval()
    seen.clear()
    model.training_step(batch, 0)
    ((views, features),) = seen
    if not isinstance(model, (Masked, Momentum)):
        encoder = model.get_submodule(model.trained)
        for feature, view in zip(features, views, strict=True):
            torch.testing.assert_close(feature.flatten(1), encoder(view).flatten(1))


@pytest.mark.slow
@every_method
def test_the_reconstruction_loss_halves_on_a_fixed_batch(method: type[Method]) -> None:
    model = built(method, registration=0, statistics=0, edges=0)
    optimizer = model.configure_optimizers()
    outputs = rebuilt_by(model)
    batch = model.batch()
    for step in range(40):
        optimizer.zero_grad()
        model.training_step(batch, step).backward()
        optimizer.step()
    losses = [output.reconstruction_loss.item() for output in outputs]
    assert sum(losses[-2:]) < sum(losses[:2]) / 2, losses


@every_method
def test_detached_is_as_it_was(method: type[Method]) -> None:
    torch.manual_seed(0)
    model = method()
    bare = {name: set(vars(module)) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    attach(model)
    model.training_step(model.batch(), 1)
    recon_aux.detach(model)
    assert list(model.state_dict()) == keys
    assert {name: set(vars(module)) for name, module in model.named_modules()} == bare
    assert not hooked(model)


@every_method
def test_trains_under_the_trainer(method: type[Method]) -> None:
    model = built(method)
    before = decoder_of(model)
    batches: Any = [model.batch()] * 2
    trained = trainer(max_steps=2)
    trained.fit(model, DataLoader(batches, batch_size=None))
    assert_trained(model, before)
    assert "recon_aux/loss" in trained.callback_metrics


def test_the_momentum_encoders_feature_is_put_in_the_views_order() -> None:
    model = built(ShuffledMomentum)
    model.eval()
    seen = rebuilt_from(model)
    batch = model.batch()
    model.training_step(batch, 0)
    ((views, features),) = seen
    expected = model.backbone_momentum(batch[0][1]).flatten(1)
    assert torch.equal(views[1], batch[0][1])
    torch.testing.assert_close(features[1], expected)


@every_method
def test_a_later_step_compares_no_values(method: type[Method]) -> None:
    """Which would wait for a GPU, but where a momentum encoder's images aren't the batch's."""
    model = built(method)
    model.configure_optimizers()
    for step in range(2):
        model.training_step(model.batch(), step)
    with torch.profiler.profile() as profile:
        model.training_step(model.batch(), 2)
    compared = any(event.key == "aten::equal" for event in profile.key_averages())
    assert compared == (method is ShuffledMomentum)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_shuffle_of_stacked_views_is_undone(dim: int) -> None:
    class Stacked(ShuffledMomentum):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            return super().training_step((batch[0].unbind(dim), batch[1]))

    model = built(Stacked)
    model.eval()
    seen = rebuilt_from(model)
    views, labels = shaded_views(2, size=6), torch.arange(6)
    for index in range(3):
        model.training_step((torch.stack(views, dim), labels), index)
        ((found, features),) = seen
        assert all(torch.equal(a, b) for a, b in zip(found, views, strict=True))
        expected = model.backbone_momentum(views[1]).flatten(1)
        torch.testing.assert_close(features[1], expected)
        seen.clear()


def test_a_shuffle_is_undone_where_views_have_the_same_sums() -> None:
    model = built(ShuffledMomentum)
    seen = rebuilt_from(model)
    view = torch.arange(4 * 3 * 8 * 8).reshape(4, 3, 8, 8).float()
    views = [view, view.flip(-1)]
    for pair in (views, views[::-1]):
        model.training_step((pair, torch.arange(4)), 0)
        assert all(torch.equal(a, b) for a, b in zip(seen.pop()[0], pair, strict=True))


def test_a_momentum_encoder_gets_no_gradient_from_the_reconstruction() -> None:
    model = built(MomentumWithGradient)
    model.training_step(model.batch(), 0).backward()
    assert model.backbone[0].weight.grad is not None
    assert model.backbone_momentum[0].weight.grad is None


def test_a_head_may_be_copied_within_the_first_step() -> None:
    class Copies(Method):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            loss = super().training_step(batch)
            self.kept = [copy.deepcopy(self.projection_head), pickle.dumps(self.projection_head)]
            return loss

    model = built(Copies)
    model.training_step(model.batch(), 0)
    x = torch.rand(4, 16)
    assert torch.equal(model.kept[0](x), model.projection_head(x))


def test_an_encoder_that_is_frozen_is_not_the_one() -> None:
    model: Any = Method()
    model.my_encoder = model.backbone
    model.backbone = nn.Linear(4, 4).requires_grad_(False)
    attach(model)
    assert recon_aux.export_backbone(model).keys() == model.my_encoder.state_dict().keys()


@pytest.mark.parametrize("method", [Momentum, ShuffledMomentum])
@pytest.mark.parametrize("first", [True, False])
def test_a_third_image_of_the_batch_is_no_view_where_the_encoder_alone_looks_at_it(
    method: Any, first: bool
) -> None:
    class Third(method):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            losses = []
            for look in (first, not first):
                if look:
                    with torch.no_grad():
                        self.backbone(batch[0][2])
                else:
                    losses.append(super().training_step((batch[0][:2], batch[1])))
            return losses[0]

    model = built(Third)
    model.eval()
    seen = rebuilt_from(model)
    views, labels = shaded_views(3), torch.arange(4)
    for index in range(2):
        model.training_step((views, labels), index)
        ((found, features),) = seen
        assert all(torch.equal(a, b) for a, b in zip(found, views, strict=False))
        encoders = (model.backbone, model.backbone_momentum)
        for encoder, view, feature in zip(encoders, views, features, strict=False):
            torch.testing.assert_close(feature, encoder(view).flatten(1))
        seen.clear()


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("side", [32, 48])
def test_what_a_probe_encodes_first_is_no_view(side: int, detached: bool) -> None:
    class Probed(Method):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            clean = torch.rand(4, 3, side, side)
            if batch_idx:
                probed = self.backbone(clean)
                self.probed = probed.detach() if detached else probed
            return super().training_step(batch)

    model = built(Probed)
    seen = rebuilt_from(model)
    views, labels = model.batch()
    for index in (0, 1, 2):
        model.training_step((views, labels), index)
    assert all(torch.equal(a, b) for call in seen for a, b in zip(call[0], views, strict=True))
    assert len(seen) == 3


@pytest.mark.parametrize("detached", [True, False])
def test_small_crops_leave_a_view_without_gradient_a_view(detached: bool) -> None:
    class Crops(Method):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            (x0, x1), _ = batch
            with torch.set_grad_enabled(detached):
                told = self.projection_head(self.backbone(x1).flatten(1)).detach()
            z = [self.projection_head(self.backbone(x).flatten(1)) for x in (x0, x0[..., ::2, ::2])]
            return self.criterion(z[0], told) + self.criterion(z[1], told)

    model = built(Crops)
    seen = rebuilt_from(model)
    views, labels = model.batch()
    model.training_step((views, labels), 0)
    assert {id(view) for view in seen[0][0]} == {id(view) for view in views}


@every_method
def test_what_is_masked_is_not_told_of(method: type[Method]) -> None:
    model = built(method)
    rebuilt = rebuilt_by(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="recon_aux")
        model.training_step(model.batch(), 0)
    assert len(rebuilt) == 1


def test_a_head_whose_only_child_is_called_module_is_a_head() -> None:
    class Normalizing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(16, 8)

        def forward(self, y: Tensor) -> Tensor:
            return self.module(nn.functional.normalize(y))

    class Sequenced(nn.ModuleList):
        def forward(self, y: Tensor) -> Tensor:
            return self[1](self[0](y).relu())

    for head in (Normalizing(), Sequenced([nn.Linear(16, 8), nn.Linear(8, 8)])):
        model = Method()
        model.projection_head = head
        attach(model)
        model.training_step(model.batch(), 0)
        assert hooked(model) == ["", "backbone", "projection_head"]


def test_an_encoder_may_be_replaced_before_the_first_step() -> None:
    model = built(Method)
    model.backbone = copy.deepcopy(model.backbone)
    nn.init.ones_(model.backbone[0].bias)
    model.training_step(model.batch(), 0)
    assert recon_aux.export_backbone(model)["0.bias"].all()


def test_an_encoder_may_take_a_mask_before_the_images() -> None:
    class TakesAMask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_encoder(dim=16)

        def forward(self, pixel_values: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.inner(pixel_values)

    class MaskFirst(Method):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            (x0, x1), mask = batch
            z = [
                self.projection_head(self.backbone(mask=mask, pixel_values=x).flatten(1))
                for x in (x0, x1)
            ]
            return self.criterion(*z)

    model = attach(MaskFirst(TakesAMask()))
    seen = rebuilt_from(model)
    views, labels = model.batch()
    model.training_step((views, labels), 0)
    assert all(torch.equal(a, b) for a, b in zip(seen[0][0], views, strict=True))


def test_heads_in_a_list_are_heads() -> None:
    class Several(Method):
        def __init__(self) -> None:
            super().__init__()
            self.projection_heads = nn.ModuleList([self.projection_head, nn.Linear(16, 8)])
            del self.projection_head

        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            y0, y1 = (self.backbone(x).flatten(1) for x in batch[0])
            return sum(self.criterion(head(y0), head(y1)) for head in self.projection_heads)

    model = attach(Several())
    model.training_step(model.batch(), 0)
    assert hooked(model) == ["", "backbone", "projection_heads.0", "projection_heads.1"]


def test_images_are_no_features_whatever_the_layer_is_called() -> None:
    class Input(Method):
        def __init__(self) -> None:
            super().__init__()
            self.input_projection = nn.Conv2d(3, 3, 1)

        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            views, labels = batch
            return super().training_step(([self.input_projection(x) for x in views], labels))

    model = attach(Input())
    with pytest.raises(ValueError, match=r"receive the encoder's 16 channels, got \(4, 3, 16, 1"):
        model.training_step((list(torch.rand(2, 4, 3, 16, 16)), torch.arange(4)), 0)


def test_images_of_another_process_are_refused() -> None:
    class Elsewhere(Momentum):
        def key(self, x: Tensor) -> Tensor:
            return super().key(torch.rand_like(x))

    model = built(Elsewhere)
    with pytest.raises(RuntimeError, match="made within the step, or are another process"):
        model.training_step(model.batch(), 0)


def test_only_the_view_with_gradient_is_rebuilt() -> None:
    model = built(Momentum)
    outputs = rebuilt_by(model)
    for _ in range(3):
        model.training_step(model.batch(), 0)
    assert [output.rebuilt for output in outputs] == [(0,)] * 3


def test_an_encoder_without_its_usual_name_is_recognised_by_its_gradient() -> None:
    model = built(MultiCrop)
    model.training_step(model.batch(), 0).backward()
    assert model.pupil[0].weight.grad is not None
    assert model.backbone[0].weight.grad is None


def test_two_encoders_that_are_both_trained_need_to_be_told_apart() -> None:
    class Two(Method):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (copy.deepcopy(self.backbone) for _ in range(2))

        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            pairs = zip((self.left, self.right), batch[0], strict=True)
            return self.criterion(*(self.projection_head(f(x).flatten(1)) for f, x in pairs))

    model = built(Two)
    with pytest.raises(RuntimeError, match=r"train one encoder.*\['left', 'right'\].*backbone="):
        model.training_step(model.batch(), 0)


def test_two_towers_of_which_one_has_the_usual_name() -> None:
    class Towers(Method):
        def __init__(self) -> None:
            super().__init__()
            self.other = copy.deepcopy(self.backbone)

        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            x0, x1 = batch[0]
            return self.criterion(self.embed(x0), self.projection_head(self.other(x1).flatten(1)))

    model = built(Towers)
    with pytest.raises(RuntimeError, match=r"\['backbone', 'other'\].*momentum encoder .*detached"):
        model.training_step(model.batch(), 0)


@pytest.mark.parametrize(
    "neck", [nn.Linear(DIM, DIM), nn.LayerNorm(DIM), nn.Softmax(1)], ids=lambda neck: str(neck)[:9]
)
def test_what_mixes_the_channels_before_a_head_is_refused(neck: nn.Module) -> None:
    model = attach(mixed_by(neck))
    with pytest.raises(RuntimeError, match=r"mixed into what the heads \['projection_head'\] rec"):
        model.training_step(model.batch(), 0)
    attach(recon_aux.detach(model), heads=["neck"]).training_step(model.batch(), 0)


def test_two_poolings_of_a_map_are_not_taken_for_the_map() -> None:
    class Pooled(Method):
        def __init__(self) -> None:
            super().__init__(map_encoder())
            self.projection_head = nn.Linear(2 * DIM, 8)

        def embed(self, x: Tensor) -> Tensor:
            feature = self.backbone(x)
            return self.projection_head(torch.cat([feature.mean((2, 3)), feature.amax((2, 3))], 1))

    model = built(Pooled)
    with pytest.raises(RuntimeError, match="mixed into what the heads"):
        model.training_step(model.batch(), 0)


def test_a_head_that_is_exchanged_after_the_first_step_is_noticed() -> None:
    model = built(Method)
    model.training_step(model.batch(), 0)
    model.projection_head = Head()
    with pytest.raises(RuntimeError, match="past what the heads"):
        model.training_step(model.batch(), 1)


class ArrangedOtherwise(Method):
    """Encodes what ``arrange`` makes of the views, and looks at all of it."""

    @staticmethod
    def arrange(views: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return sum(self.embed(x).var() for x in self.arrange(batch[0]))  # type: ignore[return-value]


ARRANGEMENTS = {
    "in small batches": lambda views: [half for view in views for half in view.chunk(2)],
    "shuffled": lambda views: [torch.cat(views)[torch.arange(2 * len(views[0])).roll(1)]],
    "twice": lambda views: [views[0], views[0].clone(), views[1]],
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_views_that_the_batch_shows_to_be_paired_wrongly_are_refused(name: str) -> None:
    model = built(type("Arranged", (ArrangedOtherwise,), {"arrange": ARRANGEMENTS[name]}))
    model.arrange = ARRANGEMENTS[name]
    with pytest.raises(RuntimeError, match=r"another arrangement|same images .* twice"):
        model.training_step(model.batch(), 0)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_views_that_take_turns_in_the_batch_are_taken_apart(stacked: bool, labelled: bool) -> None:
    # a lone stacked batch doesn't show which of its dimensions is the views
    options: Any = {"views": 2} if stacked and not labelled else {}
    model = built(ArrangedOtherwise, **options).eval()
    model.arrange = lambda views: [
        views.flatten(0, 1) if stacked else torch.stack(views, 1).flatten(0, 1)
    ]
    views, labels = model.batch()
    batch = [torch.stack(views, 1) if stacked else views, *[labels] * labelled]
    seen = rebuilt_from(model)
    for _ in range(2):
        model.training_step(batch, 0)
        images, features = seen.pop()
        assert all(torch.equal(a, b) for a, b in zip(images, views, strict=True))
        assert all(
            torch.allclose(y, model.backbone(x).flatten(1), atol=1e-5)
            for x, y in zip(images, features, strict=True)
        )


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_lone_stacked_batch_needs_the_number_of_views(count: int) -> None:
    """Also with more views than images, as in a last batch that is incomplete."""
    for images in (2, 3, 4):
        if images == count:
            continue
        batch = torch.rand(images, count, 3, 32, 32)
        model = built(ArrangedOtherwise)
        model.arrange = lambda views: [views.flatten(0, 1)]
        with pytest.raises(RuntimeError, match="pass views= how many"):
            model.training_step([batch], 0)
        model = built(ArrangedOtherwise, views=count)
        model.arrange = lambda views: [views.flatten(0, 1)]
        seen = rebuilt_from(model)
        model.training_step([batch], 0)
        assert torch.equal(seen[0][0][0], batch[:, 0])
        assert torch.equal(seen[0][0][1], batch[:, 1])


def test_views_that_take_turns_are_taken_apart_where_an_option_says_so() -> None:
    def step(self: Any, batch: Any, batch_idx: int = 0) -> Tensor:
        scales = torch.tensor([1.0, 0.5]).repeat(len(batch[0]))
        z = self.embed(batch[0].repeat_interleave(2, 0) * scales[:, None, None, None])
        return self.criterion(z[0::2], z[1::2])

    model = built(type("Turns", (Method,), {"training_step": step}), interleaved=True)
    seen = rebuilt_from(model)
    (x, _), labels = model.batch()
    model.training_step((x, labels), 0)
    assert torch.equal(seen[0][0][0], x)
    assert torch.equal(seen[0][0][1], 0.5 * x)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_batch_whose_views_take_turns_is_taken_apart_where_options_say_so(labelled: bool) -> None:
    """The collate function made it so."""

    class Collated(Method):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            z = self.embed(batch[0])
            return self.criterion(z[0::2], z[1::2])

    views, labels = Method().batch()
    x = torch.stack(views, 1).flatten(0, 1)
    batch = (x, labels.repeat_interleave(2)) if labelled else (x,)
    with pytest.raises(RuntimeError, match=r"pass views= how many.*interleaved=True, too"):
        built(Collated).training_step(batch, 0)
    model = built(Collated, views=2, interleaved=True)
    seen = rebuilt_from(model)
    for _ in range(2):
        model.training_step(batch, 0)
        assert all(torch.equal(a, b) for a, b in zip(seen.pop()[0], views, strict=True))


@pytest.mark.parametrize("images", [torch.zeros(4, 3, 32, 32), torch.rand(1, 3, 32, 32)])
def test_images_that_are_equal_are_in_the_batchs_order(images: Tensor) -> None:
    views = [images.expand(4, 3, 32, 32) + 0.1 * torch.rand(4, 1, 1, 1) for _ in range(2)]
    views[0][:] = images
    for second in (views[1], views[1].flip(0)):
        model = built(Method)
        seen = rebuilt_from(model)
        model.training_step(([views[0], second], torch.arange(4)), 0)
        assert torch.equal(seen[0][0][0], views[0])
        assert torch.equal(seen[0][0][1], second)


def test_a_momentum_encoders_look_at_the_same_view_is_not_the_other() -> None:
    class Both(Momentum):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            x0, x1 = batch[0]
            query = self.embed(x0.clone())
            own, key = self.key(x0), self.key(x1)
            return self.criterion(query, key) + self.criterion(query, own)

    model = built(Both)
    seen = rebuilt_from(model)
    for _ in range(2):
        model.training_step(model.batch(), 0)
        assert torch.equal(torch.stack(seen.pop()[0]), torch.stack(model.batch()[0]))


def test_a_momentum_encoders_view_that_is_made_in_the_step_needs_a_word() -> None:
    class Scaled(Momentum):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            return super().training_step(([2 * x - 1 for x in batch[0]], batch[1]))

    model = built(Scaled)
    with pytest.raises(RuntimeError, match=r"made within the step.*pass views=1"):
        model.training_step(model.batch(), 0)
    model = built(Scaled, views=1)
    seen = rebuilt_from(model)
    model.training_step(model.batch(), 0)
    assert torch.equal(seen[0][0][1], 2 * model.batch()[0][1] - 1)


def test_small_crops_do_not_stand_in_for_a_view_that_is_not_in_the_batch() -> None:
    class Crops(Momentum):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            x0, x1 = (2 * x - 1 for x in batch[0])
            query, key = self.embed(x0), self.key(x1)
            small = [self.embed(x[..., :16, :16]) for x in (x0, x1)]
            return sum((self.criterion(z, key) for z in small), self.criterion(query, key))

    model = built(Crops)
    with pytest.raises(RuntimeError, match=r"made within the step.*pass views=1"):
        model.training_step(model.batch(), 0)


def test_validation_by_the_training_step_passes_through() -> None:
    model = built(Method)
    with torch.no_grad():
        rebuilt = rebuilt_by(model)
        loss = model.training_step(model.batch(), 0)
        assert torch.equal(loss, model.training_step(model.batch(), 0))
    assert rebuilt == []
    assert not loss.requires_grad


def test_copies_that_are_made_between_steps_are_watched_and_leave_no_hook() -> None:
    class Reset(Momentum):
        def on_train_epoch_start(self) -> None:
            self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)

    model = built(Reset)
    for _ in range(3):
        model.on_train_epoch_start()
        model.training_step(model.batch(), 0)
    kept = model.backbone_momentum
    recon_aux.detach(model)
    assert not hooked(model)
    assert "forward" not in vars(kept)


def test_a_recon_aux_of_the_models_own_is_not_replaced() -> None:
    model = Method()
    model.recon_aux = recon_aux.ReconAux(DIM)
    with pytest.raises(ValueError, match="without a recon_aux, got one that is its own"):
        attach(model)


def test_a_loss_that_does_not_depend_on_the_encoder() -> None:
    class Detached(Method):
        def embed(self, x: Tensor) -> Tensor:
            return self.projection_head(self.backbone(x).flatten(1).detach())

    model = built(Detached)
    with pytest.raises(RuntimeError, match="depends on none of those like backbone"):
        model.training_step(model.batch(), 0)


def test_a_momentum_encoder_that_is_made_after_attaching() -> None:
    class Later(Method):
        teacher: Any

        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            x0, x1 = batch[0]
            with torch.no_grad():
                key = self.projection_head(self.teacher(x1).flatten(1))
            return self.criterion(self.embed(x0), key)

    model = built(Later)
    model.teacher = copy.deepcopy(recon_aux.detach(copy.deepcopy(model)).backbone)
    seen = rebuilt_from(model)
    model.training_step(model.batch(), 0)
    ((views, _),) = seen
    assert torch.equal(views[1], model.batch()[0][1])


WRAPPERS = {
    "torch.compile": lambda module: torch.compile(module, backend="eager"),
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("method", [Method, Momentum, Masked], ids=lambda m: m.__name__)
def test_wrapped_encoders_and_heads(wrapper: str, method: type[Method]) -> None:
    if wrapper == "DataParallel" and method is Masked:
        pytest.skip("DataParallel has no encode")
    torch.manual_seed(0)
    model = method()
    for name, child in list(model.named_children()):
        if "backbone" in name or "head" in name:
            setattr(model, name, WRAPPERS[wrapper](child))
    attach(model, weight=0, equivariant_dim=6)
    encoders = [name for name in hooked(model) if "backbone" in name]
    assert len(encoders) == (1 if method is Method else 2)
    twin = built(method, weight=0, equivariant_dim=6)
    batch = model.batch()
    for attached in (model, twin):
        attached.training_step(batch, 0).backward()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    for ours, theirs in pairs:
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_an_encoder_compiled_in_place_and_after_attaching() -> None:
    model, twin = built(Method), built(Method)
    model.backbone.compile(backend="eager")
    losses = [attached.training_step(attached.batch(), 0) for attached in (model, twin)]
    torch.testing.assert_close(*losses)


def test_a_compiled_model_is_to_be_attached_first() -> None:
    compiled = torch.compile(Method(), backend="eager")
    with pytest.raises(TypeError, match="OptimizedModule: attach first"):
        attach(compiled)


def test_a_class_is_not_a_model() -> None:
    with pytest.raises(TypeError, match="expected a model, an instance of its class, got <class"):
        attach(Method)


@pytest.mark.parametrize("name", ["MAE", "AIM", "SimMIM", "IJEPA", "Pixio", "CAPI"])
def test_methods_with_one_view_are_refused_by_name(name: str) -> None:
    method = type(name, (Method,), {})
    with pytest.raises(TypeError, match=f"encodes two views, got {name}, which .* of one view"):
        attach(method())


def test_a_method_of_the_backbone_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"to name a method of Sequential.*encode"):
        built(Method, backbone_method="encode")


def test_an_encoder_that_is_called_past_its_forward() -> None:
    model = built(Masked, backbone_method="forward")
    with pytest.raises(RuntimeError, match=r"call forward of the encoder .*backbone_method="):
        model.training_step(model.batch(), 0)


def test_fewer_than_two_views() -> None:
    with pytest.raises(ValueError, match="expected views= of 1 or more, got 0"):
        built(Method, views=0)


def test_the_same_view_twice_is_not_two_views() -> None:
    class Same(Momentum):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            x0 = batch[0][0]
            return self.criterion(self.embed(x0), self.key(x0.clone()))

    model = built(Same)
    with pytest.raises(RuntimeError, match="expected two views"):
        model.training_step((shaded_views(2), torch.arange(4)), 0)


def test_a_batch_may_hold_its_views_concatenated() -> None:
    class Concatenated(Method):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            return self.criterion(*self.embed(batch[0]).chunk(2))

    views = shaded_views(2)
    model = built(Concatenated, views=2)
    seen = rebuilt_from(model)
    for labels in (torch.arange(4), torch.arange(4).repeat(2)):
        model.training_step((torch.cat(views), labels), 0)
        assert all(torch.equal(a, b) for a, b in zip(seen.pop()[0], views, strict=True))
    # or, where the encoder gets them so, in turns
    model = built(Concatenated, views=2)
    model.embed = lambda x: Method.embed(model, torch.stack(x.chunk(2), 1).flatten(0, 1))
    seen = rebuilt_from(model)
    model.training_step((torch.cat(views), torch.arange(4)), 0)
    assert all(torch.equal(a, b) for a, b in zip(seen.pop()[0], views, strict=True))


def test_a_graph_of_many_ways_is_walked_once() -> None:
    x = y = torch.ones(1, requires_grad=True) + 0
    for _ in range(100):
        y = y + y
    assert reached(y, [x])


def joined_and_others(self: Any, views: list[Tensor], others: Tensor, *, first: bool) -> Tensor:
    """The loss of concatenated views, and of others that are encoded first or last."""
    extra = self.embed(others).square().mean() if first else 0
    loss = self.criterion(*self.embed(torch.cat(views)).chunk(2))
    return loss + extra if first else loss + self.embed(others).square().mean()


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("options", [{}, {"views": 2}])
def test_concatenated_views_are_found_beside_labelled_images(
    count: int, first: bool, options: dict[str, Any]
) -> None:
    class Supervised(Method):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            return joined_and_others(self, *batch[:2], first=first)

    model = built(Supervised, **options)
    views, seen = shaded_views(2), rebuilt_from(model)
    others = torch.rand(count, *views[0].shape[1:])
    for _ in range(2):
        model.training_step((views, others, torch.arange(count)), 0)
        assert all(torch.equal(a, b) for a, b in zip(seen.pop()[0], views, strict=True))


@pytest.mark.parametrize("options", [{}, {"views": 2}])
def test_of_two_sources_that_are_concatenated_the_first_is_taken(options: dict[str, Any]) -> None:
    class Sources(Method):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            pairs = ([x, x.flip(3)] for x in batch)
            return sum(
                (self.criterion(*self.embed(torch.cat(pair)).chunk(2)) for pair in pairs),
                torch.zeros(()),
            )

    model = built(Sources, **options)
    (one, other), seen = shaded_views(2), rebuilt_from(model)
    model.training_step([one, other], 0)
    assert all(torch.equal(a, b) for a, b in zip(seen.pop()[0], [one, one.flip(3)], strict=True))


def test_how_many_views_are_concatenated_does_not_cut_what_is_one_view() -> None:
    class OneByOne(Method):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            return self.criterion(*map(self.embed, batch[0]))

    model = built(OneByOne, views=2)
    views, seen = shaded_views(2), rebuilt_from(model)
    model.training_step((views, torch.arange(4)), 0)
    assert all(torch.equal(a, b) for a, b in zip(seen.pop()[0], views, strict=True))
