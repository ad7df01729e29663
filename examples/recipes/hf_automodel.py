"""An encoder of Hugging Face's AutoModel: features= takes what the heads receive."""

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from transformers import AutoModel, ViTConfig

from recon_aux.integrations.lightly import attach


class SimCLR(LightningModule):
    def __init__(self):
        super().__init__()
        # your own encoder: AutoModel.from_pretrained("facebook/dinov2-small")
        config = ViTConfig(hidden_size=64, num_hidden_layers=2, image_size=32, patch_size=8)
        self.backbone = AutoModel.from_config(config, add_pooling_layer=False)
        self.projection_head = SimCLRProjectionHead(64, 64, 32)
        self.criterion = NTXentLoss()

    def forward(self, x):
        return self.projection_head(self.backbone(pixel_values=x).last_hidden_state[:, 0])

    def training_step(self, batch, batch_idx):
        (x0, x1), _ = batch
        return self.criterion(self(x0), self(x1))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def build():
    return attach(SimCLR(), features=lambda output: output.last_hidden_state[:, 0])


def train(model):
    # your own images: ImageFolder("path", transform=SimCLRTransform()) in place of FakeData
    data = FakeData(16, (3, 32, 32), transform=SimCLRTransform(input_size=32))
    Trainer(max_epochs=1).fit(model, DataLoader(data, 4, shuffle=True))


if __name__ == "__main__":
    train(build())
