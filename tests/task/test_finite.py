"""A loss that isn't finite, or that runs away: at once, or when a GPU has sent it."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from helpers import inside
from helpers.features import smooth_pictures, views_and_features
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
        match=rf"finite loss of the task, got nan in step 1; .*range.* infinity in {where}",
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
    aux(views, features * float("nan"))
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


def test_overflows_that_a_scaler_skips_are_counted_in_a_row() -> None:
    aux = ReconAux(8, target_size=8, registration=0, statistics=0, edges=0)
    views, features = torch.rand(2, 2, 3, 8, 8), torch.rand(2, 2, 8).half()
    for _ in range(2):
        aux(views, features)
        for _ in range(200):
            aux(views, features * float("inf"))
    with pytest.raises(FloatingPointError, match="got nan in step 403"):
        aux(views, features * float("inf"))


# --- a loss that runs away ---

RUNS_AWAY = (
    r"recon_aux: expected a loss, before the weight, below \d+.* in step .* Lower the learning"
)
SGD_WITH_MOMENTUM = partial(SGD, momentum=0.9)


def train(
    make: Any, lr: float, steps: int, decoder_lr: float | None = None, **options: Any
) -> list[str]:
    """Train a small encoder on pictures, until the loss isn't finite, and return the warnings."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 32)
    )
    aux = ReconAux(32, seed=0, **options)
    rates = (encoder, lr), (aux, lr if decoder_lr is None else decoder_lr)
    optimizer = make([{"params": module.parameters(), "lr": rate} for module, rate in rates])
    pictures = smooth_pictures(64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            views = pictures[torch.randint(64, (2, 16))] * (0.5 + torch.rand(2, 16, 1, 1, 1))
            try:
                loss = aux(views, [encoder(view) for view in views]).loss
            except FloatingPointError:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("make", "lr"), [(SGD_WITH_MOMENTUM, 30.0), (AdamW, 1.0), (AdamW, 9.6)])
def test_a_learning_rate_that_is_far_too_high_is_warned_of_once(make: Any, lr: float) -> None:
    (message,) = train(make, lr, 15)
    assert re.match(RUNS_AWAY, message), message
    # what it advises ends it
    assert train(make, lr / 1000, 15) == train(make, lr, 15, decoder_lr=1e-3) == []


@pytest.mark.parametrize(
    "options",
    [
        {"edges": 0},
        {"registration": 0, "statistics": 0, "edges": 0, "weight": 4},
        {"normalize_patches": True, "loss": "smooth_l1"},
        {"structure": 4.0, "reconstruct": "both"},
    ],
)
def test_so_it_is_with_other_options(options: dict[str, Any]) -> None:
    assert len(train(AdamW, 3.0, 12, **options)) == 1
    assert train(AdamW, 1e-3, 10, **options) == []


IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "of whole numbers up to 255": lambda x: (x * 255).round(),
    "near one colour": lambda x: 0.5 + 1e-4 * x,
    "of a high dynamic range": lambda x: 1e3 * x * torch.randn(len(x), 1, 1, 1).mul(2).exp(),
    "blank but a few": lambda x: x * (torch.rand(len(x), 1, 1, 1) > 0.8),
    "of noise": torch.rand_like,
}


@pytest.mark.parametrize("count", [2, 16])
@pytest.mark.parametrize("images", IMAGES)
def test_no_images_are_a_reason_to_warn(images: str, count: int) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        aux = ReconAux(8, seed=seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(10):
                pictures = IMAGES[images](smooth_pictures(2 * count, seed=10 * seed + step))
                views = pictures.view(2, count, *pictures.shape[1:])
                aux(views, 100 * torch.randn(2, count, 8))
        assert caught == []


def test_a_first_batch_that_is_darker_than_the_others_is_warned_of() -> None:
    aux = ReconAux(8, seed=0)
    first, *others = (smooth_pictures(8, seed=seed).view(2, 4, 3, 32, 32) for seed in range(4))
    with pytest.warns(UserWarning, match="first batch was darker or flatter.*shuffle the data"):
        for views in (1e-3 * first, *others):
            aux(views, torch.randn(2, 4, 8))


def magnified(aux: ReconAux) -> ReconAux:
    """With a decoder whose output is far too large."""
    other = copy.deepcopy(aux)
    with torch.no_grad():
        for parameter in other.decoder.parameters():
            parameter.mul_(30)
    return other


@pytest.mark.parametrize("weight", [1e-9, 1.0, 1e9])
def test_a_spike_is_no_reason_to_warn_but_two_high_losses_in_a_row_are(weight: float) -> None:
    views, features = views_and_features()
    # what is far doesn't depend on the weight
    aux = ReconAux(8, weight=weight)
    aux(views, features)
    normal, far = copy.deepcopy(aux.state_dict()), magnified(aux).state_dict()
    # loaded in place, which forgets no earlier loss
    for state in (far, normal, far, normal):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            for name, parameter in aux.named_parameters():
                parameter.copy_(state[name])
            aux(views, features)
    aux = magnified(aux)
    for warns in (False, True, False):
        with warnings.catch_warnings(record=True) as caught:
            aux(views, features)
        assert len(caught) == warns


def test_a_gpus_losses_are_judged_when_they_have_arrived(sent: list[Sent]) -> None:
    views, features = views_and_features()
    aux = ReconAux(8)
    aux(views, features)
    aux = magnified(aux)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            aux(views, features)
    with pytest.warns(UserWarning, match=RUNS_AWAY):
        aux.state_dict()
