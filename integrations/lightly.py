"""Attach to LightningModules written the way lightly's examples and benchmarks are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from recon_aux.attach import attach as _attach
from recon_aux.attach import describe_children

try:
    from lightly.models.modules.heads import ProjectionHead
except ImportError as error:
    raise ImportError(
        "recon_aux.integrations.lightly needs lightly; "
        "install it with: pip install 'recon-aux[lightly]'"
    ) from error

Model = TypeVar("Model", bound=nn.Module)

_BACKBONES = ("student_backbone", "online_backbone", "backbone", "student", "encoder")

# what balances each loss with the reconstruction loss; the README says how they were measured
_WEIGHTS = {"NTXentLoss": 4.0, "VICRegLoss": 25.0, "NegativeCosineSimilarity": 1.0}


def attach(
    model: Model,
    *,
    backbone: str | nn.Module | None = None,
    heads: Sequence[str | nn.Module] | None = None,
    weight: float | None = None,
    **options: Any,
) -> Model:
    """Attach to a model; the one line.

    Args:
        model: a LightningModule of ``lightning`` or ``pytorch_lightning``, whose training step
            encodes two views, one by one or concatenated.
        backbone: the encoder, or its name; by default found by its usual names.
        heads: the modules that take the encoder's features, or their names; by default lightly's
            projection heads and what is called one, momentum ones too.
        weight: weight of the reconstruction loss; the default depends on the method's loss.
        options: those of :func:`recon_aux.attach.attach` and :class:`recon_aux.ReconAux`.

    Returns:
        The same model, changed in place; ``model.recon_aux`` is the :class:`recon_aux.ReconAux`.

    Raises:
        ValueError: if no encoder or no head is found; the message lists the submodules.

    Example:
        >>> from lightly.loss import NTXentLoss
        >>> from lightly.models.modules import SimCLRProjectionHead
        >>> from pytorch_lightning import LightningModule
        >>> from torchvision.models import resnet18
        >>> class SimCLR(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.backbone = nn.Sequential(*list(resnet18().children())[:-1])
        ...         self.projection_head = SimCLRProjectionHead(512, 512, 128)
        ...         self.criterion = NTXentLoss()
        ...     def training_step(self, batch, batch_idx):
        ...         z0, z1 = (self.projection_head(self.backbone(x).flatten(1)) for x in batch[0])
        ...         return self.criterion(z0, z1)
        >>> model = attach(SimCLR())
        >>> model.recon_aux.splitter
        FeatureSplitter(invariant_dim=256, equivariant_dim=256)
    """
    backbone = _find_backbone(model) if backbone is None else backbone
    heads = _find_heads(model) if heads is None else heads
    if not heads and options.get("equivariant_dim") != 0:
        raise ValueError(
            f"expected a projection head in {type(model).__name__}, found none; heads= tells which "
            f"modules take the encoder's features, of these: {describe_children(model)}"
        )
    weight = _default_weight(model) if weight is None else weight
    return _attach(model, backbone=backbone, heads=heads, weight=weight, **options)


def _find_backbone(model: nn.Module) -> nn.Module:
    children = dict(model.named_children())
    for name in _BACKBONES:
        child = children.get(name)
        if child is not None and any(p.requires_grad for p in child.parameters()):
            return child
    raise ValueError(
        f"expected an encoder named one of {_BACKBONES} in {type(model).__name__}; "
        f"backbone= tells which it is, of these: {describe_children(model)}"
    )


def _find_heads(model: nn.Module) -> list[nn.Module]:
    return [
        child
        for name, child in model.named_children()
        if isinstance(child, ProjectionHead) or "projection" in name or "projector" in name
        if "Prediction" not in type(child).__name__
    ]


def _default_weight(model: nn.Module) -> float:
    losses = {base.__name__ for child in model.children() for base in type(child).__mro__}
    return next((weight for loss, weight in _WEIGHTS.items() if loss in losses), 1.0)
