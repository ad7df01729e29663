"""Ways to train, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning
import torch
from lightly.utils.lars import LARS
from torch import Tensor
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import DataLoader

import recon_aux
from helpers.data import Views, batch
from helpers.models import InALoop, Siamese, siamese_loss, tiny_encoder
from helpers.weights import bare_state
from recon_aux.integrations.lightly import attach


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
    model: Any,
    package: Any = pytorch_lightning,
    *,
    side: int = 16,
    shuffle: bool = False,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Any:
    """Train for a few steps, of four pairs of views each."""
    trained = trainer(package, **options)
    data = DataLoader(Views(side=side), batch_size=4, shuffle=shuffle)
    trained.fit(model, data, ckpt_path=ckpt_path)
    return trained


def take_steps(model: Any, optimizer: Any, batches: Iterable[Any], step: Any = None) -> None:
    """Steps by hand, each on a batch. Their losses are finite."""
    for given in batches:
        loss = model.training_step(given, 0) if step is None else step(model, given)
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def losses_in(step: Any, model: Any, count: int) -> list[Tensor]:
    """The losses of some steps by hand, on the same batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(count):
        loss = step(batch(4, side=16), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def scaled_step(
    model: InALoop, optimizer: Any, scaler: Any, views: list[Tensor], magnify: float = 1.0
) -> Tensor:
    """One step in a loop, in fp16 with loss scaling."""
    optimizer.zero_grad()
    with torch.autocast(views[0].device.type, torch.float16):
        z0, z1 = (model(view) for view in views)
        loss = recon_aux.add_loss(model, magnify * siamese_loss(z0, z1))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss


# --- for neutrality: the same training, with the model changed before ---

DECAYING_OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "Adam": partial(Adam, lr=1e-2),
    "AdamW": partial(AdamW, lr=1e-2),
    "LARS": partial(LARS, lr=0.05, momentum=0.9, weight_decay=1e-3),
}


def off(model: Any) -> Any:
    return attach(model, weight=0, equivariant_dim=0)


def on_and_off_again(model: Any) -> Any:
    return recon_aux.detach(attach(model))


def all_after_training(
    change: Callable[[Any], Any],
    optimizer: str,
    precision: Any,
    dropout: float,
    accelerator: str = "cpu",
) -> dict[str, Tensor]:
    """Weights, the optimizer's state and the random state, without what we add."""
    torch.manual_seed(0)
    encoder = tiny_encoder(dropout=dropout)
    made_by = DECAYING_OPTIMIZERS[optimizer]
    model = change(Siamese(encoder, configure=lambda model: made_by(model.parameters())))
    torch.manual_seed(3)
    options = {"precision": precision, "accelerator": accelerator, "max_steps": 5}
    made = fit(model, **options).optimizers[0]
    state = {
        f"{name} {key}": value
        for name, parameter in model.named_parameters()
        for key, value in made.state[parameter].items()
        if isinstance(value, Tensor)
    }
    return {**bare_state(model), **state, "random": torch.get_rng_state()}
