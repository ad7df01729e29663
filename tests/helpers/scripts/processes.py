"""What test_processes.py lets two processes do: ``torchrun processes.py CASE,CASE FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import recon_aux
from helpers.data import Views
from helpers.models import InALoop, Siamese, siamese_loss
from helpers.training import trainer
from recon_aux import ReconAux
from recon_aux.integrations.lightly import attach

STEPS = 6
# where a view fits about as well as its mirror image, rounding would decide for registration
OPTIONS: dict[str, Any] = {"weight": "auto", "seed": 1, "registration": 0}
WITH_REGISTRATION = {**OPTIONS, "registration": 4.0}


def rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def global_batches() -> list[list[Tensor]]:
    """Of eight pairs of views, whose brightness depends on the half of the batch."""
    batches = []
    for step in range(STEPS):
        pairs = [Views()[(8 * step + index) % 16][0] for index in range(8)]
        views = [torch.stack([pair[i] for pair in pairs]) for i in (0, 1)]
        batches.append(
            [
                view * torch.tensor([1.0, 5.0]).repeat_interleave(4)[:, None, None, None]
                for view in views
            ]
        )
    return batches


def own_part(views: list[Tensor]) -> list[Tensor]:
    return [view[4 * rank() : 4 * rank() + 4] for view in views]


def train(model: nn.Module, batches: list[list[Tensor]], wrapped: nn.Module | None = None) -> None:
    wrapped = model if wrapped is None else wrapped
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for views in batches:
        loss = siamese_loss(*(wrapped(view) for view in views))
        loss = recon_aux.add_loss(wrapped, loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def loop(folder: Path) -> None:
    """A plain loop under DistributedDataParallel."""
    model = attach(InALoop(), **OPTIONS)
    train(model, [own_part(views) for views in global_batches()], DistributedDataParallel(model))
    torch.save(model.state_dict(), folder / f"{rank()}.pt")


def sharded(folder: Path) -> None:
    """FSDP2, the encoder and the decoder in units of their own."""
    model = attach(InALoop(), **OPTIONS)
    for module in (model.backbone, model.recon_aux, model):
        fully_shard(module)
    train(model, [own_part(views) for views in global_batches()])
    whole = {
        name: x.full_tensor() if hasattr(x, "full_tensor") else x
        for name, x in model.state_dict().items()
    }
    torch.save(whole, folder / f"{rank()}.pt")
    exported = recon_aux.export_backbone(model)
    InALoop().backbone.load_state_dict(exported)


def loaded(folder: Path) -> None:
    """One process alone has loaded a checkpoint; DistributedDataParallel sends it to the other."""
    model = attach(InALoop(), **WITH_REGISTRATION)
    if rank() == 0:
        saved = attach(InALoop(), **WITH_REGISTRATION)
        # in units that the batches here wouldn't set
        train(saved, [[3 * view for view in views] for views in global_batches()[:2]])
        model.load_state_dict(saved.state_dict())
        torch.save(saved.state_dict(), folder / "loaded.pt")
    distributed.init_process_group("gloo")
    train(model, [own_part(views) for views in global_batches()], DistributedDataParallel(model))
    torch.save(model.state_dict(), folder / f"{rank()}.pt")


def first_batch(first: int, last: int) -> ReconAux:
    """The task after its first batch: some of the first eight pairs of views."""
    aux = ReconAux(8, seed=1)
    views = [view[first:last] for view in global_batches()[0]]
    aux(views, torch.ones(2, last - first, 8))
    return aux


def uneven(folder: Path) -> None:
    """First batches of two images and of six."""
    aux = first_batch(*((0, 2), (2, 8))[rank()])
    torch.save(dict(aux.named_buffers()), folder / f"{rank()}.pt")


def measured_weight(part: int) -> float:
    """The automatic weight that half of the batches gives, of losses that differ in size."""
    model = attach(InALoop(), **OPTIONS)
    for views in global_batches()[:2]:
        x0, x1 = (view[4 * part : 4 * part + 4] for view in views)
        loss = (30_000, 3_000)[part] * siamese_loss(model(x0), model(x1))
        recon_aux.add_loss(model, loss).backward()
    weight: float = model.recon_aux.weight
    return weight


def weight(folder: Path) -> None:
    """Each process has a loss of another size."""
    torch.save(measured_weight(rank()), folder / f"{rank()}.pt")


class GlobalBatches(Dataset[Any]):
    """The same batches for a trainer; one process may get a pixel that is not a number."""

    def __init__(self, broken: int | None) -> None:
        self.views = [torch.cat(views) for views in zip(*global_batches(), strict=True)]
        if broken == rank():
            self.views[0][24:] = float("nan")

    def __len__(self) -> int:
        return len(self.views[0])

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return [view[index] for view in self.views], 0


class Halves(DistributedSampler[Any]):
    """Each process's half of each eight."""

    def __init__(self, views: GlobalBatches) -> None:
        super().__init__(views, num_replicas=2, rank=rank(), shuffle=False)

    def __iter__(self) -> Any:
        return iter([8 * step + 4 * rank() + i for step in range(STEPS) for i in range(4)])


def lightning(folder: Path, broken: int | None = None, strategy: str = "ddp") -> None:
    """Lightning's DDP, as solo-learn uses it: no search for unused parameters."""
    model = attach(Siamese(), **OPTIONS)
    views = GlobalBatches(broken)
    trained = trainer(strategy=strategy, devices=2, max_steps=STEPS)
    trained.fit(model, DataLoader(views, batch_size=4, sampler=Halves(views)))
    torch.save(model.state_dict(), folder / f"{rank()}.pt")


def searching(folder: Path) -> None:
    """Lightning's DDP with a search for unused parameters."""
    lightning(folder, strategy="ddp_find_unused_parameters_true")


def failing(folder: Path, broken: int) -> None:
    """A loop in which one process fails in its fourth step."""
    model = attach(InALoop(), **OPTIONS)
    batches = [own_part(views) for views in global_batches()]
    if rank() == broken:
        batches[3][0][0, 0, 0, 0] = float("nan")
    train(model, batches, DistributedDataParallel(model))


def forgetting(folder: Path) -> None:
    """A loop under DistributedDataParallel without add_loss."""
    parallel = DistributedDataParallel(attach(InALoop(), **OPTIONS))
    said = ""
    try:
        for views in global_batches()[:2]:
            siamese_loss(*(parallel(view) for view in own_part(views))).backward()
    except RuntimeError as error:
        said = str(error)
    torch.save(said, folder / f"{rank()}.pt")


def monitored(folder: Path) -> None:
    """Lightning's DDP with a monitor."""
    monitor = recon_aux.Monitor(torch.rand(32, 3, 16, 16))
    trained = trainer(strategy="ddp", devices=2, max_steps=-1, max_epochs=2, callbacks=[monitor])
    trained.fit(attach(Siamese()), DataLoader(Views(side=16), batch_size=4))
    found = {k: float(x) for k, x in trained.callback_metrics.items() if k.startswith("monitor")}
    torch.save(found, folder / f"{rank()}.pt")


if __name__ == "__main__":
    names, folder, *broken = sys.argv[1:]
    torch.set_num_threads(1)
    cases: dict[str, Any] = {
        "loop": loop,
        "loaded": loaded,
        "sharded": sharded,
        "lightning": lightning,
        "searching": searching,
        "failing": failing,
        "forgetting": forgetting,
        "monitored": monitored,
        "uneven": uneven,
        "weight": weight,
    }
    for name in names.split(","):
        # the former joins the group in the midst, the latter is started by Lightning itself
        if name not in ("loaded", "lightning") and not distributed.is_initialized():
            distributed.init_process_group("gloo")
        (Path(folder) / name).mkdir(exist_ok=True)
        cases[name](Path(folder) / name, *map(int, broken))
    if distributed.is_initialized():
        # gloo may abort a process whose partner has gone already, or one whose threads are left
        distributed.barrier()
        distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)
