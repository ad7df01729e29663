"""Read a data set in 3DIEBench's layout: the official one, or what render.py makes.

A pair of views is two images of one object, not augmented further. A pair's target is as in
Garrido, Najman and LeCun (2023, arXiv 2302.10283, section 4).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.images import as_input

COLORS = [3, 6]
"""Where a latent holds the floor's hue and the lamp's."""


class Objects(Dataset[Any]):
    """Pairs of views of objects.

    An item is ``[x0, x1], (label, target)``: two of the object's views, drawn at random from the
    global random state, its class, and what changed, see :func:`targets`.

    Args:
        root: the folder that the lists' paths start from.
        split: ``"train"`` or ``"val"``.
        size: side of the images, in pixels.
        lists: the folder of ``{split}_images.npy`` and ``{split}_labels.npy``, if not ``root``.
        views: how many there are of each object.
        limit: use so many objects, spread over the list.
        cached: read every image once, at the start, into memory.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        size: int = 64,
        lists: Path | None = None,
        views: int = 50,
        limit: int | None = None,
        cached: bool = True,
    ) -> None:
        listed = (lists or root) / f"{split}_images.npy"
        if not listed.is_file():
            raise SystemExit(
                f"expected {listed}, as render.py makes it; pass --lists FOLDER if the lists are "
                "in another folder than the data set"
            )
        paths = np.load(listed)
        labels = np.load((lists or root) / f"{split}_labels.npy")
        rows = np.linspace(0, len(paths) - 1, min(limit or len(paths), len(paths))).astype(int)
        # the official lists' paths begin with a slash
        self.folders = [root / str(paths[row]).lstrip("/") for row in rows]
        self.labels = torch.from_numpy(labels[rows].astype(np.int64))
        self.views, self.size = views, size
        self.latents = np.stack(
            [
                [np.load(folder / f"latent_{view}.npy") for view in range(views)]
                for folder in track(self.folders, f"reading {split} latents")
            ]
        )
        self.images: Tensor | None = None
        if cached:
            folders = track(self.folders, f"reading {split} images")
            self.images = torch.stack(
                [torch.stack([self._read(f, view) for view in range(views)]) for f in folders]
            )

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, row: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        pair = torch.randperm(self.views)[:2]
        views = [as_input(self.image(row, int(view))) for view in pair]
        target = targets(self.latents[row, pair[:1].numpy()], self.latents[row, pair[1:].numpy()])
        return views, (self.labels[row], target[0])

    def image(self, row: int, view: int) -> Tensor:
        """One image, ``(3, H, W)``, in uint8."""
        if self.images is not None:
            return self.images[row, view]
        return self._read(self.folders[row], view)

    def _read(self, folder: Path, view: int) -> Tensor:
        image = Image.open(folder / f"image_{view}.jpg").convert("RGB")
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def targets(first: np.ndarray, second: np.ndarray) -> Tensor:
    """Compute what changed between two views.

    Args:
        first: latents ``(N, 7)``.
        second: the same of the other views.

    Returns:
        ``(N, 6)``: the relative rotation as a quaternion ``(x, y, z, w)``, then the differences of
        the floor's hue and of the lamp's.
    """
    start, end = (Rotation.from_euler("xyz", latents[:, :3]) for latents in (first, second))
    change = np.concatenate(
        [(start.inv() * end).as_quat(), second[:, COLORS] - first[:, COLORS]], axis=1
    )
    return torch.from_numpy(change).float()
