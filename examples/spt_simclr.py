"""SimCLR with stable-pretraining on scikit-learn's digits: bare, and with recon_aux attached."""

import argparse

import stable_pretraining as spt
import torch
from lightning import Trainer
from sklearn.datasets import load_digits
from stable_pretraining.forward import simclr
from torch.utils.data import DataLoader, TensorDataset, default_collate, random_split

from recon_aux.integrations.stable_pretraining import attach
from recon_aux.probe import compare, draw_parameters, render, transform


def two_views(samples):
    x, labels = default_collate(samples)
    views = [transform(x, draw_parameters(len(x))) for _ in range(2)]
    return {"views": [{"image": view, "label": labels} for view in views]}


def simclr_module():
    torch.manual_seed(args.seed)
    return spt.Module(
        forward=simclr,
        backbone=spt.backbone.from_torchvision("resnet18"),
        projector=spt.backbone.MLP(512, [512, 128], norm_layer="batch_norm"),
        simclr_loss=spt.losses.NTXEntLoss(temperature=0.2),
        optim={
            "optimizer": {"type": "AdamW", "lr": 1e-3, "weight_decay": 1e-4},
            "scheduler": "LinearWarmupCosineAnnealing",
        },
    )


def fit(module):
    trainer = Trainer(max_epochs=args.epochs, devices=1, num_sanity_val_steps=0, logger=False)
    data = spt.data.DataModule(train=loader)
    spt.Manager(trainer=trainer, module=module, data=data, seed=args.seed)()
    return module


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

x, y = map(torch.tensor, load_digits(return_X_y=True))
x = torch.nn.functional.pad(x.float().view(-1, 1, 8, 8) / 16, [4, 4, 4, 4])
x = torch.cat([0.2 + 0.7 * x, 0.3 + 0.3 * x, 0.5 - 0.2 * x], dim=1)  # orange on blue
train, test = random_split(TensorDataset(x, y), [1400, 397], torch.Generator().manual_seed(0))
loader = DataLoader(train, 128, shuffle=True, drop_last=True, collate_fn=two_views)

bare = fit(simclr_module())
model = fit(attach(simclr_module()))  # the one line

print(render(compare({"bare": bare, "attached": model}, train[:], test[:])))
