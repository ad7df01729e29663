"""SimCLR in a plain PyTorch loop on scikit-learn's digits: trained bare, and with ReconAux."""

import argparse

import torch
from lightly.loss import NTXentLoss
from lightly.models import ResNetGenerator
from lightly.models.modules import SimCLRProjectionHead
from rich.progress import track
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset, default_collate, random_split

from recon_aux import ReconAux
from recon_aux.probe import draw_parameters, probe, render, transform


def small_resnet18():
    layers = list(ResNetGenerator("resnet-18", width=0.25).children())[:-1]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(device)


def fit(encoder, head, aux=None):
    modules = nn.ModuleList([encoder, head, aux or nn.Identity()]).to(device)
    adamw = optim.AdamW(modules.parameters(), lr=2e-3)
    schedule = optim.lr_scheduler.CosineAnnealingLR(adamw, args.epochs)
    criterion = NTXentLoss(temperature=0.2)
    for _ in track(range(args.epochs), "training"):
        for (x0, x1), _ in loader:
            x0, x1 = x0.to(device), x1.to(device)
            y0, y1 = encoder(x0), encoder(x1)
            if aux is None:
                loss = criterion(head(y0), head(y1))
            else:
                loss = criterion(head(aux.invariant(y0)), head(aux.invariant(y1)))
                loss = loss + aux((x0, x1), (y0, y1)).loss
            adamw.zero_grad()
            loss.backward()
            adamw.step()
        schedule.step()
    dim = 0 if aux is None else aux.splitter.equivariant_dim
    return probe(encoder, train[:], test[:], equivariant_dim=dim, device=device)


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
device = "cuda" if torch.cuda.is_available() else "cpu"

torch.manual_seed(args.seed)
bare = fit(small_resnet18(), SimCLRProjectionHead(128, 512, 128))
torch.manual_seed(args.seed)
encoder, aux = small_resnet18(), ReconAux(feature_dim=128)
attached = fit(encoder, SimCLRProjectionHead(aux.splitter.invariant_dim, 512, 128), aux)
print(render({"bare": bare, "attached": attached}))
