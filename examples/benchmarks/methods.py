"""The methods that the studies train, written as lightly's documentation writes them."""

from __future__ import annotations

import copy
import random
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightly.loss import (
    BarlowTwinsLoss,
    DINOLoss,
    IBOTPatchLoss,
    KoLeoLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    VICRegLoss,
)
from lightly.models import modules
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.models.utils import (
    deactivate_requires_grad,
    random_block_mask,
    update_momentum,
)
from lightly.utils.scheduler import cosine_schedule
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchvision.models import VisionTransformer


class StudyModule(LightningModule):
    """An encoder, with the optimizer and the schedule that all of a study's models have.

    Args:
        backbone: the encoder.
        lr: highest learning rate.
    """

    optimizer_name = "AdamW"
    """``"AdamW"`` or ``"SGD"``; SGD is set up as in lightly's benchmarks for small images."""

    equivariant_dim = 0
    """How many of the feature's last channels are an equivariant part of the model's own."""

    attach_options: ClassVar[dict[str, Any]] = {}
    """Options of attach that the method always needs."""

    def __init__(self, backbone: nn.Module, lr: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.lr = lr

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer: torch.optim.Optimizer
        if self.optimizer_name == "SGD":
            optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=5e-4)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            self.lr,
            steps,
            pct_start=0.101,
            cycle_momentum=self.optimizer_name == "AdamW",
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Method(StudyModule):
    """An encoder, a projection head, and a loss of two views."""

    def __init__(self, backbone: nn.Module, head: nn.Module, criterion: nn.Module, lr: float):
        super().__init__(backbone, lr)
        self.projection_head = head
        self.criterion = criterion

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.projection_head(self.backbone(x).flatten(start_dim=1))
        return z

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1), _ = batch
        loss = self.loss(x0, x1)
        self.log("loss", loss, prog_bar=True)
        return loss

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Compare what both views are projected to."""
        loss: Tensor = self.criterion(self.forward(x0), self.forward(x1))
        return loss


class SimCLR(Method):
    """Chen et al. (2020)."""

    def __init__(self, backbone: nn.Module, feature_dim: int, lr: float) -> None:
        head = modules.SimCLRProjectionHead(feature_dim, 512, 128)
        super().__init__(backbone, head, NTXentLoss(temperature=0.2), lr)


class VICReg(Method):
    """Bardes et al. (2022)."""

    def __init__(self, backbone: nn.Module, feature_dim: int, lr: float) -> None:
        head = VICRegProjectionHead(feature_dim, 1024, 1024, num_layers=2)
        super().__init__(backbone, head, VICRegLoss(), lr)


class BarlowTwins(Method):
    """Zbontar et al. (2021)."""

    def __init__(self, backbone: nn.Module, feature_dim: int, lr: float) -> None:
        head = modules.BarlowTwinsProjectionHead(feature_dim, 1024, 1024)
        super().__init__(backbone, head, BarlowTwinsLoss(), lr)


class SwaV(Method):
    """Caron et al. (2020), of two views."""

    def __init__(self, backbone: nn.Module, feature_dim: int, lr: float) -> None:
        head = modules.SwaVProjectionHead(feature_dim, 512, 128)
        super().__init__(backbone, head, SwaVLoss(), lr)
        self.prototypes = modules.SwaVPrototypes(128, n_prototypes=512)

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        self.prototypes.normalize()
        projected = (nn.functional.normalize(self.forward(x), dim=1) for x in (x0, x1))
        loss: Tensor = self.criterion([self.prototypes(z) for z in projected], [])
        return loss


# --- methods that predict what the other view is projected to ---


class Predicting(Method):
    """Predicts what the other view is projected to; a subclass adds ``prediction_head``."""

    prediction_head: nn.Module

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        z0, z1 = self.forward(x0), self.forward(x1)
        p0, p1 = self.prediction_head(z0), self.prediction_head(z1)
        z0, z1 = self.target(z0, False), self.target(z1, True)
        loss: Tensor = 0.5 * (self.criterion(z0, p1) + self.criterion(z1, p0))
        return loss

    def target(self, z: Tensor, last: bool) -> Tensor:
        """Give what is to be predicted, for each view in turn."""
        return z.detach()


class SimSiam(Predicting):
    """Chen and He (2021)."""

    def __init__(self, backbone: nn.Module, feature_dim: int, lr: float) -> None:
        head = modules.SimSiamProjectionHead(feature_dim, 1024, 1024)
        super().__init__(backbone, head, NegativeCosineSimilarity(), lr)
        self.prediction_head = modules.SimSiamPredictionHead(1024, 256, 1024)


class NNCLR(Predicting):
    """Dwibedi et al. (2021): the target is the nearest neighbour in a queue."""

    def __init__(self, backbone: nn.Module, feature_dim: int, lr: float) -> None:
        head = modules.NNCLRProjectionHead(feature_dim, 1024, 256)
        super().__init__(backbone, head, NTXentLoss(temperature=0.2), lr)
        self.prediction_head = modules.NNCLRPredictionHead(256, 1024, 256)
        self.memory_bank = modules.NNMemoryBankModule(size=(4096, 256))

    def target(self, z: Tensor, last: bool) -> Tensor:
        nearest: Tensor = self.memory_bank(z.detach(), update=last)
        return nearest


# --- methods with a momentum encoder ---


class Momentum(Method):
    """With a momentum encoder, which a subclass uses.

    Args:
        backbone: the encoder.
        make_head: makes a projection head. It is called twice: a head with normalised weights
            can't be copied.
        criterion: the loss.
        lr: highest learning rate.
        momentum: of the first step; it rises to 1.
    """

    def __init__(
        self, backbone: nn.Module, make_head: Any, criterion: nn.Module, lr: float, momentum: float
    ) -> None:
        super().__init__(backbone, make_head(), criterion, lr)
        self.backbone_momentum = copy.deepcopy(backbone)
        self.projection_head_momentum = make_head()
        self.projection_head_momentum.load_state_dict(self.projection_head.state_dict())
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.momentum = momentum

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        steps = self.trainer.estimated_stepping_batches
        momentum = cosine_schedule(self.trainer.global_step, steps, self.momentum, 1)
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
        return super().training_step(batch, batch_idx)

    @torch.no_grad()
    def forward_momentum(self, x: Tensor) -> Tensor:
        """Project a view by the momentum encoder."""
        z: Tensor = self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1))
        return z


class BYOL(Momentum):
    """Grill et al. (2020)."""

    def __init__(
        self, backbone: nn.Module, feature_dim: int, lr: float, momentum: float = 0.99
    ) -> None:
        head = modules.BYOLProjectionHead(feature_dim, 1024, 256)
        make_head = partial(copy.deepcopy, head)
        super().__init__(backbone, make_head, NegativeCosineSimilarity(), lr, momentum)
        self.prediction_head = modules.BYOLPredictionHead(256, 1024, 256)

    def forward(self, x: Tensor) -> Tensor:
        p: Tensor = self.prediction_head(super().forward(x))
        return p

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        p0, p1 = self.forward(x0), self.forward(x1)
        z0, z1 = self.forward_momentum(x0), self.forward_momentum(x1)
        loss: Tensor = 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))
        return loss


class MoCo(Momentum):
    """He et al. (2020): others' images come from a queue."""

    def __init__(
        self, backbone: nn.Module, feature_dim: int, lr: float, momentum: float = 0.99
    ) -> None:
        make_head = partial(modules.MoCoProjectionHead, feature_dim, 512, 128)
        criterion = NTXentLoss(temperature=0.2, memory_bank_size=(4096, 128))
        super().__init__(backbone, make_head, criterion, lr, momentum)

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.forward(x0), self.forward_momentum(x1))
        return loss


class DINO(Momentum):
    """Caron et al. (2021), of two views."""

    def __init__(
        self, backbone: nn.Module, feature_dim: int, lr: float, momentum: float = 0.99
    ) -> None:
        make_head = partial(modules.DINOProjectionHead, feature_dim, 512, 64, 1024)
        super().__init__(backbone, make_head, DINOLoss(output_dim=1024), lr, momentum)

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        teacher = [self.forward_momentum(x) for x in (x0, x1)]
        student = [self.forward(x) for x in (x0, x1)]
        loss: Tensor = self.criterion(teacher, student, epoch=self.current_epoch)
        return loss


# --- methods that mask patches of a vision transformer ---


def class_token(tokens: Tensor) -> Tensor:
    """Take the class token out of all tokens, ``(B, N, D)`` -> ``(B, D)``."""
    return tokens[:, 0]


class IBOT(Momentum):
    """Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer" (2022), of two views.

    The student's views are masked, the momentum encoder's are not. One head takes class tokens and
    patches. What is probed is the class token, and so attach splits it, not all tokens.

    Args:
        backbone: torchvision's vision transformer.
        feature_dim: its width.
        lr: highest learning rate.
        momentum: of the first step; it rises to 1.
    """

    attach_options: ClassVar[dict[str, Any]] = {"features": class_token}

    # lightly's masked transformers
    backbone: Any
    backbone_momentum: Any

    def __init__(
        self, backbone: nn.Module, feature_dim: int, lr: float, momentum: float = 0.99
    ) -> None:
        if not isinstance(backbone, VisionTransformer):
            raise SystemExit(
                f"expected torchvision's vision transformer for {type(self).__name__}, got "
                f"{type(backbone).__name__}. Pass --backbone tiny-vit."
            )
        # the weights stay as torchvision draws them, as for all other methods
        kept = {"weight_initialization": "skip", "pos_embed_initialization": "skip"}
        masked = modules.MaskedVisionTransformerTorchvision(backbone, **kept)
        make_head = partial(modules.DINOProjectionHead, feature_dim, 512, 64, 1024)
        super().__init__(masked, make_head, DINOLoss(output_dim=1024), lr, momentum)
        self.patch_criterion = IBOTPatchLoss(output_dim=1024)

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        images = torch.cat([x0, x1])
        blocks = self.draw_blocks(len(images)).to(images.device)
        # the class token is never masked
        mask = F.pad(blocks.flatten(1), (1, 0))
        with torch.no_grad():
            known = self.backbone_momentum.encode(images)
            teacher = self.projection_head_momentum(class_token(known)).chunk(2)
            known_patches = self.projection_head_momentum(known[mask])
        tokens = self.backbone.encode(images, mask=mask)
        student = self.projection_head(class_token(tokens)).chunk(2)
        patches = self.projection_head(tokens[mask])
        of_classes = self.criterion(list(teacher), list(student), epoch=self.current_epoch)
        of_patches = self.patch_criterion(known_patches, patches, blocks)
        loss: Tensor = of_classes + of_patches + self.spread(class_token(tokens))
        return loss

    def draw_blocks(self, count: int) -> Tensor:
        """Choose the masked patches of some images, ``(count, H, W)``."""
        side = round((self.backbone.sequence_length - 1) ** 0.5)
        # torch's random state alone is kept for a run that goes on; lightly draws from Python's
        random.seed(int(torch.randint(2**31, ())))
        return random_block_mask((count, side, side))

    def spread(self, features: Tensor) -> Any:
        """Give what else is in the loss."""
        return 0


class DINOv2(IBOT):
    """Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision" (2023).

    iBOT, and KoLeo's loss of each view's class tokens. As in lightly's example, one head takes
    class tokens and patches.
    """

    def __init__(
        self, backbone: nn.Module, feature_dim: int, lr: float, momentum: float = 0.99
    ) -> None:
        super().__init__(backbone, feature_dim, lr, momentum)
        self.koleo_criterion = KoLeoLoss()

    def spread(self, features: Tensor) -> Any:
        return 0.1 * sum(self.koleo_criterion(view) for view in features.chunk(2))


METHODS: dict[str, Any] = {"SimCLR": SimCLR, "BYOL": BYOL, "VICReg": VICReg}
"""The three methods of the README's tables, by name."""

MORE_METHODS: dict[str, Any] = {
    method.__name__: method for method in (BarlowTwins, SimSiam, NNCLR, MoCo, DINO, SwaV)
}
"""More of lightly's methods, to see what attaching gives them."""

VIT_METHODS: dict[str, Any] = {"iBOT": IBOT, "DINOv2": DINOv2}
"""Methods that need a vision transformer, by name."""
