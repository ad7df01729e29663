"""A LightningModule that optimizes by hand: attach refuses it, so call ReconAux in its step."""

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import resnet18

from recon_aux import ReconAux


class SimCLR(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()
        self.recon_aux = ReconAux(feature_dim=512)
        # of half the width: it takes the invariant part alone
        self.projection_head = SimCLRProjectionHead(256, 512, 128)
        self.criterion = NTXentLoss()

    def training_step(self, batch, batch_idx):
        (x0, x1), _ = batch
        y0, y1 = self.backbone(x0), self.backbone(x1)
        z0, z1 = (self.projection_head(self.recon_aux.invariant(y)) for y in (y0, y1))
        loss = self.criterion(z0, z1) + self.recon_aux((x0, x1), (y0, y1)).loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(model):
    # your own images: ImageFolder("path", transform=SimCLRTransform()) in place of FakeData
    data = FakeData(16, (3, 32, 32), transform=SimCLRTransform(input_size=32))
    Trainer(max_epochs=1).fit(model, DataLoader(data, 4, shuffle=True))


if __name__ == "__main__":
    train(SimCLR())
