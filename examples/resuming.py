"""Train with Lightning; after an interruption, go on from where the last checkpoint was."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, Timer
from torch.utils.data import DataLoader


def fit(
    model: LightningModule,
    loader: DataLoader[Any],
    path: Path,
    args: argparse.Namespace,
    **budget: int,
) -> float:
    """Train a model, with a checkpoint after each epoch, next to where the record is to be.

    Args:
        model: new, with the same seed as before the interruption, if there was one.
        loader: its batches; as many each epoch.
        path: of the record's file, which :func:`keep` will write.
        args: the command line's ``precision`` and ``device``.
        budget: Lightning's ``max_epochs`` or ``max_steps``.

    Returns:
        How long training took, with what was before an interruption, in seconds.
    """
    folder = _checkpoints(path)
    # of each epoch's last step, from which Lightning goes on exactly
    saved = ModelCheckpoint(folder, save_last=True, every_n_train_steps=len(loader))
    timer = Timer()
    last = folder / "last.ckpt"
    Trainer(
        precision=args.precision,
        accelerator=args.device,
        devices=1,
        logger=False,
        callbacks=[saved, timer],
        enable_model_summary=False,
        **budget,
    ).fit(model, loader, ckpt_path=str(last) if last.exists() else None)
    return timer.time_elapsed("train")


def keep(path: Path, record: dict[str, Any]) -> None:
    """Write the record of a run that is done; its checkpoints go."""
    path.write_text(json.dumps(record, indent=1))
    shutil.rmtree(_checkpoints(path), ignore_errors=True)


def _checkpoints(path: Path) -> Path:
    return path.with_suffix("")
