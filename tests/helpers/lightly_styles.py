"""SimCLR, BYOL and VICReg for lightly, in the two styles lightly's users write them in."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss, VICRegLoss
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, SimCLRProjectionHead
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.models.utils import (
    deactivate_requires_grad,
    get_weight_decay_parameters,
    update_momentum,
)
from lightly.utils.benchmarking import OnlineLinearClassifier
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler
from torch import Tensor, nn

from helpers.models import tiny_encoder


def build(base: type, method: str, style: str, backbone: nn.Module | None = None, **kw: Any) -> Any:
    """Make a method's class on ``base``, a LightningModule of either package, and build one."""
    classes = {"one_by_one": one_by_one_classes, "concatenated": concatenated_classes}[style]
    return classes(base)[method](tiny_encoder(**kw) if backbone is None else backbone)


def feature_dim(backbone: nn.Module) -> int:
    backbone.eval()
    with torch.random.fork_rng(), torch.no_grad():
        dim = backbone(torch.zeros(1, 3, 32, 32)).flatten(1).shape[1]
    backbone.train()
    return dim


def one_by_one_classes(base: type) -> dict[str, type]:
    class SimCLR(base):  # type: ignore[misc]
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone
            self.projection_head = SimCLRProjectionHead(feature_dim(backbone), 32, 16)
            self.criterion = NTXentLoss()

        def forward(self, x: Tensor) -> Tensor:
            return self.projection_head(self.backbone(x).flatten(start_dim=1))

        def training_step(self, batch: Any, batch_index: int) -> Any:
            x0, x1 = batch[0]
            return self.criterion(self.forward(x0), self.forward(x1))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.06)

    class VICReg(SimCLR):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__(backbone)
            self.projection_head = VICRegProjectionHead(feature_dim(backbone), 32, 32, num_layers=2)
            self.criterion = VICRegLoss()

        def training_step(self, batch: Any, batch_index: int) -> dict[str, Any]:
            return {"loss": super().training_step(batch, batch_index), "size": len(batch[1])}

    class BYOL(base):  # type: ignore[misc]
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone
            self.projection_head = BYOLProjectionHead(feature_dim(backbone), 32, 16)
            self.prediction_head = BYOLPredictionHead(16, 32, 16)
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
            deactivate_requires_grad(self.projection_head_momentum)
            self.criterion = NegativeCosineSimilarity()

        def online(self, x: Tensor) -> Tensor:
            return self.prediction_head(self.projection_head(self.backbone(x).flatten(1)))

        def target(self, x: Tensor) -> Tensor:
            return self.projection_head_momentum(self.backbone_momentum(x).flatten(1)).detach()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            update_momentum(self.backbone, self.backbone_momentum, m=0.99)
            update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
            x0, x1 = batch[0]
            p0, p1, z0, z1 = self.online(x0), self.online(x1), self.target(x0), self.target(x1)
            return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.06)

    return {"SimCLR": SimCLR, "VICReg": VICReg, "BYOL": BYOL}


def concatenated_classes(base: type) -> dict[str, type]:
    class Concatenated(base):  # type: ignore[misc]
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            dim = feature_dim(backbone)
            self.backbone = backbone
            self.projection_head = self.head(dim)
            self.criterion = self.loss()
            self.online_classifier = OnlineLinearClassifier(dim, num_classes=4, topk=(1,))

        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            views, targets = batch[0], batch[1]
            features = self.forward(torch.cat(views)).flatten(start_dim=1)
            loss = self.criterion(*self.projection_head(features).chunk(len(views)))
            self.log("train_loss", loss, prog_bar=True, batch_size=len(targets))
            given = (features.detach(), targets.repeat(len(views)))
            cls_loss, cls_log = self.online_classifier.training_step(given, batch_idx)
            self.log_dict(cls_log, batch_size=len(targets))
            return loss + cls_loss

        def trained(self) -> list[nn.Module]:
            return [self.backbone, self.projection_head]

        def configure_optimizers(self) -> Any:
            params, no_decay = get_weight_decay_parameters(self.trained())
            optimizer = LARS(
                [
                    {"name": "method", "params": params},
                    {"name": "method_no_weight_decay", "params": no_decay, "weight_decay": 0.0},
                    {"name": "online", "params": self.online_classifier.parameters()},
                ],
                lr=0.1,
                momentum=0.9,
                weight_decay=1e-6,
            )
            schedule = CosineWarmupScheduler(optimizer, warmup_epochs=2, max_epochs=10)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    class SimCLR(Concatenated):
        def head(self, dim: int) -> nn.Module:
            return SimCLRProjectionHead(dim, 32, 16)

        def loss(self) -> nn.Module:
            return NTXentLoss(temperature=0.1)

    class VICReg(Concatenated):
        def head(self, dim: int) -> nn.Module:
            return VICRegProjectionHead(dim, 32, 32, num_layers=2)

        def loss(self) -> nn.Module:
            return VICRegLoss()

    class BYOL(Concatenated):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__(backbone)
            self.prediction_head = BYOLPredictionHead(16, 32, 16)
            self.teacher_backbone = copy.deepcopy(self.backbone)
            self.teacher_projection_head = self.head(feature_dim(backbone))

        def head(self, dim: int) -> nn.Module:
            return BYOLProjectionHead(dim, 32, 16)

        def loss(self) -> nn.Module:
            return NegativeCosineSimilarity()

        def trained(self) -> list[nn.Module]:
            return [*super().trained(), self.prediction_head]

        def student(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = self(x).flatten(start_dim=1)
            return features, self.prediction_head(self.projection_head(features))

        @torch.no_grad()
        def teacher(self, x: Tensor) -> Tensor:
            return self.teacher_projection_head(self.teacher_backbone(x).flatten(start_dim=1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            update_momentum(self.backbone, self.teacher_backbone, m=0.99)
            update_momentum(self.projection_head, self.teacher_projection_head, m=0.99)
            (x0, x1), targets = batch[0], batch[1]
            t0, t1 = self.teacher(x0), self.teacher(x1)
            (y0, p0), (_, p1) = self.student(x0), self.student(x1)
            loss = 2 * self.criterion(t0, p1) + 2 * self.criterion(t1, p0)
            cls_loss, _ = self.online_classifier.training_step((y0.detach(), targets), batch_idx)
            return loss + cls_loss

    return {"SimCLR": SimCLR, "VICReg": VICReg, "BYOL": BYOL}
