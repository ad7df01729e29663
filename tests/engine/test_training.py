"""Accumulation, clipping, checkpointing, validation, torch.compile, copies: nothing breaks."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.compile import from_compiled
from timm.utils.model_ema import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cosine_similarity
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import recon_aux
from helpers.data import Views, batch
from helpers.inside import hooked, take_units_of
from helpers.lightly_styles import build
from helpers.methods import mixed_by
from helpers.models import InALoop, Siamese, plain_encoder, siamese_loss
from helpers.running import run_script
from helpers.training import fit, losses_in, take_steps, trainer
from helpers.versions import newer
from helpers.watching import alive, calls_of, rebuilt_by, seen_by
from helpers.weights import (
    assert_both_trained,
    assert_same,
    assert_trained,
    decoder_of,
    weights_of,
)
from recon_aux.integrations.lightly import attach

BATCH = batch(4, side=16)


def test_gradients_accumulate_to_those_of_the_whole_batch() -> None:
    views, labels = batch(side=16)
    whole, parts = (attach(Siamese(), reconstruct="both") for _ in range(2))
    # units are those of the first batch
    take_units_of(parts.recon_aux, whole.recon_aux)
    whole.training_step((views, labels), 0).backward()
    for rows in (slice(0, 4), slice(4, 8)):
        step = parts.training_step(([view[rows] for view in views], labels[rows]), 0)
        (step / 2).backward()
    for ours, theirs in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_trains_with_accumulation_and_clipping(algorithm: Any) -> None:
    model = attach(Siamese())
    before = decoder_of(model)
    sizes: list[float] = []

    def optimizer_step(epoch: int, index: int, optimizer: Any, closure: Any) -> None:
        optimizer.step(closure)
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        sizes.append((gradients.norm() if algorithm == "norm" else gradients.abs().max()).item())

    model.optimizer_step = optimizer_step
    options = {"gradient_clip_val": 1e-2, "gradient_clip_algorithm": algorithm}
    fit(model, accumulate_grad_batches=2, max_steps=4, **options)
    assert_trained(model, before)
    assert sizes == pytest.approx([1e-2] * 4, rel=1e-3)


class Checkpointed(Siamese):
    """Its encoder's activations are computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        feature = checkpoint(self.backbone, x, use_reentrant=False)
        z: Tensor = checkpoint(self.projection_head, feature.flatten(1), use_reentrant=False)
        return z


def test_an_encoder_that_is_checkpointed_is_captured_once() -> None:
    plain, checkpointed = attach(Siamese()), attach(Checkpointed())
    for _ in range(3):
        losses = []
        for model in (plain, checkpointed):
            model.zero_grad()
            loss = model.training_step(BATCH, 0)
            loss.backward()
            losses.append(loss)
        assert torch.equal(*losses)
    for ours, theirs in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_checkpointed_model_trains_what_one_would_that_is_not() -> None:
    models = [attach(Siamese()), attach(Checkpointed())]
    losses = [losses_in(model.training_step, model, 4) for model in models]
    assert all(map(torch.equal, *losses))


def test_reentrant_checkpointing_of_a_head_is_refused() -> None:
    class Reentrant(Siamese):
        def forward(self, x: Tensor) -> Tensor:
            feature = self.backbone(x).flatten(1)
            z: Tensor = checkpoint(self.projection_head, feature, use_reentrant=True)
            return z

    with pytest.raises(RuntimeError, match="expected activation checkpointing with use_reentrant"):
        attach(Reentrant()).training_step(BATCH, 0)


def test_another_error_of_a_head_s_backward_pass_is_its_own() -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    class Failed(Siamese):
        def forward(self, x: Tensor) -> Tensor:
            feature = Failing.apply(self.backbone(x).flatten(1))
            z: Tensor = self.projection_head(feature)
            return z

    with pytest.raises(RuntimeError, match=r"^out of memory"):
        attach(Failed()).training_step(BATCH, 0)


def test_a_checkpointed_loop_captures_nothing_in_the_backward_pass() -> None:
    model = attach(InALoop())
    (x0, x1), _ = BATCH
    calls, seen = calls_of(model.backbone), seen_by(model.backbone, outputs=True)
    masked = seen_by(model.projection_head.layers)
    for step in range(1, 4):
        outputs = [checkpoint(model, x, use_reentrant=False) for x in (x0, x1)]
        loss = recon_aux.add_loss(model, siamese_loss(*outputs))
        loss.backward()
        assert len(calls) == len(seen) == 4 * step
        del outputs, loss
        assert alive(seen) == alive(masked) == 0


def test_validation_and_prediction_run_nothing_of_ours() -> None:
    model = attach(Siamese())
    fit(model, max_steps=2)
    encoded, rebuilt = calls_of(model.backbone), calls_of(model.recon_aux)
    seen = seen_by(model.backbone)
    data = DataLoader(Views(), batch_size=8)
    trained = trainer()
    trained.validate(model, data, verbose=False)
    predicted = trained.predict(model, data)
    assert len(encoded) == 2 * 2 + 2
    assert rebuilt == []
    assert alive(seen) == 0
    assert not any(z.requires_grad for z in predicted)


def test_validation_between_steps_changes_no_step() -> None:
    data = DataLoader(Views(), batch_size=4)
    trained = []
    for validated in (False, True):
        model = attach(Siamese())
        options = {"val_check_interval": 1} if validated else {"limit_val_batches": 0}
        trainer(max_steps=4, **options).fit(model, data, data)
        trained.append(model.state_dict())
    assert_same(*trained)


# --- torch.compile ---


def compile_encoder(model: Any, counter: Any) -> Any:
    model.backbone = torch.compile(model.backbone, backend=counter)
    return model.training_step


def compile_encoder_in_one_graph(model: Any, counter: Any) -> Any:
    model.backbone = torch.compile(model.backbone, backend=counter, fullgraph=True)
    return model.training_step


def compile_encoder_in_place(model: Any, counter: Any) -> Any:
    model.backbone.compile(backend=counter)
    return model.training_step


def compile_head(model: Any, counter: Any) -> Any:
    model.projection_head = torch.compile(model.projection_head, backend=counter)
    return model.training_step


def compile_encoder_with_a_break(model: Any, counter: Any) -> Any:
    class Break(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x

    model.backbone.insert(1, Break())
    return compile_encoder(model, counter)


def compile_model(model: Any, counter: Any) -> Any:
    compiled: Any = torch.compile(model, backend=counter)
    from_compiled(compiled)
    return model.training_step


def compile_step(model: Any, counter: Any) -> Any:
    return torch.compile(model.training_step, backend=counter)


def compile_decoder(model: Any, counter: Any) -> Any:
    model.recon_aux.decoder.compile(backend=counter)
    return model.training_step


COMPILED = {
    "the encoder": compile_encoder,
    "the encoder, in one graph": compile_encoder_in_one_graph,
    "the encoder, in place": compile_encoder_in_place,
    "an encoder that breaks the graph": compile_encoder_with_a_break,
    "a head": compile_head,
    "the model": compile_model,
    "its training step": compile_step,
    "the decoder": compile_decoder,
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SimCLR", "BYOL"])
@pytest.mark.parametrize("what", COMPILED)
def test_compiled_it_trains_the_same_and_compiles_no_more_after_three_steps(
    what: str, method: str
) -> None:
    def made() -> Any:
        torch.manual_seed(0)
        return attach(build(LightningModule, method, "one_by_one"))

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    plain, model = made(), made()
    step = COMPILED[what](model, counter)
    expected = losses_in(plain.training_step, plain, 6)
    losses = losses_in(step, model, 3)
    compiled = counter.frame_count
    assert compiled > 0 or "breaks" in what
    losses += losses_in(step, model, 3)
    assert counter.frame_count == compiled
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_that_lightning_compiled_trains_bare_after_detaching() -> None:
    torch._dynamo.reset()
    model = attach(Siamese())
    fit(torch.compile(model, backend="aot_eager"))
    recon_aux.detach(model)
    before = model.backbone[0].weight.clone()
    fit(model)
    assert not torch.equal(before, model.backbone[0].weight)
    assert not hooked(model)


def test_a_step_may_be_called_by_hand_after_training() -> None:
    model = attach(Siamese())
    fit(model)
    model.zero_grad()
    before = decoder_of(model)
    model.training_step(BATCH, 0).backward()
    assert model.recon_aux.decoder.queries.grad.any()
    assert_same(decoder_of(model), before)


def test_fabric_logs_the_loss() -> None:
    class Kept(DummyLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            logged.update(metrics)

    logged: dict[str, Any] = {}
    fabric = lightning.Fabric(accelerator="cpu", devices=1, loggers=[Kept()])
    module = attach(build(lightning.LightningModule, "SimCLR", "one_by_one"))
    model, _ = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    model.training_step(BATCH, 0)
    assert "recon_aux/loss" in logged


def test_a_step_in_a_module_of_ones_own_trains_by_itself() -> None:
    class Own(Siamese):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx)

    Own.training_step.__module__ = "project.core.module"
    model = attach(Own())
    model.training_step(BATCH, 0).backward()
    assert model.recon_aux.decoder.queries.grad.any()


def test_a_lightning_module_without_a_step_is_trained_in_a_loop() -> None:
    class Named(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.method = InALoop()
            self.backbone, self.projection_head = self.method.backbone, self.method.projection_head

    model = attach(Named())
    z0, z1 = (model.method(view) for view in BATCH[0])
    recon_aux.add_loss(model, siamese_loss(z0, z1)).backward()
    assert model.recon_aux.decoder.queries.grad.any()


def test_compiled_another_method_of_the_encoder_is_seen() -> None:
    class Encoding(nn.Sequential):
        def encode(self, x: Tensor) -> Tensor:
            return self(x)

    class ByMethod(Siamese):
        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.projection_head(self.backbone.encode(x).flatten(1))
            return z

    encoder: Any = torch.compile(Encoding(*plain_encoder()), backend="eager")
    model = ByMethod(encoder)
    attach(model, backbone_method="encode")
    before = weights_of(model)
    take_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), [BATCH] * 3)
    assert_both_trained(model, before)


@pytest.mark.parametrize("compiled", [compile_step, compile_model])
def test_compiled_the_first_step_still_sees_mixed_channels(compiled: Any) -> None:
    torch._dynamo.reset()
    step = compiled(attach(mixed_by(nn.Linear(16, 16))), "aot_eager")
    with pytest.raises(RuntimeError, match="mixed into what the heads"):
        step(BATCH, 0)


def test_a_compiled_momentum_head_is_compiled_no_more_for_many_views() -> None:
    class Many(Siamese):
        def __init__(self) -> None:
            super().__init__()
            self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            self.projection_head_momentum.requires_grad_(False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                for _ in range(2 + batch_idx):
                    y = self.backbone_momentum(batch[0][1]).flatten(1)
                    z1 = self.projection_head_momentum(y)
            return -cosine_similarity(self(batch[0][0]), z1).mean()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = attach(Many())
    model.projection_head_momentum.compile(backend=counter)
    counts = []
    for step in range(6):
        model.training_step(BATCH, step)
        counts.append(counter.frame_count)
    # the first step runs as it is
    assert counts == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("options", [{}, {"fullgraph": True}])
def test_a_compiled_loop_trains_the_same(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    losses = []
    for whole in (False, True):
        model = attach(InALoop(), weight=1.0)
        called = torch.compile(model, backend=counter, **options) if whole else model

        def step(batch: Any, index: int, model: Any = model, called: Any = called) -> Tensor:
            return recon_aux.add_loss(model, siamese_loss(*(called(view) for view in batch[0])))

        losses.append(torch.stack(losses_in(step, model, 4)))
    assert counter.frame_count
    torch.testing.assert_close(*losses)


def test_a_compiled_loop_of_both_views_in_one_call_trains_the_same() -> None:
    class Both(InALoop):
        def forward(self, x0: Tensor, x1: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x0), super().forward(x1)

    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        model = attach(Both(), weight=1.0)
        called = torch.compile(model, backend="aot_eager") if compiled else model

        def step(batch: Any, index: int, model: Any = model, called: Any = called) -> Tensor:
            return recon_aux.add_loss(model, siamese_loss(*called(*batch[0])))

        losses.append(torch.stack(losses_in(step, model, 3)))
    torch.testing.assert_close(*losses)


@pytest.mark.slow
def test_compiled_by_inductor_before_attaching_it_trains_the_same() -> None:
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        model = Siamese()
        if compiled:
            model.backbone = torch.compile(model.backbone)
        attach(model)
        losses.append(torch.stack(losses_in(model.training_step, model, 3)))
    torch.testing.assert_close(*losses)


# --- copies ---


def test_weights_that_are_clamped_between_micro_batches_do_not_count_as_steps() -> None:
    model = attach(Siamese())

    def clamp(*_: Any) -> None:
        with torch.no_grad():
            model.backbone[0].weight.clamp_(-1, 1)

    model.on_train_batch_start = clamp
    before, outputs = decoder_of(model), rebuilt_by(model)
    fit(model, accumulate_grad_batches=4, max_steps=1)
    assert_trained(model, before)
    assert len(outputs) == 4


def test_an_average_of_the_weights_follows_and_sees_nothing() -> None:
    model = attach(InALoop())
    averages = [AveragedModel(model), AveragedModel(model.backbone)]
    (x0, x1), _ = BATCH
    for _ in range(2):
        recon_aux.add_loss(model, siamese_loss(model(x0), model(x1))).backward()
        for average, averaged in zip(averages, (model, model.backbone), strict=True):
            average.update_parameters(averaged)
    with torch.no_grad():
        assert torch.equal(averages[0](x0), averages[0].module(x0))
        assert torch.equal(averages[1](x0), averages[1].module(x0))
    with pytest.raises(RuntimeError, match="saw 0 calls"):
        recon_aux.add_loss(model, x0.sum())


@pytest.mark.parametrize("copied", [copy.deepcopy, AveragedModel])
def test_a_copy_of_a_model_in_a_loop_may_be_its_teacher(copied: Any) -> None:
    model = attach(InALoop())
    teacher = copied(model)
    inner = getattr(teacher, "module", teacher)
    seen = seen_by(inner.backbone, outputs=True)
    (x0, x1), _ = BATCH
    for _ in range(40):
        with torch.no_grad():
            teacher(x0)
    assert alive(seen) == 0
    update_bn([x0] * 40, teacher)
    # and a copy may be trained
    recon_aux.add_loss(inner, siamese_loss(inner(x0), inner(x1))).backward()


def test_without_gradient_a_loop_keeps_few_calls() -> None:
    model = attach(InALoop())
    seen = seen_by(model.backbone, outputs=True)
    (x0, x1), _ = BATCH
    with torch.no_grad():
        for _ in range(100):
            model(x0)
    assert alive(seen) == 16
    recon_aux.add_loss(model, siamese_loss(model(x0), model(x1)))


@pytest.mark.parametrize("average", [ModelEmaV2, ModelEmaV3])
def test_timms_averages_of_the_weights(average: Any) -> None:
    model = attach(InALoop())
    ema = average(model, decay=0.5)
    nn.init.zeros_(model.backbone[0].weight)
    ema.update(model)
    ema.update(model)
    weight = ema.module.backbone[0].weight
    torch.testing.assert_close(weight, InALoop().backbone[0].weight / 4)
    model.load_state_dict(ema.module.state_dict())


def test_lightnings_callback_that_averages_weights() -> None:
    model = attach(Siamese())
    before = decoder_of(model)
    fit(model, callbacks=[newer("pytorch_lightning.callbacks", "WeightAveraging")()])
    assert_trained(model, before)


def test_a_copy_from_before_attaching_stays_bare() -> None:
    bare = Siamese()
    twin = copy.deepcopy(bare)
    attach(bare)
    assert not recon_aux.is_attached(twin)
    assert not hooked(twin)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_trains_as_the_original_would(how: str, tmp_path: Path) -> None:
    model = attach(Siamese())
    fit(model, max_steps=1)
    model.trainer = None
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    expected, losses = (losses_in(each.training_step, each, 3) for each in (model, twin))
    assert all(map(torch.equal, expected, losses))
    recon_aux.detach(twin)
    assert not hooked(twin)
    assert recon_aux.is_attached(model)


@pytest.mark.slow
def test_it_is_sent_to_processes_that_are_spawned() -> None:
    result = run_script("spawned.py")
    assert "trained" in result.stdout, result.stderr[-3000:]


def test_batch_norms_may_be_exchanged_for_synchronised_ones() -> None:
    torch.manual_seed(0)
    model = attach(build(LightningModule, "SimCLR", "one_by_one"))
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in twin.modules())
    losses = [each.training_step(BATCH, 0) for each in (model, twin)]
    assert torch.equal(*losses)
    losses[1].backward()
    assert twin.recon_aux.decoder.queries.grad.any()
