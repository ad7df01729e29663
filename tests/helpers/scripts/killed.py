"""Train for twelve steps, or be killed at one of them: ``killed.py FOLDER RECONSTRUCT STEP``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from helpers.data import Views
from helpers.models import Siamese, tiny_encoder
from helpers.training import trainer
from recon_aux.integrations.lightly import attach


class Killed(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def configure(model: Any) -> Any:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main(folder: Path, reconstruct: str, killed_at: int) -> None:
    torch.manual_seed(0)
    model = Siamese(tiny_encoder(), configure=configure)
    attach(model, reconstruct=reconstruct, seed=4, decoder_lr=2e-3)
    # what a user's own code draws must not matter
    torch.rand(killed_at)
    last = folder / "last.ckpt"
    # three steps in an epoch, so that another view comes first in each; a checkpoint of the end of
    # an epoch, rather than of its last step, lets Lightning itself repeat a batch
    trainer(
        max_steps=12,
        enable_checkpointing=True,
        default_root_dir=folder,
        callbacks=[
            ModelCheckpoint(folder, save_last=True, every_n_train_steps=3),
            Killed(killed_at),
        ],
    ).fit(
        model, DataLoader(Views(12), batch_size=4), ckpt_path=str(last) if last.exists() else None
    )
    torch.save(model.state_dict(), folder / "final.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
