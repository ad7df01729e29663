"""SIE, which is given what changed between the views, as how an object turned.

Garrido, Najman, LeCun, "Self-Supervised Learning of Split Invariant Equivariant Representations",
ICML 2023, arXiv 2302.10283, written from the paper (section 3). The weights are those of the
authors' command, which gives the equivariance's as 0.45 of the invariance's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from lightly.loss import vicreg_loss
from lightly.loss.vicreg_loss import covariance_loss
from lightly.models.modules.heads import VICRegProjectionHead
from torch import Tensor, nn

from benchmarks.methods import StudyModule


class HyperPredictor(nn.Module):
    """Predicts the second view's equivariant embedding from the first's and what changed.

    A linear hypernetwork makes the matrix of a linear map from what changed, so that the change
    can't be ignored. The result is linear in both: a linear map of their products.

    Args:
        dim: channels of the embedding.
        change_dim: how many numbers say what changed. The fourth is 1 where nothing did, as the
            last number of a quaternion, or of a 2x2 matrix.
    """

    def __init__(self, dim: int, change_dim: int = 4) -> None:
        super().__init__()
        self.products = nn.Linear(change_dim * dim, dim, bias=False)
        # begin as if nothing changed: torch's own first weights predict several times the
        # embedding's size
        nn.init.zeros_(self.products.weight)
        nn.init.eye_(self.products.weight[:, 3 * dim : 4 * dim])

    def forward(self, embedding: Tensor, change: Tensor) -> Tensor:
        """``(B, dim)``, ``(B, change_dim)`` -> ``(B, dim)``."""
        products = einsum(change, embedding, "b k, b j -> b k j")
        predicted: Tensor = self.products(rearrange(products, "b k j -> b (k j)"))
        return predicted


class SIE(StudyModule):
    """VICReg on embeddings of both parts of the feature.

    The invariant parts are trained to be equal, the equivariant parts to be predictable from what
    changed.

    Args:
        backbone: images -> ``(B, feature_dim)``.
        feature_dim: channels of the feature; the last half is equivariant.
        lr: AdamW's highest learning rate.
        dim: channels of the embeddings.
        layers: of the heads.
        change_dim: how many numbers of what changed are given: the first 4 are the rotation.
        invariance: weight of the invariant parts' distance.
        equivariance: weight of the predictions' distance.
        variance: weight of the variance terms, including that of the predictor's output.
        covariance: weight of the covariance terms.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        lr: float,
        *,
        dim: int = 512,
        layers: int = 2,
        change_dim: int = 4,
        invariance: float = 10.0,
        equivariance: float = 4.5,
        variance: float = 10.0,
        covariance: float = 1.0,
    ) -> None:
        super().__init__(backbone, lr)
        self.split = feature_dim // 2
        self.equivariant_dim = feature_dim - self.split
        self.heads = nn.ModuleList(
            VICRegProjectionHead(self.split, dim, dim, num_layers=layers) for _ in range(2)
        )
        self.change_dim = change_dim
        self.predictor = HyperPredictor(dim, change_dim)
        self.weights = (invariance, equivariance, variance, covariance)

    def embed(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of both parts of the feature."""
        feature = self.backbone(views).flatten(1)
        return self.heads[0](feature[:, : self.split]), self.heads[1](feature[:, self.split :])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch of two views, labels and changes."""
        (x0, x1), (_, change) = batch
        (i0, e0), (i1, e1) = self.embed(x0), self.embed(x1)
        predicted = self.predictor(e0, change[:, : self.change_dim])
        # both parts together, so that what is in one isn't repeated in the other
        whole = [torch.cat(pair, dim=1).float() for pair in ((i0, e0), (i1, e1))]
        terms = (
            F.mse_loss(i0, i1),
            F.mse_loss(predicted, e1),
            sum(map(variance_loss, whole)) + variance_loss(predicted.float()),
            sum(map(covariance_loss, whole)),
        )
        loss: Tensor = sum(weight * term for weight, term in zip(self.weights, terms, strict=True))
        return loss


def variance_loss(x: Tensor) -> Tensor:
    """How far the standard deviations of a batch stay below 1; half of VICReg's."""
    loss: Tensor = vicreg_loss.variance_loss(x) / 2
    return loss
