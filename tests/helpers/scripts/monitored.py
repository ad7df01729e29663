"""Two processes train with a monitor: ``monitored.py FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import recon_aux
from helpers.data import Views
from helpers.models import Siamese
from helpers.training import trainer
from recon_aux.integrations.lightly import attach

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    monitor = recon_aux.Monitor(torch.rand(32, 3, 16, 16))
    trained = trainer(strategy="ddp", devices=2, max_steps=-1, max_epochs=2, callbacks=[monitor])
    trained.fit(attach(Siamese()), DataLoader(Views(side=16), batch_size=4))
    found = {k: float(x) for k, x in trained.callback_metrics.items() if k.startswith("monitor")}
    torch.save(found, folder / f"{os.environ.get('LOCAL_RANK', '0')}.pt")
