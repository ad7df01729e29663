"""Attach to TorchGeo's self-supervised tasks: SimCLRTask, MoCoTask and BYOLTask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from recon_aux.engine.adapter import Conventions, MethodHook, attach_by

try:
    from torchgeo import trainers
except ImportError as error:
    raise ImportError(
        "recon_aux.integrations.torchgeo needs torchgeo; "
        "install it with, in a clone: pip install '.[torchgeo]'"
    ) from error

Task = TypeVar("Task", bound=nn.Module)

# measured for the same losses in lightly; BYOLTask sums two views, and its loss squares distances
_WEIGHTS = {"SimCLRTask": 1.0, "MoCoTask": 1.0, "BYOLTask": 0.8}

_ENCODE_TWO_VIEWS = {*_WEIGHTS, "BaseTask"}


def attach(
    task: Task,
    *,
    backbone: str | nn.Module | None = None,
    heads: Sequence[str | nn.Module] | None = None,
    weight: float | Literal["auto"] | None = None,
    **options: Any,
) -> Task:
    """Attach to one of TorchGeo's tasks, with any number of bands; the one line.

    Args:
        task: a ``SimCLRTask``, a ``MoCoTask`` of version 1, 2 or 3, or a ``BYOLTask``.
        backbone: the encoder, or its name; by default the task's.
        heads: the modules that take the encoder's features, or their names; by default the task's.
        weight: weight of the reconstruction loss; by default what was measured for such a loss.
        options: those of :func:`recon_aux.attach` and :class:`recon_aux.ReconAux`.

    Returns:
        The same task, changed in place; ``task.recon_aux`` is the :class:`recon_aux.ReconAux`.

    Raises:
        TypeError: if the task learns from labels.
        ValueError: if no encoder or no head is found; the message lists the submodules.

    Example:
        >>> from torchgeo.trainers import MoCoTask
        >>> task = attach(MoCoTask(model="resnet18", in_channels=13, version=2))
        >>> task.recon_aux.image_channels
        13
    """
    given = {"backbone": backbone, "heads": heads, "weight": weight, **options}
    if isinstance(task, trainers.BYOLTask) and backbone is None:
        # a hook within the encoder runs the head
        wrapper = task.model.backbone
        given = {"features": partial(_embedding, wrapper), **given, "backbone": wrapper.model}
    is_first = isinstance(task, trainers.MoCoTask) and task.hparams["version"] == 1
    if not is_first or heads is not None or options.get("equivariant_dim") == 0:
        return attach_by(_TORCHGEO, task, **given)
    # MoCo's first version has no head: its loss compares the encoder's features
    head = nn.Identity()
    attach_by(_TORCHGEO, task, **{**given, "heads": [head]})
    for method in ("forward", "forward_momentum"):
        MethodHook(task, method, partial(_masked, head))
    return task


def _masked(head: nn.Module, task: Any, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    output = method(*args, **kwargs)
    return head(output) if isinstance(output, Tensor) else (head(output[0]), *output[1:])


def _embedding(wrapper: Any, output: Tensor) -> Any:
    return wrapper._embedding


def _is_head(name: str, module: nn.Module) -> bool:
    return name.startswith("projection_head") or name.endswith("._projector")


def _defaults(task: nn.Module) -> dict[str, Any]:
    classes = (base.__name__ for base in type(task).__mro__)
    weight = next((_WEIGHTS[name] for name in classes if name in _WEIGHTS), "auto")
    # each call encodes one view, which the task made within the step
    return {"weight": weight, "views": 1}


_TORCHGEO = Conventions(
    backbones=("backbone",),
    is_head=_is_head,
    defaults=_defaults,
    refused={name: "learns from labels" for name in {*trainers.__all__} - _ENCODE_TWO_VIEWS},
)
