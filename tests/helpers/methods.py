"""Methods of every shape that lightly's users write, each as short as it can be."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models.modules import (
    DINOProjectionHead,
    SimCLRProjectionHead,
)
from lightly.models.utils import (
    batch_shuffle,
    batch_unshuffle,
    deactivate_requires_grad,
    select_most_similar,
)
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from helpers.data import shaded_views
from helpers.models import tiny_encoder
from helpers.versions import newer

DIM = 16
Head = partial(SimCLRProjectionHead, DIM, 32, 16)


def map_encoder() -> nn.Module:
    """Gives a feature map ``(B, D, 8, 8)``."""
    return tiny_encoder(dim=DIM)[:-1]


def tiny_vit(**kw: Any) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        **{"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_classes": 0, **kw},
    )


class Method(LightningModule):
    """Two views, one by one, and what the others share."""

    # which of its modules is trained as the encoder
    trained = "backbone"

    def __init__(self, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone: Any = tiny_encoder(dim=DIM) if backbone is None else backbone
        self.projection_head: Any = Head()
        self.criterion: Any = NTXentLoss()

    def batch(self) -> Any:
        return shaded_views(2), torch.arange(4)

    def expected(self, batch: Any) -> list[Tensor]:
        """The two views that are to be rebuilt."""
        return batch[0][:2]

    def embed(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).flatten(1))

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        x0, x1 = batch[0]
        return self.criterion(self.embed(x0), self.embed(x1))

    def configure_optimizers(self) -> Any:
        trained = (p for p in self.parameters() if p.requires_grad)
        return torch.optim.Adam(trained, lr=2e-3)


class Momentum(Method):
    """One view through the encoder, the other through its momentum copy, as in MoCo."""

    def __init__(self, backbone: nn.Module | None = None) -> None:
        super().__init__(backbone)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def key(self, x: Tensor) -> Tensor:
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(1)).detach()

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        x0, x1 = batch[0]
        return self.criterion(self.embed(x0), self.key(x1))


class ShuffledMomentum(Momentum):
    """MoCo's shuffle: the momentum encoder gets the batch in another order."""

    @torch.no_grad()
    def key(self, x: Tensor) -> Tensor:
        x, order = batch_shuffle(x)
        return batch_unshuffle(super().key(x), order)


class CopiedInTheStep(Momentum):
    """SMoG's reset: the momentum encoder is replaced by a copy in the middle of training."""

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        if batch_idx % 5 == 1:
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
        return super().training_step(batch)


class MomentumWithGradient(Momentum):
    """Nobody froze the momentum encoder; only its projection is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone_momentum.requires_grad_(True)


class WithoutGradient(Method):
    """The other view goes through the encoder itself, without gradient."""

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        x0, x1 = batch[0]
        with torch.no_grad():
            key = self.embed(x1)
        return self.criterion(self.embed(x0), key)


class Dense(Momentum):
    """DenseCL: a feature map, pooled for one head, every position of it for another.

    Positions are matched by the invariant part, as the adapter's warning advises.
    """

    def __init__(self) -> None:
        super().__init__(map_encoder())
        dense_head = newer("lightly.models.modules", "DenseCLProjectionHead")
        self.projection_head_local = dense_head(DIM, 32, 16)

    def pooled(self, feature: Tensor) -> Tensor:
        return feature.mean((2, 3))

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        x0, x1 = batch[0]
        feature, other = self.backbone(x0), self.backbone_momentum(x1)
        z0 = self.projection_head(self.pooled(feature))
        z1 = self.projection_head_momentum(self.pooled(other))
        positions, others = (y.flatten(2).permute(0, 2, 1) for y in (feature, other))
        local, keys = map(self.projection_head_local, (positions, others))
        aux: Any = getattr(self, "recon_aux", None)
        if aux is not None:
            positions, others = aux.invariant(positions), aux.invariant(others)
        matched = select_most_similar(positions, others, keys.detach())
        return self.criterion(z0, z1) + (local - matched).square().mean()


class ChannelsLast(Method):
    """VICRegL: a head on every position of a map, channels last; small crops; a dict as batch."""

    def __init__(self) -> None:
        super().__init__(map_encoder())
        self.local_projection_head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 8))

    def batch(self) -> Any:
        views = shaded_views(2) + shaded_views(2, side=16)
        return {"views": views, "grids": [torch.rand(4, 4, 4, 2)] * 4, "label": torch.arange(4)}

    def expected(self, batch: Any) -> list[Tensor]:
        return batch["views"][:2]

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        z, local = [], []
        for x in batch["views"]:
            feature = self.backbone(x)
            z.append(self.projection_head(feature.mean((2, 3))))
            local.append(self.local_projection_head(feature.permute(0, 2, 3, 1)).mean((1, 2)))
        return self.criterion(z[0], z[1]) + self.criterion(local[2], local[3])


class MultiCrop(Method):
    """DINO: a student sees large and small crops, concatenated; the teacher is ``backbone``."""

    trained = "pupil"

    def __init__(self) -> None:
        super().__init__()
        self.pupil = copy.deepcopy(self.backbone)
        self.pupil_projection_head = DINOProjectionHead(DIM, 32, 16, 64)
        self.projection_head = DINOProjectionHead(DIM, 32, 16, 64)
        self.criterion = DINOLoss(output_dim=64)

    def batch(self) -> Any:
        return shaded_views(2) + shaded_views(3, side=16), torch.arange(4)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        views = batch[0]
        with torch.no_grad():
            teacher = self.embed(torch.cat(views[:2])).chunk(2)
        crops = (torch.cat(views[:2]), torch.cat(views[2:]))
        student = [self.pupil_projection_head(self.pupil(x).flatten(1)) for x in crops]
        return self.criterion(list(teacher), [*student[0].chunk(2), *student[1].chunk(3)], epoch=0)


class BackwardOnce(Method):
    """VIbCReg: a layer whose backward pass ruins what it saved."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x * 1)
            return x * 1

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            ctx.saved_tensors[0].zero_()
            return gradient

    def embed(self, x: Tensor) -> Tensor:
        return self.Once.apply(super().embed(x))


class ManyViews(Method):
    """FastSiam, LeJEPA: more than two large views."""

    def batch(self) -> Any:
        return shaded_views(4), torch.arange(4)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return torch.stack([self.embed(x) for x in batch[0]]).var(0).mean()


class AugmentsInTheStep(Method):
    """The views are made where the encoder is called, and go through it concatenated."""

    def batch(self) -> Any:
        return {"image": shaded_views(1)[0], "index": torch.arange(4)}

    def expected(self, batch: Any) -> list[Tensor]:
        return [batch["image"].flip(-1), batch["image"] * 0.5]

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return self.criterion(*self.embed(torch.cat(self.expected(batch))).chunk(2))


class ThirteenChannels(Method):
    """A satellite's images."""

    def __init__(self) -> None:
        super().__init__(tiny_encoder(13, DIM))

    def batch(self) -> Any:
        return shaded_views(2, channels=13), torch.arange(4)


class PooledTransformer(Method):
    def __init__(self) -> None:
        super().__init__(tiny_vit())
        self.projection_head = SimCLRProjectionHead(48, 32, 16)


class Tokens(PooledTransformer):
    """The encoder gives tokens, without a class token, and the head takes their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_vit(class_token=False, global_pool="")

    def embed(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).mean(1))


class EveryToken(PooledTransformer):
    """The encoder gives tokens with a class token, and the head takes them all."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_vit(global_pool="")
        self.projection_head = newer("lightly.models.modules", "DenseCLProjectionHead")(48, 32, 16)

    def embed(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x)).flatten(1)


class Masked(Method):
    """iBOT: the encoder is called through encode, with a mask, the heads through forward."""

    trained = "student_backbone"

    def __init__(self) -> None:
        super().__init__()
        del self.backbone, self.projection_head
        vit = tiny_vit(dynamic_img_size=True, pos_embed="learn")
        masked = newer("lightly.models.modules", "MaskedVisionTransformerTIMM")
        self.teacher_backbone = masked(vit=vit, antialias=False)
        self.student_backbone = copy.deepcopy(self.teacher_backbone)
        self.teacher_head = DINOProjectionHead(48, 32, 16, 64)
        self.student_head = DINOProjectionHead(48, 32, 16, 64)
        self.criterion = DINOLoss(output_dim=64)
        self.patch_criterion = newer("lightly.loss", "IBOTPatchLoss")(output_dim=64)

    def batch(self) -> Any:
        return shaded_views(2) + shaded_views(2, side=16), torch.arange(4)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        large, small = torch.cat(batch[0][:2]), torch.cat(batch[0][2:])
        blocks = torch.zeros(len(large), 4, 4, dtype=torch.bool)
        blocks[::2, 1:3, 1:3] = True
        mask = F.pad(blocks.flatten(1), (1, 0))
        with torch.no_grad():
            known = self.teacher_backbone.encode(large)
            teacher = self.teacher_head.forward(known[:, 0]).chunk(2)
            patches = self.teacher_head.forward(known[mask])
        tokens = self.student_backbone.encode(large, mask=mask)
        student = [
            *self.student_head.forward(tokens[:, 0]).chunk(2),
            *self.student_head.forward(self.student_backbone.encode(small)[:, 0]).chunk(2),
        ]
        masked = self.student_head.forward(tokens[mask])
        loss = self.criterion(list(teacher), student, epoch=0)
        return loss + self.patch_criterion(patches, masked, blocks) + self.spread(tokens[:, 0])

    def spread(self, tokens: Tensor) -> Any:
        return 0


class MaskedAndSpread(Masked):
    """DINOv2: a loss on the encoder's features themselves, past every head."""

    def __init__(self) -> None:
        super().__init__()
        self.koleo_criterion = newer("lightly.loss", "KoLeoLoss")()

    def spread(self, tokens: Tensor) -> Any:
        return 0.1 * sum(self.koleo_criterion(part) for part in tokens.chunk(2))


def mixed_by(neck: nn.Module) -> Any:
    """A method that mixes the channels before the head, so that zeroing them hides nothing."""

    class Mixed(Method):
        def __init__(self) -> None:
            super().__init__()
            self.neck = neck

        def embed(self, x: Tensor) -> Tensor:
            return self.projection_head(self.neck(self.backbone(x).flatten(1)))

    return Mixed()


METHODS = [
    Method,
    Momentum,
    ShuffledMomentum,
    CopiedInTheStep,
    MomentumWithGradient,
    WithoutGradient,
    Dense,
    ChannelsLast,
    MultiCrop,
    BackwardOnce,
    ManyViews,
    AugmentsInTheStep,
    ThirteenChannels,
    PooledTransformer,
    Tokens,
    EveryToken,
    Masked,
    MaskedAndSpread,
]
