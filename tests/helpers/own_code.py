"""Models as people write them, small, with a switch that puts noise on equivariant channels."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLProjectionHead
from torch import Tensor, nn

from helpers.training import take_steps
from helpers.weights import assert_both_trained, weights_of

WIDTH = 32


class Noise(nn.Module):
    """Puts noise on the last half of the channels, where it is switched on."""

    def __init__(self) -> None:
        super().__init__()
        self.is_on = False

    def forward(self, feature: Tensor) -> Tensor:
        half = feature.shape[1] // 2
        noise = torch.rand_like(feature[:, half:])
        return torch.cat([feature[:, :half], noise], 1) if self.is_on else feature


def encoder(width: int = WIDTH) -> nn.Sequential:
    pooled = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return pooled.append(Noise())


def frozen(module: nn.Module) -> Any:
    return copy.deepcopy(module).requires_grad_(False)


class Trained(nn.Module):
    """A model that a trainer would train."""

    recon_aux: Any

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def views() -> Tensor:
    return torch.rand(4, 3, 32, 32) + 0.05 * torch.rand(2, 4, 3, 32, 32)


def methods_loss(model: Any, batch: Any) -> Tensor:
    """The method's own loss, without the task's."""
    model.recon_aux.weight = 0.0
    return model.training_step(batch, 0).detach()


def sees_noise(model: Any, noise: Any, batch: Any) -> bool:
    """Whether the method's own loss changes with the last channels of a feature."""
    before = methods_loss(model, batch)
    noise.is_on = True
    after = methods_loss(model, batch)
    noise.is_on = False
    return not torch.equal(before, after)


def trains(model: Any, *batches: Any) -> None:
    """A few steps change the encoder and the decoder."""
    before = weights_of(model)
    take_steps(model, model.configure_optimizers(), batches)
    assert_both_trained(model, before)


class BYOL(Trained):
    def __init__(self, online: nn.Module, target: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.online, self.target = online, target.requires_grad_(False)
        self.projector = BYOLProjectionHead(width, 64, 16)
        self.target_projector = frozen(self.projector)
        self.criterion = NegativeCosineSimilarity()
        self.eval()

    def take(self, output: Any) -> Tensor:
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        p = [self.projector(self.take(self.online(x))) for x in batch]
        with torch.no_grad():
            z = [self.target_projector(self.take(self.target(x))) for x in batch]
        return self.criterion(p[0], z[1]) + self.criterion(p[1], z[0])
