"""What the other view is worth to the decoder: decoders trained on frozen features of views.

``python examples/benchmarks/decoders.py STUDY IMAGES --arms "SimCLR, attached"`` takes the encoders
that natural_images.py has trained with ``--out STUDY``, and trains decoders like recon_aux's on
their features of views of IMAGES. Each rebuilds a view from its last half of channels. Beside them
it sees nothing of the other view, its first half (as shipped), its last half, or both. It prints
how many percent of the pixels' variance over test views are explained. Records are kept in
STUDY/decoders.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.metrics import r2_score
from torch import Tensor, nn

from recon_aux import CrossAttentionDecoder
from recon_aux.task.options import Context, Options

# let this file be run by its path
sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.frozen import find_trained, measure_trained, task_parser
from benchmarks.images import Split, TwoViews, load

CONTEXTS: tuple[Context, ...] = ("none", "invariant", "equivariant", "both")
"""What a decoder sees of the other view, by its column in the table."""


class Views(NamedTuple):
    """Two views of each image, ``(2, N, 3, H, W)``, and their features, ``(2, N, D)``."""

    images: Tensor
    features: Tensor


def explained(rebuilt: Tensor, images: Tensor) -> float:
    """Give how many percent of the variance over images are explained; the mean explains 0.

    Example:
        >>> images = torch.rand(8, 3, 4, 4)
        >>> explained(images, images), round(explained(images.mean(0), images), 2)
        (100.0, 0.0)
    """
    pixels, drawn = (x.expand_as(images).flatten(1).cpu() for x in (images, rebuilt))
    return 100 * float(r2_score(pixels, drawn, multioutput="variance_weighted"))


@torch.no_grad()
def encode_views(encoder: nn.Module, split: Split, seed: int) -> Views:
    """Make two views of each image, and encode them."""
    device = next(encoder.parameters()).device
    images: list[Tensor] = []
    features: list[Tensor] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for rows in torch.split(torch.arange(len(split[0])), 256):
            pair, _ = TwoViews(flip=True)([(split[0][i], split[1][i]) for i in rows])
            images.append(torch.stack(pair))
            features.append(torch.stack([encoder(x.to(device)).flatten(1) for x in pair]))
    return Views(torch.cat(images, dim=1).to(device), torch.cat(features, dim=1).float())


def train_decoder(context: Context, train: Views, test: Views, steps: int) -> float:
    """Train a decoder; give the percent of the variance that it explains on test views."""
    options = Options(train.features.shape[-1], target_size=train.images.shape[-1])
    own_part, seen = options.channels("equivariant"), options.channels(context)
    device = train.images.device
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = CrossAttentionDecoder(own_part[1], seen[1], target_size=options.target_size).to(
            device
        )
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
        for step in range(steps):
            own = step % 2
            rows = torch.randint(train.images.shape[1], (128,))
            mine, other = train.features[own, rows], train.features[1 - own, rows]
            rebuilt = decoder(mine.narrow(1, *own_part), other.narrow(1, *seen))
            optimizer.zero_grad()
            F.mse_loss(rebuilt, train.images[own, rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        mine, other = test.features
        rebuilt = decoder(mine.narrow(1, *own_part), other.narrow(1, *seen))
    return explained(rebuilt, test.images[0])


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = task_parser(__doc__, out="decoders")
    add = parser.add_argument
    add("images", help="a folder with train/ and test/ (or val/), cifar10, or digits")
    add("--limit", type=int, default=10000, help="train images; a fifth as many test images")
    add("--steps", type=int, default=2500, help="of each decoder")
    return parser.parse_args()


def main() -> None:
    """Read the command line, train what isn't trained, print the table."""
    args = parse_options()
    trained = find_trained(args.folder, "natural_images.py", args.arms)

    @cache
    def splits() -> tuple[Split, Split]:
        side = int(trained[0]["options"]["image_size"])
        train, (images, labels) = load(args.images, side, args.limit)
        return train, (images[: args.limit // 5], labels[: args.limit // 5])

    def run(encoder: nn.Module, path: Path) -> dict[str, float]:
        train, test = (encode_views(encoder, split, i) for i, split in enumerate(splits()))
        return {name: train_decoder(name, train, test, args.steps) for name in CONTEXTS}

    measure_trained(
        args,
        trained,
        run,
        shown="invariant",
        nothing="none",
    )


if __name__ == "__main__":
    main()
