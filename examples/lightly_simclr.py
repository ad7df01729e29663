"""SimCLR with lightly, bare and with recon_aux attached."""

import torch
from common import Study
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from pytorch_lightning import LightningModule

from recon_aux.integrations.lightly import attach


class SimCLR(LightningModule):
    """As lightly's documentation writes it."""

    def __init__(self, backbone, feature_dim, lr):
        super().__init__()
        self.backbone = backbone
        self.projection_head = SimCLRProjectionHead(feature_dim, 512, 128)
        self.criterion = NTXentLoss(temperature=0.2)
        self.lr = lr

    def forward(self, x):
        h = self.backbone(x).flatten(start_dim=1)
        return self.projection_head(h)

    def training_step(self, batch, batch_idx):
        (x0, x1), _ = batch
        loss = self.criterion(self.forward(x0), self.forward(x1))
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
        model = SimCLR(*study.encoder(), study.args.lr)
        study.trainer().fit(model, study.loader())
        study.measure("bare", model.backbone)

    model = attach(SimCLR(*study.encoder(), study.args.lr), **study.options)  # the one line
    study.trainer().fit(model, study.loader())
    study.measure("attached", model.backbone, model.recon_aux)

    study.report()
