"""SimCLR in a plain PyTorch loop, bare and with ReconAux."""

import torch
from common import Study
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from rich.progress import track

from recon_aux import ReconAux


def train(encoder, head, aux, study):
    """Train for the study's budget; ``aux`` is None for the bare method."""
    device = study.device
    modules = torch.nn.ModuleList([encoder, head] + ([] if aux is None else [aux])).to(device)
    loader, epochs, lr = study.loader(), study.args.epochs, study.args.lr
    criterion = NTXentLoss(temperature=0.2)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, epochs * len(loader), pct_start=0.101
    )
    for _ in track(range(epochs), "bare" if aux is None else "attached"):
        for (x0, x1), _ in loader:
            x0, x1 = x0.to(device), x1.to(device)
            with study.autocast():
                y0, y1 = encoder(x0), encoder(x1)
                if aux is None:
                    loss = criterion(head(y0), head(y1))
                else:
                    loss = criterion(head(aux.invariant(y0)), head(aux.invariant(y1)))
                    loss = loss + aux((x0, x1), (y0, y1)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


if __name__ == "__main__":
    study = Study(__doc__)

    if study.compare:
        encoder, feature_dim = study.encoder()
        train(encoder, SimCLRProjectionHead(feature_dim, 512, 128), None, study)
        study.measure("bare", encoder)

    encoder, feature_dim = study.encoder()
    aux = ReconAux(feature_dim, **study.options)
    train(encoder, SimCLRProjectionHead(aux.splitter.invariant_dim, 512, 128), aux, study)
    study.measure("attached", encoder, aux)

    study.report()
