"""What the examples share: one study, bare and attached, with the same seed, data and budget."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from encoders import ENCODERS, build_encoder, width_of
from images import TwoViews, load, normalize
from pictures import save_reconstructions
from records import record
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from recon_aux import ReconAux
from recon_aux.probe import ProbeResult, probe, render

try:
    from pytorch_lightning import Trainer
except ImportError:
    from lightning import Trainer


class Study:
    """Reads the command line, holds the data, and measures what is trained on it."""

    def __init__(self, description: str | None, trainer: Any = Trainer) -> None:
        self.args = args = _parse(description)
        # there are two packages of Lightning, and a model trains with its own's
        self.trainer_class = trainer
        self.out = Path(
            args.out or Path("runs") / f"{Path(sys.argv[0]).stem}-{Path(args.data).name}"
        )
        if self.out.exists() and any(self.out.iterdir()) and not args.overwrite:
            raise SystemExit(
                f"expected a new output folder, {self.out} holds another run; "
                "--overwrite replaces it, --out names another"
            )
        self.console = Console()
        self.train, self.test = load(args.data, args.image_size, args.limit)
        # where Lightning's --device trains
        self.device = self.trainer().strategy.root_device
        self.results: dict[str, ProbeResult] = {}
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()
        self.aux: tuple[nn.Module, ReconAux] | None = None

    def autocast(self) -> torch.autocast:
        """What --precision asks for, for a loop without Lightning."""
        known = {"32-true": None, "bf16-mixed": torch.bfloat16}
        if self.args.precision not in known:
            raise SystemExit(f"--precision expects {list(known)}, got {self.args.precision!r}")
        dtype = known[self.args.precision]
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=bool(dtype))

    @property
    def compare(self) -> bool:
        """Whether the bare method is trained, too."""
        return not self.args.no_compare

    @property
    def options(self) -> dict[str, Any]:
        """The options for attach() that the command line gives."""
        given = {"weight": self.args.weight, "equivariant_dim": self.args.equivariant_dim}
        return {name: value for name, value in given.items() if value is not None}

    def encoder(self) -> tuple[nn.Module, int]:
        """Seed everything, then build an encoder; give it and its feature's width."""
        torch.manual_seed(self.args.seed)
        encoder = build_encoder(self.args.backbone).to(memory_format=torch.channels_last)
        width = width_of(encoder, self.args.image_size)
        self.started = time.perf_counter()
        return encoder, width

    def loader(self, *, indexed: bool = False) -> DataLoader[Any]:
        """Batches of two views, see :class:`TwoViews`."""
        return DataLoader(
            TensorDataset(*self.train),
            self.args.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=self.args.workers,
            persistent_workers=self.args.workers > 0,
            collate_fn=TwoViews(flip=self.args.data != "digits", indexed=indexed),
        )

    def trainer(self) -> Any:
        """A plain Lightning trainer with a progress bar."""
        return self.trainer_class(
            max_epochs=self.args.epochs,
            accelerator=self.args.device,
            devices=1,
            precision=self.args.precision,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )

    def measure(self, name: str, encoder: nn.Module, aux: ReconAux | None = None) -> None:
        """Probe a trained encoder, whole and, if it is split, in its parts."""
        self.seconds[name] = time.perf_counter() - self.started
        # Lightning brings a model back to the CPU after training
        torch.nn.ModuleList([encoder] if aux is None else [encoder, aux]).to(self.device)
        self.results[name] = probe(
            encoder,
            self.train,
            self.test,
            equivariant_dim=0 if aux is None else aux.splitter.equivariant_dim,
            normalize=normalize,
            device=self.device,
            seed=self.args.seed,
            progress=True,
        )
        if aux is not None:
            self.aux = (encoder, aux)

    def report(self) -> None:
        """Print the table; save it, the numbers and the reconstructions."""
        self.out.mkdir(parents=True, exist_ok=True)
        text = render(self.results)
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        (self.out / "table.md").write_text(text)
        results = {name: result.to_dict() for name, result in self.results.items()}
        told = record(self.args, self.device, sum(self.seconds.values()), results)
        told["seconds"] = {name: round(seconds, 1) for name, seconds in self.seconds.items()}
        (self.out / "results.json").write_text(json.dumps(told, indent=1))
        if self.aux is not None:
            path = self.out / "reconstructions.png"
            save_reconstructions(*self.aux, self.test[0], self.args.seed, path)
        for name, seconds in self.seconds.items():
            self.console.print(f"{name} trained in {seconds:.0f} s")
        self.console.print(f"saved table.md, results.json, reconstructions.png in {self.out}")


def _parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="digits", help="digits, cifar10, or a folder with train/ and test/")
    add("--limit", type=int, help="use so many train images, drawn at random")
    add("--epochs", type=int, default=30)
    add("--batch-size", type=int, default=128)
    add("--lr", type=float, default=2e-3)
    add("--backbone", default="tiny-resnet18", help=f"{', '.join(ENCODERS)}, or torchvision's name")
    add("--image-size", type=int, help="pixels; 16 for digits, else 32 if not given")
    add(
        "--weight",
        type=float,
        help="of what is added to the loss; the method's default if not given",
    )
    add("--equivariant-dim", type=int, help="half of the feature's channels if not given")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, gpu, mps: Lightning's accelerator")
    add("--precision", default="32-true", help="Lightning's, e.g. bf16-mixed")
    add("--workers", type=int, default=0, help="processes that make the views")
    add("--out", help="output folder; runs/SCRIPT-DATA if not given")
    add("--overwrite", action="store_true", help="replace what is in the output folder")
    add("--no-compare", action="store_true", help="train the attached model alone")
    args = parser.parse_args()
    args.image_size = args.image_size or (16 if args.data == "digits" else 32)
    return args
