"""SimCLR with solo-learn on scikit-learn's digits: trained bare, and with recon_aux attached."""

import argparse

import torch
from lightning import Trainer
from omegaconf import OmegaConf
from sklearn.datasets import load_digits
from solo.methods import METHODS
from torch.utils.data import DataLoader, TensorDataset, default_collate, random_split

from recon_aux.integrations.solo_learn import attach
from recon_aux.probe import compare, draw_parameters, render, transform


def two_views(samples):
    x, labels = default_collate(samples)
    views = [transform(x, draw_parameters(len(x))) for _ in range(2)]
    return torch.arange(len(x)), views, labels


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

x, y = map(torch.tensor, load_digits(return_X_y=True))
x = torch.nn.functional.pad(x.float().view(-1, 1, 8, 8) / 16, [4, 4, 4, 4])
x = torch.cat([0.2 + 0.7 * x, 0.3 + 0.3 * x, 0.5 - 0.2 * x], dim=1)  # orange on blue
train, test = random_split(TensorDataset(x, y), [1400, 397], torch.Generator().manual_seed(0))
loader = DataLoader(train, 128, shuffle=True, drop_last=True, collate_fn=two_views)

# what solo-learn's scripts read from YAML
data = {"dataset": "custom", "num_classes": 10, "num_large_crops": 2, "num_small_crops": 0}
optimizer = {"name": "adamw", "batch_size": 128, "weight_decay": 1e-4}
cfg = OmegaConf.create(
    {
        "name": "simclr",
        "method": "simclr",
        "method_kwargs": {"proj_hidden_dim": 512, "proj_output_dim": 128, "temperature": 0.2},
        "backbone": {"name": "resnet18"},
        "data": data,
        "optimizer": {**optimizer, "lr": 1e-3, "classifier_lr": 1e-3},
        "scheduler": {"name": "warmup_cosine", "warmup_epochs": args.epochs / 10},
        "max_epochs": args.epochs,
    }
)

torch.manual_seed(args.seed)
bare = METHODS["simclr"](cfg)
Trainer(max_epochs=args.epochs, devices=1).fit(bare, loader)

torch.manual_seed(args.seed)
model = attach(METHODS["simclr"](cfg))  # the one line
Trainer(max_epochs=args.epochs, devices=1).fit(model, loader)

print(render(compare({"bare": bare, "attached": model}, train[:], test[:])))
