"""How sure recon_aux is that two views show the same images: false alarms, and what is caught.

``python examples/benchmarks/pair_check.py --data CIFAR-10=FOLDER`` makes two views of each test
image with lightly's transforms, draws batches of them, and lets the check look at one batch after
another until it has decided. Batches are paired, or wrong in three ways. The numbers are kept as
JSON, and the table is printed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightly.transforms.dino_transform import DINOTransform
from lightly.transforms.moco_transform import MoCoV1Transform, MoCoV2Transform
from lightly.transforms.simclr_transform import SimCLRTransform
from lightly.transforms.swav_transform import SwaVTransform
from rich.progress import track
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from recon_aux.engine.pairing import PairCheck
from recon_aux.probe import markdown_table

# let this file be run by its path
sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.images import TwoViews, load
from benchmarks.records import Record, as_text, keep, kept, record

Views = tuple[Tensor, Tensor]

# an undecided check is given up after so many steps
_MOST_STEPS = 500


# --- views ---


TRANSFORMS: dict[str, Callable[[int], Any]] = {
    "SimCLR": SimCLRTransform,
    "MoCo v1": MoCoV1Transform,
    "MoCo v2": MoCoV2Transform,
    "DINO": lambda size: DINOTransform(global_crop_size=size, n_local_views=0),
    "SwaV": lambda size: SwaVTransform(crop_sizes=(size, size), crop_counts=(2, 0)),
}
"""lightly's, with its defaults but the size; of DINO's and SwaV's crops the two large ones."""

PROBED = "probed"
"""The views of natural_images.py: turned, moved, scaled, mirrored, in other colours."""


def make_views(name: str, images: Tensor) -> Views:
    """Make two views of each image, the same ones each time."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    if name == PROBED:
        views, _ = TwoViews(flip=True)([(image, torch.tensor(0)) for image in images])
        return views[0], views[1]
    transform = TRANSFORMS[name](images.shape[-1])
    pairs = [transform(to_pil_image(image)) for image in track(images, f"views of {name}")]
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])


# --- batches ---


def paired(views: Views, rows: Tensor) -> Views:
    """Give the first half of the rows, as a correct loop does."""
    rows = rows[: len(rows) // 2]
    return views[0][rows], views[1][rows]


def shifted(views: Views, rows: Tensor) -> Views:
    """Pair each image with the next one."""
    view0, view1 = paired(views, rows)
    return view0, view1.roll(1, 0)


def interleaved(views: Views, rows: Tensor) -> Views:
    """Give the halves of one batch whose rows 2i and 2i + 1 are of one image."""
    both = torch.stack(paired(views, rows), 1).flatten(0, 1)
    view0, view1 = both.split(len(both) // 2)
    return view0, view1


def other_images(views: Views, rows: Tensor) -> Views:
    """Give a labelled batch, and a view of other images."""
    view0, view1 = views[0][rows].split(len(rows) // 2)
    return view0, view1


WRONG = {"shifted": shifted, "interleaved": interleaved, "other images": other_images}


# --- what is measured ---


def decide(draw: Callable[[Views, Tensor], Views], views: Views, batch_size: int) -> Any:
    """Check batch after batch; give whether they were found paired, and after how many steps."""
    check = PairCheck()
    for step in range(1, _MOST_STEPS + 1):
        rows = torch.randperm(len(views[0]))[: 2 * batch_size]
        check(*draw(views, rows))
        if check.paired is not None:
            return check.paired, step
    return None, _MOST_STEPS


def measure(name: str, images: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one transform at all batch sizes."""
    views = make_views(name, images)
    found: dict[str, Any] = {}
    for batch_size in track(args.batch_sizes, f"checks of {name}"):
        runs = {"paired": [decide(paired, views, batch_size) for _ in range(args.runs)]}
        for kind, draw in WRONG.items():
            runs[kind] = [decide(draw, views, batch_size) for _ in range(args.wrong_runs)]
        found[str(batch_size)] = {
            kind: {
                "runs": len(results),
                "reported": sum(is_paired is False for is_paired, _ in results),
                "undecided": sum(is_paired is None for is_paired, _ in results),
                "steps": Counter(steps for _, steps in results),
            }
            for kind, results in runs.items()
        }
    return found


# --- what is shown ---


def table(done: list[Record]) -> str:
    """Put data sets, transforms and batch sizes one below the other."""
    titles = ["views", "batch", "false alarms", "steps until sure", *WRONG, "steps until reported"]
    grid = markdown_table(titles)
    grid.columns[0].header = "data"
    for run in done:
        data = f"{run['data']}, {run['options']['image_size']} px"
        for views, sizes in run["results"].items():
            for batch_size, found in sizes.items():
                correct = found["paired"]
                alarms = f"{correct['reported']} of {correct['runs']}"
                sure, reported = _quantiles([correct]), _quantiles([found[k] for k in WRONG])
                caught = [f"{found[k]['reported']} of {found[k]['runs']}" for k in WRONG]
                grid.add_row(data, views, batch_size, alarms, sure, *caught, reported)
    return as_text(grid)


def _quantiles(kinds: list[dict[str, Any]]) -> str:
    steps = sorted(
        int(step) for kind in kinds for step, count in kind["steps"].items() for _ in range(count)
    )
    return ", ".join(str(steps[round(share * (len(steps) - 1))]) for share in (0.5, 0.95))


# --- the command line ---


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data",
        required=True,
        help="NAME=FOLDER with train/ and test/ (or val/), NAME=cifar10, which is downloaded, or "
        "NAME=digits; the test images are used",
    )
    names = [*TRANSFORMS, PROBED]
    add("--transforms", nargs="+", choices=names, default=names)
    add("--batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    add("--image-size", type=int, default=32, help="side of an image, and of its views")
    add("--runs", type=int, default=250, help="with paired views, of each transform and batch size")
    add("--wrong-runs", type=int, default=50, help="of each kind of wrong pairing")
    add("--out", type=Path, default=Path("runs/pair-check"))
    return parser.parse_args()


def main() -> None:
    """Read the command line, measure, print the table."""
    args = parse_options()
    name, _, folder = args.data.partition("=")
    _, (images, _) = load(folder, args.image_size, limit=2)
    if len(images) < 2 * max(args.batch_sizes):
        raise SystemExit(
            f"expected {2 * max(args.batch_sizes)} test images or more, twice the largest batch, "
            f"found {len(images)}. Pass smaller --batch-sizes."
        )
    started = time.perf_counter()
    results = {transform: measure(transform, images, args) for transform in args.transforms}
    seconds = time.perf_counter() - started
    args.out.mkdir(parents=True, exist_ok=True)
    kept_as = record(args, torch.device("cpu"), seconds, results, data=name, images=len(images))
    keep(args.out / f"{name}.json", kept_as)
    text = table(kept(args.out))
    print(text)
    (args.out / "table.md").write_text(text)
    print(f"saved in {args.out}")


if __name__ == "__main__":
    main()
