"""A head that is the encoder's fc, as in MoCo's own code: move it out of the encoder."""

import torch
from lightly.loss import NTXentLoss
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
        self.backbone = resnet18(num_classes=128)
        # your own head, where you had self.backbone.fc = nn.Sequential(...)
        self.projection_head = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), self.backbone.fc)
        self.backbone.fc = nn.Identity()  # else the encoder returns no features to split
        self.criterion = NTXentLoss()

    def forward(self, x):
        return self.projection_head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        (x0, x1), _ = batch
        return self.criterion(self(x0), self(x1))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def build():
    return attach(SimCLR())


def train(model):
    # your own images: ImageFolder("path", transform=SimCLRTransform()) in place of FakeData
    data = FakeData(16, (3, 32, 32), transform=SimCLRTransform(input_size=32))
    Trainer(max_epochs=1).fit(model, DataLoader(data, 4, shuffle=True))


if __name__ == "__main__":
    train(build())
