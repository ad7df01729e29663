"""The engine: what it refuses, and by what name; what it leaves as it was."""

from __future__ import annotations

import builtins
import copy
import importlib
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import recon_aux
from helpers import inside
from helpers.data import batch
from helpers.inside import MethodHook, hooked
from helpers.methods import tiny_vit
from helpers.models import InADict, PlainMethod, Siamese, plain_method, tiny_encoder
from helpers.watching import rebuilt_by, rebuilt_from
from helpers.weights import assert_same, bare_state
from recon_aux.integrations.lightly import attach


def test_attaching_twice() -> None:
    model = attach(plain_method())
    with pytest.raises(ValueError, match=r"expected a bare PlainMethod.*recon_aux\.detach"):
        attach(model)


def test_detaching_what_is_not_attached() -> None:
    with pytest.raises(ValueError, match="got a bare PlainMethod"):
        recon_aux.detach(plain_method())


def test_no_encoder_is_found() -> None:
    model = plain_method()
    model.trunk = model.backbone
    del model.backbone
    with pytest.raises(
        ValueError, match=r"expected a trainable encoder.*Pass backbone=.*trunk \(Sequential\)"
    ):
        attach(model)


def test_a_name_that_is_no_submodule() -> None:
    with pytest.raises(ValueError, match=r"backbone= .*got 'trunk'; there are: backbone"):
        attach(plain_method(), backbone="trunk")
    with pytest.raises(ValueError, match=r"heads= .*got 'top'; there are: backbone"):
        attach(plain_method(), heads=["top"])


def test_a_module_may_be_named_by_any_of_its_names() -> None:
    model = plain_method()
    model.parts = nn.ModuleDict({"encoder": model.backbone, "head": model.projection_head})
    attach(model, backbone="parts.encoder", heads=["parts.head"])
    assert hooked(model) == ["", "backbone", "projection_head"]
    assert torch.isfinite(model.training_step(batch(), 0))


def test_a_head_may_be_named_by_itself() -> None:
    by_name, by_itself = plain_method(), plain_method()
    attach(by_name, heads="projection_head")
    attach(by_itself, backbone=by_itself.backbone, heads=by_itself.projection_head)
    for model in (by_name, by_itself):
        assert hooked(model) == ["", "backbone", "projection_head"]


def test_an_unknown_option_is_named_with_the_likely_one() -> None:
    with pytest.raises(TypeError, match=r"got the option wieght=; did you mean weight="):
        attach(plain_method(), wieght=4)
    with pytest.raises(TypeError, match=r"equivariant_dim= as a whole number, got 0\.5"):
        attach(plain_method(), equivariant_dim=0.5)


def test_no_head_is_found() -> None:
    model = plain_method()
    model.top = nn.Linear(16, 8)
    del model.projection_head
    with pytest.raises(
        ValueError, match=r"expected a projection head.*Pass heads=.*top \(Linear\)"
    ):
        attach(model)
    assert recon_aux.is_attached(attach(model, equivariant_dim=0))


def test_a_head_that_was_not_told_of() -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        return (
            PlainMethod.training_step(self, batch, 0)
            + self.other(self.backbone(batch[0][0])).mean()
        )

    model = plain_method(training_step=step)
    model.other = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    attach(model)
    with pytest.raises(
        RuntimeError, match=r"past what the heads \['projection_head'\] .*Pass heads=.*other"
    ):
        model.training_step(batch(), 0)
    attach(recon_aux.detach(model), heads=["projection_head", "other.1"])
    assert torch.isfinite(model.training_step(batch(), 0))


class NamelessMomentum(PlainMethod):
    """With a teacher whose head has no name that tells, and frozen others of a head's shape."""

    def __init__(self, head: nn.Module, noise: float = 0) -> None:
        super().__init__()
        frozen = copy.deepcopy(head).requires_grad_(False)
        self.backbone.append(nn.Flatten()).append(frozen)
        self.projection_head, self.noise = head, noise
        self.guess = copy.deepcopy(head)
        student = {"body": self.backbone, "target": head, "guess": self.guess}
        self.teacher = copy.deepcopy(nn.ModuleDict(student)).requires_grad_(False)
        self.critic = copy.deepcopy(nn.Sequential(head, head)).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x0, x1 = batch[0]
        z0 = self.guess(self.projection_head(self.backbone(x0)))
        feature = self.teacher["body"](x1)
        feature = feature + self.noise * (torch.arange(16) >= 8)
        return (z0 - self.teacher["guess"](self.teacher["target"](feature))).square().mean()


@pytest.mark.parametrize("heads", [None, ["projection_head"]])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("partly_frozen", [False, True])
def test_a_momentum_head_of_any_name_sees_the_invariant_part(
    heads: Any, deep: bool, partly_frozen: bool
) -> None:
    losses = []
    for noise in (0.0, 1.0):
        torch.manual_seed(0)
        layers = nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)
        head = nn.Sequential(*layers) if deep else layers[0]
        layers[0].bias.requires_grad_(not partly_frozen)
        model = attach(NamelessMomentum(head, noise), heads=heads, weight=0)
        losses.append(model.training_step(batch(), 0))
        masked = [name for name, module in model.named_modules() if "forward" in vars(module)]
        assert masked == ["backbone", "projection_head", "teacher.body", "teacher.target"]
    assert torch.equal(*losses)


def test_a_momentum_head_that_is_named_is_all_there_is() -> None:
    model = attach(NamelessMomentum(nn.Linear(16, 16)), heads=["projection_head", "teacher.guess"])
    assert "forward" not in vars(model.teacher["target"])


def test_a_frozen_module_like_a_head_without_a_momentum_encoder_is_none() -> None:
    model = plain_method()
    model.projection_head = nn.Linear(16, 16)
    model.whiten = nn.Linear(16, 16).requires_grad_(False)
    attach(model)
    assert "forward" not in vars(model.whiten)


def test_a_head_within_the_encoder_is_named() -> None:
    model = plain_method()
    model.student = nn.ModuleDict({"body": model.backbone, "head": model.projection_head})
    del model.backbone, model.projection_head
    with pytest.raises(ValueError, match=r"got SimCLRProjectionHead within a ModuleDict; backbone"):
        attach(model, heads=["student.head"])


@pytest.mark.parametrize("exchanged", [False, True])
def test_a_step_past_the_attached_one_is_noticed(exchanged: bool) -> None:
    model = attach(plain_method())
    optimizer = model.configure_optimizers()

    def train() -> None:
        step = model.training_step if exchanged else partial(PlainMethod.training_step, model)
        step(batch(), 0).backward()
        optimizer.step()

    model.training_step(batch(), 0).backward()
    optimizer.step()
    if exchanged:
        model.training_step = partial(PlainMethod.training_step, model)
    # looking at what a loss would be, twice, is no training
    PlainMethod.training_step(model, batch(), 0)
    train()
    with pytest.raises(
        RuntimeError, match=r"train the head SimCLRProjectionHead, which is masked, .* past it"
    ):
        train()


def test_a_look_past_the_step_in_each_step_is_none_of_ours() -> None:
    model = attach(plain_method())
    optimizer = model.configure_optimizers()
    teacher: Any = AveragedModel(model, use_buffers=True)
    outputs = rebuilt_by(model)
    for index in range(3):
        model.training_step(batch(), index).backward()
        PlainMethod.training_step(model, batch(), index)
        optimizer.step()
        PlainMethod.training_step(model, batch(), index).backward()
        teacher.update_parameters(model)
        PlainMethod.training_step(teacher.module, batch(), index)
    assert len(outputs) == 3


def test_a_look_in_eval_mode_past_the_step_is_no_training() -> None:
    model = attach(plain_method())
    optimizer = model.configure_optimizers()
    for index in range(3):
        model.training_step(batch(), index).backward()
        optimizer.step()
        # as for saliency, in turn with updates
        model.eval()
        for _ in range(2):
            image = batch()[0][0].requires_grad_()
            model.projection_head(model.backbone(image).flatten(1)).tanh().mean().backward()
            assert image.grad is not None
            assert image.grad.any()
            optimizer.step()
        model.train()


@pytest.mark.parametrize(("begins", "is_noticed"), [(2, 3), (128, 191)])
def test_a_loss_past_the_heads_that_weighs_nothing_at_first(begins: int, is_noticed: int) -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        past = self.backbone(batch[0][0]).square().mean()
        return PlainMethod.training_step(self, batch, 0) + (batch_idx >= begins) * past

    model = attach(plain_method(training_step=step), weight=0)
    few = [x[:2] for x in batch()[0]], batch()[1][:2]
    for index in range(is_noticed):
        model.training_step(few, index)
    with pytest.raises(RuntimeError, match="past what the heads"):
        model.training_step(few, is_noticed)


def test_a_head_of_another_encoder_is_named() -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        taught = self.teacher_projection(batch[0][0].flatten(1)[:, :24])
        loss: Tensor = PlainMethod.training_step(self, batch, 0) + taught.square().mean()
        return loss

    model = plain_method(training_step=step)
    model.teacher_projection = nn.Linear(24, 8)
    with pytest.raises(ValueError, match="expected the head teacher_projection to receive"):
        attach(model).training_step(batch(), 0)


def test_a_head_that_takes_what_another_gives() -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        z0, z1 = (
            self.projector2(self.projection_head(self.backbone(x).flatten(1))) for x in batch[0]
        )
        return (z0 - z1).square().mean()

    model = plain_method(training_step=step)
    model.projection_head, model.projector2 = nn.Linear(16, 16), nn.Linear(16, 8)
    with pytest.raises(
        RuntimeError, match=r"of \['projection_head', 'projector2'\] one takes what another gives"
    ):
        attach(model).training_step(batch(), 0)
    attach(recon_aux.detach(model), heads=["projection_head"])
    assert torch.isfinite(model.training_step(batch(), 0))


def test_an_encoder_that_is_never_called() -> None:
    model = plain_method(
        training_step=lambda self, batch, i: self.projection_head.layers[0].weight.sum()
    )
    attach(model)
    with pytest.raises(
        RuntimeError, match=r"forward of the encoder backbone .*0 calls, .*backbone="
    ):
        model.training_step(batch(), 0)


def test_an_encoder_that_is_only_called_without_gradient() -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            y = self.backbone(batch[0][0]).flatten(1)
        return self.projection_head(y).mean()

    model = attach(plain_method(training_step=step))
    with pytest.raises(RuntimeError, match="saw 1 calls, none of which trains it"):
        model.training_step(batch(), 0)


def test_a_method_with_one_view() -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        return self.projection_head(self.backbone(batch[0][0]).flatten(1)).mean()

    model = attach(plain_method(training_step=step))
    with pytest.raises(
        RuntimeError, match=r"expected two views.*\(8, 3, 32, 32\).*Encode the other"
    ):
        model.training_step(batch(), 0)


def concatenating(count: int) -> Any:
    """A step that encodes ``count`` views in one call."""

    def step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        views = batch.views if hasattr(batch, "views") else batch[0]
        z = self.projection_head(self.backbone(torch.cat(views)).flatten(1))
        return torch.stack(z.chunk(count)).var(0).mean()

    return step


def test_three_concatenated_views_are_cut_where_they_were_joined() -> None:
    model = attach(plain_method(training_step=concatenating(3)))
    model.backbone.eval()
    seen = rebuilt_from(model)
    views, labels = batch()
    model.training_step(([*views, views[0] / 2], labels), 0)
    ((found, features),) = seen
    assert all(torch.equal(a, b) for a, b in zip(found, views, strict=True))
    for feature, view in zip(features, views, strict=True):
        torch.testing.assert_close(feature, model.backbone(view).flatten(1))


def test_labels_alone_show_how_many_images_a_view_has() -> None:
    class Hidden:
        views = batch()[0]

        def __len__(self) -> int:
            return 2

    def step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        return concatenating(2)(self, batch[0], batch_idx)

    model = attach(plain_method(training_step=step))
    seen = rebuilt_from(model)
    model.training_step((Hidden(), torch.arange(8)), 0)
    assert all(torch.equal(a, b) for a, b in zip(seen[0][0], Hidden.views, strict=True))


def test_images_show_how_many_a_view_has_whatever_there_are_of_other_numbers() -> None:
    model = attach(plain_method(training_step=concatenating(2)))
    seen = rebuilt_from(model)
    views, labels = batch()
    model.training_step((views, labels[:4], labels.repeat(2)), 0)
    assert all(torch.equal(a, b) for a, b in zip(seen[0][0], views, strict=True))


def test_a_batch_that_does_not_show_its_views_needs_to_be_told() -> None:
    class Opaque:
        views = batch()[0]

    model = attach(plain_method(training_step=concatenating(2)))
    with pytest.raises(
        RuntimeError, match=r"expected two views.*number \[\].*pass views= how many"
    ):
        model.training_step(Opaque(), 0)
    attach(recon_aux.detach(model), views=2).training_step(Opaque(), 0)


def test_stacked_views_of_which_one_is_encoded_are_not_taken_for_two() -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        return self.projection_head(self.backbone(batch[0][0]).flatten(1)).mean()

    model = attach(plain_method(training_step=step))
    views, labels = batch()
    for given in ((torch.stack(views), labels), (torch.stack(views),)):
        with pytest.raises(RuntimeError, match="expected two views"):
            model.training_step(given, 0)


def test_a_failed_attach_leaves_the_model_as_it_was() -> None:
    model = plain_method()
    keys = list(model.state_dict())
    for options in ({"heads": ["typo"]}, {"weight": -1.0}, {"image_channels": 5}):
        with pytest.raises(ValueError, match="expected"):
            attach(model, **options)
        assert list(model.state_dict()) == keys
        assert not hooked(model)


def test_switched_off_nothing_is_computed_or_logged() -> None:
    logged: list[Any] = []
    trainer = SimpleNamespace(training=True)
    model = attach(plain_method(log=lambda *a, **k: logged.append(a), trainer=trainer), weight=0)
    outputs = rebuilt_by(model)
    assert torch.isfinite(model.training_step(batch(), 0))
    assert logged == outputs == []


def test_a_weight_given_after_it_was_built_without_is_not_ignored() -> None:
    model = attach(plain_method(), weight=0)
    model.recon_aux.weight = 4.0
    with pytest.raises(ValueError, match=r"weight to stay 0.*build with a positive weight="):
        model.training_step(batch(), 0)


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_the_weight_multiplies_the_terms_once(weight: float) -> None:
    method, both = (attach(plain_method(), weight=each, seed=0) for each in (0.0, weight))
    both.load_state_dict({**both.state_dict(), **bare_state(method)})
    outputs = rebuilt_by(both)
    alone, total = (model.training_step(batch(), 0) for model in (method, both))
    (output,) = outputs
    terms = (
        output.reconstruction_loss
        + 4 * output.registration_loss
        + 8 * output.statistics_loss
        + 16 * output.edges_loss
    )
    torch.testing.assert_close(total - alone, weight * terms)


@pytest.mark.parametrize("in_training", [True, False])
def test_the_loss_is_logged_before_the_weight_with_the_batchs_size(in_training: bool) -> None:
    logged: list[Any] = []

    def log(self: Any, name: str, value: Tensor, *, batch_size: int) -> None:
        logged.append((name, value, batch_size))

    trainer = SimpleNamespace(training=in_training)
    model = attach(plain_method(log=log, trainer=trainer), weight=3.0)
    outputs = rebuilt_by(model)
    model.training_step(batch(), 0)
    assert not any(value.requires_grad or size != 8 for _, value, size in logged)
    values = {name: value for name, value, _ in logged}
    assert len(values) == len(logged)
    assert ("recon_aux/loss" in values) == in_training
    if in_training:
        torch.testing.assert_close(values["recon_aux/loss"], outputs[0].loss.detach() / 3)


def test_a_weight_can_be_ramped_from_zero() -> None:
    model = attach(plain_method(), weight=1.0)
    model.recon_aux.weight = 0.0
    model.training_step(batch(), 0).backward()
    assert not model.recon_aux.decoder.queries.grad.any()
    model.recon_aux.weight = 0.5
    model.training_step(batch(), 0).backward()
    assert model.recon_aux.decoder.queries.grad.any()


def test_the_decoder_trains_where_most_of_the_encoder_does() -> None:
    def configure(self: Any) -> Any:
        stem, *rest = self.backbone.parameters()
        groups = [{"params": [stem], "lr": 1e-6}, {"params": rest, "lr": 1e-3}]
        return torch.optim.AdamW([*groups, {"params": self.projection_head.parameters()}])

    model = attach(plain_method(configure_optimizers=configure))
    groups = model.configure_optimizers().param_groups
    queries = model.recon_aux.decoder.queries
    assert [group["lr"] for group in groups if any(p is queries for p in group["params"])] == [1e-3]


def test_where_names_mislead_the_decoder_trains_with_the_encoder_that_does() -> None:
    def configure(self: Any) -> Any:
        heads = [*self.projection_head.parameters(), *self.largest.parameters()]
        groups = [{"params": heads, "lr": 1e-1}, {"params": self.online.parameters()}]
        return torch.optim.AdamW(groups, lr=1e-3)

    model = plain_method(configure_optimizers=configure)
    # the backbone is a teacher that could be trained
    model.online, model.largest = copy.deepcopy(model.backbone), nn.Linear(512, 512)
    groups = attach(model).configure_optimizers().param_groups
    its = {id(p) for p in model.recon_aux.parameters()}
    assert [sum(id(p) in its for p in group["params"]) for group in groups] == [0, len(its)]


def test_views_of_different_batch_size() -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        x0, x1 = batch[0]
        y0, y1 = (self.projection_head(self.backbone(x).flatten(1)) for x in (x0, x1[:5]))
        return y0.mean() + y1.mean()

    model = attach(plain_method(training_step=step))
    with pytest.raises(RuntimeError, match=r"saw calls .*\(8, .*\(5, .*two views of one size"):
        model.training_step(batch(), 0)


def test_manual_optimization() -> None:
    with pytest.raises(TypeError, match="automatic_optimization=False"):
        attach(plain_method(automatic_optimization=False))
    model = attach(plain_method())
    model.automatic_optimization = False
    with pytest.raises(TypeError, match="automatic_optimization=False"):
        model.training_step(batch(), 0)


def test_a_method_of_any_name_may_return_the_loss() -> None:
    def losses(self: Any, batch: Any) -> Any:
        return {"loss": PlainMethod.training_step(self, batch, 0)}

    def by_hand(self: Any, batch: Any, batch_idx: int) -> Any:
        losses = self.losses(batch)
        losses["loss"].backward()
        return losses

    model = attach(
        plain_method(training_step=by_hand, losses=losses, automatic_optimization=False),
        step_method="losses",
    )
    outputs = rebuilt_by(model)
    loss = model.training_step(batch(), 0)["loss"]
    assert model.recon_aux.decoder.queries.grad.any()
    assert len(outputs) == 1
    assert loss > outputs[0].loss > 0
    # used for inference, it is the method's alone
    model.eval().losses(batch())
    assert len(outputs) == 1


def test_a_step_that_is_skipped_passes_through() -> None:
    model = attach(plain_method(training_step=lambda self, batch, batch_idx: None))
    assert model.training_step(batch(), 0) is None


def test_what_else_a_step_returns_stays_in_it() -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.own = {"loss": PlainMethod.training_step(self, batch, 0), "size": len(batch[1])}
        return self.own

    model = attach(plain_method(training_step=step))
    result = model.training_step(batch(), 0)
    assert result.keys() == {"loss", "size"}
    assert result["size"] == 8
    # the model's own dict keeps the method's own loss
    assert result["loss"] > model.own["loss"] + 1
    result["loss"].backward()
    assert model.recon_aux.decoder.queries.grad.any()


def test_a_first_step_whose_loss_trains_nothing_leaves_the_checks_to_the_next() -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        features = [self.neck(self.backbone(x).flatten(1)) for x in batch[0]]
        z0, z1 = (self.projection_head(y) for y in features)
        loss = (z0 - z1).square().mean()
        return loss if batch_idx else loss.detach()

    model = plain_method(training_step=step)
    model.neck = nn.Linear(16, 16)
    attach(model)
    model.training_step(batch(), 0)
    with pytest.raises(RuntimeError, match="mixed into what the heads"):
        model.training_step(batch(), 1)


def test_a_model_that_only_has_a_training_step_is_trained_in_a_loop() -> None:
    for setting in ("decoder_lr", "decoder_weight_decay"):
        with pytest.raises(ValueError, match="for a model that configures its optimizers, got Pl"):
            attach(plain_method(configure_optimizers=None), **{setting: 0.1})
    model = attach(plain_method(configure_optimizers=None))
    loss = recon_aux.add_loss(model, model.training_step(batch(), 0))
    loss.backward()
    assert model.recon_aux.decoder.queries.grad.any()


def test_a_step_that_returns_something_else() -> None:
    model = attach(plain_method(training_step=lambda self, batch, batch_idx: {"total": 1}))
    with pytest.raises(TypeError, match=r"a dict with 'loss'.*got \['total'\]"):
        model.training_step(batch(), 0)


def test_no_optimizer() -> None:
    model = attach(plain_method(configure_optimizers=lambda self: None))
    with pytest.raises(ValueError, match="expected configure_optimizers to return an optimizer"):
        model.configure_optimizers()


def test_a_split_that_leaves_the_method_nothing() -> None:
    with pytest.raises(ValueError, match="equivariant_dim below the feature's 16 channels, got 16"):
        attach(plain_method(), equivariant_dim=16, context="equivariant")
    with pytest.raises(ValueError, match=r"equivariant_dim from 0 to .*16 channels, got 17"):
        attach(plain_method(), equivariant_dim=17)


def test_a_loss_that_is_not_finite() -> None:
    model = attach(plain_method())
    views, labels = batch()
    views[1][0, 0, 0, 0] = float("inf")
    model.backbone.eval()
    model.backbone.register_forward_hook(lambda *call: call[2].nan_to_num(0, 0, 0))
    with pytest.raises(FloatingPointError, match="expected a finite loss of the task"):
        for _ in range(2):
            model.training_step((views, labels), 0)


def test_detaching_waits_for_a_late_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    late = inside.send_late(monkeypatch)
    model = attach(plain_method())
    model.backbone.eval()
    model.backbone.register_forward_hook(lambda *call: call[2].nan_to_num(0, 0, 0))
    views, labels = batch()
    views[0][0, 0, 0, 0] = float("inf")
    model.training_step((views, labels), 0)
    with pytest.raises(FloatingPointError, match="expected a finite loss of the task"):
        recon_aux.detach(model)
    assert [loss.arrived for loss in late] == [True]
    assert not recon_aux.is_attached(model)
    assert not hooked(model)
    assert not hasattr(model, "recon_aux")


def test_an_encoder_that_returns_no_tensor() -> None:
    model = plain_method()
    model.backbone = InADict()
    with pytest.raises(TypeError, match=r"pooled.*tensor \(1, 16, 1, 1\).*features="):
        attach(model)
    attach(model, features=lambda output: output["pooled"])
    assert model.recon_aux.splitter.feature_dim == 16


def test_an_encoder_that_accepts_one_size_alone() -> None:
    model = plain_method()
    model.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16))
    with pytest.raises(ValueError, match=r"takes images \(1, 3, 64, 64\), but .*image_size="):
        attach(model)
    attach(model, image_size=32).training_step(batch(), 0)
    # what is given goes before what the encoder says, by either name
    for name in ("img_size", "image_size"):
        for said, options in ((32, {}), ((32, 32), {}), (64, {"image_size": 32})):
            recon_aux.detach(model)
            setattr(model.backbone, name, said)
            attach(model, **options)
            assert model.recon_aux.splitter.feature_dim == 16
            delattr(model.backbone, name)


def test_an_encoder_in_double_precision_is_attached() -> None:
    model = attach(plain_method().double())
    views, labels = batch()
    model.training_step(([view.double() for view in views], labels), 0).backward()
    assert model.backbone[0].weight.grad.dtype == torch.float64
    assert model.recon_aux.decoder.queries.grad.any()


def test_an_encoder_without_convolutions_takes_the_channels_that_are_given() -> None:
    model = plain_method()
    model.backbone = nn.Sequential(nn.Flatten(), nn.Linear(5 * 32 * 32, 16))
    attach(model, image_channels=5, image_size=32)
    assert model.recon_aux.image_channels == 5
    model.training_step(batch(channels=5), 0).backward()
    assert model.recon_aux.decoder.queries.grad.any()


def test_an_encoder_of_images_that_are_not_square() -> None:
    views, labels = [torch.rand(4, 3, 32, 64) for _ in range(2)], torch.arange(4)
    model = plain_method()
    model.backbone = nn.Sequential(WideImages(), nn.Flatten(), nn.Linear(3 * 32 * 64, 16))
    models = [attach(model, image_size=(32, 64))]
    # timm's say which they take
    model = plain_method()
    model.backbone = tiny_vit(img_size=(32, 64))
    model.projection_head = SimCLRProjectionHead(48, 32, 16)
    models.append(attach(model))
    for model in models:
        seen = rebuilt_from(model)
        model.training_step((views, labels), 0)
        assert all(torch.equal(a, b) for a, b in zip(seen[0][0], views, strict=True))


class WideImages(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-2:] == (32, 64)
        return x


def test_a_missing_framework_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".", maxsplit=1)[0] in ("lightly", "kornia"):
            raise ImportError(f"No module named {name!r}", name=name.split(".", maxsplit=1)[0])
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for module, extra in (("integrations.lightly", "lightly"), ("probe", "probe")):
        monkeypatch.delitem(sys.modules, f"recon_aux.{module}", raising=False)
        with pytest.raises(ImportError, match=rf"pip install '\.\[{extra}\]'"):
            importlib.import_module(f"recon_aux.{module}")


def test_the_blank_image_leaves_no_trace() -> None:
    model = plain_method()
    model.backbone = nn.Sequential(tiny_encoder(channels=13, dropout=0.5), nn.Dropout())
    # but for the convolution that is, all are in training: the batch norm, too
    model.backbone[0][4].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    attach(model)
    shape = model.recon_aux.image_channels, model.recon_aux.splitter.feature_dim
    assert (*shape, model.recon_aux.decoder.spatial) == (13, 16, False)
    recon_aux.detach(model)
    assert [module.training for module in model.modules()] == modes
    assert_same(model.state_dict(), before)
    model.backbone.append(RandomlyShifted())
    attach(model)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("weight", ["auto", 1.0])
def test_a_step_leaves_the_random_state_alone(weight: Any) -> None:
    model = attach(Siamese(), weight=weight, reconstruct="random")
    state = torch.random.get_rng_state()
    for step in range(3):
        model.training_step(batch(), step).backward()
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_blank_image_leaves_no_trace_in_a_head_that_the_encoder_runs() -> None:
    head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 8))

    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_encoder()

        def forward(self, x: Tensor) -> Tensor:
            feature: Tensor = self.net(x).flatten(1)
            self.projected = [head(feature)]
            return feature

    model = plain_method()
    model.backbone, model.projection_head = Running(), head
    before = copy.deepcopy(model.state_dict())
    attach(model)
    assert all(module.training for module in head.modules())
    assert_same(recon_aux.detach(model).state_dict(), before)


class RandomlyShifted(nn.Module):
    def forward(self, feature: Tensor) -> Tensor:
        return feature + torch.rand(1)


def masked_head(*shape: int) -> Any:
    """A head that gives back what it sees, next to an encoder of such features."""

    class Given(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), *shape)

    model = nn.ModuleDict({"backbone": Given(), "projection_head": nn.Identity()})
    given: Any = {"backbone": "backbone", "heads": ["projection_head"], "equivariant_dim": 2}
    # a map of such a shape doesn't show which of its dimensions are positions
    given["features"] = lambda output: output
    return recon_aux.attach(model, **given)["projection_head"]


@pytest.mark.parametrize(
    ("shape", "encoded"),
    [
        ((4, 6), (6,)),
        ((4, 6, 2, 3), (6, 2, 3)),
        ((4, 5, 6), (5, 6)),
        ((4, 36), (6, 2, 3)),
        ((4, 2, 3, 6), (6, 2, 3)),
        # as many positions as channels
        ((4, 6, 2, 6), (6, 2, 6)),
        ((4, 6, 6), (6, 6)),
    ],
)
def test_a_masked_head_computes_what_a_narrower_one_would(
    shape: tuple[int, ...], encoded: tuple[int, ...]
) -> None:
    feature = torch.rand(shape, requires_grad=True)
    masked = masked_head(*encoded)(feature)
    masked.sum().backward()
    dim = 2 if len(shape) == 3 else shape.index(6) if 6 in shape else 1
    width = 2 * (shape[dim] // 6)
    kept = shape[dim] - width
    assert torch.equal(masked.narrow(dim, 0, kept), feature.narrow(dim, 0, kept))
    assert not masked.narrow(dim, kept, width).any()
    assert feature.grad is not None
    assert not feature.grad.narrow(dim, kept, width).any()


@pytest.mark.parametrize("shape", [(4, 6, 2, 3), (4, 5, 6)])
def test_a_flattened_feature_loses_the_channels_that_it_would(shape: tuple[int, ...]) -> None:
    feature = torch.rand(shape)
    head = masked_head(*shape[1:])
    assert torch.equal(head(feature.flatten(1)), head(feature).flatten(1))


def test_a_head_that_does_not_take_the_feature_is_named() -> None:
    for width in (7, 12):  # a pooled feature is never twice as wide as itself
        message = rf"head projection_head to receive .*6 channels, got \(4, {width}\)"
        with pytest.raises(ValueError, match=message):
            masked_head(6)(torch.rand(4, width))


def test_methods_of_the_instance_come_back() -> None:
    model = plain_method()

    def own(batch: Any, batch_idx: int) -> Tensor:
        return PlainMethod.training_step(model, batch, batch_idx)

    model.training_step = own
    attach(model).training_step(batch(), 0)
    assert recon_aux.detach(model).training_step is own


def test_a_method_that_others_hold_is_the_models_own_after_detaching() -> None:
    model = attach(plain_method())
    model.backbone.held = model.backbone.forward
    held = model.training_step
    recon_aux.detach(nn.DataParallel(model))
    torch.manual_seed(0)
    assert torch.isfinite(held(batch(), 0))
    assert torch.equal(*(call(batch()[0][0]) for call in (model.backbone.held, model.backbone)))


def test_detaching_takes_off_a_hook_behind_another() -> None:
    model = attach(plain_method())
    MethodHook(model, "configure_optimizers", lambda module, call, args, kw: call(*args, **kw))
    assert not hooked(recon_aux.detach(model))


@pytest.mark.parametrize("size", [(16, 16), (8, 48)])
def test_multi_crop_rebuilds_the_large_views(size: tuple[int, int]) -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        x0, x1 = batch[0]
        small = torch.rand(2, 8, 3, *size)
        images = small[0], x0, x1, small[1]
        z = [self.projection_head(self.backbone(x).flatten(1)) for x in images]
        return torch.stack(z).var(0).mean()

    model = attach(plain_method(training_step=step))
    seen = rebuilt_from(model)
    views, labels = batch()
    model.training_step((views, labels), 0)
    assert all(torch.equal(a, b) for a, b in zip(seen[0][0], views, strict=True))


def test_images_that_are_encoded_twice_are_one_view() -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        x0, x1 = batch[0]
        self.features = [self.backbone(x).flatten(1) for x in (x0, x0, x1)]
        return torch.stack([self.projection_head(y) for y in self.features]).var(0).mean()

    model = plain_method(training_step=step)
    model.backbone = tiny_encoder(dropout=0.5)
    attach(model)
    seen = rebuilt_from(model)
    views, labels = batch()
    model.training_step((views, labels), 0)
    ((found, features),) = seen
    assert all(torch.equal(a, b) for a, b in zip(found, views, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(features, model.features[::2], strict=True))
    assert not torch.equal(*model.features[:2])


def test_a_feature_may_be_made_of_the_output() -> None:
    """By the method and by ``features=``: two tensors, which both depend on what is in there."""

    class OfADict(Siamese):
        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.projection_head(self.backbone(x)["pooled"][..., 0, 0])
            return z

    model = attach(OfADict(InADict()), features=lambda output: output["pooled"][..., 0, 0])
    seen = rebuilt_from(model)
    model.training_step(([*torch.rand(2, 4, 3, 32, 32)], torch.arange(4)), 0).backward()
    assert [feature.shape for feature in seen[0][1]] == [(4, 16)] * 2
    assert all(p.grad is not None for p in model.backbone.parameters())


def test_a_feature_is_told_from_what_else_an_encoder_returns_with_gradient() -> None:
    class Classifying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.classifier = tiny_encoder(), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"classes": self.classifier(x.mean((2, 3))), "pooled": self.net(x)}

    class OfADict(Siamese):
        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.projection_head(self.backbone(x)["pooled"].flatten(1))
            return z

    model = attach(OfADict(Classifying()), features=lambda output: output["pooled"].flatten(1))
    for step in range(2):
        model.training_step(batch(), step).backward()
        assert model.backbone.net[0].weight.grad.any()


def test_channels_past_the_heads_are_seen_through_features_too() -> None:
    class Past(Siamese):
        def forward(self, x: Tensor) -> Tensor:
            pooled = self.backbone(x)["pooled"]
            z: Tensor = self.projection_head(pooled[..., 0, 0]) + pooled.mean()
            return z

    model = attach(Past(InADict()), features=lambda output: output["pooled"][..., 0, 0])
    with pytest.raises(RuntimeError, match="past what the heads"):
        model.training_step(([*torch.rand(2, 4, 3, 32, 32)], torch.arange(4)), 0)


def test_a_warm_up_of_the_heads_by_detaching_is_told_how_to_be_one() -> None:
    class Warm(Siamese):
        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.projection_head(self.backbone(x).flatten(1).detach())
            return z

    with pytest.raises(RuntimeError, match=r"warm-up of the heads needs encoder\.requires_grad_"):
        attach(Warm()).training_step(([*torch.rand(2, 4, 3, 32, 32)], torch.arange(4)), 0)


@pytest.mark.parametrize("wrap", [torch.compile, lambda loss: nn.ModuleDict({"ssl": loss})])
def test_the_weight_is_the_losss_wherever_it_stands(wrap: Any) -> None:
    model = Siamese()
    model.criterion = wrap(model.criterion)
    assert attach(model).recon_aux.weight == 0.2
