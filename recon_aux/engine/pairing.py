"""Whether two views show the same images, row by row. Only the images are looked at."""

from __future__ import annotations

import torch
from torch import Tensor

# cells along each side of an image
_SIDE = 4
# an image whose cells differ by less shows nothing: its pixels are 0..1, or normalised
_BLANK = 0.01
# an image that is about as similar to all others tells nothing: the spread of its similarities
_TIED = 0.05
# rows that a look needs, and rows after which it is decided
_FEW, _MANY = 32, 512
# standard errors from which on rows are paired. After many rows, 4 are enough.
_PAIRED = 6.0


class PairCheck:
    """Gathers rows of two views over steps, until it is sure whether they are paired.

    Augmented views of one image are more alike than views of two images. So the similarity of row
    i of both views is compared with that of row i and row j. Over random pairings, the sum over
    rows has a mean and a variance that are known for any data (Hoeffding 1951). Paired rows are
    many standard errors above this mean.

    Attributes:
        paired: None until it is decided.
    """

    def __init__(self) -> None:
        self.paired: bool | None = None
        self._rows: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, view0: Tensor, view1: Tensor) -> bool:
        """Look at a step's views (B, C, H, W). Return True once: when it finds them not paired."""
        if self.paired is not None or view0.shape != view1.shape:
            return False
        self._rows.append(torch.stack([_cells(view[:_MANY]) for view in (view0, view1)], 1))
        if sum(map(len, self._rows)) < _FEW:
            return False
        rows = torch.cat([x.cpu() for x in self._rows])[-_MANY:].double()
        errors, telling = _standard_errors(rows[:, 0], rows[:, 1])
        self._rows = [rows[telling]]
        count = int(telling.sum())
        # views that are hardly alike are half a standard error per row above the mean
        if errors < min(0.4 * count**0.5 - 4, 2) or errors > _PAIRED or count >= _MANY:
            self.paired = errors > 4
            self._rows = []
        return self.paired is False


def _cells(view: Tensor) -> Tensor:
    """Average brightness over 4×4 cells: (B, 4, 4), of mean 0 and norm 1, or less if blank."""
    height, width = (size // _SIDE for size in view.shape[-2:])
    cut = view[..., : _SIDE * height, : _SIDE * width]
    cells = cut.unflatten(3, (_SIDE, width)).unflatten(2, (_SIDE, height))
    cells = cells.mean((1, 3, 5), dtype=torch.float32)
    cells = cells - cells.mean((1, 2), keepdim=True)
    norm = cells.square().sum((1, 2), keepdim=True).sqrt().clamp(min=_BLANK * _SIDE)
    # what isn't finite is as good as blank
    return (cells / norm).nan_to_num(0, 0, 0)


def _standard_errors(cells0: Tensor, cells1: Tensor) -> tuple[float, Tensor]:
    """Say how much more alike rows are than at random, and which rows aren't alike to all."""
    turned = [cells1, cells1.flip(-1)]
    turned += [x.flip(-2) for x in turned]
    turned += [x.mT for x in turned]
    similar = torch.stack([cells0.flatten(1) @ x.flatten(1).T for x in turned]).amax(0)
    telling = (similar.std(0) > _TIED) & (similar.std(1) > _TIED)
    # the logarithm weighs differences between near duplicates, the offset limits it
    score = -(1.01 - similar[telling][:, telling]).log()
    score = score - score.mean(0, keepdim=True) - score.mean(1, keepdim=True) + score.mean()
    variance = score.square().sum() / (len(score) - 1)
    return float(score.trace() / variance.sqrt()), telling
