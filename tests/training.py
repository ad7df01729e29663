"""A method that can be pickled and sent to other processes, and ways to train it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader, Dataset

TESTS = Path(__file__).parent


class Views(Dataset[Any]):
    """Pairs of views, the same for each index, whatever was drawn before."""

    def __init__(self, size: int = 16, side: int = 16) -> None:
        self.size, self.side = size, side

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        generator = torch.Generator().manual_seed(index)
        return list(torch.rand(2, 3, self.side, self.side, generator=generator)), index % 4


def views_of_a_batch(count: int = 8) -> list[Tensor]:
    """Two views of the first images."""
    pairs = [Views()[index][0] for index in range(count)]
    return [torch.stack([pair[i] for pair in pairs]) for i in (0, 1)]


class Siamese(pytorch_lightning.LightningModule):
    """A loss of each pair alone, so that a batch may be divided; no batch norm by default."""

    def __init__(self, encoder: nn.Module | None = None, *, configure: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = plain_encoder() if encoder is None else encoder
        self.projection_head = SimCLRProjectionHead(16, 32, 8, num_layers=1, batch_norm=False)
        self.criterion = NegativeCosineSimilarity()
        self.configure = configure

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.projection_head(self.backbone(x).flatten(1))
        return z

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z0, z1 = (self(view) for view in batch[0])
        loss: Tensor = self.criterion(z0, z1.detach()) / 2 + self.criterion(z1, z0.detach()) / 2
        return loss

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
    """The same without training step."""

    def __init__(self, encoder: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = plain_encoder() if encoder is None else encoder
        self.projection_head = SimCLRProjectionHead(16, 32, 8, num_layers=1, batch_norm=False)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.projection_head(self.backbone(x).flatten(1))
        return z


def siamese_loss(z0: Tensor, z1: Tensor) -> Tensor:
    """What Siamese trains on."""
    criterion = NegativeCosineSimilarity()
    loss: Tensor = criterion(z0, z1.detach()) / 2 + criterion(z1, z0.detach()) / 2
    return loss


def plain_encoder(dim: int = 16) -> nn.Module:
    """Without batch norm, so that a batch may be divided."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, dim, 3, 2, 1), nn.AdaptiveAvgPool2d(1)
    )


def trainer(package: Any = pytorch_lightning, **options: Any) -> Any:
    """A quiet trainer of either package, on the CPU."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": 3,
    }
    return package.Trainer(**{**quiet, **options})


def fit(
    model: Any, package: Any = pytorch_lightning, *, ckpt_path: Path | None = None, **options: Any
) -> Any:
    """Train for a few steps, of four pairs of views each."""
    trained = trainer(package, **options)
    trained.fit(model, DataLoader(Views(), batch_size=4), ckpt_path=ckpt_path)
    return trained


def fail_once(monkeypatch: pytest.MonkeyPatch, method: Any, at: int) -> list[int]:
    """Let a method's so-manyth training step fail; list the steps that are begun."""
    step = method.training_step
    begun: list[int] = []

    def training_step(model: Any, batch: Any, index: int) -> Any:
        begun.append(model.trainer.global_step)
        if len(begun) == at:
            raise OSError("the power went")
        return step(model, batch, index)

    monkeypatch.setattr(method, "training_step", training_step)
    return begun


def decoder_of(model: Any) -> dict[str, Tensor]:
    """The weights that we add, as they are now."""
    return {name: p.detach().clone() for name, p in model.recon_aux.named_parameters()}


def assert_trained(model: Any, before: dict[str, Tensor]) -> None:
    """Each of the weights that we add has changed, and is finite."""
    for name, parameter in model.recon_aux.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert not torch.equal(parameter, before[name]), name


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Both have the same names, and by each the same tensor, bit for bit, or the same value."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]
        same = torch.equal(other, value) if isinstance(value, Tensor) else other == value
        assert same, name


def run_script(
    name: str, *arguments: Any, launcher: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run one of tests/scripts to its end, which a deadlock wouldn't come to."""
    return _run(*launcher, TESTS / "scripts" / name, *arguments)


def rows(text: str) -> list[list[str]]:
    """Give the cells of a text's tables, without the lines that part head and body."""
    lines = [line.strip().strip("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [row for row in cells if set("".join(row)) != {"-"}]


def run_example(name: str, *arguments: Any) -> None:
    """Run one of the examples, which must succeed."""
    result = _run(TESTS.parent / "examples" / name, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]


def _run(*command: Any) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
    }
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
