"""Attach to TorchGeo's self-supervised tasks: SimCLR, MoCo and BYOL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from recon_aux.engine.adapter import Conventions, MethodHook, attach_by

try:
    import torchgeo

    # before TorchGeo 0.10 they are trainers, and their names end in "Task"
    _module = "tasks" if find_spec("torchgeo.tasks") else "trainers"
    _tasks: Any = import_module(f"{torchgeo.__name__}.{_module}")
except ImportError as error:
    raise ImportError(
        f"recon_aux.integrations.torchgeo needs torchgeo ({error}); "
        "install it with, in a clone: pip install '.[torchgeo]'"
    ) from error

Task = TypeVar("Task", bound=nn.Module)

# measured for the same losses in lightly; BYOL here sums two views, and its loss squares distances
_WEIGHTS = {"SimCLR": 1.0, "MoCo": 1.0, "BYOL": 0.8}


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
        task: a ``SimCLR``, a ``MoCo`` of version 1, 2 or 3, or a ``BYOL``. Before TorchGeo 0.10
            their names end in "Task".
        backbone: the encoder, or its name; by default the task's.
        heads: the modules that take the encoder's features, or their names; by default the task's.
        weight: weight of the task's loss; by default what was measured for such a loss.
        options: those of :func:`recon_aux.attach` and :class:`recon_aux.ReconAux`.

    Returns:
        The same task, changed in place; ``task.recon_aux`` is the :class:`recon_aux.ReconAux`.

    Raises:
        TypeError: if the task learns from labels.
        ValueError: if no encoder or no head is found; the message lists the submodules.

    Example:
        >>> from torchgeo.trainers import MoCoTask  # from torchgeo.tasks import MoCo
        >>> task = attach(MoCoTask(model="resnet18", in_channels=13))
        >>> task.recon_aux.image_channels
        13
    """
    given = {"backbone": backbone, "heads": heads, "weight": weight, **options}
    its: Any = task
    hooks: list[MethodHook] = []
    if _kind(task) == "BYOL" and backbone is None:
        wrapper = its.model.backbone
        given["backbone"] = wrapper.model
        # the head was made for images of this size
        given = {"image_size": getattr(its.model.augment, "size", 224), **given}
        layers = [*wrapper.model.children()]
        if not isinstance(layers[-1], nn.Identity):
            # a hook within the encoder, before its classifier, runs the head
            taken = _Taken()
            hooks = [MethodHook(layers[wrapper.layer], "forward", taken)]
            given = {"features": taken.feature, **given}
    is_first = _kind(task) == "MoCo" and its.hparams["version"] == 1
    has_no_head = is_first and heads is None and options.get("equivariant_dim") != 0
    # MoCo's first version has no head: its loss compares the encoder's features
    head = nn.Identity()
    if has_no_head:
        given["heads"] = [head]
    try:
        attach_by(_TORCHGEO, task, **given)
    except Exception:
        for hook in hooks:
            hook.remove()
        raise
    for method in ("forward", "forward_momentum") if has_no_head else ():
        MethodHook(task, method, partial(_masked, head))
    return task


def _kind(task: Any) -> str:
    """Give the task's name, or its base class's: SimCLR, MoCo or BYOL; ``""`` for any other."""
    names = (base.__name__.removesuffix("Task") for base in type(task).__mro__)
    return next((name for name in names if name in _WEIGHTS), "")


def _masked(head: nn.Module, task: Any, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    output = method(*args, **kwargs)
    return head(output) if isinstance(output, Tensor) else (head(output[0]), *output[1:])


class _Taken:
    """Takes what a layer returns, as TorchGeo's hook does, which flattens it."""

    def __init__(self) -> None:
        self.output: Any = None

    def __reduce__(self) -> tuple[type[_Taken], tuple[()]]:
        """Leave the tensor out of copies."""
        return type(self), ()

    def __call__(self, layer: Any, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.output = forward(*args, **kwargs)
        return self.output

    def feature(self, output: Any) -> Any:
        """Give the layer's output as the feature, whatever the encoder returns."""
        return self.output


def _is_head(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2]
    return last.startswith("projection_head") or last.endswith("projector")


def _defaults(task: nn.Module) -> dict[str, Any]:
    # each call of TorchGeo's tasks encodes one view, which the task made within the step
    kind = _kind(task)
    return {"weight": _WEIGHTS[kind], "views": 1} if kind else {"weight": "auto"}


_TORCHGEO = Conventions(
    backbones=("backbone",),
    is_head=_is_head,
    defaults=_defaults,
    refused={
        name: "rebuilds one masked view" if name.startswith("MAE") else "learns from labels"
        for name in _tasks.__all__
        if name != "BaseTask" and name.removesuffix("Task") not in _WEIGHTS
    },
)
