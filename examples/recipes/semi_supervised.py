"""A labelled batch beside the views: encode the views first, and name the classifier as a head."""

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import resnet18
from torchvision.transforms import ToTensor

from recon_aux.integrations.lightly import attach


class SimCLR(LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()
        self.projection_head = SimCLRProjectionHead(512, 512, 128)
        self.classifier = nn.Linear(512, 10)
        self.criterion = NTXentLoss()

    def training_step(self, batch, batch_idx):
        (views, _), (images, labels) = batch
        z = [self.projection_head(self.backbone(x)) for x in views]
        logits = self.classifier(self.backbone(images))
        return self.criterion(*z) + nn.functional.cross_entropy(logits, labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def build():
    return attach(SimCLR(), heads=["projection_head", "classifier"])


def train(model):
    # your own images: ImageFolder("path", transform=...) in place of FakeData
    data = [FakeData(16, (3, 32, 32), transform=x) for x in (SimCLRTransform(32), ToTensor())]
    loaders = [DataLoader(x, 4) for x in data]
    Trainer(max_epochs=1).fit(model, CombinedLoader(loaders, "min_size"))


if __name__ == "__main__":
    train(build())
