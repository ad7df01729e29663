"""A LightningModule that optimizes by hand: name the method that returns its loss."""

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import resnet18

from recon_aux.integrations.lightly import attach


class SimCLR(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()
        self.projection_head = SimCLRProjectionHead(512, 512, 128)
        self.criterion = NTXentLoss()

    def loss(self, batch):
        return self.criterion(*(self.projection_head(self.backbone(x)) for x in batch[0]))

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))  # once attached, the sum of both losses
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def build():
    return attach(SimCLR(), step_method="loss")


def train(model):
    # your own images: ImageFolder("path", transform=SimCLRTransform()) in place of FakeData
    data = FakeData(16, (3, 32, 32), transform=SimCLRTransform(input_size=32))
    Trainer(max_epochs=1).fit(model, DataLoader(data, 4, shuffle=True))


if __name__ == "__main__":
    train(build())
