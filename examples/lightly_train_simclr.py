"""SimCLR with LightlyTrain on scikit-learn's digits: trained bare, and with recon_aux attached."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import lightly_train
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset, random_split
from torchvision.models import resnet18
from torchvision.transforms import Normalize
from torchvision.utils import save_image

from recon_aux.integrations.lightly_train import pretrain
from recon_aux.probe import probe, render


def fit(pretrain, out, **options):
    pretrain(
        out=out,
        data=folder / "digits",
        model="torchvision/resnet18",
        method="simclr",
        epochs=args.epochs,
        batch_size=128,
        seed=args.seed,
        optim="adamw",
        optim_args={"lr": 2e-3},
        transform_args={"image_size": (32, 32)},
        num_workers=0,
        **options,
    )
    encoder = resnet18()
    encoder.load_state_dict(torch.load(out / "exported_models" / "exported_last.pt"))
    encoder.fc = nn.Identity()
    return encoder


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

x, y = map(torch.tensor, load_digits(return_X_y=True))
x = nn.functional.interpolate(x.float().view(-1, 1, 8, 8) / 16, size=32)
x = torch.cat([0.2 + 0.7 * x, 0.3 + 0.3 * x, 0.5 - 0.2 * x], dim=1)  # orange on blue
train, test = random_split(TensorDataset(x, y), [1400, 397], torch.Generator().manual_seed(0))

with TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "digits").mkdir()
    for index, image in enumerate(train[:][0]):
        save_image(image, folder / "digits" / f"{index:04d}.png")
    bare = fit(lightly_train.pretrain, folder / "bare")
    attached = fit(pretrain, folder / "attached", recon_aux={"weight": 1})  # the one line

options = {
    "normalize": Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "pairs": (500, 300),
}
results = {
    "bare": probe(bare, train[:], test[:], **options),
    "attached": probe(attached, train[:], test[:], equivariant_dim=256, **options),
}
print(render(results))
