"""Checkpoints of each kind that the command line reads, with the keys that its framework writes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from lightly.models.modules import BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad
from torch import nn

import recon_aux

# the encoder, the checkpoint, and the architecture that is to be found
Kind = tuple[Any, Any, str]


def lightning(model: nn.Module, **entries: Any) -> dict[str, Any]:
    """What Lightning's trainer saves of a model."""
    return {
        "epoch": 1,
        "global_step": 2,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": OrderedDict(model.state_dict()),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {},
        "optimizer_states": [torch.optim.AdamW(model.parameters()).state_dict()],
        "lr_schedulers": [],
        **entries,
    }


def resnet18() -> Any:
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    return model.eval()


def small_stem(padding: int = 1) -> Any:
    model = resnet18()
    model.conv1 = nn.Conv2d(3, 64, 3, 1, padding, bias=False)
    model.maxpool = nn.Identity()
    return model


def plain() -> Kind:
    encoder = resnet18()
    return encoder, encoder.state_dict(), "torchvision:resnet18"


def torchvisions() -> Kind:
    model: Any = torchvision.models.resnet34(num_classes=7)
    state = model.state_dict()
    model.fc = nn.Identity()
    return model.eval(), state, "torchvision:resnet34"


def timms() -> Kind:
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=7)
    state = {"state_dict": model.state_dict(), "arch": "vit_tiny", "epoch": 3}
    model.reset_classifier(0)
    return model.eval(), state, "timm:vit_tiny_patch16_224"


def lightlys(**options: Any) -> Kind:
    """BYOL as lightly's examples write it, with recon_aux attached."""
    children = list(torchvision.models.resnet18().children())[:-1]
    model: Any = nn.ModuleDict(
        {
            "backbone": nn.Sequential(*children),
            "projection_head": BYOLProjectionHead(512, 64, 32),
            "prediction_head": BYOLProjectionHead(32, 64, 32),
            "backbone_momentum": nn.Sequential(*torchvision.models.resnet18().children()),
        }
    )
    del model["backbone_momentum"][-1]
    deactivate_requires_grad(model["backbone_momentum"])
    model = recon_aux.attach(model, backbone="backbone", heads=["projection_head"], **options)
    return model["backbone"].eval(), lightning(model), "torchvision:resnet18"


def solo_learns() -> Kind:
    """Of a CIFAR run, whose stem has 3x3 weights and, unlike others, a padding of 2."""
    model = nn.ModuleDict(
        {
            "backbone": small_stem(padding=2),
            "classifier": nn.Linear(512, 10),
            "projector": nn.Sequential(nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 16)),
            "momentum_backbone": small_stem(padding=2),
        }
    )
    return model["backbone"], lightning(model), "torchvision:resnet18-solo"


def stable_pretrainings() -> Kind:
    model = nn.ModuleDict(
        {
            "backbone": small_stem(),
            "projector": nn.Sequential(nn.Linear(512, 64), nn.BatchNorm1d(64), nn.Linear(64, 32)),
        }
    )
    saved = {"system.working_dir": "here", "slurm.job_id": "0", "slurm.task_id": "0"}
    checkpoint = lightning(model, hparams_name=None, hyper_parameters=saved)
    return model["backbone"], checkpoint, "torchvision:resnet18-small"


KINDS: dict[str, Callable[[], Kind]] = {
    "plain": plain,
    "torchvision": torchvisions,
    "timm": timms,
    "lightly": lightlys,
    "solo-learn": solo_learns,
    "stable-pretraining": stable_pretrainings,
}


def no_module() -> int:
    return 3


def own_encoder() -> nn.Module:
    """An encoder that no library has."""
    layers = nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Conv2d(4, 8, 2, 2)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
