"""No tensor of a step outlives it."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy
import psutil
import pytest
import torch
from torch import Tensor

import recon_aux
from helpers.data import batch
from helpers.methods import CopiedInTheStep
from helpers.models import InALoop, Siamese, siamese_loss
from helpers.watching import alive, seen_by
from recon_aux.integrations.lightly import attach


def step_of(model: Any) -> Any:
    if isinstance(model, Siamese):
        return lambda views: model.training_step((views, None), 0)
    return lambda views: recon_aux.add_loss(model, siamese_loss(*(model(view) for view in views)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Siamese, InALoop])
def test_two_hundred_steps_do_not_grow_the_process(kind: type[Any]) -> None:
    model = attach(kind(), reconstruct="random")
    step = step_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    process = psutil.Process()
    shape = (2, 32, 3, 64, 64)
    resident, tensors = [], []
    # what other tests left would go meanwhile
    gc.collect()
    for index in range(200):
        views = list(torch.rand(shape))
        optimizer.zero_grad()
        step(views).backward()
        optimizer.step()
        if index >= 50 and index % 10 == 0:
            resident.append(process.memory_info().rss)
            tensors.append(sum(issubclass(type(x), Tensor) for x in gc.get_objects()))
    size_of_a_view = torch.empty(shape).nbytes / 2
    steps = 10 * numpy.arange(len(resident))
    # one small tensor kept in each step would be a slope of 1, one view of size_of_a_view
    assert abs(numpy.polyfit(steps, tensors, 1)[0]) < 0.05
    assert numpy.polyfit(steps, resident, 1)[0] < size_of_a_view / 20


def test_a_step_that_fails_keeps_nothing() -> None:
    model = attach(Siamese())
    seen, masked = seen_by(model.backbone), seen_by(model.projection_head.layers)

    def fail(*args: Any) -> None:
        raise KeyError("in the middle of a step")

    model.criterion.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        model.training_step(batch(), 0)
    assert len(seen) == len(masked) == 4
    assert alive(seen) == alive(masked) == 0
    # nor does what goes through it afterwards stay
    model(torch.rand(4, 3, 16, 16))
    assert len(seen) == len(masked) == 6
    assert alive(seen) == alive(masked) == 0


def test_a_reconstruction_that_fails_keeps_nothing() -> None:
    for model in (attach(Siamese()), attach(InALoop())):
        seen = seen_by(model.backbone)
        views = [torch.full((4, 3, 16, 16), float("nan")), torch.rand(4, 3, 16, 16)]
        with pytest.raises(FloatingPointError):
            step_of(model)(views)
        del views
        assert alive(seen) == 0


@pytest.mark.parametrize("kind", [Siamese, InALoop])
def test_an_evaluation_between_steps_keeps_nothing(kind: type[Any]) -> None:
    model = attach(kind())
    seen = seen_by(model.backbone)
    for _ in range(2):
        step_of(model)(batch()[0]).backward()
        model.eval()
        with torch.no_grad():
            model(torch.rand(4, 3, 16, 16))
        model.train()
        assert alive(seen) == 0
    assert len(seen) == 12


def test_a_loops_step_that_fails_keeps_nothing_past_the_next() -> None:
    model = attach(InALoop())
    seen = seen_by(model.backbone)
    views = batch()[0]
    model(views[0])
    for _ in range(2):
        step_of(model)(batch()[0]).backward()
        del views[:]
        assert alive(seen) == 0


def test_an_evaluation_with_gradient_keeps_little() -> None:
    model = attach(InALoop())
    seen = seen_by(model.backbone)
    masked = seen_by(model.projection_head.layers)
    model.eval()
    for _ in range(100):
        model(torch.rand(2, 3, 16, 16)).sum().backward()
    assert alive(seen) <= 2 * 32
    assert alive(masked) <= 2 * 32
    model.train()
    step_of(model)(batch()[0]).backward()
    assert alive(seen) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: model])
def test_a_momentum_encoder_that_was_replaced_is_let_go(copied: Any) -> None:
    model: Any = copied(attach(CopiedInTheStep()))
    replaced = []
    for index in range(13):
        replaced.append(weakref.ref(model.backbone_momentum))
        model.training_step(model.batch(), index).backward()
    gc.collect()
    known = {id(encoder()) for encoder in replaced if encoder() is not None}
    assert known == {id(model.backbone_momentum)}
