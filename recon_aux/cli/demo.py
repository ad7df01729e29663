"""SimCLR on scikit-learn's digits: trained bare, and with recon_aux attached."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import recon_aux
from recon_aux.cli.images import parse_normalization
from recon_aux.probe import draw_parameters, transform

NORMALIZE = parse_normalization("0.5,0.25")
_BATCH = 128


class SimCLR(nn.Module):
    """SimCLR with a ResNet-18 for small images, half as wide.

    Example:
        >>> SimCLR()(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 128])
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 32, 3, 2, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        ]
        for n, m in [(32, 32), (32, 64), (64, 128), (128, 256)]:
            shortcut = [nn.Conv2d(n, m, 1, 2, bias=False), nn.BatchNorm2d(m)] if n < m else []
            layers += [BasicBlock(n, m, m // n, nn.Sequential(*shortcut)), BasicBlock(m, m)]
        self.backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projection_head = nn.Sequential(
            nn.Linear(256, 512, bias=False),
            nn.BatchNorm1d(512),
            nn.ReLU(),
            nn.Linear(512, 128, bias=False),
            nn.BatchNorm1d(128),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Project images."""
        projected: Tensor = self.projection_head(self.backbone(x))
        return projected


def train(model: SimCLR, images: Tensor, epochs: int, bar: Progress, name: str) -> SimCLR:
    """Train a model, bare or attached, on two views of each image."""
    steps = epochs * (len(images) // _BATCH)
    task = bar.add_task(name, total=steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    # 0.1 divides by zero in ten steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, max(steps, 1), pct_start=0.101)
    device = next(model.parameters()).device
    model.train()
    for batch in _batches(images, epochs):
        x0, x1 = (
            NORMALIZE(transform(batch.to(device), draw_parameters(len(batch)))) for _ in range(2)
        )
        loss = nt_xent(model(x0), model(x1))
        if recon_aux.is_attached(model):
            loss = recon_aux.add_loss(model, loss)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        bar.advance(task)
    return model


def nt_xent(z0: Tensor, z1: Tensor, temperature: float = 0.2) -> Tensor:
    """Compute SimCLR's loss: which of all other views is the same image's?

    Example:
        >>> z = torch.eye(4)
        >>> bool(nt_xent(z, z) < nt_xent(z, z.flip(0)))
        True
    """
    z = F.normalize(torch.cat([z0, z1]))
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z), device=z.device).roll(len(z0)))


def _batches(images: Tensor, epochs: int) -> Iterator[Tensor]:
    for _ in range(epochs):
        rows = torch.randperm(len(images))[: len(images) // _BATCH * _BATCH]
        for some in rows.view(-1, _BATCH):
            yield images[some].float() / 255
