"""Does an encoder keep how an object turned? recon_aux, compared with SIE, which is given it.

``python examples/benchmarks/views3d/compare.py FOLDER`` trains every arm on a data set in
3DIEBench's layout: the official one, or what render.py makes. It measures them as Garrido, Najman
and LeCun (2023, arXiv 2302.10283, section 5) do, and prints a table. Each run is kept as JSON in
``--out``, next to it a picture of what an attached encoder rebuilds. An interrupted run goes on
from its last tenth. ``--arms`` compares others, such as ``"VICReg + recon_aux, edges=32"``, with
any of attach's options, or ``"SIE, dim=512"``, with any of the method's own.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning import seed_everything
from rich.progress import track
from sklearn.metrics import r2_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from recon_aux.probe import linear_classifier, linear_regression, markdown_table

# let this file be run by its path
sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import bars
from benchmarks.arms import Arm, attached_with, build_model, read_arm
from benchmarks.encoders import small_resnet18
from benchmarks.images import as_input
from benchmarks.methods import SimCLR, StudyModule, VICReg
from benchmarks.options import study_parser
from benchmarks.records import Record, as_text, record, results_of, with_spread
from benchmarks.resuming import fit, trained_on
from benchmarks.sie import SIE
from benchmarks.study import run_study
from benchmarks.views3d import steering
from benchmarks.views3d.data import Objects, targets


class Supervised(StudyModule):
    """The ceiling: trained with the class of each view and with what changed between them."""

    def __init__(self, backbone: nn.Module, feature_dim: int, lr: float) -> None:
        super().__init__(backbone, lr)
        # 3DIEBench has 55 classes
        self.classify = nn.Linear(feature_dim, 64)
        hidden = 2 * feature_dim
        self.regress = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 6))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The losses of both tasks."""
        (x0, x1), (labels, change) = batch
        features = [self.backbone(x).flatten(1) for x in (x0, x1)]
        error = F.mse_loss(self.regress(torch.cat(features, dim=1)).float(), change)
        classes = sum(F.cross_entropy(self.classify(y).float(), labels) for y in features)
        return classes + 10 * error


METHODS = {
    "VICReg": VICReg,
    "SimCLR": SimCLR,
    # the paper's is 1, for batches eight times as large, in which covariances are less noisy
    "SIE": partial(SIE, covariance=0.1),
    "supervised": Supervised,
}
ATTACHED = " + recon_aux"
ARMS = ["VICReg", "SimCLR", "SIE", f"VICReg{ATTACHED}", f"SimCLR{ATTACHED}", "supervised"]


def parse_arm(text: str) -> Arm:
    """Read one of ``--arms``."""
    return read_arm(text, METHODS, attached=ATTACHED, examples=ARMS)


# --- training ---


def train(
    text: str, data: Objects, seed: int, path: Path, args: argparse.Namespace
) -> tuple[Any, float]:
    """Train one arm, or go on with it; give the model, and how long it took, in seconds."""
    seed_everything(seed, verbose=False)
    encoder = small_resnet18(args.width, stride=2).to(memory_format=torch.channels_last)
    model = build_model(parse_arm(text), METHODS, encoder, 8 * args.width, args.lr)
    # an epoch, after which there is a checkpoint, is a tenth of the way
    sampler = RandomSampler(data, num_samples=max(1, args.steps // 10) * args.batch_size)
    loader = DataLoader(data, args.batch_size, sampler=sampler, num_workers=args.workers)
    return model, fit(model, loader, path, args, max_steps=args.steps)


# --- measuring ---


# fits into memory with as many objects as 3DIEBench has
_MANY_PAIRS = 200_000


class _AllViews(Dataset[Tensor]):
    """All views of each object, ``(views, 3, H, W)``, in uint8."""

    def __init__(self, data: Objects) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Tensor:
        return torch.stack([self.data.image(row, view) for view in range(self.data.views)])


@torch.no_grad()
def encode(model: Any, data: Objects, device: torch.device, workers: int = 0) -> Tensor:
    """Encode every view, ``(objects, views, D)``."""
    encoder = model.backbone.to(device).eval()
    loader = DataLoader(_AllViews(data), batch_size=None, num_workers=workers)
    features = [
        encoder(as_input(views.to(device))).flatten(1).float().cpu()
        for views in track(loader, "encoding all views")
    ]
    return torch.stack(features)


def pairs(data: Objects, each: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw pairs of views: rows, first views, second views.

    There are ``each`` pairs of each object, or as many as fit into memory.
    """
    random = np.random.default_rng(seed)
    each = max(1, min(each, _MANY_PAIRS // len(data)))
    rows = np.repeat(np.arange(len(data)), each)
    return rows, *_two_views(len(rows), data.views, random)


def _two_views(
    count: int, views: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw pairs of two views that differ."""
    first = random.integers(views, size=count)
    return first, (first + random.integers(1, views, size=count)) % views


def _of_pairs(
    features: Tensor, data: Objects, rows: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Give the features of both views, and what changed between them."""
    wanted = targets(data.latents[rows, first], data.latents[rows, second])
    return torch.cat([features[rows, first], features[rows, second]], dim=1), wanted


# what changed between two views, and which of the target's numbers it is
CHANGES = {"rotation": slice(0, 4), "color": slice(4, 6)}


def measure(
    features: tuple[Tensor, Tensor],
    data: tuple[Objects, Objects],
    device: torch.device,
    steps: int,
) -> dict[str, float]:
    """Measure accuracy, and R² of what changed between two views, by a linear map and by MLPs."""
    flat = [x.flatten(0, 1).numpy() for x in features]
    labels = [objects.labels.repeat_interleave(objects.views).numpy() for objects in data]
    some = np.random.default_rng(0).permutation(len(flat[0]))[:20000]
    linear = linear_classifier().fit(flat[0][some], labels[0][some])
    result = {"accuracy": 100 * linear.score(flat[1], labels[1])}
    train, test = (
        _of_pairs(x, objects, *pairs(objects, each, seed=0))
        for x, objects, each in zip(features, data, (60, 30), strict=True)
    )
    ridge = linear_regression().fit(*(part.numpy() for part in train))
    by_ridge = ridge.predict(test[0].numpy())
    for what, numbers in CHANGES.items():
        wanted = test[1][:, numbers].numpy()
        by_mlp = _mlp(features[0], data[0], test[0], train[1], what, device, steps)
        result |= {
            f"{what} linear": r2_score(wanted, by_ridge[:, numbers]),
            f"{what} mlp": r2_score(wanted, by_mlp),
            # as SIE's authors: of all numbers at once, around one common mean
            f"{what} mlp pooled": r2_score(wanted.ravel(), by_mlp.ravel()),
        }
    return {name: float(value) for name, value in result.items()}


def _mlp(
    features: Tensor,
    data: Objects,
    test: Tensor,
    usual: Tensor,
    what: str,
    device: torch.device,
    steps: int,
) -> np.ndarray:
    """Predict what changed with an MLP of three layers, trained on pairs drawn anew each step.

    With a fixed set of pairs it would learn those by heart. ``usual``, the train pairs' targets,
    gives the scale.
    """
    count, views, width = features.shape
    mean, deviation = features.mean((0, 1)), features.std((0, 1)) + 1e-6
    x = (features - mean) / deviation
    numbers = CHANGES[what]
    center, spread = usual[:, numbers].mean(0), usual[:, numbers].std(0)
    random = np.random.default_rng(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(2 * width, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()]
        mlp = nn.Sequential(*layers, nn.Linear(1024, len(center))).to(device)
        optimizer = torch.optim.AdamW(mlp.parameters(), lr=1e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in track(range(steps), f"reading the {what} by an MLP"):
            rows = random.integers(count, size=256)
            inputs, wanted = _of_pairs(x, data, rows, *_two_views(256, views, random))
            wanted = (wanted[:, numbers] - center) / spread
            optimizer.zero_grad()
            error = F.mse_loss(mlp(inputs.to(device)), wanted.to(device))
            torch.autograd.backward(error)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        inputs = (test - mean.repeat(2)) / deviation.repeat(2)
        predicted: Tensor = mlp(inputs.to(device)).cpu() * spread + center
    return predicted.numpy()


@torch.no_grad()
def retrieve(model: SIE, features: Tensor, data: Objects) -> dict[str, float]:
    """Measure how high the right view of an object ranks, by distance to the prediction."""
    model = model.cpu().eval()
    rows, first, second = pairs(data, 10, seed=1)
    embedded = model.heads[1](features.flatten(0, 1)[:, model.split :]).unflatten(
        0, features.shape[:2]
    )
    ranks = []
    for some in np.array_split(np.arange(len(rows)), max(1, len(rows) // 1000)):
        row, before, after = rows[some], first[some], second[some]
        change = targets(data.latents[row, before], data.latents[row, after])
        change = change[:, : model.change_dim]
        predicted = model.predictor(embedded[row, before], change)
        distance = (embedded[row] - predicted[:, None]).square().sum(-1)
        distance[np.arange(len(row)), before] = torch.inf
        # last among equals, or an embedding that is always the same would be right
        ranks.append((distance <= distance.gather(1, torch.from_numpy(after)[:, None])).sum(1))
    rank = torch.cat(ranks)
    hits = {f"H@{k}": (rank <= k).float().mean().item() for k in (1, 5)}
    return {"MRR": (1 / rank).mean().item(), **hits}


def invariant_dim(model: Any) -> int | None:
    """Give the width of the invariant part, where the feature has two."""
    if isinstance(model, SIE):
        return model.split
    aux = getattr(model, "recon_aux", None)
    return aux.splitter.invariant_dim if aux and aux.splitter.equivariant_dim else None


def run(
    which: dict[str, Any],
    data: tuple[Objects, Objects],
    path: Path,
    args: argparse.Namespace,
) -> Record:
    """Train and measure one arm with one seed."""
    model, seconds = train(which["arm"], data[0], which["seed"], path, args)
    device = trained_on(args)
    features = tuple(encode(model, objects, device, args.workers) for objects in data)
    parts = {"whole": slice(None)}
    cut = invariant_dim(model)
    if cut is not None:
        parts |= {"invariant": slice(0, cut), "equivariant": slice(cut, None)}
    results = {
        part: measure((features[0][..., cut], features[1][..., cut]), data, device, args.mlp_steps)
        for part, cut in parts.items()
    }
    if hasattr(model, "recon_aux"):
        steering.draw(model, data[1], path.with_suffix(".png"), device)
    if isinstance(model, SIE):
        results["whole"] |= retrieve(model, features[1], data[1])
    return record(args, device, seconds, results, **which, **attached_with(model))


# --- the table and the picture ---

COLUMNS = {
    "accuracy": "linear %",
    "rotation mlp": "rotation R², MLP",
    "rotation mlp pooled": "pooled",
    "rotation linear": "linear",
    "color mlp": "colour R², MLP",
    "color linear": "linear ",
    "MRR": "MRR",
    "H@1": "H@1",
    "H@5": "H@5",
}


def table(done: list[Record]) -> str:
    """Put the arms that are done side by side: mean and standard deviation over seeds."""
    # older records have fewer
    known = {key for run in done for part in run["results"].values() for key in part}
    shown = [key for key in COLUMNS if key in known]
    grid = markdown_table(["seeds", *(COLUMNS[key] for key in shown)])
    for arm in dict.fromkeys([*ARMS, *(run["arm"] for run in done)]):
        runs = results_of(done, arm)
        for part in runs[0] if runs else ():
            cells = []
            for key in shown:
                values = [run[part][key] for run in runs if key in run[part]]
                cells.append(with_spread(values, 1 if key == "accuracy" else 3))
            grid.add_row(f"{arm}, {part}", str(len(runs)), *cells)
    return as_text(grid)


def picture(done: list[Record], path: Path) -> None:
    """Draw what is read from the arms' whole features, the ceiling as a line."""
    ceiling = {"supervised": "k--"}
    measures = [
        bars.Measure("linear accuracy, %", lambda found: found["whole"]["accuracy"], ceiling),
        bars.Measure("rotation, R²", lambda found: found["whole"]["rotation mlp"], ceiling),
        bars.Measure("colour, R²", lambda found: found["whole"]["color mlp"], ceiling),
    ]
    bars.draw({"": done}, ["VICReg", "SimCLR", "SIE"], ATTACHED, measures, path)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = study_parser(
        __doc__,
        arms=ARMS,
        out="runs/views3d",
        batch_size=256,
        limit="use so many objects of each split",
    )
    add = parser.add_argument
    add("folder", type=Path, help="of the data set")
    add("--lists", type=Path, help="folder of the lists of objects, if it is another")
    add("--steps", type=int, default=5000)
    add("--width", type=int, default=64, help="of ResNet-18's first stage")
    add("--size", type=int, default=64, help="side of the images, in pixels")
    add("--views", type=int, default=50, help="of each object, that the data set has")
    add("--mlp-steps", type=int, default=4000, help="of the MLPs that read what changed")
    add("--no-cache", action="store_true", help="read images when they are needed")
    return parser.parse_args()


def main() -> None:
    """Read the command line, run what isn't done, print the table."""
    args = parse_options()
    for arm in args.arms:
        parse_arm(arm)
    options = {key: getattr(args, key) for key in ("size", "lists", "views", "limit")}

    @cache
    def data() -> tuple[Objects, Objects]:
        train, val = (
            Objects(args.folder, split, cached=not args.no_cache, **options)
            for split in ("train", "val")
        )
        return train, val

    runs = [{"arm": arm, "seed": seed} for seed in args.seeds for arm in args.arms]
    run_study(
        args,
        runs,
        lambda which, path: run(which, data(), path, args),
        table=table,
        picture=picture,
    )


if __name__ == "__main__":
    main()
