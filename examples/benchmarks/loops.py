"""Two kinds of training loop, to measure what attaching costs: Lightning's, and one by hand."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
from lightly.models.utils import update_momentum
from pytorch_lightning import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.arms import parse_options
from benchmarks.encoders import build_encoder, small_resnet18, width_of
from benchmarks.methods import METHODS
from benchmarks.resuming import trained_on
from recon_aux import add_loss
from recon_aux.integrations.lightly import attach

# encoder and side of its images, in pixels
MODELS: dict[str, tuple[str, int]] = {
    "ResNet-50, 224": ("resnet50", 224),
    "ViT-S/16, 224": ("vit-small", 224),
    "ResNet-18, 64": ("small-resnet18", 64),
    "ResNet-18, 32": ("small-resnet18", 32),
    "tiny ResNet-18, 32": ("tiny-resnet18", 32),
}
# steps at the start of each round that aren't counted
WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """What is trained."""

    model: str
    method: str = "SimCLR"
    batch_size: int = 32
    image_size: int = 0
    # of ResNet-18's first stage, to grow its feature
    width: int = 0
    # small ones, half as large, next to the two views
    crops: int = 0
    # of attach
    options: str = ""

    @property
    def side(self) -> int:
        """Height and width of the images."""
        return self.image_size or MODELS[self.model][1]

    def build(self, *, attached: bool, in_lightning: bool) -> Any:
        """Make the model, bare or attached, with the same weights."""
        torch.manual_seed(0)
        name = MODELS[self.model][0]
        encoder = small_resnet18(self.width, stride=2) if self.width else build_encoder(name)
        encoder.to(memory_format=torch.channels_last)
        method = METHODS[self.method](encoder, width_of(encoder, self.side), 1e-3)
        model = method if in_lightning else InALoop(method)
        return attach(model, **parse_options(self.options)) if attached else model

    def views(self, device: torch.device) -> list[Tensor]:
        """Draw random images."""
        sides = [self.side] * 2 + [self.side // 2] * self.crops
        shapes = [(self.batch_size, 3, side, side) for side in sides]
        images = (torch.randn(shape).to(device) for shape in shapes)
        return [image.contiguous(memory_format=torch.channels_last) for image in images]


class InALoop(nn.Module):
    """A method's modules without Lightning."""

    backbone: nn.Module
    projection_head: nn.Module
    criterion: nn.Module
    # BYOL's alone
    prediction_head: nn.Module
    backbone_momentum: nn.Module
    projection_head_momentum: nn.Module

    def __init__(self, method: Any) -> None:
        super().__init__()
        for name, module in method.named_children():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.projection_head(self.backbone(x).flatten(1))
        return embedding

    def loss(self, views: list[Tensor]) -> Tensor:
        """Compare every view with the first, BYOL both ways with the momentum encoder."""
        embeddings = [self(view) for view in views]
        if not hasattr(self, "backbone_momentum"):
            losses = [self.criterion(embeddings[0], other) for other in embeddings[1:]]
            return torch.stack(losses).mean()
        with torch.no_grad():
            for name in ("backbone", "projection_head"):
                momentum = self.get_submodule(f"{name}_momentum")
                update_momentum(self.get_submodule(name), momentum, m=0.99)
            targets = [
                self.projection_head_momentum(self.backbone_momentum(view).flatten(1))
                for view in views[:2]
            ]
        one, other = (self.prediction_head(embedding) for embedding in embeddings[:2])
        loss: Tensor = (self.criterion(one, targets[1]) + self.criterion(other, targets[0])) / 2
        return loss


class OwnLoop:
    """A training loop by hand."""

    def __init__(self, case: Case, args: argparse.Namespace, *, attached: bool) -> None:
        self.device = trained_on(args)
        self.model = case.build(attached=attached, in_lightning=False).to(self.device)
        self.views = case.views(self.device)
        self.bf16 = args.precision == "bf16-mixed"
        self.attached = attached
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)

    def warm_up(self) -> None:
        """Take the steps that don't count: the first one also makes all checks."""
        for _ in range(WARM_UP):
            self.step()

    def loss(self) -> Tensor:
        """Give the loss of one step."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss: Tensor = self.model.loss(self.views)
            return add_loss(self.model, loss) if self.attached else loss

    def step(self) -> None:
        """Train for one step."""
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def seconds(self, steps: int) -> float:
        """Measure how long a step takes, after those that don't count."""
        self.warm_up()
        started = now(self.device)
        for _ in range(steps):
            self.step()
        return (now(self.device) - started) / steps


class LightningLoop(Callback):
    """Lightning's training loop."""

    def __init__(self, case: Case, args: argparse.Namespace, *, attached: bool) -> None:
        self.model = case.build(attached=attached, in_lightning=True)
        self.args = args
        self.device = trained_on(args)
        self.batch = case.views(self.device), torch.zeros(case.batch_size)

    def seconds(self, steps: int) -> float:
        """Measure how long a step takes, after those that don't count."""
        batches: Any = [self.batch] * (WARM_UP + steps)
        Trainer(
            max_epochs=1,
            precision=self.args.precision,
            accelerator=self.device.type,
            devices=1,
            logger=False,
            callbacks=[self],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        ).fit(self.model, DataLoader(batches, batch_size=None))
        return (self.ended - self.started) / steps

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
        """Start the watch when warm."""
        if batch_idx == WARM_UP:
            self.started = now(self.device)

    def on_train_batch_end(
        self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the watch after the last step."""
        if batch_idx == trainer.num_training_batches - 1:
            self.ended = now(self.device)


def now(device: torch.device) -> float:
    """Give the time, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
