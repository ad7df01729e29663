"""Lightning Fabric: attach before the optimizer is made, and call add_loss before backward."""

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import resnet18

import recon_aux
from recon_aux.integrations.lightly import attach


class SimCLR(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()
        self.projection_head = SimCLRProjectionHead(512, 512, 128)

    def forward(self, x):
        return self.projection_head(self.backbone(x))


def build():
    return attach(SimCLR(), weight=1.0)  # the one line


def train(model):
    fabric = Fabric(accelerator="auto", devices=1)
    fabric.launch()
    # your own images: ImageFolder("path", transform=SimCLRTransform()) in place of FakeData
    data = FakeData(16, (3, 32, 32), transform=SimCLRTransform(input_size=32))
    loader = fabric.setup_dataloaders(DataLoader(data, 4, shuffle=True))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    criterion = NTXentLoss()
    for (x0, x1), _ in loader:
        loss = recon_aux.add_loss(model, criterion(model(x0), model(x1)))  # and this one
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()


if __name__ == "__main__":
    train(build())
