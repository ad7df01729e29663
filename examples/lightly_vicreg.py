"""VICReg with lightly on scikit-learn's digits: trained bare, and with recon_aux attached."""

import argparse

import torch
from lightly.loss import VICRegLoss
from lightly.models import ResNetGenerator
from lightly.models.modules.heads import VICRegProjectionHead
from pytorch_lightning import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset, default_collate, random_split

from recon_aux.integrations.lightly import attach
from recon_aux.probe import compare, draw_parameters, render, transform


class VICReg(LightningModule):
    def __init__(self):
        super().__init__()
        resnet = ResNetGenerator("resnet-18", width=0.25)
        self.backbone = nn.Sequential(*list(resnet.children())[:-1], nn.AdaptiveAvgPool2d(1))
        self.projection_head = VICRegProjectionHead(128, 512, 512, num_layers=2)
        self.criterion = VICRegLoss()

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def training_step(self, batch, batch_idx):
        (x0, x1), _ = batch
        loss = self.criterion(self.forward(x0), self.forward(x1))
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        adamw = optim.AdamW(self.parameters(), lr=2e-3)
        return [adamw], [optim.lr_scheduler.CosineAnnealingLR(adamw, self.trainer.max_epochs)]


def two_views(samples):
    x, labels = default_collate(samples)
    return [transform(x, draw_parameters(len(x))) for _ in range(2)], labels


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

x, y = map(torch.tensor, load_digits(return_X_y=True))
x = nn.functional.pad(x.float().view(-1, 1, 8, 8) / 16, [4, 4, 4, 4])
x = torch.cat([0.2 + 0.7 * x, 0.3 + 0.3 * x, 0.5 - 0.2 * x], dim=1)  # orange on blue
train, test = random_split(TensorDataset(x, y), [1400, 397], torch.Generator().manual_seed(0))
loader = DataLoader(train, 128, shuffle=True, drop_last=True, collate_fn=two_views)

torch.manual_seed(args.seed)
bare = VICReg()
Trainer(max_epochs=args.epochs, devices=1).fit(bare, loader)

torch.manual_seed(args.seed)
model = attach(VICReg())  # the one line
Trainer(max_epochs=args.epochs, devices=1).fit(model, loader)

print(render(compare({"bare": bare, "attached": model}, train[:], test[:])))
