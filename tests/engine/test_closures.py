"""Several forward passes in one optimizer step, as by SAM and LBFGS: all rebuild the same view."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

import recon_aux
from helpers.data import shaded_views
from helpers.models import InALoop, Siamese, siamese_loss
from helpers.training import fit
from helpers.watching import rebuilt_by
from recon_aux import ReconAux
from recon_aux.integrations.lightly import attach

VIEWS = shaded_views(2)


class SAM(Optimizer):
    """As it is widely copied from github.com/davda54/sam."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        its = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in its]).norm()
        for p in its:
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad * 0.05 / norm)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "old_p" in self.state[p]:
                    p.data = self.state[p].pop("old_p")
        self.base_optimizer.step()
        self.zero_grad()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.base_optimizer.param_groups = self.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        closure = torch.enable_grad()(closure)
        loss = closure()
        self.first_step()
        closure()
        self.second_step()
        return loss


class Lookahead(Optimizer):
    """As it is widely copied: it never calls its base's ``__init__``."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class Custom:
    """An optimizer that isn't one of torch's."""

    def __init__(self, params: Any) -> None:
        self.params = list(params)
        self.param_groups = [{"params": self.params}]

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for p in self.params:
            p -= 0.01 * p.grad


class WithoutHooks(Optimizer):
    """Passes for one of torch's, but never calls its base's ``__init__``."""

    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": list(params)}]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p -= 0.01 * p.grad


class Idle(Custom):
    """Updates weights while one of torch's optimizers has them, too, and is never called."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.idle = SGD(self.params, lr=0.1)


class Exchanged(Idle):
    """Updates weights in place of one of torch's optimizers, which has taken a step before."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.idle.step()


Loss = Callable[[], Tensor]


def closure_of(optimizer: Any, loss: Loss) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def by_hand(optimizer: Any, loss: Loss) -> None:
    loss().backward()
    optimizer.first_step()
    loss().backward()
    optimizer.second_step()


def with_closure(optimizer: Any, loss: Loss) -> None:
    optimizer.step(closure_of(optimizer, loss))


def accumulated(optimizer: Any, loss: Loss) -> None:
    for _ in range(3):
        (loss() / 3).backward()
    optimizer.step()
    optimizer.zero_grad()


def plain(optimizer: Any, loss: Loss) -> None:
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def skipped(optimizer: Any, loss: Loss, scaler: Any) -> None:
    """The first try overflows."""
    for factor in (1e38, 1.0):
        optimizer.zero_grad()
        scaler.scale(loss() * factor).backward()
        scaler.step(optimizer)
        scaler.update()


def compiled(optimizer: Any, loss: Loss) -> None:
    torch.compile(plain, backend="eager")(optimizer, loss)


sgd = partial(SGD, lr=0.01)
sam = partial(SAM, base=SGD, lr=0.01)
STEPS: dict[str, tuple[Any, Any, int]] = {
    "plain": (sgd, plain, 1),
    "AdamW": (partial(AdamW, lr=1e-3, fused=True), plain, 1),
    "SAM by hand": (sam, by_hand, 2),
    "SAM with a closure": (sam, with_closure, 2),
    "LBFGS": (partial(LBFGS, lr=0.01, max_iter=3), with_closure, 3),
    "accumulated": (sgd, accumulated, 3),
    "Lookahead": (lambda its: Lookahead(SGD(its, lr=0.05)), accumulated, 3),
    "a skipped step": (
        sgd, partial(skipped, scaler=torch.amp.GradScaler("cpu", init_scale=4.0)), 2
    ),
    "compiled": (sgd, compiled, 1),
    "not torch's": (Custom, plain, 1),
}  # fmt: skip


def in_turn(steps: int, calls: int, first: int = 0) -> list[tuple[int, ...]]:
    return [((first + step) % 2,) for step in range(steps) for _ in range(calls)]


def drawn(seed: int, steps: int, calls: int) -> list[tuple[int, ...]]:
    each = [Random(f"{seed} {step + 1}").randrange(2) for step in range(steps)]
    return [(view,) for view in each for _ in range(calls)]


class Trained:
    """A model, its optimizer, and the views that were rebuilt so far."""

    def __init__(self, how: str, made: tuple[Any, Any] | None = None, **options: Any) -> None:
        make, self.take_step, self.calls = STEPS[how]
        if made is None:
            model = attach(InALoop(), weight=1.0, **options)
            made = model, make(model.parameters())
        self.model, self.optimizer = made
        self.outputs = rebuilt_by(self.model)

    def forget(self) -> None:
        """Take off what looks at the outputs, which can't be pickled."""
        self.model.recon_aux._forward_hooks.clear()

    def loss(self) -> Tensor:
        z0, z1 = (self.model(view) for view in VIEWS)
        return recon_aux.add_loss(self.model, siamese_loss(z0, z1))

    def steps(self, count: int) -> list[tuple[int, ...]]:
        self.outputs.clear()
        for _ in range(count):
            self.take_step(self.optimizer, self.loss)
        return [output.rebuilt for output in self.outputs]


@pytest.mark.parametrize("how", STEPS)
def test_all_calls_of_a_step_rebuild_the_same_view_and_the_next_step_the_other(how: str) -> None:
    trained = Trained(how)
    assert trained.steps(5) == in_turn(5, trained.calls)


@pytest.mark.parametrize("how", ["plain", "SAM by hand", "LBFGS"])
def test_a_view_is_drawn_once_a_step(how: str) -> None:
    trained = Trained(how, reconstruct="random", seed=5)
    assert trained.steps(12) == drawn(5, 12, trained.calls)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [sgd, sam, partial(LBFGS, lr=0.01, max_iter=3)])
def test_so_it_is_in_lightning(make: Any, accumulate: int) -> None:
    model = attach(Siamese(configure=lambda model: make(model.parameters())))
    outputs = rebuilt_by(model)
    fit(model, max_steps=4, max_epochs=9, accumulate_grad_batches=accumulate)
    rebuilt = [output.rebuilt for output in outputs]
    assert rebuilt == in_turn(4, len(rebuilt) // 4)


def test_where_the_decoder_has_an_optimizer_of_its_own_that_ones_steps_count() -> None:
    encoder, aux = nn.Linear(192, 8), ReconAux(8)
    views = torch.rand(2, 4, 3, 8, 8)
    method, decoder = sam(encoder.parameters()), AdamW(aux.parameters(), lr=1e-3)
    rebuilt = []

    def loss() -> Tensor:
        output = aux(views, [encoder(view.flatten(1)) for view in views])
        rebuilt.append(output.rebuilt)
        return output.loss

    # the encoder is updated twice as often
    for step in range(6):
        by_hand(method, loss)
        if step % 2:
            decoder.step()
            decoder.zero_grad()
    assert rebuilt == in_turn(3, 4)
    # once frozen, it has no steps to wait for
    aux.requires_grad_(False)
    del rebuilt[:]
    for _ in range(4):
        loss()
    assert rebuilt == in_turn(4, 1, first=1)


@pytest.mark.parametrize("make", [WithoutHooks, Idle, Exchanged])
def test_where_another_than_torchs_updates_the_weights_each_call_takes_a_turn(make: Any) -> None:
    model = attach(InALoop(), weight=1.0)
    trained = Trained("plain", (model, make(model.parameters())))
    # the second may be SAM's
    assert trained.steps(7)[1:] == in_turn(6, 1)


def test_another_models_steps_do_not_count() -> None:
    one, other = Trained("accumulated"), Trained("plain")
    for step in range(3):
        for _ in range(2):
            one.loss().backward()
            other.steps(1)
        one.optimizer.step()
        assert [output.rebuilt for output in one.outputs] == in_turn(1, 2, first=step)
        one.outputs.clear()


def test_an_evaluation_between_two_calls_takes_no_turn() -> None:
    trained = Trained("SAM by hand")
    views, features = torch.rand(2, 4, 3, 8, 8), torch.rand(2, 4, 16)
    for step in range(3):
        trained.loss().backward()
        trained.optimizer.first_step()
        with torch.no_grad():
            assert trained.model.recon_aux(views, features).rebuilt == (step % 2,)
        trained.loss().backward()
        trained.optimizer.second_step()
    assert [output.rebuilt for output in trained.outputs[::3]] == in_turn(3, 1)
    assert [output.rebuilt for output in trained.outputs[2::3]] == in_turn(3, 1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("how", ["plain", "accumulated"])
def test_copies_take_turns_of_their_own(how: str, duplicate: Any) -> None:
    trained = Trained(how)
    trained.steps(3)
    # within a step, of which the copy knows nothing
    trained.loss()
    trained.forget()
    copied = Trained(how, duplicate((trained.model, trained.optimizer)))
    assert copied.steps(3) == in_turn(3, copied.calls)
    model = duplicate(trained.model)
    by_call = Trained("not torch's", (model, Custom(model.parameters())))
    assert by_call.steps(4) == in_turn(4, 1)
    trained = Trained(how, (trained.model, trained.optimizer))
    trained.take_step(trained.optimizer, trained.loss)
    assert trained.steps(3) == in_turn(3, trained.calls)


@pytest.mark.parametrize("reconstruct", ["alternate", "random"])
@pytest.mark.parametrize("how", ["plain", "SAM by hand", "SAM with a closure", "accumulated"])
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(how: str, reconstruct: str) -> None:
    whole = Trained(how, reconstruct=reconstruct, seed=3)
    whole.steps(5)
    saved = io.BytesIO()
    torch.save([whole.model.state_dict(), whole.optimizer.state_dict()], saved)
    saved.seek(0)
    resumed = Trained(how, reconstruct=reconstruct, seed=4)
    # it may have been used before
    resumed.loss()
    for part, state in zip((resumed.model, resumed.optimizer), torch.load(saved), strict=True):
        part.load_state_dict(state)
    assert resumed.steps(8) == whole.steps(8)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_step_that_is_taken_back_is_taken_again() -> None:
    trained = Trained("SAM by hand")
    trained.steps(2)
    saved = copy.deepcopy(trained.model.state_dict())
    trained.loss().backward()
    trained.model.load_state_dict(saved)
    trained.optimizer.zero_grad()
    assert trained.steps(3) == in_turn(3, 2)


def test_no_model_is_kept_alive_and_no_optimizer() -> None:
    trained = Trained("SAM by hand")
    trained.steps(2)
    references = [weakref.ref(x) for x in (trained.model.recon_aux, trained.optimizer)]
    del trained
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_a_step_is_named_by_its_number_and_not_by_that_of_its_calls() -> None:
    aux = ReconAux(8)
    optimizer = sam(aux.parameters())
    views, features = torch.rand(2, 4, 3, 8, 8), torch.rand(2, 4, 8)
    for _ in range(3):
        by_hand(optimizer, lambda: aux(views, features).loss)
    with pytest.raises(FloatingPointError, match=r"got nan in step 4;"):
        by_hand(optimizer, lambda: aux(views, features * float("nan")).loss)
