"""A training step whose views are known runs the task before the method's loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint

import recon_aux
from helpers.features import smooth_pictures
from helpers.models import siamese_loss


class InALoop(nn.Module):
    """Two views, or in some steps three. Of five the first two are only looked at."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 4, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(8), nn.Flatten()
        )
        self.head = nn.Linear(16 * 64, 8)

    def loss(self, views: list[Tensor]) -> Tensor:
        embeddings = [self.head(self.encoder(view)) for view in views]
        z0, *others = embeddings[2:] if len(views) == 5 else embeddings
        losses: list[Tensor] = [siamese_loss(z0, z1) for z1 in others]
        return torch.stack(losses).mean()


class Method(InALoop):
    """The same with a training step, in which weights may change."""

    recon_aux: Any
    then: float | None = None

    def loss(self, views: list[Tensor]) -> Tensor:
        loss = super().loss(views)
        if self.then is not None:
            self.recon_aux.weight = self.then
        return loss

    def training_step(self, views: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(views)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def attached(model: Any) -> Any:
    return recon_aux.attach(
        model, backbone="encoder", heads=["head"], image_size=32, weight=1.0, seed=1
    )


def steps(counts: list[int]) -> list[list[Tensor]]:
    """As many views of the same pictures as each step has; where there are four, two are larger."""
    generator = torch.Generator().manual_seed(0)
    pictures = smooth_pictures(8)
    noise = [torch.randn(n, *pictures.shape, generator=generator) for n in counts]
    views = [list(pictures + 0.05 * x) for x in noise]
    return [
        x[:2] + [interpolate(y, scale_factor=2) for y in x[2:]] if len(x) == 4 else x for x in views
    ]


def trained(model: Any, counts: list[int]) -> list[Tensor]:
    """The losses of some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for views in steps(counts):
        if isinstance(model, Method):
            loss = model.training_step(views, 0)
        else:
            loss = recon_aux.add_loss(model, model.loss(views), views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def test_from_the_second_step_on_the_task_runs_before_the_last_head() -> None:
    model = attached(Method())
    order: list[str] = []
    for name, module in (("head", model.head), ("task", model.recon_aux)):
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    trained(model, [2, 2, 2])
    assert order == ["head", "head", "task"] + 2 * ["head", "task", "head"]


@pytest.mark.parametrize(
    "counts",
    [[2] * 6, [2, 2, 3, 2, 3, 3, 2], [2, 2, 5, 2], [2, 2, 4, 2]],
    ids=["usual", "third views", "looks", "larger ones last"],
)
def test_early_or_not_the_losses_and_the_weights_are_the_same(counts: list[int]) -> None:
    early, late = attached(Method()), attached(InALoop())
    assert trained(early, counts) == trained(late, counts)
    for got, expected in zip(early.parameters(), late.parameters(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("saving", ["checkpoint", "on the CPU"])
def test_an_encoder_within_checkpointing_is_no_reason_to_run_early(saving: str) -> None:
    class Checkpointed(Method):
        def loss(self, views: list[Tensor]) -> Tensor:
            if saving == "on the CPU":
                with torch.autograd.graph.save_on_cpu():
                    features = [self.encoder(view) for view in views]
            else:
                features = [checkpoint(self.encoder, view, use_reentrant=False) for view in views]
            return siamese_loss(*map(self.head, features))

    early, late = attached(Checkpointed()), attached(InALoop())
    assert trained(early, [2, 2, 2]) == trained(late, [2, 2, 2])


def test_a_weight_that_is_set_while_a_step_runs_counts_in_it() -> None:
    early, late = attached(Method()), attached(InALoop())
    trained(early, [2, 2])
    trained(late, [2, 2])
    early.then = late.recon_aux.weight = 7.0
    assert trained(early, [2]) == trained(late, [2])
