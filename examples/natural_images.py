"""Natural images: what attaching buys, against bare methods and against a ceiling.

``python examples/natural_images.py --data CIFAR=FOLDER TINY=FOLDER`` trains every method bare and
attached, and a ceiling: the same encoder, supervised to tell the transformation. Each is measured
by the probe, with few labels, and, frozen, on the other data set. What is done is kept as JSON in
``--out``, next to it a picture of what an attached one rebuilds; what was interrupted goes on from
its last epoch; the tables and a picture are made of what is there. ``--arms`` compares others, such
as ``"SimCLR, attached, context='both'"``, with any of attach's options, or
``"BYOL, momentum=0.9"``, with any of the method's own. Options may stand in a file, ``@FILE``, one
a line.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bars import Measure, draw
from encoders import build_encoder, width_of
from images import Split, TwoViews, as_input, flip_half, load, normalize
from lightly.transforms import SimCLRTransform
from lightly_methods import METHODS, MORE_METHODS
from lightly_simclr import SimCLR
from options import parse_options
from pictures import save_reconstructions
from pytorch_lightning import LightningModule, seed_everything
from records import as_text, file_name, kept, record, results_of, with_spread
from resuming import fit, is_done, keep, refuse_mixed, trained_on
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import to_pil_image

from recon_aux.integrations.lightly import attach
from recon_aux.probe import (
    COMBINED,
    TRANSFORMATIONS,
    draw_parameters,
    linear_classifier,
    markdown_table,
    probe,
    transform,
)

CEILING = "ceiling"
UNTRAINED = "untrained"
ALL_METHODS = METHODS | MORE_METHODS
ARMS = [UNTRAINED, *(m + kind for m in METHODS for kind in ("", ", attached")), CEILING]


class Ceiling(LightningModule):
    """Told the parameters of the transformation, which a linear map is to read off the features."""

    def __init__(self, encoder: nn.Module, width: int, lr: float) -> None:
        super().__init__()
        self.backbone = encoder
        self.regress = nn.Linear(2 * width, len(COMBINED))
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The error of the standardised parameters."""
        (clean, changed), parameters = batch
        features = [self.backbone(x).flatten(1) for x in (clean, changed)]
        error: Tensor = F.mse_loss(self.regress(torch.cat(features, dim=1)).float(), parameters)
        return error

    configure_optimizers = SimCLR.configure_optimizers


def told(samples: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
    """Collate into clean and transformed images and what was done, standardised."""
    images = torch.stack([image for image, _ in samples]).float() / 255
    images = flip_half(images)
    drawn = draw_parameters(len(images))
    middle = [sum(TRANSFORMATIONS[name]) / 2 for name in COMBINED]
    spread = [(high - low) / 12**0.5 for low, high in (TRANSFORMATIONS[n] for n in COMBINED)]
    parameters = torch.stack(list(drawn.values()), dim=1)
    parameters = (parameters - torch.tensor(middle)) / torch.tensor(spread)
    return [normalize(images), normalize(transform(images, drawn))], parameters


class SimCLRViews:
    """Collate images into two views by lightly's SimCLRTransform, as it advises for small images.

    Crops, flips, colours, grey: no turns, and other shifts and scales than the probe asks for.
    """

    def __init__(self, image_size: int) -> None:
        self.transform = SimCLRTransform(
            image_size, cj_strength=0.5, gaussian_blur=0.0, normalize=None
        )

    def __call__(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
        pairs = [self.transform(to_pil_image(image)) for image, _ in samples]
        views = [normalize(torch.stack(view)) for view in zip(*pairs, strict=True)]
        return views, torch.stack([label for _, label in samples])


def configure_sgd(model: Any) -> Any:
    """Configure SGD as lightly's benchmarks for small images do, the rate as in the other arms."""
    sgd = torch.optim.SGD(model.parameters(), model.lr, momentum=0.9, weight_decay=5e-4)
    steps = model.trainer.estimated_stepping_batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        sgd, model.lr, steps, pct_start=0.101, cycle_momentum=False
    )
    return [sgd], [{"scheduler": schedule, "interval": "step"}]


def parse_arm(arm: str) -> tuple[str, bool, dict[str, Any]]:
    """Tell the method's name, whether it is attached, and attach's or else its own options."""
    name, _, options = arm.partition(", ")
    attached = options.split(", ")[0] == "attached"
    if attached:
        options = options.removeprefix("attached").removeprefix(", ")
    if arm not in (UNTRAINED, CEILING) and name not in ALL_METHODS:
        raise SystemExit(
            f"--arms expects {ARMS}, or {list(MORE_METHODS)}, with options behind, got {arm!r}"
        )
    return name, attached, parse_options(options)


def train(arm: str, data: Split, seed: int, path: Path, args: Any) -> tuple[Any, float]:
    """Train one arm, or go on with it, or not at all; and say how long it took, in seconds."""
    name, attached, options = parse_arm(arm)
    seed_everything(seed, verbose=False)
    encoder = build_encoder(args.backbone).to(memory_format=torch.channels_last)
    width = width_of(encoder, args.image_size)
    method = Ceiling if name == CEILING else ALL_METHODS.get(name, SimCLR)
    model = method(encoder, width, **{"lr": args.lr} | ({} if attached else options))
    if name == UNTRAINED:
        return model, 0.0
    if args.optimizer == "SGD":
        model.configure_optimizers = partial(configure_sgd, model)
    if attached:
        attach(model, **options)
    views = SimCLRViews(args.image_size) if args.views == "lightly" else TwoViews(flip=True)
    loader = DataLoader(
        TensorDataset(*data),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        collate_fn=told if name == CEILING else views,
    )
    return model, fit(model, loader, path, args, max_epochs=args.epochs)


@torch.no_grad()
def encode(encoder: nn.Module, images: Tensor, device: torch.device) -> np.ndarray:
    """Features of images as they are."""
    parts = (encoder(as_input(x.to(device))) for x in images.split(256))
    return torch.cat([part.flatten(1).float().cpu() for part in parts]).numpy()


def accuracy(
    features: list[np.ndarray], labels: list[np.ndarray], rows: Any = slice(None)
) -> float:
    """Of logistic regression on some train rows, in percent of the test rows."""
    model = linear_classifier().fit(features[0][rows], labels[0][rows])
    return 100 * float(model.score(features[1], labels[1]))


def with_few_labels(features: list[np.ndarray], labels: list[np.ndarray]) -> dict[str, float]:
    """Accuracy of logistic regression on 1 % and on 10 % of the labels of each class."""
    scores = {}
    random = np.random.default_rng(0)
    order = random.permutation(len(labels[0]))
    for share in (1, 10):
        rows = np.concatenate(
            [
                (of_class := order[labels[0][order] == label])[
                    : max(1, round(len(of_class) * share / 100))
                ]
                for label in np.unique(labels[0])
            ]
        )
        scores[f"{share} % of labels"] = accuracy(features, labels, rows)
    return scores


def measure(model: Any, own: str, data: dict[str, tuple[Split, Split]], args: Any) -> Any:
    """Probe; then classify with few labels, and the other data sets' images."""
    device = trained_on(args)
    encoder = model.backbone.to(device).eval()
    aux = getattr(model, "recon_aux", None)
    found = probe(
        encoder,
        *data[own],
        equivariant_dim=aux.splitter.equivariant_dim if aux else 0,
        normalize=normalize,
        pairs=(args.pairs, args.pairs // 2),
        device=device,
        progress=True,
    )
    results = found.to_dict()
    for name, splits in data.items():
        features = [encode(encoder, images, device) for images, _ in splits]
        labels = [labels.numpy() for _, labels in splits]
        if name == own:
            results["whole"] |= with_few_labels(features, labels)
        else:
            results["whole"]["transfer"] = accuracy(features, labels)
    return results


def mean_r2(part: dict[str, Any], kind: str = "combined") -> float:
    """Of a part of a feature, over the parameters, applied all at once or each ``"alone"``."""
    return mean(part[kind].values())


ACCURACY = Measure("linear accuracy, %", lambda found: found["whole"]["linear"], {UNTRAINED: "k:"})
R2 = Measure("mean R²", lambda found: mean_r2(found["whole"]), {UNTRAINED: "k:", CEILING: "k--"})


def picture(done: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy and mean R² of whole features, one row for each data set."""
    names = dict.fromkeys(run["data"] for run in done)
    groups = {name: [run for run in done if run["data"] == name] for name in names}
    draw(groups, list(ALL_METHODS), ", attached", [ACCURACY, R2], path)


def tables(done: list[dict[str, Any]]) -> str:
    """What is done, mean and standard deviation over seeds, data set by data set."""
    text = []
    for own in dict.fromkeys(run["data"] for run in done):
        runs = [run for run in done if run["data"] == own]
        arms = sorted({run["arm"] for run in runs}, key=_order)
        others = [arm for arm in arms if parse_arm(arm)[2]]
        shipped = [arm for arm in arms if arm not in others]
        text += [f"{own}: the whole feature, R² with all transformations combined"]
        text += [as_text(_wholes(runs, shipped))]
        if others:
            text += [f"{own}: the same with other options", as_text(_wholes(runs, others))]
        text += [f"{own}: its parts", as_text(_parts(runs, arms, "combined", ["linear", "knn"]))]
        text += [f"{own}: R² with each transformation alone", as_text(_parts(runs, arms, "alone"))]
    return "\n".join(text)


TITLES = {
    "linear": "linear %",
    "knn": "k-NN %",
    "1 % of labels": "1 % labels",
    "10 % of labels": "10 %",
    "transfer": "transfer",
}


def _wholes(runs: list[dict[str, Any]], arms: list[str]) -> Any:
    """All that is measured of whole features, and how much of it the equivariant part has."""
    grid = markdown_table(
        ["seeds", *TITLES.values(), "mean R²", "of the gap", "equivariant alone", *COMBINED]
    )
    for arm in arms:
        results = results_of(runs, arm)
        wholes = [result["whole"] for result in results]
        equivariant = [mean_r2(r["equivariant"]) for r in results if "equivariant" in r]
        grid.add_row(
            arm,
            str(len(results)),
            *(with_spread(_of_all(wholes, key), 1) for key in TITLES),
            with_spread([mean_r2(whole) for whole in wholes], 3),
            _closed(runs, arm),
            with_spread(equivariant, 3),
            *_means(wholes, "combined"),
        )
    return grid


def _parts(runs: list[dict[str, Any]], arms: list[str], kind: str, keys: Any = ()) -> Any:
    """Accuracies and R² of each part of the feature."""
    parameters = COMBINED if kind == "combined" else TRANSFORMATIONS
    grid = markdown_table(["seeds", *(TITLES[key] for key in keys), "mean R²", *parameters])
    for arm in arms:
        results = results_of(runs, arm)
        for part in results[0]:
            found = [result[part] for result in results]
            cells = [with_spread([values[key] for values in found], 1) for key in keys]
            cells += [with_spread([mean_r2(values, kind) for values in found], 3)]
            grid.add_row(f"{arm}, {part}", str(len(results)), *cells, *_means(found, kind))
    return grid


def _of_all(found: list[dict[str, Any]], key: str) -> list[float]:
    """Each seed's value, or none where one lacks it, as a transfer to a data set not yet given."""
    return [values[key] for values in found] if all(key in values for values in found) else []


def _means(found: list[dict[str, Any]], kind: str) -> list[str]:
    """Each parameter's R², the mean over seeds."""
    rows = [values[kind].values() for values in found]
    return [f"{np.mean(column):.2f}" for column in zip(*rows, strict=True)]


def _order(arm: str) -> tuple[int, str]:
    """Methods as they are listed, each bare first, the ceiling last."""
    return [UNTRAINED, *ALL_METHODS, CEILING].index(parse_arm(arm)[0]), arm


def _closed(runs: list[dict[str, Any]], arm: str) -> str:
    """How much of what the bare method lacks to the ceiling is had, over the seeds of all three."""
    name, attached, _ = parse_arm(arm)
    if not attached:
        return ""
    arms = (name, arm, CEILING)
    seeds = set.intersection(*({run["seed"] for run in runs if run["arm"] == a} for a in arms))
    if not seeds:
        return ""
    shared = [run for run in runs if run["seed"] in seeds]
    bare, ours, ceiling = (mean(R2.values(shared, a)) for a in arms)
    gain, gap = ours - bare, ceiling - bare
    return f"{100 * gain / gap:.0f} %"


def main() -> None:
    """Read the command line, run what isn't done, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        fromfile_prefix_chars="@",
    )
    add = parser.add_argument
    add(
        "--data",
        nargs="+",
        required=True,
        help="NAME=FOLDER with train/ and test/ (or val/), or NAME=cifar10, which is downloaded",
    )
    add("--arms", nargs="+", default=ARMS, help="with options behind, after a comma")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--out", type=Path, default=Path("runs/natural"))
    add("--backbone", default="tiny-resnet18", help="as the other examples'")
    add("--image-size", type=int, default=32)
    add("--limit", type=int, help="use so many train images, drawn at random")
    add(
        "--views",
        choices=["probed", "lightly"],
        default="probed",
        help="what makes the views: the probe's transformations, and flips, or SimCLRTransform",
    )
    add("--epochs", type=int, default=100)
    add("--batch-size", type=int, default=128)
    add("--optimizer", choices=["AdamW", "SGD"], default="AdamW", help="SGD: give --lr, too, 0.06")
    add("--lr", type=float, default=2e-3)
    add("--pairs", type=int, default=5000, help="train images that the probe transforms")
    add("--workers", type=int, default=0)
    add("--precision", default="32-true")
    add("--device", default="auto", help="auto, cpu, gpu: Lightning's accelerator")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    refuse_mixed(args.out, args)
    if unnamed := [part for part in args.data if "=" not in part]:
        raise SystemExit(f"--data expects NAME=FOLDER, got {', '.join(unnamed)}")
    folders = dict(part.split("=", 1) for part in args.data)
    if len(folders) > 2:
        raise SystemExit(f"--data expects one data set, or two to transfer between, got {folders}")
    data: dict[str, tuple[Split, Split]] = {}
    for arm in args.arms:
        parse_arm(arm)
    for seed in args.seeds:
        for own in folders:
            for arm in args.arms:
                path = args.out / f"{own}-{file_name(arm, seed)}.json"
                if is_done(path, args):
                    continue
                data = data or {
                    known: load(folder, args.image_size, args.limit)
                    for known, folder in folders.items()
                }
                print(f"{own}: {arm}, seed {seed}")
                model, seconds = train(arm, data[own][0], seed, path, args)
                results = measure(model, own, data, args)
                which = {"data": own, "arm": arm, "seed": seed}
                if hasattr(model, "recon_aux"):
                    which["recon_aux"] = model.recon_aux.options | {
                        "weight": model.recon_aux.weight
                    }
                    shown = data[own][1][0], seed, path.with_suffix(".png")
                    save_reconstructions(model.backbone, model.recon_aux, *shown)
                keep(path, record(args, trained_on(args), seconds, results, **which))
    done = kept(args.out)
    text = tables(done)
    print(text)
    (args.out / "table.md").write_text(text)
    picture(done, args.out / "table.png")
    print(f"saved in {args.out}")


if __name__ == "__main__":
    main()
