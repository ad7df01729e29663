"""Whether two views show the same images, row by row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# cells along each side of an image, and by how many cells one image is moved over the other
_SIDE, _MOVE = 8, 2
# standard deviation of the cells of a blank image, at most; pixels are 0..1, or normalised
_BLANK = 0.01
# an image tells nothing if its similarities to all others have a smaller standard deviation
_TIED = 0.02
# rows that a first look needs, and rows after which it is decided
_FEW, _MANY = 32, 256


class PairCheck:
    """Gathers rows of two views over steps, until it is sure whether they are paired.

    Views of one image are more alike than views of two. So the similarity of row i to row i is
    compared with that of row i to row j. Over random pairings, the sum over rows has a mean and a
    variance that are known for any images (Hoeffding 1951). Pairs are many standard errors above.

    Attributes:
        paired: None until it is decided.
    """

    def __init__(self) -> None:
        self.paired: bool | None = None
        self._rows: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, view0: Tensor, view1: Tensor) -> bool:
        """Look at a step's views, (B, C, H, W). Return True once: if they aren't paired."""
        if self.paired is not None or view0.shape != view1.shape:
            return False
        self._rows.append(torch.stack([_cells(view[:_MANY]) for view in (view0, view1)], 1))
        if sum(map(len, self._rows)) < _FEW:
            return False
        rows = torch.cat([x.cpu() for x in self._rows])[-_MANY:]
        errors, telling = _standard_errors(rows[:, 0], rows[:, 1])
        count = int(telling.sum())
        # views of one image that are hardly alike have 0.4 * count**0.5, give or take 1
        if errors < min(0.4 * count**0.5 - 4, 2) or errors > 6 or count == _MANY:
            self.paired = errors > 4
        self._rows = [] if self.paired is not None else [rows[telling]]
        return self.paired is False


def _cells(view: Tensor) -> Tensor:
    """Average brightness over cells, (B, 8, 8), of mean 0 and norm 1; all 0 if blank."""
    cells = F.adaptive_avg_pool2d(view.float(), _SIDE).mean(1)
    cells = cells - cells.mean((1, 2), keepdim=True)
    norm = cells.flatten(1).norm(dim=1)[:, None, None]
    # what isn't finite is as good as blank
    return torch.where(norm > _BLANK * _SIDE, cells / norm, 0)


def _standard_errors(cells0: Tensor, cells1: Tensor) -> tuple[float, Tensor]:
    """Say how much more alike rows are than at random, and which rows tell something."""
    turned = [cells1, cells1.flip(-1)]
    turned += [x.flip(-2) for x in turned]
    turned += [x.mT for x in turned]
    moved = F.pad(cells0, (_MOVE,) * 4).unfold(1, _SIDE, 1).unfold(2, _SIDE, 1)
    moved = moved.movedim(0, 2).flatten(3).flatten(0, 1)
    with torch.autocast("cpu", enabled=False):
        alike = torch.stack([(moved @ x.flatten(1).T).amax(0) for x in turned]).amax(0)
    # blank images are like none, equal ones like all
    telling = torch.minimum(alike.std(0), alike.std(1)) > _TIED
    # the logarithm weighs differences between near duplicates, the offset limits it
    score = -(1.01 - alike[telling][:, telling]).log()
    score = score - score.mean(0, keepdim=True) - score.mean(1, keepdim=True) + score.mean()
    error = (score.square().sum() / (len(score) - 1)).sqrt()
    return float(score.trace() / error), telling
