"""Train with Lightning; after an interruption, go on from the last checkpoint.

A run that is done keeps its last checkpoint. With ``--remeasure``, or if its record is deleted, the
run is measured again from that checkpoint, not trained again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, Timer
from torch.utils.data import DataLoader

from benchmarks.options import note_options, refuse_others


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
        path: of the record's file.
        args: the command line's ``precision`` and ``device``.
        budget: Lightning's ``max_epochs`` or ``max_steps``.

    Returns:
        How long training took, in seconds, including what was before an interruption.

    Raises:
        SystemExit: if the options were others before the interruption.
    """
    folder = path.with_suffix("")
    note_options(folder, args)
    checkpoints = folder / "checkpoints"
    last = checkpoints / "last.ckpt"
    if last.exists():
        saved = torch.load(last, map_location="cpu", weights_only=False)
        # Lightning would train one step more, if an interrupted run had gone on to the end
        if saved["global_step"] >= (budget.get("max_steps") or budget["max_epochs"] * len(loader)):
            model.load_state_dict(saved["state_dict"])
            return float(saved["callbacks"]["Timer"]["time_elapsed"]["train"])
    timer = Timer()
    # after the epoch's end: Lightning takes an epoch that is saved in its last step for unfinished
    checkpoint = ModelCheckpoint(
        checkpoints,
        filename=last.stem,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    options: dict[str, Any] = dict(budget)
    Trainer(
        precision=args.precision,
        accelerator=args.device,
        devices=1,
        logger=False,
        callbacks=[checkpoint, timer, _RandomState()],
        enable_model_summary=False,
        **options,
    ).fit(model, loader, ckpt_path=str(last) if last.exists() else None)
    return timer.time_elapsed("train")


def trained_on(args: argparse.Namespace) -> torch.device:
    """Give the device that Lightning's ``--device`` means."""
    device: torch.device = Trainer(
        accelerator=args.device, devices=1, logger=False, enable_checkpointing=False
    ).strategy.root_device
    return device


def is_done(path: Path, args: argparse.Namespace) -> bool:
    """Whether a run's record is there.

    Raises:
        SystemExit: if it was made with other options.
    """
    if not path.exists():
        return False
    refuse_others(json.loads(path.read_text())["options"], args, path)
    return True


def needs_no_training(path: Path) -> bool:
    """Whether a run that is done can be measured again: its checkpoint is kept, or it had none."""
    checkpoint = path.with_suffix("") / "checkpoints" / "last.ckpt"
    seconds: int = json.loads(path.read_text())["seconds"]
    return checkpoint.exists() or seconds == 0


def refuse_mixed(out: Path, args: argparse.Namespace) -> None:
    """Refuse a folder whose records are of other options: one table would mix them.

    Raises:
        SystemExit: if one was made with other options.
    """
    for path in sorted(out.glob("*.json")):
        is_done(path, args)


class _RandomState(Callback):
    """Keeps torch's random state on the CPU, which orders and augments the images."""

    def state_dict(self) -> dict[str, Any]:
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.set_rng_state(state_dict["torch"])
