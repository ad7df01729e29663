"""The tests' only look behind the public lines: what moves in there is adapted here alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recon_aux import ReconAux
from recon_aux.engine.autograd import reached
from recon_aux.engine.hooks import MethodHook
from recon_aux.task import finite
from recon_aux.task.calibration import ChannelWhitening, color_axes
from recon_aux.task.terms.edges import Edges
from recon_aux.task.terms.prediction import LinearReadout
from recon_aux.task.terms.prediction import PredictionTerm as TermOfNumbers
from recon_aux.task.terms.reconstruction import resize_view
from recon_aux.task.terms.registration import Registration as RegistrationOfPoses
from recon_aux.task.terms.registration import likeness, motions
from recon_aux.task.terms.statistics import Statistics

__all__ = [
    "ChannelWhitening",
    "Edges",
    "Late",
    "LinearReadout",
    "MethodHook",
    "PredictionTerm",
    "Registration",
    "Statistics",
    "color_axes",
    "feature_of_poses",
    "has_units",
    "hooked",
    "likeness",
    "motions",
    "options_in_section",
    "reached",
    "readout_of",
    "resize_view",
    "send_by",
    "send_late",
    "shift_read_from",
    "take_units_of",
    "units_are_set",
    "whitening_of",
]


def hooked(*models: nn.Module) -> list[str]:
    """The names of the modules of which a method is stood in for."""
    return [
        name
        for model in models
        for name, module in model.named_modules()
        if any(isinstance(value, MethodHook) for value in vars(module).values())
    ]


def whitening_of(aux: ReconAux) -> ChannelWhitening:
    """What brings the views' pixels to a unit of their own."""
    return aux.pixel_scale


def readout_of(aux: ReconAux, term: str) -> LinearReadout:
    """The linear map of a term."""
    readout: LinearReadout = getattr(aux, term).readout
    return readout


def has_units(target: Any) -> bool:
    """Whether a batch has set the units of what a term asks for."""
    return target.calibrated


def units_are_set(aux: ReconAux) -> list[bool]:
    """Whether there are units yet: of the pixels, of the statistics, of the edges."""
    assert aux.statistics is not None
    assert aux.edges is not None
    targets = aux.pixel_scale, aux.statistics.told, aux.edges.told
    return [has_units(target) for target in targets]


def take_units_of(aux: ReconAux, other: Any) -> None:
    """Measure in another's units, which are those of its first batch."""
    aux.pixel_scale = other.pixel_scale
    for term in ("statistics", "edges"):
        getattr(aux, term).told = getattr(other, term).told


class Registration(RegistrationOfPoses):
    """Registration that reads the poses from features itself."""

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        """Compare each view with the other one, moved."""
        return super().forward(self.readout(features), images)


class PredictionTerm(TermOfNumbers):
    """A term that reads the numbers from features itself."""

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        """Compare the prediction with the views' own numbers."""
        return super().forward(self.readout(features), images)


def feature_of_poses(registration: RegistrationOfPoses, *poses: list[float]) -> Tensor:
    """Features of which the registration reads these poses, as it is set to."""
    features = torch.eye(6)[: len(poses)]
    normalized = nn.functional.layer_norm(features, (6,), eps=1e-3)
    wanted = torch.atanh(torch.tensor(poses)) / 0.3
    with torch.no_grad():
        registration.pose.linear.weight.copy_((torch.linalg.pinv(normalized) @ wanted).T)
    return features


def shift_read_from(registration: RegistrationOfPoses, feature: Tensor) -> Tensor:
    """How far to the right the registration takes each view to be moved."""
    return torch.tanh(0.3 * registration.pose(feature))[:, 4]


def options_in_section(section: Any) -> dict[str, Any]:
    """What solo-learn's models are attached with where its config has this section."""
    from recon_aux.integrations.solo_learn import _options  # noqa: PLC0415

    return _options(section)


class Late:
    """Numbers on their way from a GPU, which arrive when they are waited for."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = torch.full_like(numbers, 0)
        self.sent = numbers
        self.arrived = False

    def query(self) -> bool:
        """Whether they have arrived, without waiting."""
        return self.arrived

    def synchronize(self) -> None:
        """Wait for them."""
        self.arrived = True
        self.numbers.copy_(self.sent)


def send_late(monkeypatch: pytest.MonkeyPatch) -> list[Late]:
    """Let the numbers that show whether a loss is finite arrive late, and list them."""
    late: list[Late] = []

    def send(numbers: Tensor) -> tuple[Tensor, Late]:
        late.append(Late(numbers))
        return late[-1].numbers, late[-1]

    send_by(monkeypatch, send)
    return late


def send_by(monkeypatch: pytest.MonkeyPatch, send: Callable[[Tensor], Any]) -> None:
    """Let the numbers that tell whether a loss is finite go another way than a CPU's."""
    monkeypatch.setattr(finite, "_send", send)
