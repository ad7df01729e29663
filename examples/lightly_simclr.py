"""SimCLR with lightly on scikit-learn's digits: trained bare, and with recon_aux attached."""

import argparse

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from pytorch_lightning import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate, random_split
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import Normalize

from recon_aux.integrations.lightly import attach
from recon_aux.probe import compare, draw_parameters, render, transform


class SimCLR(LightningModule):
    def __init__(self):
        super().__init__()
        # ResNet-18 for small images, half as wide
        layers = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
        for n, m in [(32, 32), (32, 64), (64, 128), (128, 256)]:
            shortcut = [nn.Conv2d(n, m, 1, 2, bias=False), nn.BatchNorm2d(m)] if n < m else []
            layers += [BasicBlock(n, m, m // n, nn.Sequential(*shortcut)), BasicBlock(m, m)]
        self.backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.projection_head = SimCLRProjectionHead(256, 512, 128)
        self.criterion = NTXentLoss(temperature=0.2)

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def training_step(self, batch, batch_idx):
        (x0, x1), _ = batch
        return self.criterion(self.forward(x0), self.forward(x1))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=1e-4)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.101)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def two_views(samples):
    x, labels = default_collate(samples)
    return [normalize(transform(x / 255, draw_parameters(len(x)))) for _ in range(2)], labels


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

x, y = map(torch.tensor, load_digits(return_X_y=True))
x = nn.functional.pad(x.float().view(-1, 1, 8, 8) / 16, [4, 4, 4, 4])
x = (torch.cat([0.2 + 0.7 * x, 0.3 + 0.3 * x, 0.5 - 0.2 * x], 1) * 255).byte()  # orange on blue
train, test = random_split(TensorDataset(x, y), [1400, 397], torch.Generator().manual_seed(0))
loader = DataLoader(train, 128, shuffle=True, drop_last=True, collate_fn=two_views)
normalize = Normalize(0.5, 0.25)

torch.manual_seed(args.seed)
bare = SimCLR().to(memory_format=torch.channels_last)
Trainer(max_epochs=args.epochs, devices=1).fit(bare, loader)

torch.manual_seed(args.seed)
model = attach(SimCLR().to(memory_format=torch.channels_last))  # the one line
Trainer(max_epochs=args.epochs, devices=1).fit(model, loader)

print(render(compare({"bare": bare, "attached": model}, train[:], test[:], normalize=normalize)))
