"""More of lightly's methods, to see what attaching gives them."""

import copy
from functools import partial

import torch
from lightly.loss import (
    BarlowTwinsLoss,
    DINOLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
)
from lightly.models import modules
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import cosine_schedule
from lightly_simclr import SimCLR
from pytorch_lightning import LightningModule
from torch import nn


class Method(LightningModule):
    """An encoder, a projection head, and a loss of two views."""

    def __init__(self, backbone, head, criterion, lr):
        super().__init__()
        self.backbone = backbone
        self.projection_head = head
        self.criterion = criterion
        self.lr = lr

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def training_step(self, batch, batch_idx):
        (x0, x1), _ = batch
        loss = self.loss(x0, x1)
        self.log("loss", loss, prog_bar=True)
        return loss

    def loss(self, x0, x1):
        return self.criterion(self.forward(x0), self.forward(x1))

    configure_optimizers = SimCLR.configure_optimizers


class BarlowTwins(Method):
    """Zbontar et al. (2021)."""

    def __init__(self, backbone, feature_dim, lr):
        head = modules.BarlowTwinsProjectionHead(feature_dim, 1024, 1024)
        super().__init__(backbone, head, BarlowTwinsLoss(), lr)


class Predicting(Method):
    """Predicts what the other view is projected to."""

    def loss(self, x0, x1):
        z0, z1 = self.forward(x0), self.forward(x1)
        p0, p1 = self.prediction_head(z0), self.prediction_head(z1)
        z0, z1 = self.target(z0.detach(), False), self.target(z1.detach(), True)
        return 0.5 * (self.criterion(z0, p1) + self.criterion(z1, p0))

    def target(self, z, last):
        return z


class SimSiam(Predicting):
    """Chen and He (2021)."""

    def __init__(self, backbone, feature_dim, lr):
        head = modules.SimSiamProjectionHead(feature_dim, 1024, 1024)
        super().__init__(backbone, head, NegativeCosineSimilarity(), lr)
        self.prediction_head = modules.SimSiamPredictionHead(1024, 256, 1024)


class NNCLR(Predicting):
    """Dwibedi et al. (2021): the target is the nearest neighbour in a queue."""

    def __init__(self, backbone, feature_dim, lr):
        head = modules.NNCLRProjectionHead(feature_dim, 1024, 256)
        super().__init__(backbone, head, NTXentLoss(temperature=0.2), lr)
        self.prediction_head = modules.NNCLRPredictionHead(256, 1024, 256)
        self.memory_bank = modules.NNMemoryBankModule(size=(4096, 256))

    def target(self, z, last):
        return self.memory_bank(z, update=last)


class Momentum(Method):
    """With a momentum encoder, which a subclass uses."""

    def __init__(self, backbone, make_head, criterion, lr, momentum):
        super().__init__(backbone, make_head(), criterion, lr)
        self.backbone_momentum = copy.deepcopy(backbone)
        # a head with normalised weights can't be copied
        self.projection_head_momentum = make_head()
        self.projection_head_momentum.load_state_dict(self.projection_head.state_dict())
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.momentum = momentum

    def training_step(self, batch, batch_idx):
        steps = self.trainer.estimated_stepping_batches
        momentum = cosine_schedule(self.trainer.global_step, steps, self.momentum, 1)
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
        return super().training_step(batch, batch_idx)

    @torch.no_grad()
    def forward_momentum(self, x):
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1))


class MoCo(Momentum):
    """He et al. (2020): others' images come from a queue."""

    def __init__(self, backbone, feature_dim, lr, momentum=0.99):
        head = partial(modules.MoCoProjectionHead, feature_dim, 512, 128)
        criterion = NTXentLoss(temperature=0.2, memory_bank_size=(4096, 128))
        super().__init__(backbone, head, criterion, lr, momentum)

    def loss(self, x0, x1):
        return self.criterion(self.forward(x0), self.forward_momentum(x1))


class DINO(Momentum):
    """Caron et al. (2021), of two views."""

    def __init__(self, backbone, feature_dim, lr, momentum=0.99):
        head = partial(modules.DINOProjectionHead, feature_dim, 512, 64, 1024)
        super().__init__(backbone, head, DINOLoss(output_dim=1024), lr, momentum)

    def loss(self, x0, x1):
        teacher = [self.forward_momentum(x) for x in (x0, x1)]
        student = [self.forward(x) for x in (x0, x1)]
        return self.criterion(teacher, student, epoch=self.current_epoch)


class SwaV(Method):
    """Caron et al. (2020), of two views."""

    def __init__(self, backbone, feature_dim, lr):
        head = modules.SwaVProjectionHead(feature_dim, 512, 128)
        super().__init__(backbone, head, SwaVLoss(), lr)
        self.prototypes = modules.SwaVPrototypes(128, n_prototypes=512)

    def loss(self, x0, x1):
        self.prototypes.normalize()
        projected = (nn.functional.normalize(self.forward(x), dim=1) for x in (x0, x1))
        return self.criterion([self.prototypes(z) for z in projected], [])


MORE = (BarlowTwins, SimSiam, NNCLR, MoCo, DINO, SwaV)
