"""TorchGeo's tasks by their names of before 0.10, whatever its version."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

TASKS = "torchgeo.tasks" if find_spec("torchgeo.tasks") else "torchgeo.trainers"


def task_class(name: str) -> Any:
    """Give a class; since 0.10 its name doesn't end in "Task"."""
    tasks = import_module(TASKS)
    return getattr(tasks, name, None) or getattr(tasks, name.removesuffix("Task"))


def byol_of(encoder: Any, side: int) -> Any:
    """Give what is in BYOL's task, of an encoder, and with small heads."""
    made = import_module(f"{TASKS}.byol")
    # the model behind the task, whose name may be the task's
    model: Any = next(x for x in vars(made).values() if getattr(x, "update_target", None))
    return model(encoder, image_size=(side, side), in_channels=3, hidden_size=32)


def augmentation(side: int) -> Any:
    """Give BYOL's augmentation, for smaller images than its own."""
    return import_module(f"{TASKS}.byol").SimCLRAugmentation((side, side))
