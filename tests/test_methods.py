"""Every shape of method, attached by the one line."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import pytest
import pytorch_lightning
import torch
from methods import DIM, METHODS, Head, Masked, Method, Momentum, ShuffledMomentum, smooth
from models import tiny_encoder
from torch import Tensor, nn
from torch.utils.data import DataLoader

import recon_aux
from recon_aux.graph import reached
from recon_aux.integrations.lightly import attach
from recon_aux.intercept import doors

# recon_aux.attach is the function, too
engine = importlib.import_module("recon_aux.attach")
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


def built(method: type[Method], **options: Any) -> Any:
    torch.manual_seed(0)
    return attach(method(), **options)


def calls_of_encoder(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What went through the encoder, as the engine saw it."""
    seen: list[Any] = []

    def spy(calls: Any, encoder: nn.Module, *rest: Any) -> Any:
        seen.extend(call for call in calls if call.encoder is encoder)
        return find(calls, encoder, *rest)

    find = engine.two_views
    monkeypatch.setattr(engine, "two_views", spy)
    return seen


def rebuilt_from(model: Any) -> list[Any]:
    """What the ReconAux got: views and features."""
    seen: list[Any] = []
    model.recon_aux.register_forward_pre_hook(lambda module, args: seen.append(args))
    return seen


@every_method
def test_the_methods_loss_leaves_the_equivariant_channels_alone(
    method: type[Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calls_of_encoder(monkeypatch)
    model = built(method, weight=0, equivariant_dim=6)
    loss = model.training_step(model.batch(), 0)
    outputs = [call.output for call in seen if call.output.requires_grad]
    gradients = torch.autograd.grad(loss, outputs)
    parts = [model.recon_aux.splitter(engine.as_feature(g)) for g in gradients]
    assert not any(equivariant.any() for _, equivariant in parts)
    assert all(invariant.any() for invariant, _ in parts)


@every_method
def test_the_two_views_are_found_with_their_features(
    method: type[Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of_encoder(monkeypatch)
    model = built(method)
    seen = rebuilt_from(model)
    batch = model.batch()
    model.training_step(batch, 0)
    ((views, features),) = seen
    assert all(torch.equal(a, b) for a, b in zip(views, model.expected(batch), strict=True))
    assert features[0].requires_grad
    encoder = calls[0].encoder
    # of the evaluated encoder, so that a view's feature doesn't depend on the rest of its batch
    model.eval()
    seen.clear()
    model.training_step(batch, 0)
    ((views, features),) = seen
    if not isinstance(model, (Masked, Momentum)):
        expected = [engine.as_feature(encoder(view)) for view in views]
        for feature, known in zip(features, expected, strict=True):
            torch.testing.assert_close(feature.flatten(1), known.flatten(1))


@every_method
def test_the_reconstruction_loss_halves_on_a_fixed_batch(method: type[Method]) -> None:
    model = built(method)
    optimizer = model.configure_optimizers()
    losses: list[float] = []
    model.recon_aux.register_forward_hook(
        lambda module, args, out: losses.append(out.reconstruction_loss.item())
    )
    batch = model.batch()
    for step in range(20):
        optimizer.zero_grad()
        model.training_step(batch, step).backward()
        optimizer.step()
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
    assert not doors(model)


@every_method
def test_trains_under_the_trainer(method: type[Method]) -> None:
    model = built(method)
    trainer = pytorch_lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = copy.deepcopy(model.recon_aux.decoder.state_dict())
    trainer.fit(model, DataLoader([model.batch()] * 2, batch_size=None))
    trained = model.recon_aux.decoder.state_dict()
    assert not any(torch.equal(before[name], trained[name]) for name in before)
    assert "recon_aux/loss" in trainer.callback_metrics


def test_the_momentum_encoders_feature_is_put_in_the_views_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = built(ShuffledMomentum)
    model.eval()
    seen = rebuilt_from(model)
    batch = model.batch()
    model.training_step(batch, 0)
    ((views, features),) = seen
    expected = model.backbone_momentum(batch[0][1]).flatten(1)
    assert torch.equal(views[1], batch[0][1])
    torch.testing.assert_close(features[1], expected)


def test_a_shuffle_is_undone_where_views_have_the_same_sums() -> None:
    model = built(ShuffledMomentum)
    seen = rebuilt_from(model)
    view = torch.arange(4 * 3 * 8 * 8).reshape(4, 3, 8, 8).float()
    views = [view, view.flip(-1)]
    for pair in (views, views[::-1]):
        model.training_step((pair, torch.arange(4)), 0)
        assert all(torch.equal(a, b) for a, b in zip(seen.pop()[0], pair, strict=True))


def test_a_momentum_encoder_gets_no_gradient_from_the_reconstruction() -> None:
    (method,) = [m for m in METHODS if m.__name__ == "MomentumWithGradient"]
    model = built(method)
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
    model = Method()
    model.my_encoder = model.backbone
    model.backbone = nn.Linear(4, 4).requires_grad_(False)
    attach(model)
    assert model._recon_aux_attachment.encoder is model.my_encoder


def test_images_of_another_process_are_refused() -> None:
    class Elsewhere(Momentum):
        def key(self, x: Tensor) -> Tensor:
            return super().key(torch.rand_like(x))

    model = built(Elsewhere)
    with pytest.raises(RuntimeError, match="images that this process has not been given"):
        model.training_step(model.batch(), 0)


def test_only_the_view_with_gradient_is_rebuilt() -> None:
    model = built(Momentum)
    rebuilt: list[Any] = []
    model.recon_aux.register_forward_hook(lambda m, args, out: rebuilt.append(out.rebuilt))
    for _ in range(3):
        model.training_step(model.batch(), 0)
    assert rebuilt == [(0,)] * 3


def test_an_encoder_without_its_usual_name_is_recognised_by_its_gradient() -> None:
    (method,) = [m for m in METHODS if m.__name__ == "MultiCrop"]
    model = built(method)
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
    with pytest.raises(
        RuntimeError, match=r"encoder backbone gives.*\['left', 'right'\].*backbone="
    ):
        model.training_step(model.batch(), 0)


def test_a_loss_that_does_not_depend_on_the_encoder() -> None:
    class Detached(Method):
        def embed(self, x: Tensor) -> Tensor:
            return self.projection_head(self.backbone(x).flatten(1).detach())

    model = built(Detached)
    with pytest.raises(RuntimeError, match="depends on no encoder"):
        model.training_step(model.batch(), 0)


def test_a_momentum_encoder_that_is_made_after_attaching() -> None:
    class Later(Method):
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
    assert len(model._recon_aux_attachment.watched) == (1 if method is Method else 2)
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
    with pytest.raises(ValueError, match="expected views= of 2 or more, got 0"):
        built(Method, views=0)


def test_the_same_view_twice_is_not_two_views() -> None:
    class Same(Momentum):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            x0 = batch[0][0]
            return self.criterion(self.embed(x0), self.key(x0.clone()))

    model = built(Same)
    with pytest.raises(RuntimeError, match="expected two views"):
        model.training_step((smooth(2), torch.arange(4)), 0)


class InALoop(nn.Module):
    """lightly's other style: the loop, the criterion and the optimizer are the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_encoder(dim=DIM)
        self.projection_head = Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).flatten(1))


def test_a_loop_of_ones_own_gets_what_a_training_step_gets() -> None:
    torch.manual_seed(0)
    model = attach(InALoop(), weight=4.0)
    twin = built(Method, weight=4.0)
    twin.load_state_dict(model.state_dict(), strict=False)
    views, labels = twin.batch()
    for _ in range(2):
        z0, z1 = (model(view) for view in views)
        loss = recon_aux.add_loss(model, twin.criterion(z0, z1))
        assert torch.equal(loss, twin.training_step((views, labels), 0))
    loss.backward()
    assert model.recon_aux.decoder.queries.grad.any()


def test_a_loop_that_concatenates_its_views() -> None:
    model = attach(InALoop())
    views, _ = Method().batch()
    seen = rebuilt_from(model)
    for given in (views, [*views, torch.arange(4)]):
        recon_aux.add_loss(model, model(torch.cat(views)).var(), given)
    with pytest.raises(RuntimeError, match="expected two views"):
        recon_aux.add_loss(model, model(torch.cat(views)).var())
    recon_aux.add_loss(model, sum(model(view).var() for view in views))
    assert all(torch.equal(a, b) for call in seen for a, b in zip(call[0], views, strict=True))
    assert len(seen) == 3


def test_a_loop_may_evaluate_between_its_steps() -> None:
    model = attach(InALoop())
    views, _ = Method().batch()
    model.eval()
    with torch.no_grad():
        for _ in range(300):
            model(views[0][:1])
    model.train()
    recon_aux.add_loss(model, sum(model(view).var() for view in views))


def test_a_loop_that_forgets_the_loss_is_stopped() -> None:
    model = attach(InALoop())
    with pytest.raises(RuntimeError, match=r"expected recon_aux\.add_loss.* once a step, saw 200"):
        for _ in range(300):
            model(torch.rand(2, 3, 8, 8))


def test_a_copy_of_a_model_in_a_loop_is_attached_to_itself() -> None:
    views, _ = Method().batch()
    twin = copy.deepcopy(attach(InALoop()))
    loss = recon_aux.add_loss(twin, sum(twin(view).var() for view in views))
    loss.backward()
    assert twin.recon_aux.decoder.queries.grad.any()


def test_the_loss_is_not_added_twice() -> None:
    model = built(Method)
    with pytest.raises(TypeError, match="training_step returns the sum of both losses already"):
        recon_aux.add_loss(model, model.training_step(model.batch(), 0))
    with pytest.raises(ValueError, match="got a bare Method"):
        recon_aux.add_loss(recon_aux.detach(model), torch.zeros(()))


def test_a_graph_of_many_ways_is_walked_once() -> None:
    x = y = torch.ones(1, requires_grad=True) + 0
    for _ in range(100):
        y = y + y
    assert reached(y, [x]) == [True]
