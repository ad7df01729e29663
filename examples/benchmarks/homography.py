"""Homography between two crops of a photograph, read from the frozen features of both.

``python examples/benchmarks/homography.py STUDY PHOTOS`` measures the encoders that
natural_images.py has trained with ``--out STUDY``, on photographs in PHOTOS, and prints a table:
how far the predicted corners are from the right ones, in pixels, and how far they are for the mean
prediction, which needs no encoder. Records, a picture of each encoder's predictions and a picture
of the table are kept in STUDY/homography. ``--arms SimCLR "SimCLR, attached"`` measures these only.

The task is that of DeTone, Malisiewicz and Rabinovich, "Deep Image Homography Estimation", 2016,
arXiv 1606.03798. The first crop is a square of a photograph. Each of its corners moves by up to a
quarter of its side, and the second crop shows what is between the moved corners. The moves, eight
numbers, are predicted. The error is the mean distance of the four corners. As there, the
photographs are larger than the crops, so crops never show a border.

Ours: crops are as large as the encoder's images, of photographs twice as large, in colour. The
encoder is frozen and sees one crop at a time. A light MLP, the probe's, reads both features. It is
trained three times; the error is the mean, and the spread its standard deviation. With few pairs it
overfits, and then its error may be above that of the mean prediction.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from kornia.geometry.transform import get_perspective_transform, warp_perspective
from torch import Tensor, nn

from recon_aux.probe import mlp_regression

# let this file be run by its path
sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.frozen import find_trained, measure_trained, task_parser
from benchmarks.images import as_input, encode, load
from benchmarks.pictures import save_pictures

ERROR, SPREAD, MEANS = "corner error, px", "spread of the MLP", "of the mean prediction, px"

# an MLP's error depends a little on its seed
HEADS = 3

Pairs = tuple[Tensor, Tensor, Tensor]
"""First crops and second crops ``(N, 3, side, side)`` in uint8, and moves ``(N, 4, 2)`` in pixels.

A move is what is added to a corner's x and y. Corners go round from the upper left, clockwise.
"""


def square(side: int) -> Tensor:
    """Give the corners of a crop, ``(4, 2)``: the middles of its outermost pixels."""
    return torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]) * (side - 1)


def draw_pairs(photos: Tensor, count: int, side: int, seed: int) -> Pairs:
    """Draw pairs of crops of photographs.

    Args:
        photos: ``(N, 3, H, W)`` in uint8, at least one and a half times as large as the crops.
        count: how many pairs.
        side: of the crops, in pixels.
        seed: of photographs, places and moves; the global random state is left as it is.

    Example:
        >>> photos = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
        >>> first, second, moves = draw_pairs(photos, 5, side=32, seed=0)
        >>> first.shape, bool(moves.abs().max() <= 8)
        (torch.Size([5, 3, 32, 32]), True)
    """
    generator = torch.Generator().manual_seed(seed)
    most = side // 4
    height, width = photos.shape[-2:]
    # so that no moved corner is outside
    places = [
        torch.randint(most, size - side - most + 1, (count,), generator=generator)
        for size in (width, height)
    ]
    corners = square(side) + torch.stack(places, dim=1)[:, None]
    moves = (2 * torch.rand(count, 4, 2, generator=generator) - 1) * most
    rows = torch.randint(len(photos), (count,), generator=generator)
    crops = []
    for start in (corners, corners + moves):
        # not all photographs at once
        parts = zip(rows.split(256), start.split(256), strict=True)
        crops.append(torch.cat([warp(photos[r], c, square(side), side) for r, c in parts]))
    return crops[0], crops[1], moves


def warp(images: Tensor, start: Tensor, end: Tensor, side: int) -> Tensor:
    """Warp images so that four points, ``(N, 4, 2)``, come to others, ``(4, 2)`` or as many.

    Returns:
        The upper left squares of the warped images, ``(N, 3, side, side)`` in uint8; black where
        an image has ended.
    """
    matrix = get_perspective_transform(start, end.expand_as(start))
    shown = warp_perspective(images.float(), matrix, (side, side))
    return shown.round().clamp(0, 255).to(torch.uint8)


def corner_error(predicted: Tensor, moves: Tensor) -> float:
    """Give the mean distance of the predicted corners from the right ones, in pixels."""
    return (predicted - moves).norm(dim=2).mean().item()


def measure(
    encoder: nn.Module, train: Pairs, test: Pairs, device: torch.device
) -> tuple[dict[str, float], Tensor]:
    """Predict how the corners moved; give the errors, and the predictions of one of the MLPs."""
    x = [
        np.concatenate([encode(encoder, x, device).flatten(1) for x in pairs[:2]], axis=1)
        for pairs in (train, test)
    ]
    predictions = []
    for seed in range(HEADS):
        found = mlp_regression(x[0], train[2].flatten(1), x[1], seed=seed, device=device)
        predictions.append(torch.from_numpy(found).unflatten(1, (4, 2)))
    errors = [corner_error(predicted, test[2]) for predicted in predictions]
    means = corner_error(train[2].mean(0), test[2])
    return {ERROR: mean(errors), SPREAD: stdev(errors), MEANS: means}, predictions[0]


def save_predictions(pairs: Pairs, predicted: Tensor, path: Path, count: int = 10) -> None:
    """Save a picture of some pairs, and of the second crop put back by the predicted moves."""
    first, second, moves = (part[:count] for part in pairs)
    side = first.shape[-1]
    corners = square(side)
    rows = {"first crop": first, "second crop": second}
    for label, moved in (("put back", predicted[:count]), ("rightly", moves)):
        rows[label] = warp(second, corners.expand_as(moved), corners + moved, side)
    save_pictures([list(as_input(row)) for row in rows.values()], list(rows), path)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = task_parser(__doc__, out="homography")
    add = parser.add_argument
    add("photos", help="a folder with train/ and test/ (or val/), cifar10, or digits")
    add("--pairs", type=int, default=10000, help="of train crops; half as many of test crops")
    return parser.parse_args()


def main() -> None:
    """Read the command line, measure what isn't done, print the table."""
    args = parse_options()
    trained = find_trained(args.folder, "natural_images.py", args.arms)
    side = int(trained[0]["options"]["image_size"])

    @cache
    def pairs() -> tuple[Pairs, Pairs]:
        (train, _), (test, _) = load(args.photos, 2 * side, args.pairs)
        return draw_pairs(train, args.pairs, side, 0), draw_pairs(test, args.pairs // 2, side, 1)

    def run(encoder: nn.Module, path: Path) -> dict[str, float]:
        results, predicted = measure(encoder, *pairs(), next(encoder.parameters()).device)
        save_predictions(pairs()[1], predicted, path.with_suffix(".png"))
        return results

    measure_trained(
        args,
        trained,
        run,
        shown=ERROR,
        nothing=MEANS,
    )


if __name__ == "__main__":
    main()
