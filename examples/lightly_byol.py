"""BYOL with lightly, bare and with recon_aux attached."""

import copy

import torch
from common import Study
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import cosine_schedule
from pytorch_lightning import LightningModule

from recon_aux.integrations.lightly import attach


class BYOL(LightningModule):
    """As lightly's documentation writes it."""

    def __init__(self, backbone, feature_dim, lr, momentum=0.99):
        super().__init__()
        self.backbone = backbone
        self.projection_head = BYOLProjectionHead(feature_dim, 1024, 256)
        self.prediction_head = BYOLPredictionHead(256, 1024, 256)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()
        self.lr = lr
        self.momentum = momentum

    def forward(self, x):
        h = self.backbone(x).flatten(start_dim=1)
        return self.prediction_head(self.projection_head(h))

    @torch.no_grad()
    def forward_momentum(self, x):
        h = self.backbone_momentum(x).flatten(start_dim=1)
        return self.projection_head_momentum(h)

    def training_step(self, batch, batch_idx):
        steps = self.trainer.estimated_stepping_batches
        momentum = cosine_schedule(self.trainer.global_step, steps, self.momentum, 1)
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
        (x0, x1), _ = batch
        p0, p1 = self.forward(x0), self.forward(x1)
        z0, z1 = self.forward_momentum(x0), self.forward_momentum(x1)
        loss = 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=1e-4)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, steps, pct_start=0.101)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


if __name__ == "__main__":
    study = Study(__doc__)

    if study.compare:
        model = BYOL(*study.encoder(), study.args.lr)
        study.trainer().fit(model, study.loader())
        study.measure("bare", model.backbone)

    model = attach(BYOL(*study.encoder(), study.args.lr), **study.options)  # the one line
    study.trainer().fit(model, study.loader())
    study.measure("attached", model.backbone, model.recon_aux)

    study.report()
