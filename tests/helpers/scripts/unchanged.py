"""What import, attach, a step and detach change of what all code in the process shares."""

from __future__ import annotations

import gc
import random
import sys
import warnings
from typing import Any

import lightly.utils.lars  # noqa: F401
import numpy
import torch
import torch._dynamo
from torch.nn.modules import module as nn_module
from torch.optim import optimizer as optimizers

from helpers.data import batch
from helpers.models import Siamese, tiny_encoder

PACKAGES = {"torch", "lightly", "pytorch_lightning", "lightning", "builtins"}
MODULES = ["torch", "torch.nn", "torch.nn.functional", "torch.optim", "torch.utils"]
Classes = set[type]


def known_classes() -> Classes:
    """The classes that there are, of torch and the frameworks."""
    return {
        known
        for known in gc.get_objects()
        if isinstance(known, type) and str(known.__module__).split(".")[0] in PACKAGES
    }


def shared(classes: Classes) -> dict[str, Any]:
    """What all code in the process shares, as it is now."""
    return {
        "random": random.getstate(),
        "numpy": [str(part) for part in numpy.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradient": torch.is_grad_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "filters": list(warnings.filters),
        "excepthook": sys.excepthook,
        "path": list(sys.path),
        "hooks": {
            name: len(value)
            for name, value in vars(nn_module).items()
            if name.startswith("_global") and hasattr(value, "__len__")
        },
        "classes": {
            known: {
                name: value
                for name, value in vars(known).items()
                if callable(value) or isinstance(value, (property, classmethod, staticmethod))
            }
            for known in classes
        },
        "functions": {
            name: {key: value for key, value in vars(sys.modules[name]).items() if callable(value)}
            for name in MODULES
        },
    }


def optimizer_hooks() -> list[int]:
    """How many hooks all optimizers have, before a step and after it."""
    before, after = optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks
    return [len(before), len(after)]


def compare(before: dict[str, Any], classes: Classes, when: str) -> None:
    after = shared(classes)
    for key, value in before.items():
        if value != after[key]:
            parts = value if isinstance(value, dict) else {}
            changed = [part for part in parts if parts[part] != after[key].get(part)]
            raise SystemExit(f"{when} changed {key} {changed}")


def main() -> None:
    # what torch does lazily in any training is not ours
    bare = Siamese(tiny_encoder())
    optimizer = bare.configure_optimizers()
    bare.training_step(batch(), 0).backward()
    optimizer.step()
    model = Siamese(tiny_encoder())
    classes = known_classes()
    before = shared(classes)
    hooks = optimizer_hooks()

    import recon_aux  # noqa: PLC0415
    from recon_aux.integrations.lightly import attach  # noqa: PLC0415

    compare(before, classes, "import")
    attach(model)
    compare(before, classes, "attach")
    optimizer = model.configure_optimizers()
    for _ in range(3):
        model.training_step(batch(), 0).backward()
        optimizer.step()
    compare(before, classes, "a step")
    recon_aux.detach(model)
    compare(before, classes, "detach")
    added = [new - old for old, new in zip(hooks, optimizer_hooks(), strict=True)]
    if added != [1, 1]:
        raise SystemExit(f"expected one hook before an optimizer's step and one after, got {added}")
    print("nothing changed in", len(classes), "classes")


if __name__ == "__main__":
    main()
