"""A training step whose views are known runs the task before the method's loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint

import recon_aux
from helpers.features import smooth_pictures
from helpers.models import siamese_loss
from helpers.watching import calls_of


class InALoop(nn.Module):
    """Two views, or in some steps three. Of five the first two are only looked at."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 4, stride=4), nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.GELU()
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


def momentum(method: InALoop) -> InALoop:
    """Give it a momentum encoder and head."""
    for name in ("encoder", "head"):
        copied = copy.deepcopy(getattr(method, name)).requires_grad_(False)
        setattr(method, f"{name}_momentum", copied)
    return method


def joined_with_teacher(
    model: Any, views: list[Tensor], without: Callable[[], Any] = torch.no_grad
) -> Tensor:
    """The student's joined views, then the teacher's."""
    z0, z1 = model.head(model.encoder(torch.cat(views))).chunk(2)
    with without():
        t0, t1 = model.head_momentum(model.encoder_momentum(torch.cat(views))).chunk(2)
    return siamese_loss(z0, t1.clone()) + siamese_loss(z1, t0.clone())


def changed_in_place(model: Any, views: list[Tensor], change: Callable[[Tensor], Any]) -> Tensor:
    features = [model.encoder(view) for view in views]
    for feature in features:
        change(feature)
    return siamese_loss(*map(model.head, features))


def detached_in_place(model: Any, views: list[Tensor]) -> Tensor:
    y0, y1 = (model.encoder(view) for view in views)
    return siamese_loss(model.head(y0), model.head(y1.detach_()))


def changed_where_joined(model: Any, views: list[Tensor]) -> Tensor:
    features = model.encoder(torch.cat(views))
    return siamese_loss(*model.head(features.relu_()).chunk(2))


def evaluated_last(model: Any, views: list[Tensor]) -> Tensor:
    loss = siamese_loss(*model.head(model.encoder(torch.cat(views))).chunk(2))
    with torch.no_grad():
        model.encoder(views[0])
    return loss


def differentiated_forwards(model: Any, views: list[Tensor]) -> Tensor:
    feature = model.encoder(views[0])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(views[1], torch.ones_like(views[1]))
        other, _ = forward_ad.unpack_dual(model.encoder(dual))
    return siamese_loss(*map(model.head, (feature, other)))


STEPS: dict[str, Callable[[Any, list[Tensor]], Tensor]] = {
    "joined views, then a teacher's": joined_with_teacher,
    "a teacher in inference mode": partial(joined_with_teacher, without=torch.inference_mode),
    "relu_": partial(changed_in_place, change=torch.relu_),
    "detach_": detached_in_place,
    "relu_ of joined views": changed_where_joined,
    "an evaluation last": evaluated_last,
    "forward-mode gradients": differentiated_forwards,
}


@pytest.mark.parametrize("name", STEPS)
def test_whatever_is_done_in_the_step_early_or_not_is_the_same(name: str) -> None:
    class Stepping(Method):
        def loss(self, views: list[Tensor]) -> Tensor:
            return STEPS[name](self, views)

    class Looping(InALoop):
        def loss(self, views: list[Tensor]) -> Tensor:
            return STEPS[name](self, views)

    early, late = (attached(momentum(made)) for made in (Stepping(), Looping()))
    assert trained(early, [2] * 4) == trained(late, [2] * 4)
    assert any(p.grad is not None and p.grad.any() for p in early.encoder.parameters())
    for got, expected in zip(early.parameters(), late.parameters(), strict=True):
        assert torch.equal(got, expected)


def test_a_step_that_is_skipped_raises_nothing_and_takes_no_turn() -> None:
    class Skipping(Method):
        def training_step(self, views: list[Tensor], batch_idx: int) -> Any:
            loss = self.loss(views)
            return loss if torch.isfinite(loss) else None

    model = attached(Skipping())
    made: list[Any] = []
    model.recon_aux.register_forward_hook(lambda *given: made.append(given[-1].rebuilt))
    rebuilt = []
    for index, views in enumerate(steps([2] * 9)):
        if index % 2:
            views[0][0] = float("nan")
            assert model.training_step(views, 0) is None
            continue
        model.zero_grad()
        model.training_step(views, 0).backward()
        rebuilt.append(made[-1])
        # an update without an optimizer: each call takes a turn
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.01 * parameter.grad)
    assert rebuilt == [(0,), (1,), (0,), (1,), (0,)]


def test_a_weight_that_is_set_while_a_step_runs_counts_in_it() -> None:
    early, late = attached(Method()), attached(InALoop())
    trained(early, [2, 2])
    trained(late, [2, 2])
    early.then = late.recon_aux.weight = 7.0
    assert trained(early, [2]) == trained(late, [2])


def test_where_features_change_in_place_the_task_soon_runs_once_a_step() -> None:
    class Stepping(Method):
        def loss(self, views: list[Tensor]) -> Tensor:
            return changed_in_place(self, views, torch.relu_)

    model = attached(Stepping())
    runs = calls_of(model.recon_aux)
    trained(model, [2] * 4)
    # in the second step it ran in vain
    assert len(runs) == 5


def test_a_feature_that_changes_in_place_later_is_warned_of_once() -> None:
    class Stepping(Method):
        change: Any = staticmethod(torch.Tensor.clone)

        def loss(self, views: list[Tensor]) -> Tensor:
            return changed_in_place(self, views, self.change)

    model = attached(Stepping())
    trained(model, [2, 2])
    model.change = torch.relu_
    with pytest.warns(UserWarning, match="changed in place") as caught:
        trained(model, [2, 2, 2])
    assert len(caught) == 1


def test_a_view_that_is_changed_in_place_in_a_later_step_is_refused() -> None:
    class Noisy(Method):
        noise = 0.0

        def loss(self, views: list[Tensor]) -> Tensor:
            z0 = self.head(self.encoder(views[0]))
            if self.noise:
                views[0].add_(self.noise)
            return siamese_loss(z0, self.head(self.encoder(views[1])))

    model = attached(Noisy())
    trained(model, [2, 2])
    model.noise = 0.1
    with pytest.raises(RuntimeError, match="changed in place"):
        trained(model, [2])
