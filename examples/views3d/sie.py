"""SIE, told how the object turned between the views: the comparison's nearest method.

Garrido, Najman, LeCun, "Self-Supervised Learning of Split Invariant Equivariant Representations",
ICML 2023, arXiv 2302.10283, written from the paper (section 3). The weights are those of the
authors' command, where the equivariance's is told as 0.45 of the invariance's, but for the
covariance's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from lightly.loss import vicreg_loss
from lightly.loss.vicreg_loss import covariance_loss
from lightly.models.modules.heads import VICRegProjectionHead
from lightly_simclr import SimCLR
from pytorch_lightning import LightningModule
from torch import Tensor, nn


class HyperPredictor(nn.Module):
    """Predicts the second view's equivariant embedding from the first's and what changed.

    A linear map whose matrix a linear hypernetwork makes from the relative rotation, so that the
    change can't be ignored: linear in both, thus a linear map of their products.
    """

    def __init__(self, dim: int, told: int = 4) -> None:
        super().__init__()
        self.products = nn.Linear(told * dim, dim, bias=False)
        # as if nothing turned, which the quaternion's last number says; torch's own first weights
        # predict several times the embedding's size
        nn.init.zeros_(self.products.weight)
        nn.init.eye_(self.products.weight[:, -dim:])

    def forward(self, embedding: Tensor, change: Tensor) -> Tensor:
        """``(B, dim)``, ``(B, told)`` -> ``(B, dim)``."""
        products = einsum(change, embedding, "b k, b j -> b k j")
        predicted: Tensor = self.products(rearrange(products, "b k j -> b (k j)"))
        return predicted


class SIE(LightningModule):
    """VICReg on embeddings of both parts of the feature: the invariant parts are to be equal, the
    equivariant ones predictable from what changed.

    Args:
        encoder: images -> ``(B, width)``.
        width: channels of the feature; the last half is equivariant.
        lr: AdamW's highest learning rate.
        dim: channels of the embeddings.
        layers: of the heads.
        invariance: weight of the invariant parts' distance.
        equivariance: weight of the predictions' distance.
        variance: weight of the variance terms, that of the predictor's output among them.
        covariance: weight of the covariance terms; the paper's is 1, for batches eight times as
            large as the README's, in which covariances are that much less noisy.
    """

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        lr: float,
        *,
        dim: int = 512,
        layers: int = 2,
        invariance: float = 10.0,
        equivariance: float = 4.5,
        variance: float = 10.0,
        covariance: float = 0.1,
    ) -> None:
        super().__init__()
        self.backbone = encoder
        self.half = width // 2
        self.heads = nn.ModuleList(
            VICRegProjectionHead(self.half, dim, dim, num_layers=layers) for _ in range(2)
        )
        self.predictor = HyperPredictor(dim)
        self.lr = lr
        self.weights = (invariance, equivariance, variance, covariance)

    def embed(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of both parts of the feature."""
        feature = self.backbone(views).flatten(1)
        return self.heads[0](feature[:, : self.half]), self.heads[1](feature[:, self.half :])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch of two views, labels and changes."""
        (x0, x1), (_, change) = batch
        (i0, e0), (i1, e1) = self.embed(x0), self.embed(x1)
        predicted = self.predictor(e0, change[:, :4])
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

    configure_optimizers = SimCLR.configure_optimizers


def variance_loss(x: Tensor) -> Tensor:
    """How far the standard deviations of a batch stay below 1; half of VICReg's."""
    return vicreg_loss.variance_loss(x) / 2
