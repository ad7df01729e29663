"""An encoder of timm that is called by forward_features: name the method."""

import timm
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData

from recon_aux.integrations.lightly import attach


class SimCLR(LightningModule):
    def __init__(self):
        super().__init__()
        # your own encoder: timm.create_model("vit_small_patch16_224", pretrained=True)
        self.backbone = timm.create_model(
            "vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=48, depth=2
        )
        self.projection_head = SimCLRProjectionHead(48, 64, 32)
        self.criterion = NTXentLoss()

    def forward(self, x):
        return self.projection_head(self.backbone.forward_features(x).mean(dim=1))

    def training_step(self, batch, batch_idx):
        (x0, x1), _ = batch
        return self.criterion(self(x0), self(x1))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def build():
    return attach(SimCLR(), backbone_method="forward_features")


def train(model):
    # your own images: ImageFolder("path", transform=SimCLRTransform()) in place of FakeData
    data = FakeData(16, (3, 32, 32), transform=SimCLRTransform(input_size=32))
    Trainer(max_epochs=1).fit(model, DataLoader(data, 4, shuffle=True))


if __name__ == "__main__":
    train(build())
