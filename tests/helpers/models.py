"""Encoders and the smallest models: with a training step, without, without Lightning."""

from __future__ import annotations

from typing import Any

import pytorch_lightning
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity


def tiny_encoder(channels: int = 3, dim: int = 16, *, dropout: float = 0.0) -> nn.Sequential:
    """Convolutions, batch norm and a pooled map (B, dim, 1, 1), as a cut-off ResNet gives."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(8, dim, 3, 2, 1),
        nn.AdaptiveAvgPool2d(1),
    )


def plain_encoder(dim: int = 16) -> nn.Sequential:
    """Without batch norm, so that a batch may be divided."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, dim, 3, 2, 1), nn.AdaptiveAvgPool2d(1)
    )


class Siamese(pytorch_lightning.LightningModule):
    """A loss of each pair alone, so that a batch may be divided; no batch norm by default.

    It can be pickled and sent to other processes.
    """

    def __init__(self, encoder: nn.Module | None = None, *, configure: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone: Any = plain_encoder() if encoder is None else encoder
        self.projection_head = SimCLRProjectionHead(16, 32, 8, num_layers=1, batch_norm=False)
        self.criterion = NegativeCosineSimilarity()
        self.configure = configure

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).flatten(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z0, z1 = (self(view) for view in batch[0])
        return self.criterion(z0, z1.detach()) / 2 + self.criterion(z1, z0.detach()) / 2

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        z0, z1 = (self(view) for view in batch[0])
        self.log("similarity", cosine_similarity(z0, z1).mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0][0])

    def configure_optimizers(self) -> Any:
        if self.configure is not None:
            return self.configure(self)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class InALoop(nn.Module):
    """The same without training step: the loop, the criterion and the optimizer are the user's."""

    def __init__(self, encoder: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone: Any = plain_encoder() if encoder is None else encoder
        self.projection_head = SimCLRProjectionHead(16, 32, 8, num_layers=1, batch_norm=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).flatten(1))


def siamese_loss(z0: Tensor, z1: Tensor) -> Tensor:
    """What Siamese trains on."""
    criterion = NegativeCosineSimilarity()
    return criterion(z0, z1.detach()) / 2 + criterion(z1, z0.detach()) / 2


class PlainMethod(nn.Module):
    """The least that trains as a LightningModule does."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone: Any = tiny_encoder()
        self.projection_head = SimCLRProjectionHead(16, 32, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        z0, z1 = (self.projection_head(self.backbone(x).flatten(1)) for x in batch[0])
        return (z0 - z1).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def plain_method(**replaced: Any) -> Any:
    """A PlainMethod, some of whose methods are others."""
    return type("PlainMethod", (PlainMethod,), replaced)()


class InADict(nn.Module):
    """An encoder whose feature stands in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = tiny_encoder()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"pooled": self.encoder(x)}
