"""A monitored run in TensorBoard: scikit-learn's digits, 300 of them held out for the monitor."""

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import recon_aux
from recon_aux.integrations.lightly import attach
from recon_aux.probe import draw_parameters, transform


class SimCLR(LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(*list(resnet18().children())[:-1], nn.Flatten())
        self.projection_head = SimCLRProjectionHead(512, 512, 128)
        self.criterion = NTXentLoss(temperature=0.2)

    def training_step(self, batch, batch_idx):
        views = [transform(batch[0], draw_parameters(len(batch[0]))) for _ in range(2)]
        return self.criterion(*(self.projection_head(self.backbone(view)) for view in views))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def build():
    return attach(SimCLR())


def train(model, epochs=1, every=1):
    # your own images, from 0 to 1, and their labels
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    x = nn.functional.interpolate(x.float().view(-1, 1, 8, 8) / 16, size=32, mode="bilinear")
    x = torch.cat([0.2 + 0.7 * x, 0.3 + 0.3 * x, 0.5 - 0.2 * x], dim=1)  # orange on blue
    monitor = recon_aux.Monitor(x[:300], y[:300], every=every)
    logger = TensorBoardLogger("runs", name="digits")
    trainer = Trainer(max_epochs=epochs, callbacks=[monitor], logger=logger, log_every_n_steps=10)
    trainer.fit(model, DataLoader(TensorDataset(x[300:], y[300:]), 64, shuffle=True))


if __name__ == "__main__":
    train(build(), epochs=20, every=2)
