"""Natural images: what attaching gains, compared with bare methods and with a ceiling.

``python examples/benchmarks/natural_images.py --data CIFAR=FOLDER TINY=FOLDER`` trains every method
bare and attached, and a ceiling: the same encoder, supervised to regress the transformation's
parameters. Each is measured by the probe, in the paper's protocol, on transformations that no view
has, with few labels, and, frozen, on the other data set. Each run is kept as JSON in ``--out``,
next to it a picture of what an attached encoder rebuilds. An interrupted run goes on from its last
epoch. The tables and a picture are made of all records that are there.

``--arms`` compares others, such as ``"SimCLR, attached, context='both'"``, with any of attach's
options, ``"BYOL, momentum=0.9"``, with any of the method's own, or the rivals of rivals.py, such as
``"SIE given all"``. ``@examples/benchmarks/field.args`` names all of them. Options may stand in a
file, ``@FILE``, one a line. ``--remeasure`` measures arms again that are done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightly.transforms.simclr_transform import SimCLRTransform
from pytorch_lightning import seed_everything
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import to_pil_image

from recon_aux.probe import (
    COMBINED,
    TRANSFORMATIONS,
    draw_parameters,
    linear_classifier,
    markdown_table,
    probe,
    transform,
)

# let this file be run by its path
sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import field
from benchmarks.arms import Arm, attached_with, build_model, read_arm
from benchmarks.bars import Measure, draw
from benchmarks.encoders import ENCODERS, build_encoder, width_of
from benchmarks.images import Split, TwoViews, encode, load, mirror, normalize
from benchmarks.methods import METHODS, MORE_METHODS, VIT_METHODS, SimCLR, StudyModule
from benchmarks.options import study_parser
from benchmarks.pictures import save_reconstructions
from benchmarks.records import Record, as_text, by_data, record, results_of, with_spread
from benchmarks.resuming import fit, trained_on
from benchmarks.rivals import GIVEN, RIVALS
from benchmarks.study import run_study

CEILING = "ceiling"
UNTRAINED = "untrained"
ARMS = [UNTRAINED, *(m + kind for m in METHODS for kind in ("", ", attached")), CEILING]


# --- training ---


class ParameterRegression(StudyModule):
    """The ceiling: trained to regress the transformation's parameters, by a linear map."""

    def __init__(self, backbone: nn.Module, feature_dim: int, lr: float) -> None:
        super().__init__(backbone, lr)
        self.regress = nn.Linear(2 * feature_dim, len(COMBINED))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (clean, changed), parameters = batch
        features = [self.backbone(x).flatten(1) for x in (clean, changed)]
        error: Tensor = F.mse_loss(self.regress(torch.cat(features, dim=1)).float(), parameters)
        return error


MODELS: dict[str, Any] = {
    UNTRAINED: SimCLR,
    **METHODS,
    **MORE_METHODS,
    **VIT_METHODS,
    **RIVALS,
    CEILING: ParameterRegression,
}
"""What an arm's name stands for, in the order of the tables."""


def transformed_pairs(samples: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
    """Collate into images, the same transformed, and the standardised parameters of that."""
    images = torch.stack([image for image, _ in samples]).float() / 255
    images = mirror(images, torch.rand(len(images)) < 0.5)
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


def load_splits(folder: str, args: argparse.Namespace) -> tuple[Split, Split]:
    """Load train and test images; with ``--validate``, both from the train split."""
    if not args.validate:
        return load(folder, args.image_size, args.limit)
    (images, labels), _ = load(folder, args.image_size, args.limit and args.limit + args.validate)
    cut = len(images) - args.validate
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


def parse_arm(text: str) -> Arm:
    """Read one of ``--arms``."""
    examples = [*ARMS, *MORE_METHODS, *VIT_METHODS, *RIVALS]
    return read_arm(text, MODELS, attached=", attached", examples=examples)


def collate(method: str, args: argparse.Namespace) -> Any:
    """Give what makes a batch for a method."""
    if method == CEILING:
        return transformed_pairs
    if args.views == "lightly":
        if method in GIVEN:
            raise SystemExit(
                f"expected views whose parameters are known for {method}, got --views lightly. "
                "Pass --views probed or --views unflipped."
            )
        return SimCLRViews(args.image_size)
    return TwoViews(flip=args.views == "probed", changes=method in GIVEN)


def train(
    text: str, data: Split, seed: int, path: Path, args: argparse.Namespace
) -> tuple[Any, float]:
    """Train one arm, or go on with it; give the model, and how long it took, in seconds."""
    arm = parse_arm(text)
    seed_everything(seed, verbose=False)
    encoder = build_encoder(args.backbone).to(memory_format=torch.channels_last)
    model = build_model(arm, MODELS, encoder, width_of(encoder, args.image_size), args.lr)
    if arm.method == UNTRAINED:
        return model, 0.0
    model.optimizer_name = args.optimizer
    loader = DataLoader(
        TensorDataset(*data),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        collate_fn=collate(arm.method, args),
    )
    return model, fit(model, loader, path, args, max_epochs=args.epochs)


# --- measuring ---

PROTOCOLS = {"paper": "mlp", "unseen": "ridge"}
"""What else is measured: sets of transformations, and what reads them."""

# what is kept of each
KINDS = ("alone", "combined", "spread")


def accuracy(
    features: list[np.ndarray], labels: list[np.ndarray], rows: Any = slice(None)
) -> float:
    """Of logistic regression on some train rows, in percent of the test rows."""
    model = linear_classifier().fit(features[0][rows], labels[0][rows])
    return 100 * float(model.score(features[1], labels[1]))


def with_few_labels(features: list[np.ndarray], labels: list[np.ndarray]) -> dict[str, float]:
    """Accuracy of logistic regression on 1 % and on 10 % of the labels of each class."""
    scores = {}
    order = np.random.default_rng(0).permutation(len(labels[0]))
    classes = [order[labels[0][order] == label] for label in np.unique(labels[0])]
    for share in (1, 10):
        few = [rows[: max(1, round(len(rows) * share / 100))] for rows in classes]
        scores[f"{share} % of labels"] = accuracy(features, labels, np.concatenate(few))
    return scores


def measure(
    model: Any, own: str, data: dict[str, tuple[Split, Split]], args: argparse.Namespace
) -> dict[str, Any]:
    """Probe in each protocol; classify with few labels, and the other data set's images."""
    device = trained_on(args)
    encoder = model.backbone.to(device).eval()
    aux = getattr(model, "recon_aux", None)
    measured = partial(
        probe,
        encoder,
        normalize=normalize,
        pairs=(args.pairs, args.pairs // 2),
        device=device,
        progress=True,
    )
    width = (aux.splitter if aux else model).equivariant_dim
    results = measured(*data[own], equivariant_dim=width).to_dict()
    unlabelled = [(images, None) for images, _ in data[own]]
    for name in args.protocols:
        # of the whole feature alone: the MLP takes long
        found = measured(*unlabelled, transformations=name, regressor=PROTOCOLS[name]).to_dict()
        whole = found["whole"]
        results["whole"][name] = {key: value for key, value in whole.items() if key in KINDS}
    for name, splits in data.items():
        features = [encode(encoder, x, device).flatten(1).numpy() for x, _ in splits]
        labels = [labels.numpy() for _, labels in splits]
        if name == own:
            results["whole"] |= with_few_labels(features, labels)
        else:
            results["whole"]["transfer"] = accuracy(features, labels)
    return results


def mean_r2(part: dict[str, Any], kind: str = "combined") -> float:
    """Mean R² of a part of the feature, all parameters ``"combined"`` or each ``"alone"``."""
    values: dict[str, float] = part[kind]
    return mean(values.values())


# --- the tables and the picture ---


ACCURACY = Measure("linear accuracy, %", lambda found: found["whole"]["linear"], {UNTRAINED: "k:"})
R2 = Measure("mean R²", lambda found: mean_r2(found["whole"]), {UNTRAINED: "k:", CEILING: "k--"})


def draw_bars(done: list[Record], path: Path) -> None:
    """Draw accuracy and mean R² of whole features, one row for each data set."""
    draw(by_data(done), [*METHODS, *MORE_METHODS, *VIT_METHODS], ", attached", [ACCURACY, R2], path)


def tables(done: list[Record]) -> str:
    """Write what is done, mean and standard deviation over seeds, data set by data set."""
    text = []
    for own, runs in by_data(done).items():
        arms = sorted({run["arm"] for run in runs}, key=_order)
        others = [arm for arm in arms if parse_arm(arm).options]
        shipped = [arm for arm in arms if arm not in others]
        titles = {"the whole feature, R² with all transformations combined": shipped}
        titles["the same with other options"] = others
        for title, some in titles.items():
            text += [f"{own}: {title}", as_text(_wholes(runs, some))] if some else []
        text += field.tables(own, runs, arms)
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


def _wholes(runs: list[Record], names: list[str]) -> Table:
    """All that is measured of whole features, and how much of it the equivariant part has."""
    grid = markdown_table(
        ["seeds", *TITLES.values(), "mean R²", "of the gap", "equivariant alone", *COMBINED]
    )
    for arm in names:
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


def _parts(runs: list[Record], names: list[str], kind: str, keys: Sequence[str] = ()) -> Table:
    """Accuracies and R² of each part of the feature."""
    parameters = COMBINED if kind == "combined" else TRANSFORMATIONS
    grid = markdown_table(["seeds", *(TITLES[key] for key in keys), "mean R²", *parameters])
    for arm in names:
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
    """Sort arms as the methods are listed, each bare first."""
    return list(MODELS).index(parse_arm(arm).method), arm


def _closed(runs: list[Record], arm: str) -> str:
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


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = study_parser(
        __doc__,
        arms=ARMS,
        out="runs/natural",
        batch_size=128,
        limit="use so many train images, drawn at random",
    )
    add = parser.add_argument
    add(
        "--data",
        nargs="+",
        required=True,
        help="NAME=FOLDER with train/ and test/ (or val/), NAME=cifar10, which is downloaded, or "
        "NAME=digits",
    )
    add("--backbone", default="tiny-resnet18", help=f"{', '.join(ENCODERS)}, or torchvision's name")
    add("--image-size", type=int, default=32)
    add(
        "--views",
        choices=["probed", "unflipped", "lightly"],
        default="probed",
        help="what makes the views: the probe's transformations and flips, the same without flips, "
        "or SimCLRTransform",
    )
    add("--epochs", type=int, default=100)
    add("--optimizer", choices=["AdamW", "SGD"], default="AdamW", help="SGD: give --lr, too, 0.06")
    add(
        "--protocols",
        nargs="*",
        choices=list(PROTOCOLS),
        default=list(PROTOCOLS),
        help="what else is measured: the paper's protocol, and transformations that no view has",
    )
    add(
        "--validate",
        type=int,
        default=0,
        metavar="N",
        help="test on so many other train images, to choose options by",
    )
    add("--pairs", type=int, default=5000, help="train images that the probe transforms")
    return parser.parse_args()


def main() -> None:
    """Read the command line, run what isn't done, print the tables."""
    args = parse_options()
    if unnamed := [part for part in args.data if "=" not in part]:
        raise SystemExit(f"--data expects NAME=FOLDER, got {', '.join(unnamed)}")
    folders = dict(part.split("=", 1) for part in args.data)
    if len(folders) > 2:
        raise SystemExit(f"--data expects one data set, or two to transfer between, got {folders}")
    for arm in args.arms:
        parse_arm(arm)

    @cache
    def data() -> dict[str, tuple[Split, Split]]:
        return {name: load_splits(folder, args) for name, folder in folders.items()}

    def run(which: dict[str, Any], path: Path) -> Record:
        own, seed = which["data"], which["seed"]
        train_split, (test_images, _) = data()[own]
        model, seconds = train(which["arm"], train_split, seed, path, args)
        results = measure(model, own, data(), args)
        if hasattr(model, "recon_aux"):
            picture = path.with_suffix(".png")
            save_reconstructions(model.backbone, model.recon_aux, test_images, seed, picture)
        which = which | attached_with(model)
        return record(args, trained_on(args), seconds, results, **which)

    runs = [
        {"data": name, "arm": arm, "seed": seed}
        for seed in args.seeds
        for name in folders
        for arm in args.arms
    ]
    run_study(args, runs, run, table=tables, picture=draw_bars)


if __name__ == "__main__":
    main()
