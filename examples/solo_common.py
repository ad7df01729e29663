"""What the solo-learn examples share: a config such as solo-learn's scripts read from YAML."""

from __future__ import annotations

from typing import Any

from common import Study
from omegaconf import DictConfig, OmegaConf
from solo.methods.base import BaseMethod


def config(study: Study, method: str, **method_kwargs: Any) -> DictConfig:
    """Build the config of a method; its backbone is the study's."""

    def backbone(method: str) -> Any:
        encoder, encoder.num_features = study.encoder()
        return encoder

    BaseMethod._BACKBONES["study"] = backbone
    args = study.args
    return OmegaConf.create(
        {
            "name": method,
            "method": method,
            "method_kwargs": method_kwargs,
            "momentum": {"base_tau": 0.99, "final_tau": 1.0},
            "backbone": {"name": "study"},
            "data": {
                "dataset": "custom",
                "num_classes": int(study.train[1].max()) + 1,
                "num_large_crops": 2,
                "num_small_crops": 0,
            },
            "optimizer": {
                "name": "adamw",
                "batch_size": args.batch_size,
                "lr": args.lr,
                "classifier_lr": args.lr,
                "weight_decay": 1e-4,
            },
            "scheduler": {"name": "warmup_cosine", "warmup_epochs": args.epochs / 10},
            "max_epochs": args.epochs,
        }
    )
