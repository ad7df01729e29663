"""The weight that is set by what the losses' gradients are."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import recon_aux
from helpers.data import batch
from helpers.methods import METHODS, Masked, Method
from helpers.models import InALoop, Siamese, siamese_loss
from helpers.training import fit
from recon_aux.integrations import lightly

attach = partial(lightly.attach, weight="auto")

# of a loss, which then pulls more strongly than the task
STRONG = 1e4

BATCH = batch(side=16)
VIEWS = BATCH[0]


class Scaled(Siamese):
    """The same loss in other units, under a name that nothing was measured of."""

    def __init__(self, by: float = STRONG) -> None:
        super().__init__()
        self.criterion = UnknownLoss()
        self.by = by

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.by * super().training_step(batch, batch_idx)


class UnknownLoss(torch.nn.Module):
    def forward(self, p: Tensor, z: Tensor) -> Tensor:
        return -torch.nn.functional.cosine_similarity(p, z).mean()


def two_steps(model: Any) -> Any:
    """Train for two steps; in the second the weight is set."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    given = model.batch()
    for index in range(2):
        optimizer.zero_grad()
        model.training_step(given, index).backward()
        optimizer.step()
    return model


def gradient_norms(model: Any, batch: Any) -> tuple[float, float]:
    """Of the method's loss and of the task's, on the features, by hand."""
    features: list[Tensor] = []
    model.backbone.register_forward_hook(lambda _, __, y: features.append(y))
    both = model.training_step(batch, 0)
    model.recon_aux.weight = 0.0
    alone = model.training_step(batch, 0)
    assert not torch.equal(alone, both)
    whole = torch.autograd.grad(both, features[:2], retain_graph=True)
    bare = torch.autograd.grad(alone, features[2:])
    task = [y - x for x, y in zip(bare, whole, strict=True)]
    norms = [torch.cat([g.flatten() for g in some]).norm().item() for some in (bare, task)]
    return norms[0], norms[1]


def test_the_task_pulls_twice_as_strongly_as_the_methods_loss() -> None:
    # a step that sets no weight leaves the choice of view as it was
    given = attach(Scaled(), weight=1.0, reconstruct="both")
    method, task = gradient_norms(given, BATCH)
    model = attach(Scaled(), reconstruct="both")
    for index in range(2):
        assert model.recon_aux.weight == 1.0
        model.training_step(BATCH, index).backward()
    model.training_step(BATCH, 2)
    assert model.recon_aux.weight == pytest.approx(2 * method / task, rel=0.05)


@pytest.mark.parametrize("by", [30.0, 1e3])
def test_the_weight_follows_a_strong_losss_units(by: float) -> None:
    weights = []
    for scale in (1.0, by):
        model = attach(Scaled(STRONG * scale), seed=0)
        fit(model, max_steps=2)
        weights.append(model.recon_aux.weight)
    assert weights[1] == pytest.approx(by * weights[0], rel=0.06)
    assert weights[0] > 1


def test_next_to_a_weak_loss_it_is_one() -> None:
    model = attach(Scaled(1e-3))
    fit(model, max_steps=2)
    assert model.recon_aux.weight == 1
    # once set it stays, whatever comes
    model.by = STRONG
    fit(model, max_steps=2)
    assert model.recon_aux.weight == 1


def test_it_is_the_default_for_what_was_not_measured() -> None:
    loop: Any = InALoop()
    assert lightly.attach(Siamese()).recon_aux.options["weight"] == 0.2
    assert lightly.attach(Scaled()).recon_aux.options["weight"] == "auto"
    heads = [loop.projection_head]
    recon_aux.attach(loop, backbone="backbone", heads=heads)
    assert loop.recon_aux.options["weight"] == "auto"


def test_it_is_logged() -> None:
    model = attach(Scaled())
    trained = fit(model, max_steps=3)
    told = trained.callback_metrics["recon_aux/weight"]
    assert told == pytest.approx(model.recon_aux.weight)
    assert f"weight={told:.3g}" in str(model.recon_aux).splitlines()[1]
    assert model.recon_aux.options["weight"] == "auto"


def gradients_on_views(method: type[Method], **options: Any) -> list[Tensor]:
    """Of the first step's loss, on the rows of the encoder's outputs that are of the two views."""
    torch.manual_seed(0)
    model: Any = method()
    encoder = model.get_submodule(model.trained)
    called = "encode" if isinstance(model, Masked) else "forward"
    call, outputs, images = getattr(encoder, called), [], []

    def note(image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = call(image, *args, **kwargs)
        if output.requires_grad:
            outputs.append(output)
            images.append(image)
        return output

    setattr(encoder, called, note)
    loss = attach(model, seed=0, **options).training_step(given := model.batch(), 0)
    gradients = torch.autograd.grad(loss, outputs)
    views = model.expected(given)
    rows = []
    for image, gradient in zip(images, gradients, strict=True):
        # several may be concatenated in one call
        parts = zip(image.split(len(views[0])), gradient.split(len(views[0])), strict=True)
        rows += [g for x, g in parts if any(x.shape == v.shape and x.equal(v) for v in views)]
    return rows


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
@pytest.mark.parametrize("options", [{}, {"equivariant_dim": 0}], ids=["split", "whole"])
def test_it_is_set_for_every_shape_of_method(method: type[Method], options: dict[str, Any]) -> None:
    alone, both = (gradients_on_views(method, weight=w, **options) for w in (0.0, 1.0))
    task = [y - x for x, y in zip(alone, both, strict=True)]
    bare, its = (torch.cat([g.flatten() for g in some]).norm().item() for some in (alone, task))
    torch.manual_seed(0)
    model: Any = method()
    step = model.training_step
    model.training_step = lambda *given: STRONG * step(*given)
    weight = two_steps(attach(model, seed=0, **options)).recon_aux.weight
    assert weight == pytest.approx(2 * STRONG * bare / its, rel=0.06)
    assert weight > 1


def test_until_then_the_encoder_trains_as_without_the_task() -> None:
    def gradients(weight: Any) -> dict[str, Tensor | None]:
        model = attach(Scaled(), weight=weight, seed=0)
        model.training_step(BATCH, 0).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    found, off, one = (gradients(weight) for weight in ("auto", 0.0, 1.0))
    for name, gradient in found.items():
        assert gradient is not None
        expected = one[name] if name.startswith("recon_aux.") else off[name]
        assert expected is not None
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0, msg=name)


def test_where_the_methods_gradient_cannot_be_seen_it_says_so() -> None:
    torch._dynamo.reset()
    model = attach(InALoop(), seed=0)
    called = torch.compile(model, backend="aot_eager")
    views = VIEWS
    with pytest.warns(UserWarning, match=r"compiled together; the weight stays 1. Pass weight="):
        loss = recon_aux.add_loss(model, STRONG * siamese_loss(*(called(view) for view in views)))
    # and the encoder is trained by the task at once
    (gradient,) = torch.autograd.grad(loss, model.backbone[0].weight)
    torch._dynamo.reset()
    for _ in range(2):
        seen = STRONG * siamese_loss(*(model(view) for view in VIEWS))
        recon_aux.add_loss(model, seen).backward()
        assert model.recon_aux.weight == 1.0
    other = attach(InALoop(), weight=1.0, seed=0)
    loss = recon_aux.add_loss(other, STRONG * siamese_loss(*(other(view) for view in VIEWS)))
    (expected,) = torch.autograd.grad(loss, other.backbone[0].weight)
    torch.testing.assert_close(gradient, expected)


def test_with_the_encoder_alone_compiled_it_is_seen() -> None:
    torch._dynamo.reset()
    weights = []
    for compiled in (False, True):
        model = attach(InALoop(), seed=0)
        if compiled:
            model.backbone.compile(backend="aot_eager")
        for _ in range(2):
            loss = STRONG * siamese_loss(*(model(view) for view in VIEWS))
            recon_aux.add_loss(model, loss).backward()
        weights.append(model.recon_aux.weight)
    assert weights[1] == pytest.approx(weights[0], rel=0.05)
    assert weights[0] > 1


def test_steps_whose_backward_pass_comes_late_set_nothing() -> None:
    model = attach(InALoop(), seed=0)
    losses = [
        recon_aux.add_loss(model, STRONG * siamese_loss(*(model(x) for x in VIEWS)))
        for _ in range(5)
    ]
    assert model.recon_aux.weight == 1.0
    torch.stack(losses).sum().backward()
    recon_aux.add_loss(model, siamese_loss(*(model(view) for view in VIEWS)))
    assert model.recon_aux.weight > 1


def test_what_is_due_again_is_measured_again() -> None:
    weights = []
    model = attach(Scaled(), seed=0)
    bare = copy.deepcopy(model.state_dict())
    for scale in (1.0, 100.0):
        model.load_state_dict(bare)
        model.by = STRONG * scale
        for index in range(2):
            model.training_step(BATCH, index).backward()
        weights.append(model.recon_aux.weight)
    assert weights[1] == pytest.approx(100 * weights[0], rel=0.06)


def test_the_views_alone_are_compared_however_they_are_encoded() -> None:
    def trained(*, at_once: bool) -> float:
        model = attach(InALoop(), seed=0)
        views = [view.roll(shift, -1) for shift in (0, 5) for view in VIEWS]
        together = torch.cat(views)
        for _ in range(2):
            z = model(together).chunk(4) if at_once else [model(view) for view in views]
            loss = siamese_loss(*z[:2]) + siamese_loss(*z[2:])
            recon_aux.add_loss(model, STRONG * loss, views).backward()
        return float(model.recon_aux.weight)

    assert 1 < trained(at_once=True) == pytest.approx(trained(at_once=False), rel=0.05)


@pytest.mark.parametrize("strong", [0, 1])
def test_a_loss_on_other_rows_does_not_count(strong: int) -> None:
    def measured(by: float) -> float:
        model = attach(InALoop(), seed=0)
        views = [view.roll(shift, -1) for shift in (0, 5) for view in VIEWS]
        for _ in range(2):
            z = model(torch.cat(views)).chunk(4)
            losses = [siamese_loss(*z[:2]), siamese_loss(*z[2:])]
            losses[strong] = by * losses[strong]
            recon_aux.add_loss(model, STRONG * (losses[0] + losses[1]), views).backward()
        return float(model.recon_aux.weight)

    # the views are the first two, whatever is made of the others
    assert measured(50.0) == pytest.approx((50 if strong == 0 else 1) * measured(1.0), rel=0.06)


@pytest.mark.parametrize("weight", [torch.tensor(0.5), numpy.float32(0.5)])
def test_a_weight_may_be_set_by_any_number(weight: Any) -> None:
    model = attach(Scaled())
    model.recon_aux.weight = weight
    again = attach(Scaled())
    again.load_state_dict(model.state_dict())
    assert again.recon_aux.weight == 0.5


def test_a_measured_weight_gives_way_to_a_loaded_one() -> None:
    one, other = (attach(Scaled(STRONG * by), seed=0) for by in (1.0, 50.0))
    for model in (one, other):
        fit(model, max_steps=2)
    assert one.recon_aux.weight != other.recon_aux.weight
    one.load_state_dict(other.state_dict())
    assert one.recon_aux.weight == other.recon_aux.weight
    one.load_state_dict(attach(Scaled(), seed=0).state_dict())
    assert one.recon_aux.weight == 1.0
    fit(one, max_steps=2)
    assert one.recon_aux.weight > 1.0


def test_a_checkpoint_of_a_given_weight_goes_on_with_it() -> None:
    model = attach(Scaled())
    with pytest.warns(UserWarning, match="weight=2.0, not 'auto'"):
        model.load_state_dict(attach(Scaled(), weight=2.0).state_dict())
    fit(model, max_steps=2)
    assert model.recon_aux.weight == 2.0


def test_a_weight_that_is_given_since_stays() -> None:
    model = attach(Scaled())
    model.recon_aux.weight = 0.7
    fit(model, max_steps=3)
    assert model.recon_aux.weight == 0.7
    # also over one that was measured, here or elsewhere
    other = attach(Scaled())
    fit(other, max_steps=2)
    model.load_state_dict(other.state_dict())
    assert model.recon_aux.weight == 0.7
    other.recon_aux.weight = 0.7
    assert other.recon_aux.weight == 0.7
    fit(other, max_steps=2)
    assert other.recon_aux.weight == 0.7


def test_it_is_saved_and_a_resumed_run_goes_on_with_it(tmp_path: Any) -> None:
    whole, half = attach(Scaled(10.0), seed=0), attach(Scaled(10.0), seed=0)
    fit(whole, max_steps=4)
    begun = fit(half, max_steps=2, max_epochs=4)
    begun.save_checkpoint(tmp_path / "half.ckpt")
    again = attach(Scaled(10.0), seed=0)
    loaded = torch.load(tmp_path / "half.ckpt", weights_only=False)
    again.load_state_dict(loaded["state_dict"])
    assert again.recon_aux.weight == half.recon_aux.weight == whole.recon_aux.weight
    fit(again, max_steps=3)
    assert again.recon_aux.weight == half.recon_aux.weight
    with pytest.warns(UserWarning, match="weight='auto', not 2.0"):
        attach(Scaled(), weight=2.0).load_state_dict(half.state_dict())


def test_in_a_loop_of_ones_own_micro_batches_too() -> None:
    def trained(parts: int) -> Any:
        model = attach(InALoop(), seed=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            for views in zip(*(view.chunk(parts) for view in VIEWS), strict=True):
                loss = siamese_loss(*(model(view) for view in views))
                (recon_aux.add_loss(model, STRONG * loss) / parts).backward()
            optimizer.step()
        return model.recon_aux.weight

    weights = [trained(parts) for parts in (1, 2)]
    assert weights[1] == pytest.approx(weights[0], rel=0.5)
    assert 1 < weights[0] < STRONG


def test_a_copy_in_between_sets_its_own() -> None:
    model = attach(Scaled())
    model.training_step(BATCH, 0).backward()
    clone = copy.deepcopy(model)
    for each in (model, clone):
        each.training_step(BATCH, 1).backward()
        each.training_step(BATCH, 2)
    assert model.recon_aux.weight == clone.recon_aux.weight != 1.0


def test_an_overflow_under_a_loss_scaler_sets_nothing() -> None:
    model = attach(InALoop(), seed=0)
    for scale in (torch.inf, 2.0**10):
        loss = STRONG * siamese_loss(*(model(view) for view in VIEWS))
        (scale * recon_aux.add_loss(model, loss)).backward()
    assert model.recon_aux.weight == 1.0
    loss = STRONG * siamese_loss(*(model(view) for view in VIEWS))
    recon_aux.add_loss(model, loss)
    assert model.recon_aux.weight != 1.0


def test_a_loss_without_gradient_sets_nothing() -> None:
    model = attach(InALoop(), seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recon_aux.add_loss(model, siamese_loss(*(model(view) for view in VIEWS)).detach())
    assert model.recon_aux.weight_is_due


def test_gradients_in_half_precision_set_the_weight_of_single_precision() -> None:
    weights = []
    for dtype in (torch.float32, torch.float16):
        model = attach(InALoop().to(dtype), seed=0)
        for _ in range(2):
            # of squares that half precision can't hold
            loss = 300 * STRONG * siamese_loss(*(model(view.to(dtype)).float() for view in VIEWS))
            recon_aux.add_loss(model, loss).backward()
        weights.append(model.recon_aux.weight)
    assert weights[1] == pytest.approx(weights[0], rel=0.05)
    assert weights[0] > 100


@pytest.mark.parametrize(("method", "both"), [(1e25, 1.0), (1e-25, 1e25)])
def test_an_overflow_of_one_gradient_alone_sets_nothing(method: float, both: float) -> None:
    model = attach(InALoop(), seed=0)
    for _ in range(2):
        loss = method * siamese_loss(*(model(view) for view in VIEWS))
        (both * recon_aux.add_loss(model, loss)).backward()
        assert model.recon_aux.options["weight"] == "auto"
        assert model.recon_aux.weight_is_due


def test_compiled_it_is_measured_whenever_it_is_due() -> None:
    torch._dynamo.reset()
    model = attach(Scaled(), seed=0)
    due = copy.deepcopy(model.state_dict())
    step = torch.compile(model.training_step, backend="aot_eager")
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="recon_aux: expected to see the gradients")
            for index in range(2):
                step(BATCH, index).backward()
        assert model.recon_aux.weight > 1
        model.load_state_dict(due)
        assert model.recon_aux.weight == 1


def test_the_module_alone_has_nobody_to_set_it() -> None:
    with pytest.raises(ValueError, match="expected weight= as a finite number"):
        recon_aux.ReconAux(8, weight="auto")  # type: ignore[arg-type]


def test_a_first_batch_without_gradient_is_warned_of() -> None:
    model: Any = attach(Scaled(by=0.0))
    model.training_step(BATCH, 0).backward()
    with pytest.warns(UserWarning, match="has no gradient on the features.* Pass weight=1.0"):
        model.training_step(BATCH, 0).backward()
    assert not model.recon_aux.weight_is_due
    assert model.recon_aux.weight == 1
