"""Where the object is, drawn by a linear map from frozen features.

``python examples/benchmarks/views3d/segmentation.py STUDY FOLDER`` measures the encoders that
compare.py has trained with ``--out STUDY``, on the objects in FOLDER, and prints a table: the mean
of the IoU of the object and of the background, in percent, over all pixels of held-out objects.
Records, a picture of each encoder's masks and a picture of the table are kept in
STUDY/segmentation. ``--arms VICReg "VICReg + recon_aux"`` measures these only.

FOLDER is what render.py makes, with masks. Ridge regression predicts each pixel of the mask, 0 or
1, from the encoder's whole map before its global pooling; beside it, from the pooled feature. A
pixel above one half is the object's. Predicting the mean mask needs no encoder.

Usually, linear segmentation upsamples the map and classifies each pixel by its own feature. That
isn't measured here: images of 32 pixels have maps of 2x2, too coarse to draw any object. In a trial
all encoders drew background alone, which has 42 %.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from sklearn.metrics import jaccard_score
from torch import Tensor, nn

from recon_aux.probe import linear_regression

# let this file be run by its path
sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.encoders import small_resnet18
from benchmarks.frozen import find_trained, measure_trained, task_parser
from benchmarks.images import as_input, encode, normalize
from benchmarks.pictures import save_pictures
from benchmarks.views3d.data import Objects

MAP, POOLED, MEANS = "mean IoU, %", "from the pooled feature", "of the mean mask"

# the regression holds all of them at once
TRAIN_IMAGES = 5000

Masked = tuple[Tensor, Tensor]
"""Images ``(N, 3, H, W)`` in uint8, and masks ``(N, H, W)``, true where the object is."""


def read(folder: Path, split: str, **options: Any) -> Masked:
    """Read the images and the masks of a split, all views of all objects.

    Args:
        folder: of the data set.
        split: ``"train"`` or ``"val"``.
        options: of :class:`Objects`.

    Raises:
        SystemExit: if there are no masks.
    """
    data = Objects(folder, split, **options)
    if not (data.folders[0] / "mask_0.png").is_file():
        raise SystemExit(
            f"expected mask_0.png in {data.folders[0]}, found none. Run render.py again, with the "
            "options that made the objects: it adds the masks."
        )
    paths = [folder / f"mask_{view}.png" for folder in data.folders for view in range(data.views)]
    masks = np.stack([_read_mask(path, data.size) for path in track(paths, "reading masks")])
    images = [data.image(row, view) for row in range(len(data)) for view in range(data.views)]
    return torch.stack(images), torch.from_numpy(masks)


def _read_mask(path: Path, size: int) -> np.ndarray:
    mask = Image.open(path).convert("L").resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(mask) > 127


def mean_iou(masks: Any, predicted: Any) -> float:
    """Give the mean of the object's IoU and the background's, in percent, over all pixels.

    Example:
        >>> mask = np.array([[True, False, False, False]])
        >>> mean_iou(mask, mask), round(mean_iou(mask, ~mask & False), 1)
        (100.0, 37.5)
    """
    found = jaccard_score(np.ravel(masks), np.ravel(predicted), average="macro", zero_division=0)
    return 100 * float(found)


def measure(
    maps: tuple[Tensor, Tensor], masks: tuple[Tensor, Tensor]
) -> tuple[dict[str, float], Tensor]:
    """Predict the test masks from maps; give the IoUs, and the masks that the maps give."""
    wanted = masks[0].flatten(1).float().numpy()
    results, drawn = {}, []
    for name, features in {
        MAP: [part.flatten(1).numpy() for part in maps],
        POOLED: [part.mean((2, 3)).numpy() for part in maps],
    }.items():
        predicted = linear_regression().fit(features[0], wanted).predict(features[1]) > 0.5
        results[name] = mean_iou(masks[1], predicted)
        drawn.append(torch.from_numpy(predicted).view_as(masks[1]))
    results[MEANS] = mean_iou(masks[1], (masks[0].float().mean(0) > 0.5).expand_as(masks[1]))
    return results, drawn[0]


def save_masks(images: Tensor, masks: Tensor, drawn: Tensor, path: Path, count: int = 10) -> None:
    """Save a picture of some images, their masks, and what is drawn from the features."""
    rows = torch.linspace(0, len(images) - 1, count).long()
    white = [normalize(mask[rows, None].float().expand(-1, 3, -1, -1)) for mask in (masks, drawn)]
    save_pictures(
        [list(as_input(images[rows])), *map(list, white)], ["image", "mask", "from features"], path
    )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = task_parser(__doc__, out="segmentation")
    add = parser.add_argument
    add("data", type=Path, help="folder of the objects that the encoders were trained on")
    add("--limit", type=int, help="use so many objects of each split")
    return parser.parse_args()


def main() -> None:
    """Read the command line, measure what isn't done, print the table."""
    args = parse_options()
    trained = find_trained(args.folder, "compare.py", args.arms)
    options = {key: int(trained[0]["options"][key]) for key in ("size", "views")}

    @cache
    def data() -> tuple[Masked, Masked]:
        train, val = (read(args.data, s, limit=args.limit, **options) for s in ("train", "val"))
        chosen = np.random.default_rng(0).permutation(len(train[0]))[:TRAIN_IMAGES]
        return (train[0][chosen], train[1][chosen]), val

    def run(encoder: nn.Module, path: Path) -> dict[str, float]:
        assert isinstance(encoder, nn.Sequential)
        device = next(encoder.parameters()).device
        (train, train_masks), (test, test_masks) = data()
        # before the global pooling
        maps = encode(encoder[:-2], train, device), encode(encoder[:-2], test, device)
        results, drawn = measure(maps, (train_masks, test_masks))
        save_masks(test, test_masks, drawn, path.with_suffix(".png"))
        return results

    measure_trained(
        args,
        trained,
        run,
        shown=MAP,
        nothing=MEANS,
        build=lambda made: small_resnet18(int(made["width"]), stride=2),
    )


if __name__ == "__main__":
    main()
