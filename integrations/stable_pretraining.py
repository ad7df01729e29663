"""Attach to stable-pretraining's modules: its forward functions, and its classes of methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from recon_aux import ReconAux
from recon_aux.engine.adapter import Conventions, MethodHook, attach_by

try:
    from stable_pretraining import Module, TeacherStudentWrapper
except ImportError as error:
    raise ImportError(
        f"recon_aux.integrations.stable_pretraining needs stable-pretraining ({error}); "
        "install it with, in a clone: pip install '.[stable-pretraining]'"
    ) from error

Model = TypeVar("Model", bound=nn.Module)

# measured for the same losses in lightly; BYOLLoss is twice lightly's
_WEIGHTS = {"NTXEntLoss": 1.0, "VICRegLoss": 0.3, "BYOLLoss": 0.4, "SimSiam": 0.2}

# classes that run a ViT layer by layer, in their own _encode(vit, images, mask)
_BY_LAYERS = {"CMAE", "DINOv2", "DINOv3", "MSN", "iBOT"}


def attach(
    model: Model,
    *,
    backbone: str | nn.Module | None = None,
    heads: Sequence[str | nn.Module] | None = None,
    weight: float | Literal["auto"] | None = None,
    **options: Any,
) -> Model:
    """Attach to a module; the one line.

    Its ``forward`` returns the method's loss plus the task's loss. So set ``forward``
    before attaching. Where several optimizers choose their modules by regular expressions, the
    decoder joins the encoder's, unless an expression names ``recon_aux``.

    Args:
        model: a ``stable_pretraining.Module`` that encodes two views.
        backbone: the encoder, or its name; by default ``backbone``, or the student in it.
        heads: the modules that take the encoder's features, or their names; by default those
            named projector or head, teachers' too.
        weight: weight of the task's loss; by default what was measured for the method's
            loss, else ``"auto"``, see :func:`recon_aux.attach`.
        options: those of :func:`recon_aux.attach` and :class:`recon_aux.ReconAux`.

    Returns:
        The same model, changed in place; ``model.recon_aux`` is the :class:`recon_aux.ReconAux`.

    Raises:
        TypeError: if the method has no two views, as masked image modelling.
        ValueError: if no encoder or no head is found; the message lists the submodules.

    Example:
        >>> from stable_pretraining.forward import simclr                   # doctest: +SKIP
        >>> module = attach(spt.Module(backbone=resnet18, projector=mlp,    # doctest: +SKIP
        ...     forward=simclr, simclr_loss=spt.losses.NTXEntLoss()))
        >>> trainer.fit(module, datamodule=data)                            # doctest: +SKIP
    """
    if isinstance(model, Module) and (backbone is None or heads is None):
        # functools.partial, as configs make it, has no name, and comes wrapped
        _SPT.refuse(getattr(model.forward, "_fn", model.forward))
    attach_by(_SPT, model, backbone=backbone, heads=heads, weight=weight, **options)
    if isinstance(model, Module):
        MethodHook(model, "_collect_parameters_by_optimizer_groups", _without_decoder)
        # by default its layers would be sharded, each alone
        aux: Any = model.get_submodule("recon_aux")
        aux.fsdp_setup = partial(_shard, aux)
    if _names(model) & _BY_LAYERS:
        MethodHook(model, "_encode", _record)
    return model


def _names(model: nn.Module) -> set[str]:
    return {base.__name__ for base in type(model).__mro__}


def _is_head(name: str, module: nn.Module) -> bool:
    name = name.removesuffix(".student").removesuffix(".teacher")
    named = "." not in name and ("proj" in name or name.endswith("head"))
    # the student and the teacher in it are heads themselves
    return named and not isinstance(module, TeacherStudentWrapper)


def _defaults(model: nn.Module) -> dict[str, Any]:
    names = _names(model).union(*map(_names, model.modules()))
    weight = next((weight for name, weight in _WEIGHTS.items() if name in names), "auto")
    by_hand = getattr(model, "automatic_optimization", True) is False
    by_layers = _names(model) & {*_BY_LAYERS, "VICRegL"}
    return {
        "weight": weight,
        "step_method": "forward" if by_hand else "training_step",
        "backbone_method": "forward_features" if by_layers else "forward",
        "features": _tokens if "PreTrainedModel" in names else None,
    }


def _tokens(output: Any) -> Tensor:
    """Take the feature from an output of transformers."""
    tokens: Tensor = getattr(output, "last_hidden_state", output)
    return tokens


_SPT = Conventions(
    backbones=("backbone.student", "backbone", "encoder.student", "encoder"),
    is_head=_is_head,
    defaults=_defaults,
    refused={
        "supervised": "classifies one view by its labels",
        **dict.fromkeys(["MAE", "CrossMAE", "SimMIM"], "rebuilds masked patches of one view"),
        "MaskFeat": "rebuilds gradients of masked patches of one view",
        "BEiT": "predicts tokens of masked patches of one view",
        "Data2Vec": "predicts features of masked patches of one view",
        **dict.fromkeys(["IJEPA", "SALT"], "predicts features of masked blocks of one view"),
        "iGPT": "predicts the next patch of one view",
        "NEPA": "predicts the next patch's embedding of one view",
    },
)


def _without_decoder(
    model: nn.Module, collect: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[dict[str, list[Any]], ...]:
    """Leave the decoder to the encoder's optimizer, unless an expression names it."""
    params, named, modules = collect(*args, **kwargs)
    if not any("recon_aux" in config["modules"] for _, config in args[0]):
        ours = {id(p) for p in model.get_submodule("recon_aux").parameters()}
        params = {k: [p for p in some if id(p) not in ours] for k, some in params.items()}
        named = {k: [pair for pair in some if id(pair[1]) not in ours] for k, some in named.items()}
    return params, named, modules


def _shard(aux: nn.Module, mesh: Any, policy: Any) -> None:
    """Shard the task as one unit, in float32: it computes its gradients in its forward pass."""
    fully_shard(aux, mesh=mesh)


def _record(model: nn.Module, encode: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
    """Encode layer by layer, and record it as one call of the ViT."""
    vit, *given = args
    hook = getattr(vit, "forward_features", None)
    if not isinstance(hook, MethodHook) or hook.callback is None:
        # not the attached encoder: the first step says which one was expected
        return encode(*args, **kwargs)
    tokens: Tensor = hook.callback(vit, partial(encode, vit), tuple(given), kwargs)
    if not (torch.is_grad_enabled() and model.training):
        return tokens
    # DINOv3's KoLeo takes the student's features past the heads
    aux: ReconAux = model.get_submodule("recon_aux")  # type: ignore[assignment]
    return F.pad(aux.invariant(tokens), (0, aux.splitter.equivariant_dim))
