"""Hugging Face's accelerate: attach before prepare, and call add_loss before backward."""

import torch
from accelerate import Accelerator
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
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
    accelerator = Accelerator()
    # your own images: ImageFolder("path", transform=SimCLRTransform()) in place of FakeData
    data = FakeData(16, (3, 32, 32), transform=SimCLRTransform(input_size=32))
    loader, optimizer = DataLoader(data, 4, shuffle=True), torch.optim.AdamW(model.parameters())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    criterion = NTXentLoss()
    for (x0, x1), _ in loader:
        with accelerator.accumulate(model):
            loss = recon_aux.add_loss(model, criterion(model(x0), model(x1)))  # and this one
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    train(build())
