"""The decoder trains under the user's optimizers and follows the user's schedules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.models.utils import get_weight_decay_parameters
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger
from timm.optim.adafactor import Adafactor
from timm.optim.lookahead import Lookahead
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedules

import recon_aux
from helpers.data import batch
from helpers.models import InALoop, Siamese, siamese_loss, tiny_encoder
from helpers.training import fit
from helpers.weights import assert_trained, decoder_of
from recon_aux import ReconAux
from recon_aux.integrations.lightly import attach

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(SGD, lr=0.05, momentum=0.9),
    "Adam": partial(Adam, lr=1e-3),
    "AdamW": partial(AdamW, lr=1e-3),
    "LARS": partial(LARS, lr=0.05, momentum=0.9, weight_decay=1e-4),
}


def by_weight_decay(model: Any) -> list[dict[str, Any]]:
    params, no_decay = get_weight_decay_parameters([model.backbone, model.projection_head])
    return [{"params": params}, {"params": no_decay, "weight_decay": 0.0}]


GROUPS: dict[str, Callable[[Any], Any]] = {
    "one": lambda model: model.parameters(),
    "encoder and head": lambda model: [
        {"params": model.projection_head.parameters(), "lr": 0.01},
        {"params": model.backbone.parameters()},
    ],
    "named": lambda model: model.named_parameters(),
    "named groups": lambda model: [
        {"params": module.named_parameters()} for module in (model.projection_head, model.backbone)
    ],
    "bias and norm": by_weight_decay,
}

SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "LinearLR": partial(schedules.LinearLR, start_factor=0.1, total_iters=4),
    "CosineAnnealingLR": partial(schedules.CosineAnnealingLR, T_max=6),
    "CosineAnnealingLR with a floor": partial(schedules.CosineAnnealingLR, T_max=6, eta_min=0.01),
    "OneCycleLR": partial(schedules.OneCycleLR, max_lr=0.1, total_steps=12),
    "LambdaLR": partial(schedules.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "LambdaLR of a list": lambda optimizer: schedules.LambdaLR(
        optimizer, [lambda step: 1 / (1 + step) for _ in optimizer.param_groups]
    ),
    "ReduceLROnPlateau": partial(schedules.ReduceLROnPlateau, patience=0, threshold=10.0),
    "CosineWarmupScheduler": partial(CosineWarmupScheduler, warmup_epochs=2, max_epochs=12),
    "CosineAnnealingWarmRestarts": partial(schedules.CosineAnnealingWarmRestarts, T_0=3),
    "CyclicLR": partial(schedules.CyclicLR, base_lr=0.01, max_lr=0.05, step_size_up=2),
    "SequentialLR": lambda optimizer: schedules.SequentialLR(
        optimizer,
        [
            schedules.LinearLR(optimizer, 0.1, total_iters=2),
            schedules.ExponentialLR(optimizer, 0.7),
        ],
        milestones=[2],
    ),
}


def model_with(optimizer: str = "SGD", groups: str = "one", schedule: str | None = None) -> Siamese:
    def configure(model: Any) -> Any:
        made = OPTIMIZERS[optimizer](GROUPS[groups](model))
        if schedule is None:
            return made
        scheduler = {
            "scheduler": SCHEDULES[schedule](made),
            "interval": "step",
            "monitor": "recon_aux/loss",
        }
        return {"optimizer": made, "lr_scheduler": scheduler}

    # with batch norm, so that there are biases and norms
    encoder = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    )
    return Siamese(encoder, configure=configure)


def groups_of(optimizer: Any, module: nn.Module) -> list[dict[str, Any]]:
    """The groups with a module's parameters, each of which stands in one alone."""
    own = {id(p) for p in module.parameters()}
    placed = [id(p) for g in optimizer.param_groups for p in g["params"] if id(p) in own]
    assert sorted(placed) == sorted(own)
    return [g for g in optimizer.param_groups if any(id(p) in own for p in g["params"])]


def rates_in_training(
    model: Any, steps: int = 8, ckpt_path: Path | None = None, saved: Path | None = None
) -> list[tuple[float, float]]:
    """The encoder's learning rate and the decoder's, at each step of the optimizer."""
    rates = []

    def on_before_optimizer_step(optimizer: Any) -> None:
        encoder, decoder = (
            groups_of(optimizer, module)[0]["lr"] for module in (model.backbone, model.recon_aux)
        )
        rates.append((encoder, decoder))

    model.on_before_optimizer_step = on_before_optimizer_step
    trained = fit(model, ckpt_path=ckpt_path, max_steps=steps)
    if saved is not None:
        trained.save_checkpoint(saved)
    return rates


@pytest.mark.parametrize("settings", [{}, {"decoder_lr": 0.02, "decoder_weight_decay": 0.01}])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_of_the_decoders_parameters_trains_in_one_group(
    optimizer: str, groups: str, settings: dict[str, float]
) -> None:
    model = attach(model_with(optimizer, groups), **settings)
    before = decoder_of(model)
    made = fit(model, max_steps=4).optimizers[0]
    assert_trained(model, before)
    for group in groups_of(made, model.recon_aux):
        shared = any(p is weight for p in group["params"] for weight in model.backbone.parameters())
        assert shared != bool(settings)
        assert ("param_names" in group) == ("named" in groups)
        assert len(group.get("param_names", group["params"])) == len(group["params"])
        if settings:
            assert group["lr"] == pytest.approx(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize(
    ("optimizer", "lr", "told"),
    # SimSiam's and MoCo's for small batches are 0.5 and 0.3, SimCLR's for 4096 images 4.8
    [(SGD, 0.06, 0.95), (SGD, 1.0, 0.85), (partial(LARS, weight_decay=1e-6), 4.8, 0.85)],
)
def test_the_decoder_bears_rates_that_encoders_bear(
    optimizer: Any, lr: float, told: float, width: int
) -> None:
    images = nn.functional.interpolate(torch.rand(32, 3, 6, 6), 32, mode="bilinear")
    features = (images[:, :, ::4, ::4].flatten(1) @ torch.randn(192, width) - 4).relu()
    aux = ReconAux(width, reconstruct="both")
    vectors, weights = ([p for p in aux.parameters() if (p.ndim > 1) == is_w] for is_w in (0, 1))
    groups = [{"params": weights}, {"params": vectors, "weight_decay": 0.0}]
    trains = optimizer(groups, lr=lr, momentum=0.9)
    losses = []
    for step in range(60):
        for group in trains.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20)
        trains.zero_grad()
        output = aux(images.chunk(2), features.chunk(2))
        output.loss.backward()
        trains.step()
        losses.append(output.loss.item())
    assert max(losses[20:]) < losses[0]
    assert output.edges_loss < told


def test_biases_and_norms_are_not_decayed_where_the_encoders_are_not() -> None:
    for settings, decay in (({}, 1e-4), ({"decoder_weight_decay": 0.5}, 0.5)):
        model = attach(model_with("LARS", "bias and norm"), **settings)
        decayed, not_decayed = groups_of(model.configure_optimizers(), model.recon_aux)
        ours = {id(p) for p in model.recon_aux.parameters()}
        assert decayed["weight_decay"] == decay
        assert not_decayed["weight_decay"] == 0
        assert all(p.ndim > 1 for p in decayed["params"] if id(p) in ours)
        assert all(p.ndim < 2 for p in not_decayed["params"] if id(p) in ours)


def test_weights_may_be_given_no_decay_of_their_own() -> None:
    model = attach(model_with("LARS", "one"), decoder_weight_decay=0.0)
    encoder, decoder = model.configure_optimizers().param_groups
    assert (encoder["weight_decay"], decoder["weight_decay"]) == (1e-4, 0.0)


def test_weights_without_decay_of_their_own_may_be_given_it() -> None:
    model = attach(model_with("SGD", "one"), decoder_weight_decay=0.5)
    encoder, decoder = model.configure_optimizers().param_groups
    assert (encoder["weight_decay"], decoder["weight_decay"]) == (0, 0.5)
    assert encoder["lr"] == decoder["lr"]
    assert {id(p) for p in decoder["params"]} == {id(p) for p in model.recon_aux.parameters()}


@pytest.mark.parametrize("groups", ["one", "encoder and head", "bias and norm"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_decoder_follows_the_schedule_and_its_own_rate_in_proportion(
    schedule: str, groups: str
) -> None:
    bare = rates_in_training(attach(model_with("SGD", groups, schedule)))
    assert len({encoder for encoder, _ in bare}) > 2
    assert all(encoder == decoder for encoder, decoder in bare)
    base = {"OneCycleLR": 0.1, "CyclicLR": 0.01}.get(schedule, 0.05)
    model = attach(model_with("SGD", groups, schedule), decoder_lr=3 * base)
    rates = rates_in_training(model)
    assert [encoder for encoder, _ in rates] == pytest.approx([encoder for encoder, _ in bare])
    assert [decoder for _, decoder in rates] == pytest.approx([3 * encoder for encoder, _ in rates])


@pytest.mark.parametrize("groups", ["one", "encoder and head", "bias and norm"])
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if "floor" not in name])
def test_the_schedulers_own_rates_are_in_proportion(schedule: str, groups: str) -> None:
    """Lightning logs them between the scheduler's step and the optimizer's."""
    base = {"OneCycleLR": 0.1, "CyclicLR": 0.01}.get(schedule, 0.05)
    model = attach(model_with("SGD", groups, schedule), decoder_lr=3 * base)
    configured = model.configure_optimizers()
    made, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    encoder, decoder = (groups_of(made, m)[0] for m in (model.backbone, model.recon_aux))
    at = [[g is group for g in made.param_groups].index(True) for group in (encoder, decoder)]
    rates = []
    for _ in range(8):
        made.step()
        scheduler.step(*[1.0] * (schedule == "ReduceLROnPlateau"))
        # ReduceLROnPlateau leaves a rate that is next to nothing
        assert decoder["lr"] == pytest.approx(3 * encoder["lr"], abs=1e-7)
        last = scheduler.get_last_lr()
        assert [last[i] for i in at] == [encoder["lr"], decoder["lr"]]
        rates.append(encoder["lr"])
    assert len(set(rates)) > 2


@pytest.mark.parametrize("groups", ["one", "bias and norm"])
def test_lightnings_monitor_of_learning_rates_takes_the_groups_names(
    groups: str, tmp_path: Path
) -> None:
    model = attach(model_with("SGD", groups, "LinearLR"), decoder_lr=0.01)
    monitor = LearningRateMonitor()
    fit(model, logger=CSVLogger(tmp_path), callbacks=[monitor], log_every_n_steps=1)
    encoder = next(name for name in ("lr-SGD/pg1", "lr-SGD/pg2") if name in monitor.lrs)
    assert len(set(monitor.lrs[encoder])) == 3
    expected = [rate / 5 for rate in monitor.lrs[encoder]]
    assert monitor.lrs["lr-SGD/recon_aux"] == pytest.approx(expected)


@pytest.mark.parametrize("key", ["lr", "lr_scale"])
def test_of_layers_with_rates_of_their_own_the_decoder_joins_the_last(key: str) -> None:
    def configure(model: Any) -> Any:
        layers = [layer for layer in model.backbone if isinstance(layer, nn.Conv2d)]
        groups = [
            {"params": [parameter], key: 0.1 ** (2 - i)}
            for i, layer in enumerate(layers)
            for parameter in layer.parameters()
        ]
        return AdamW([*groups, {"params": model.projection_head.parameters(), key: 1.0}])

    convolutions = [nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1), nn.Conv2d(16, 16, 3)]
    alike = nn.Sequential(*convolutions[:2], copy.deepcopy(convolutions[1]))
    model = attach(Siamese(nn.Sequential(*alike, nn.AdaptiveAvgPool2d(1)), configure=configure))
    rates = {group[key] for group in groups_of(model.configure_optimizers(), model.recon_aux)}
    assert rates == {1.0}


def test_a_learning_rate_of_its_own_stays_in_proportion_on_resuming(tmp_path: Path) -> None:
    def plateau(model: Any) -> Any:
        made = SGD(model.parameters(), lr=0.1)
        schedule = schedules.ReduceLROnPlateau(made, patience=0, threshold=1e9)
        return {"optimizer": made, "lr_scheduler": schedule, "monitor": "recon_aux/loss"}

    for ckpt_path, steps in ((None, 8), (tmp_path / "model.ckpt", 16)):
        model = attach(Siamese(configure=plateau), decoder_lr=0.2)
        rates = rates_in_training(model, steps, ckpt_path, tmp_path / "model.ckpt")
        assert [decoder for _, decoder in rates] == pytest.approx([2 * own for own, _ in rates])
    assert rates[-1][0] < 0.01


def test_a_learning_rate_of_its_own_follows_a_schedule_that_is_made_later() -> None:
    model = attach(Siamese(), decoder_lr=0.2)
    made = model.configure_optimizers()
    schedule = schedules.OneCycleLR(made, max_lr=0.1, total_steps=5)
    for _ in range(4):
        made.step()
        schedule.step()
    encoder = made.param_groups[0]["lr"]
    made.step()
    assert made.param_groups[1]["lr"] == pytest.approx(2 * encoder)


def test_a_learning_rate_of_its_own_follows_one_that_is_set_by_hand() -> None:
    model = attach(Siamese(), decoder_lr=0.1)

    def warm_up(batch: Any, batch_idx: int) -> None:
        model.optimizers().param_groups[0]["lr"] = 0.05 * batch_idx / 4

    model.on_train_batch_start = warm_up
    rates = rates_in_training(model, 4)
    assert rates == [pytest.approx((0.05 * step / 4, 0.1 * step / 4)) for step in range(4)]


def test_biases_and_norms_with_a_rate_of_their_own_follow_the_encoders() -> None:
    model = attach(model_with("SGD", "bias and norm"), decoder_lr=0.2)
    made = model.configure_optimizers()
    weights, vectors, our_weights, our_vectors = made.param_groups
    assert all(p.ndim < 2 for p in our_vectors["params"])
    vectors["lr"] *= 0.5
    made.step()
    assert our_vectors["lr"] == pytest.approx(0.1)
    assert our_weights["lr"] == pytest.approx(0.2)
    weights["lr"] *= 0.1
    made.step()
    assert our_vectors["lr"] == pytest.approx(0.1)
    assert our_weights["lr"] == pytest.approx(0.02)


def test_a_learning_rate_of_its_own_is_of_its_base_whatever_notes_another() -> None:
    """As Lightning's search for a rate and its SWA callback do, which set all groups alike."""
    model = attach(Siamese(), decoder_lr=0.2)
    made = model.configure_optimizers()
    for group in made.param_groups:
        group["lr"] = group["initial_lr"] = 1e-4
    made.step()
    assert made.param_groups[1]["lr"] == pytest.approx(0.2 / 0.05 * 1e-4)


def test_an_optimizer_without_hooks_for_loading_trains_the_decoder() -> None:
    model = attach(Siamese(configure=lambda m: Lookahead(SGD(m.parameters(), lr=0.05))))
    before = decoder_of(model)
    fit(model)
    assert_trained(model, before)


def test_the_decoder_joins_no_group_whose_rate_is_zero() -> None:
    def configure(model: Any) -> Any:
        weights = [p for p in model.backbone.parameters() if p.ndim > 1]
        others = [p for p in model.backbone.parameters() if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": weights, "lr": 0.0}, {"params": others}]
        return SGD([*groups, {"params": model.projection_head.parameters()}], lr=0.01)

    model = attach(Siamese(tiny_encoder(dim=16), configure=configure))
    rates = {group["lr"] for group in groups_of(model.configure_optimizers(), model.recon_aux)}
    assert rates == {0.01}


def test_a_learning_rate_of_zero_leaves_the_decoder_as_it_is() -> None:
    model = attach(model_with(schedule="CosineAnnealingLR with a floor"), decoder_lr=0.0)
    before = decoder_of(model)
    fit(model)
    assert all(torch.equal(weight, before[name]) for name, weight in decoder_of(model).items())


def test_of_several_optimizers_the_encoders_trains_the_decoder() -> None:
    def configure(model: Any) -> Any:
        head = SGD(model.projection_head.parameters(), lr=0.1)
        encoder = Adam(model.backbone.parameters(), lr=1e-3)
        return [head, encoder], [schedules.ExponentialLR(o, 0.5) for o in (encoder, head)]

    for settings in ({}, {"decoder_lr": 0.01}):
        model = attach(Siamese(configure=configure), **settings)
        (head, encoder), (schedule, of_the_head) = model.configure_optimizers()
        assert of_the_head.base_lrs == of_the_head.get_last_lr() == [0.1]
        assert schedule.base_lrs == [1e-3, *settings.values()]
        assert not groups_of(head, nn.Module())
        assert groups_of(encoder, model.recon_aux)
        before = decoder_of(model)
        model.training_step(batch(4, side=16), 0).backward()
        for optimizer in (head, encoder):
            optimizer.step()
        schedule.step()
        assert_trained(model, before)


def test_a_loop_may_have_several_optimizers() -> None:
    model = attach(InALoop())
    optimizers = [
        SGD([*model.projection_head.parameters()], lr=0.1),
        Adam([*model.backbone.parameters(), *model.recon_aux.parameters()]),
    ]
    before = decoder_of(model)
    (x0, x1), _ = batch(4, side=16)
    recon_aux.add_loss(model, siamese_loss(model(x0), model(x1))).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert_trained(model, before)


class UnknownScheduler:
    """A scheduler of a kind that we can't know."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer


def refused(configure: Any, message: str, **settings: float) -> None:
    model = attach(Siamese(configure=configure), **settings)
    with pytest.raises(ValueError, match=message):
        model.configure_optimizers()


def test_settings_that_cannot_be_met_are_named() -> None:
    with pytest.raises(ValueError, match="expected decoder_lr= as a finite number of 0 or m"):
        attach(Siamese(), decoder_lr=-1)
    with pytest.raises(ValueError, match=r"decoder_weight_decay= as a finite .* got .0\.1."):
        attach(Siamese(), decoder_weight_decay="0.1")
    for setting in ({"decoder_lr": 0.1}, {"decoder_weight_decay": 0.1}, {"decoder_lr": 0.0}):
        with pytest.raises(
            ValueError, match=r"got InALoop, which doesn't: .*recon_aux\.parameters\(\)"
        ):
            attach(InALoop(), **setting)
    refused(lambda model: SGD(model.parameters(), lr=0.0), "learning rate above 0", decoder_lr=0.1)
    refused(
        lambda model: ([made := SGD(model.parameters(), lr=0.1)], [UnknownScheduler(made)]),
        r"torch's learning-rate schedulers .*got a UnknownScheduler; .*self\.recon_aux\.parameters",
        decoder_lr=0.1,
    )
    refused(
        lambda model: SGD(
            [
                {"params": model.backbone.parameters()},
                {"params": model.recon_aux.parameters(), "lr": 0.2},
            ],
            lr=0.1,
        ),
        "got both, decoder_lr=0.1 and a group with 0.2",
        decoder_lr=0.1,
    )


def test_an_optimizer_that_takes_no_notice_of_the_decoder_is_noticed() -> None:
    class Sharding(SGD):
        """Steps what it was made of; what another process steps is sent here."""

        def __init__(self, params: list[Any], elsewhere: list[Any]) -> None:
            super().__init__([*params, *elsewhere], lr=0.1)
            self.known = [*params, *(p.data for p in elsewhere)]
            self.gradients_of = [*params, *elsewhere]

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            with torch.no_grad():
                for known, p in zip(self.known, self.gradients_of, strict=True):
                    known.sub_(0.1 * p.grad)

    class Sharded(Siamese):
        recon_aux: Any
        listed = False

        def configure_optimizers(self) -> Any:
            known = [*self.backbone.parameters(), *self.projection_head.parameters()]
            return Sharding(known, list(self.recon_aux.parameters()) if self.listed else [])

    def train(model: Any) -> None:
        optimizer = model.configure_optimizers()
        for step in range(4):
            model.training_step(batch(4), step).backward()
            optimizer.step()

    with pytest.raises(RuntimeError, match=r"it updates only .* list model\.recon_aux"):
        train(attach(Sharded()))
    model = attach(Sharded())
    model.listed = True
    before = decoder_of(model)["decoder.queries"].clone()
    train(model)
    assert not torch.equal(before, decoder_of(model)["decoder.queries"])
    # nor does one whose user froze the decoder
    model = attach(Sharded())
    model.recon_aux.requires_grad_(False)
    train(model)


def assert_its_optimizer_trains_the_decoder(model: Any, steps: int) -> None:
    before = decoder_of(model)
    optimizer = model.configure_optimizers()
    for step in range(steps):
        model.training_step(batch(4, side=16), step).backward()
        optimizer.step()
    assert_trained(model, before)


def test_an_optimizer_that_trains_the_decoder_in_every_other_step_is_no_mistake() -> None:
    class InTurn(SGD):
        steps = 0

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            ours = {id(p): p.grad for p in model.recon_aux.parameters()}
            if self.steps % 2:
                for p in model.recon_aux.parameters():
                    p.grad = None
            super().step()
            for p in model.recon_aux.parameters():
                p.grad = ours[id(p)]
            self.steps += 1

    model = attach(Siamese(configure=lambda model: InTurn(model.backbone.parameters(), lr=0.05)))
    assert_its_optimizer_trains_the_decoder(model, 4)


def test_after_detaching_the_optimizer_trains_the_bare_model() -> None:
    model = attach(Siamese())
    optimizer = model.configure_optimizers()
    for step in range(4):
        if step == 1:
            recon_aux.detach(model)
        optimizer.zero_grad()
        before = model.backbone[0].weight.clone()
        model.training_step(batch(4, side=16), step).backward()
        optimizer.step()
        assert not torch.equal(model.backbone[0].weight, before)
    assert not recon_aux.is_attached(model)


def test_a_decoder_in_a_group_with_others_keeps_that_groups_settings() -> None:
    def configure(model: Any) -> Any:
        rest = [*model.projection_head.parameters(), *model.recon_aux.parameters()]
        groups: list[Any] = [{"params": [*model.backbone.parameters()]}]
        return SGD([*groups, {"params": rest, "lr": 1.0}], lr=0.1)

    model = attach(Siamese(configure=configure), decoder_weight_decay=0.5)
    (group,) = groups_of(model.configure_optimizers(), model.recon_aux)
    assert (group["lr"], group["weight_decay"]) == (1.0, 0.5)


@pytest.mark.parametrize("settings", [{}, {"decoder_lr": 0.1}])
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("part", ["recon_aux", "recon_aux.edges", "backbone"])
def test_what_is_frozen_for_a_while_keeps_its_place(
    part: str, listed: bool, settings: dict[str, float]
) -> None:
    def configure(model: Any) -> Any:
        its = [*model.backbone.parameters(), *model.projection_head.parameters()]
        return SGD(its if listed else model.parameters(), lr=0.05)

    model = attach(Siamese(configure=configure), **settings)
    frozen = model.get_submodule(part).requires_grad_(False)
    optimizer = model.configure_optimizers()
    assert groups_of(optimizer, model.recon_aux)
    for trains in (False, True, False):
        frozen.requires_grad_(trains)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for step in range(3):
            optimizer.zero_grad()
            loss = model.training_step(batch(4, side=16), step)
            loss.backward()
            optimizer.step()
        its = {id(p) for p in frozen.parameters()}
        for name, p in model.named_parameters():
            nothing_is_rebuilt = not trains and part == "backbone" and "recon_aux" in name
            stays = nothing_is_rebuilt or (not trains and id(p) in its)
            assert torch.equal(p, before[name]) == stays, name


def test_a_schedulers_list_of_the_users_own_stays_as_it_is() -> None:
    class Factors(schedules.LRScheduler):
        def __init__(self, optimizer: Optimizer) -> None:
            self.factors, self.later_lrs = [1.0, 0.1], [0.3, 0.2, 0.1]
            super().__init__(optimizer)

        def get_lr(self) -> list[float | torch.Tensor]:
            factor = self.factors[min(self.last_epoch, len(self.factors) - 1)]
            return [factor * base for base in self.base_lrs]

    def configure(model: Any) -> Any:
        made = SGD(GROUPS["encoder and head"](model), lr=0.1)
        return [made], [Factors(made)]

    model = attach(Siamese(configure=configure), decoder_lr=0.2)
    (optimizer,), (scheduler,) = model.configure_optimizers()
    assert (scheduler.factors, scheduler.later_lrs) == ([1.0, 0.1], [0.3, 0.2, 0.1])
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.001, 0.01, 0.02])


def test_groups_of_the_decoders_own_follow_the_order_of_the_encoders() -> None:
    def configure(model: Any) -> Any:
        decayed, not_decayed = by_weight_decay(model)
        return SGD([not_decayed, decayed], lr=0.1, weight_decay=1e-4)

    model = attach(model_with(), decoder_lr=0.2)
    model.configure = configure
    vectors, weights = groups_of(model.configure_optimizers(), model.recon_aux)
    assert all(p.ndim < 2 for p in vectors["params"])
    assert all(p.ndim > 1 for p in weights["params"])


class CopiedLookahead(Optimizer):
    """Lookahead as it is widely copied: it never calls its base's ``__init__``."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.state = optimizer.state
        self.defaults = optimizer.defaults

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


@pytest.mark.parametrize("name", ["optimizer", "base_optimizer", "inner", "_wrapped"])
@pytest.mark.parametrize("options", [{}, {"decoder_lr": 0.1}])
def test_an_optimizer_that_is_no_proper_one_trains_the_decoder_by_the_one_in_it(
    name: str, options: Any
) -> None:
    class Named(CopiedLookahead):
        def __init__(self, optimizer: Any) -> None:
            super().__init__(optimizer)
            vars(self)[name] = vars(self).pop("optimizer")

        def __getattr__(self, other: str) -> Any:
            if other == "optimizer" and name in vars(self):
                return vars(self)[name]
            raise AttributeError(other)

    def configure(model: Any) -> Any:
        its = [*model.backbone.parameters(), *model.projection_head.parameters()]
        return Named(SGD(its, lr=0.05))

    model = attach(Siamese(configure=configure), **options)
    assert_its_optimizer_trains_the_decoder(model, 2)


def test_an_optimizer_without_any_of_torchs_in_it_trains_the_decoder() -> None:
    class Scratch:
        def __init__(self, params: Any) -> None:
            self.param_groups: list[dict[str, Any]] = [{"params": list(params), "lr": 0.05}]

        def zero_grad(self) -> None:
            for p in self.param_groups[0]["params"]:
                p.grad = None

        @torch.no_grad()
        def step(self) -> None:
            for p in self.param_groups[0]["params"]:
                p -= self.param_groups[0]["lr"] * p.grad

    def configure(model: Any) -> Any:
        return Scratch([*model.backbone.parameters(), *model.projection_head.parameters()])

    assert_its_optimizer_trains_the_decoder(attach(Siamese(configure=configure)), 2)
    model = attach(Siamese(configure=configure), decoder_lr=0.1)
    with pytest.raises(
        TypeError, match=r"got Scratch, which runs no hooks\. Leave decoder_lr= out"
    ):
        model.configure_optimizers()


@pytest.mark.parametrize("decay", [None, 0.1])
def test_an_optimizer_that_sets_its_own_rate(decay: float | None) -> None:
    def configure(model: Any) -> Any:
        return Adafactor([*model.backbone.parameters(), *model.projection_head.parameters()])

    model = attach(Siamese(configure=configure), decoder_weight_decay=decay)
    before = decoder_of(model)
    optimizer = fit(model).optimizers[0]
    assert_trained(model, before)
    assert optimizer.param_groups[-1]["weight_decay"] == (decay or 0)
