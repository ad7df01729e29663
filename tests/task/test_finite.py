"""A loss that is not finite: at once, or when a GPU has sent it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor

from helpers import inside
from helpers.features import views_and_features
from recon_aux import ReconAux


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("broken", "where"), [("view", "the data"), ("feature", "the encoder")])
def test_a_loss_that_is_not_finite_is_named_with_what_went_in(
    broken: str, where: str, which: int
) -> None:
    views, features = views_and_features()
    (views if broken == "view" else features)[which, 0] = float("nan")
    with pytest.raises(
        FloatingPointError,
        match=rf"finite reconstruction loss, got nan in step 1; .*range.* infinity in {where}",
    ):
        ReconAux(8)(views, features)


class Sent:
    """Numbers on their way from a GPU, which arrive when they are told to."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers.clone().fill_(float("nan"))
        self.there = numbers
        self.arrived = False

    def query(self) -> bool:
        if self.arrived:
            self.numbers.copy_(self.there)
        return self.arrived

    def synchronize(self) -> None:
        self.arrived = True
        assert self.query()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Sent]:
    sent: list[Sent] = []

    def send(numbers: Tensor) -> tuple[Tensor, Sent]:
        sent.append(Sent(numbers))
        return sent[-1].numbers, sent[-1]

    inside.send_by(monkeypatch, send)
    return sent


def test_a_loss_that_is_not_finite_is_told_when_a_gpu_has_sent_it(sent: list[Sent]) -> None:
    views, features = views_and_features()
    aux = ReconAux(8)
    aux(views, features)
    aux(views, [features[0], features[1] * float("nan")])
    sent[0].arrived = True
    copied = copy.deepcopy(aux)
    aux(views, features)
    sent[1].arrived = True
    with pytest.raises(FloatingPointError, match=r"got nan in step 2; .* and nan to nan\. Look"):
        aux(views, features)
    # nor is it told again, or in a copy
    for model in (aux, copied):
        model(views, features)
        model.state_dict()


def test_it_is_told_before_weights_are_saved(sent: list[Sent]) -> None:
    views, features = views_and_features()
    aux = ReconAux(8)
    saved = aux.state_dict()
    aux(views, features * float("nan"))
    with pytest.raises(FloatingPointError, match=r"got nan in step 1; "):
        aux.state_dict()
    # a step that was taken back is forgotten
    for state in (saved, {"recon_aux." + key: value for key, value in saved.items()}, {}):
        model = torch.nn.ModuleDict({"recon_aux": aux}) if state is not saved else aux
        aux(views, features * float("nan"))
        with warnings.catch_warnings():
            # of a bare model's
            warnings.simplefilter("ignore")
            model.load_state_dict(state)
    aux(views, features)
    aux.state_dict()
    assert all(step.arrived for step in sent[-1:])
