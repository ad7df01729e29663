"""What is logged of each step, and what it says about the two losses."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import recon_aux
from helpers.data import batch, shaded_views
from helpers.methods import METHODS, Method
from helpers.models import InALoop, Siamese, plain_method, siamese_loss
from helpers.training import fit
from recon_aux.integrations.lightly import attach

TERMS = ("reconstruction", "registration", "statistics", "edges")
VIEWS = shaded_views(2, side=16)


def one_step(model: Any, by: float = 1.0) -> tuple[Tensor, Tensor]:
    """The method's loss of a step in a loop, and the total, after its backward pass."""
    loss = by * siamese_loss(*(model(view) for view in VIEWS))
    total = recon_aux.add_loss(model, loss)
    total.backward()
    return loss.detach(), total.detach()


def values_of(model: Any) -> dict[str, float]:
    return {name.split("/")[1]: float(x) for name, x in recon_aux.logs(model).items()}


def test_the_terms_are_those_of_the_loss() -> None:
    model = attach(InALoop(), weight=0.5)
    options = model.recon_aux.options
    loss, total = one_step(model)
    found = values_of(model)
    weights = [1, *(options[name] for name in TERMS[1:])]
    terms = sum(found[name] * weight for name, weight in zip(TERMS, weights, strict=True))
    assert found["loss"] == pytest.approx(terms, rel=1e-5)
    assert found["loss"] == pytest.approx(float(total - loss) / 0.5, rel=1e-5)
    share = float((total - loss) / ((total - loss) + loss.abs()))
    assert found["share"] == pytest.approx(share, rel=1e-5)


def test_terms_without_weight_are_left_out() -> None:
    model = attach(InALoop(), weight=1.0, edges=0, statistics=0)
    one_step(model)
    assert {*values_of(model)} == {"loss", "reconstruction", "registration", "share"}


def test_the_share_of_a_loss_below_zero_is_a_share() -> None:
    model = attach(InALoop(), weight=0.2)
    loss, _ = one_step(model, by=1e3)
    assert loss < -100
    assert 0 < values_of(model)["share"] < 0.1


def by_hand(method: type[Method], given: Any, **options: Any) -> float:
    """The ratio by two backward passes, of the whole loss and of the method's alone."""
    torch.manual_seed(0)
    model: Any = attach(method(), seed=0, **options)
    encoder = model.get_submodule(model.trained)
    outputs: list[Tensor] = []
    encoder.register_forward_hook(lambda _, __, y: outputs.append(y))
    gradients = []
    for weight in (options["weight"], 0.0):
        outputs.clear()
        torch.manual_seed(1)
        model.recon_aux.weight = weight
        loss = model.training_step(given, 0)
        its = [output for output in outputs if output.requires_grad]
        found = torch.autograd.grad(loss, its, allow_unused=True)
        gradients.append(torch.cat([x.flatten() for x in found if x is not None]))
    both, bare = gradients
    return float((both - bare).norm() / bare.norm())


@pytest.mark.parametrize("method", METHODS[:4], ids=lambda method: method.__name__)
@pytest.mark.parametrize("options", [{}, {"equivariant_dim": 0}], ids=["split", "whole"])
def test_the_ratio_is_that_of_two_backward_passes(
    method: type[Method], options: dict[str, Any]
) -> None:
    options = {"weight": 0.7, "reconstruct": "both", **options}
    torch.manual_seed(0)
    model: Any = attach(method(), seed=0, **options)
    given = model.batch()
    expected = by_hand(method, given, **options)
    torch.manual_seed(1)
    model.training_step(given, 0).backward()
    model.training_step(given, 1)
    assert values_of(model)["gradient_ratio"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_ratio_is_the_same_where_views_are_encoded_at_once(interleaved: bool) -> None:
    ratios = []
    for at_once in (False, True):
        model = attach(InALoop(), weight=1.0, seed=0, interleaved=interleaved)
        for _ in range(2):
            if not at_once:
                z = [model(view) for view in VIEWS]
            elif interleaved:
                z = list(model(torch.stack(VIEWS, 1).flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1))
            else:
                z = list(model(torch.cat(VIEWS)).chunk(2))
            recon_aux.add_loss(model, siamese_loss(*z), VIEWS).backward()
        ratios.append(values_of(model)["gradient_ratio"])
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-4)


def test_the_ratio_follows_the_weight() -> None:
    found = []
    for weight in (1.0, 3.0):
        model = attach(InALoop(), weight=weight, seed=0)
        for _ in range(2):
            one_step(model)
        found.append(values_of(model)["gradient_ratio"])
    assert found[1] == pytest.approx(3 * found[0], rel=1e-4)


def test_where_a_feature_is_made_of_the_output_no_ratio_is_given() -> None:
    model = InALoop(torch.nn.Conv2d(3, 16, 8, 8))
    recon_aux.attach(
        model,
        backbone="backbone",
        heads=[],
        equivariant_dim=0,
        weight=1.0,
        features=lambda y: y.mean((2, 3)),
    )
    for _ in range(2):
        z0, z1 = (model.projection_head(model.backbone(x).mean((2, 3))) for x in VIEWS)
        recon_aux.add_loss(model, siamese_loss(z0, z1)).backward()
    assert "gradient_ratio" not in values_of(model)


@pytest.mark.parametrize("log", [True, False])
def test_measuring_changes_no_gradient(log: bool) -> None:
    gradients = []
    for is_logged in (log, False):
        model = attach(InALoop(), weight=1.0, seed=0, log=is_logged)
        for _ in range(3):
            one_step(model)
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is None or torch.equal(one, other)


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value is read, for which a GPU would be waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_value_is_read_for_the_log() -> None:
    def reads(log: bool) -> int:
        names: list[str] = []
        trainer = SimpleNamespace(training=True)
        given = {"log": lambda self, name, *_, **__: names.append(name), "trainer": trainer}
        model = attach(plain_method(**given), weight=1.0, log=log)
        with Reads() as found:
            for index in range(3):
                model.training_step(batch(), index).backward()
        assert ("recon_aux/gradient_ratio" in names) == log
        return found.count

    assert reads(True) == reads(False) > 0


def test_a_trainer_logs_all_of_it_and_the_loss_in_each_step() -> None:
    logged: list[str] = []

    class Noting(Siamese):
        def log(self, name: str, *given: Any, **options: Any) -> None:
            logged.append(name)
            super().log(name, *given, **options)

    model = attach(Noting(), weight=1.0)
    trained = fit(model, max_steps=12, max_epochs=-1)
    expected = {f"recon_aux/{x}" for x in ("loss", "share", "gradient_ratio", *TERMS)}
    assert expected == {x for x in trained.callback_metrics if x.startswith("recon_aux")}
    assert logged.count("recon_aux/loss") == 12
    # the first, that which knows the ratio, and every tenth
    assert logged.count("recon_aux/edges") == 3


def test_with_an_automatic_weight_the_ratio_is_of_the_weight_that_was_set() -> None:
    model = attach(Siamese(), weight="auto")
    given = batch(4, side=16)
    for index in range(4):
        model.training_step(given, index).backward()
        assert ("gradient_ratio" in values_of(model)) == (index >= 2)
    assert values_of(model)["weight"] == model.recon_aux.weight


def test_log_false_logs_nothing() -> None:
    model = attach(Siamese(), log=False)
    trained = fit(model)
    assert not [name for name in trained.callback_metrics if name.startswith("recon_aux")]
    assert recon_aux.logs(model) == {}


def test_a_bare_model_has_no_numbers() -> None:
    with pytest.raises(ValueError, match=r"expected a model that attach\(\) returned"):
        recon_aux.logs(InALoop())


def test_copies_in_between_have_none_and_go_on() -> None:
    model = attach(InALoop(), weight=1.0)
    one_step(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert recon_aux.logs(again) == {}
        one_step(again)
        assert values_of(again)["loss"] > 0
