"""Good and bad runs: what the logs and the monitor show when training works, and when it doesn't.

``python examples/benchmarks/curves.py --data FOLDER`` trains a few of each, in a quarter of an hour
on one CPU core. Each run is kept as JSON in ``--out``. The table and the picture are made of all
records that are there.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from pytorch_lightning import Callback, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import recon_aux
from recon_aux.probe import markdown_table

# let this file be run by its path
sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.arms import Arm, attached_with, build_model
from benchmarks.encoders import small_resnet18
from benchmarks.images import Split, TwoViews, load, normalize
from benchmarks.methods import METHODS, SimSiam
from benchmarks.options import study_parser
from benchmarks.records import Record, as_text, record
from benchmarks.resuming import trained_on
from benchmarks.study import run_study

Curves = dict[str, list[tuple[int, float]]]
"""Steps and values, by the names under which they are logged."""

# steps from one point of a curve to the next
_EVERY = 5


# --- the runs ---


class SimSiamWithGradient(SimSiam):
    """SimSiam without its stop-gradient: it collapses (Chen and He, 2021, figure 2)."""

    def target(self, z: Tensor, last: bool) -> Tensor:
        """Give the gradient to what is predicted, too."""
        return z


def other_images(samples: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
    """Collate into views that are not of the same images."""
    (view, other), labels = TwoViews(flip=True)(samples)
    return [view, other.roll(1, 0)], labels


class Run(NamedTuple):
    """What is trained.

    Attributes:
        arm: method, attached or not, options of attach.
        lr: times the usual learning rate.
        collate: makes the views.
        frozen: whether the decoder isn't trained.
    """

    arm: Arm
    lr: float = 1
    collate: Callable[[list[tuple[Tensor, Tensor]]], Any] = TwoViews(flip=True)
    frozen: bool = False


def _attached(method: str, **options: Any) -> Arm:
    return Arm(method, attached=True, options=options)


MODELS: dict[str, Any] = METHODS | {"SimSiam": SimSiamWithGradient}

GOOD = [f"{method}, as shipped" for method in METHODS]
"""What works."""

BARE = "SimCLR, bare"

RUNS: dict[str, Run] = {
    BARE: Run(Arm("SimCLR", attached=False, options={})),
    **{name: Run(_attached(method)) for name, method in zip(GOOD, METHODS, strict=True)},
    "weight far too small": Run(_attached("SimCLR", weight=0.001)),
    "weight far too large": Run(_attached("SimCLR", weight=1000.0)),
    "learning rate too high": Run(_attached("SimCLR"), lr=500),
    "decoder not trained": Run(_attached("SimCLR"), frozen=True),
    "views of other images": Run(_attached("SimCLR"), collate=other_images),
    "SimSiam without stop-gradient": Run(_attached("SimSiam")),
}
"""All runs by name; those of SimCLR are compared with the bare one."""


class Recorder(Callback):
    """Keeps what recon_aux logs, and what the monitor finds, every few steps."""

    def __init__(self, test: Split, every: int) -> None:
        self.monitor = recon_aux.Monitor(*test, normalize=normalize, rows=0)
        self.every = every
        self.curves: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)

    def keep(self, numbers: Mapping[str, Any], step: int) -> None:
        """Add a point to each curve; JSON has no infinity."""
        for name, value in numbers.items():
            if isfinite(float(value)):
                self.curves[name].append((step, float(value)))

    def on_train_start(self, trainer: Any, model: Any) -> None:
        self.keep(self.monitor.measure(model).numbers, 0)

    def on_train_batch_end(
        self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        logged = recon_aux.logs(model) if recon_aux.is_attached(model) else {}
        ratio = logged.pop("recon_aux/gradient_ratio", None)
        known = self.curves["recon_aux/gradient_ratio"]
        if ratio is not None and (not known or float(ratio) != known[-1][1]):
            self.keep({"recon_aux/gradient_ratio": ratio}, step)
        if step % _EVERY == 1:
            self.keep({"loss": trainer.callback_metrics["loss"], **logged}, step)
        if step % self.every == 0:
            self.keep(self.monitor.measure(model).numbers, step)


def train(
    run: Run, data: tuple[Split, Split], seed: int, args: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """Train one run; give the model, its curves, and what it was warned of."""
    seed_everything(seed, verbose=False)
    encoder = small_resnet18(width=16, stride=2)
    model = build_model(run.arm, MODELS, encoder, 8 * 16, run.lr * args.lr)
    if run.frozen:
        model.recon_aux.requires_grad_(False)
    loader = DataLoader(
        TensorDataset(*data[0]),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=run.collate,
    )
    recorder, ended = Recorder(data[1], args.every), ""
    trainer = Trainer(
        max_steps=args.steps,
        precision=args.precision,
        accelerator=args.device,
        devices=1,
        logger=False,
        callbacks=[recorder],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(model, loader)
        except FloatingPointError as error:
            ended = str(error)
    said = [str(one.message) for one in caught if str(one.message).startswith("recon_aux:")]
    curves: Curves = {name: points for name, points in recorder.curves.items() if points}
    return model, {"curves": curves, "warnings": said, "ended by": ended}


# --- what is shown ---


def table(done: list[Record]) -> str:
    """Put the runs one below the other: the first and the last value, of the ratio its range."""
    titles = [
        "loss",
        "registration",
        "gradient_ratio",
        "share",
        "whole r2",
        "equivariant r2",
        "k-NN %",
    ]
    grid = markdown_table([*titles, "invariant rank", "invariant std", "warnings"])
    grid.columns[0].header = "run"
    for name in RUNS:
        for run in (run for run in done if run["arm"] == name):
            curves = run["results"]["curves"]
            part = "invariant" if "monitor/invariant/std" in curves else "whole"
            ends = [
                _ends(curves, "recon_aux/loss", 3),
                _ends(curves, "recon_aux/registration", 2),
                _range(curves.get("recon_aux/gradient_ratio", [])),
                _ends(curves, "recon_aux/share", 2),
                _ends(curves, "monitor/whole/r2", 2),
                _ends(curves, "monitor/equivariant/r2", 2),
                _ends(curves, "monitor/whole/knn", 3),
                _ends(curves, f"monitor/{part}/rank", 3),
                _ends(curves, f"monitor/{part}/std", 2),
            ]
            grid.add_row(name, *ends, str(len(run["results"]["warnings"])))
    return as_text(grid)


def _ends(curves: Curves, name: str, digits: int) -> str:
    points = curves.get(name)
    return f"{points[0][1]:.{digits}g} → {points[-1][1]:.{digits}g}" if points else ""


def _range(points: list[tuple[int, float]]) -> str:
    values = [value for _, value in points]
    if not values:
        return ""
    return f"{median(values):.2g} ({min(values):.2g} to {max(values):.2g})"


class Panel(NamedTuple):
    """A column of the picture: the curves in it, by their labels."""

    title: str
    curves: dict[str, str]
    is_logarithmic: bool = False
    limits: tuple[float, float] | None = None


PANELS = [
    Panel("recon_aux/loss", {"": "recon_aux/loss"}, limits=(10, 60)),
    Panel("recon_aux/registration", {"": "recon_aux/registration"}, limits=(0.5, 2.5)),
    Panel(
        "recon_aux/gradient_ratio",
        {"": "recon_aux/gradient_ratio"},
        is_logarithmic=True,
        limits=(1e-3, 1e5),
    ),
    Panel(
        "monitor/.../r2",
        {"whole": "monitor/whole/r2", "equivariant": "monitor/equivariant/r2"},
        limits=(0, 0.8),
    ),
    Panel("monitor/whole/knn, %", {"whole": "monitor/whole/knn"}),
    Panel(
        "monitor/.../std",
        {"whole": "monitor/whole/std", "invariant": "monitor/invariant/std"},
        limits=(0, 0.8),
    ),
]
_COLOURS = {"": "C0", "whole": "C0", "equivariant": "C1", "invariant": "C2"}


def draw(done: list[Record], path: Path) -> None:
    """Draw each attached run in a row, and the bare run in grey where it is to be compared."""
    found = {run["arm"]: run["results"]["curves"] for run in done}
    bare = found.pop(BARE, {})
    names = [name for name in RUNS if name in found]
    shape = max(1, len(names)), len(PANELS)
    figure, axes = plt.subplots(
        *shape,
        figsize=(2 * shape[1], 0.5 + 1.1 * shape[0]),
        squeeze=False,
        sharex=True,
        sharey="col",
    )
    for line, name in zip(axes, names, strict=False):
        is_simclr = RUNS[name].arm.method == "SimCLR"
        for axis, panel in zip(line, PANELS, strict=True):
            _draw_panel(axis, panel, found[name], bare if is_simclr else {})
        line[0].set_ylabel(name.replace(" ", "\n", 1), rotation=0, ha="right", va="center")
    for axis, panel in zip(axes[0], PANELS, strict=True):
        axis.set_title(panel.title, fontsize=9)
        if len(panel.curves) > 1:
            axis.legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_panel(axis: Any, panel: Panel, curves: Curves, bare: Curves) -> None:
    for label, name in panel.curves.items():
        if label in ("", "whole") and name in bare:
            axis.plot(*zip(*bare[name], strict=True), color="gray", linestyle="--", linewidth=1)
        if name in curves:
            steps, values = zip(*curves[name], strict=True)
            mark = "." if len(steps) < 20 else ""
            axis.plot(steps, values, marker=mark, color=_COLOURS[label], label=label)
    axis.set_yscale("log" if panel.is_logarithmic else "linear")
    if panel.limits is not None:
        axis.set_ylim(panel.limits)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)


# --- the command line ---


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = study_parser(
        __doc__,
        arms=list(RUNS),
        out="runs/curves",
        batch_size=64,
        limit="train on so many images",
    )
    parser.set_defaults(seeds=[0], limit=10_000)
    add = parser.add_argument
    add("--data", default="digits", help="digits, cifar10, or a folder with train/ and test/")
    add("--image-size", type=int, default=32)
    add("--steps", type=int, default=300)
    add("--every", type=int, default=50, help="steps from one measurement to the next")
    return parser.parse_args()


def main() -> None:
    """Read the command line, run what isn't done, make the table and the picture."""
    args = parse_options()
    if unknown := [name for name in args.arms if name not in RUNS]:
        raise SystemExit(f"--arms expects any of {list(RUNS)}, got {unknown}")

    @cache
    def data() -> tuple[Split, Split]:
        return load(args.data, args.image_size, args.limit)

    def run(which: dict[str, Any], path: Path) -> Record:
        started = time.perf_counter()
        model, results = train(RUNS[which["arm"]], data(), which["seed"], args)
        seconds = time.perf_counter() - started
        return record(args, trained_on(args), seconds, results, **which, **attached_with(model))

    runs = [{"arm": name, "seed": seed} for seed in args.seeds for name in args.arms]
    run_study(args, runs, run, table=table, picture=draw)


if __name__ == "__main__":
    main()
