"""Hugging Face's Trainer: attach before the Trainer is made, and call add_loss in forward."""

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import nn
from torchvision.datasets import FakeData
from torchvision.models import resnet18
from transformers import Trainer, TrainingArguments

import recon_aux
from recon_aux.integrations.lightly import attach


class SimCLR(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()
        self.projection_head = SimCLRProjectionHead(512, 512, 128)
        self.criterion = NTXentLoss()

    def forward(self, x0, x1):
        z0, z1 = (self.projection_head(self.backbone(x)) for x in (x0, x1))
        return {"loss": recon_aux.add_loss(self, self.criterion(z0, z1))}


def collate(samples):
    return {f"x{i}": torch.stack([views[i] for views, _ in samples]) for i in range(2)}


def build():
    return attach(SimCLR())  # the one line; the other is in forward


def train(model):
    # your own images: ImageFolder("path", transform=SimCLRTransform()) in place of FakeData
    data = FakeData(16, (3, 32, 32), transform=SimCLRTransform(input_size=32))
    args = TrainingArguments("output", num_train_epochs=1, per_device_train_batch_size=4)
    Trainer(model, args, data_collator=collate, train_dataset=data).train()


if __name__ == "__main__":
    train(build())
