"""LightningCLI: the module attaches to itself. Run it with: fit --trainer.max_epochs=1."""

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import resnet18

from recon_aux.integrations.lightly import attach


class SimCLR(LightningModule):
    def __init__(self, dim: int = 128, weight: float = 1.0):
        super().__init__()
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()
        self.projection_head = SimCLRProjectionHead(512, 512, dim)
        self.criterion = NTXentLoss()
        attach(self, weight=weight)  # the last line, after all modules are made

    def training_step(self, batch, batch_idx):
        (x0, x1), _ = batch
        z0, z1 = (self.projection_head(self.backbone(x)) for x in (x0, x1))
        return self.criterion(z0, z1)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Images(LightningDataModule):
    def train_dataloader(self):
        # your own images: ImageFolder("path", transform=SimCLRTransform()) in place of FakeData
        data = FakeData(16, (3, 32, 32), transform=SimCLRTransform(input_size=32))
        return DataLoader(data, 4, shuffle=True)


if __name__ == "__main__":
    LightningCLI(SimCLR, Images)
