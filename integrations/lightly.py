"""Attach to LightningModules written the way lightly's examples and benchmarks are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from torch import nn

from recon_aux.engine.adapter import Conventions, attach_by

try:
    from lightly.models.modules.heads import ProjectionHead
except ImportError as error:
    raise ImportError(
        f"recon_aux.integrations.lightly needs lightly ({error}); "
        "install it with, in a clone: pip install '.[lightly]'"
    ) from error

Model = TypeVar("Model", bound=nn.Module)

# measured for each loss; docs/choosing.md says how
_WEIGHTS = {
    "NTXentLoss": 1.0,
    "VICRegLoss": 0.3,
    "NegativeCosineSimilarity": 0.2,
    # not measured: its gradient is large at first, when features are alike: "auto" gives hundreds
    "KoLeoLoss": 1.0,
}

_PATCH_LOSSES = {"IBOTPatchLoss", "IBOTPlusPlusPatchLoss"}


def attach(
    model: Model,
    *,
    backbone: str | nn.Module | None = None,
    heads: Sequence[str | nn.Module] | None = None,
    weight: float | Literal["auto"] | None = None,
    **options: Any,
) -> Model:
    """Attach to a model; the one line.

    Args:
        model: a LightningModule of ``lightning`` or ``pytorch_lightning``, whose training step
            encodes two views, one by one or concatenated, or one of them with a momentum encoder.
        backbone: the encoder, or its name; by default found by its usual names.
        heads: the modules that take the encoder's features, or their names; by default lightly's
            projection heads and modules named projection or projector, momentum ones too.
        weight: weight of the task's loss; by default what was measured for the method's
            loss, else ``"auto"``, see :func:`recon_aux.attach`.
        options: those of :func:`recon_aux.attach` and :class:`recon_aux.ReconAux`.

    Returns:
        The same model, changed in place; ``model.recon_aux`` is the :class:`recon_aux.ReconAux`.

    Raises:
        TypeError: if the method has no two views, as masked image modelling.
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
    attach_by(_LIGHTLY, model, backbone=backbone, heads=heads, weight=weight, **options)
    is_dense = any(type(m).__name__ == "DenseCLProjectionHead" for m in model.modules())
    if is_dense and options.get("equivariant_dim") != 0:
        warnings.warn(
            "recon_aux: expected a loss that sees the invariant part alone, got a model with a "
            "DenseCLProjectionHead. DenseCL matches positions by the encoder's whole features. "
            "Match model.recon_aux.invariant(features) instead, or pass equivariant_dim=0. If it "
            "does the former already, ignore this.",
            stacklevel=2,
        )
    return model


def _is_head(name: str, module: nn.Module) -> bool:
    if "predict" in (name + type(module).__name__).lower():
        return False
    named = "." not in name and ("projection" in name or "projector" in name)
    # KoLeo's loss takes the encoder's features themselves
    return named or isinstance(module, ProjectionHead) or type(module).__name__ == "KoLeoLoss"


def _defaults(model: nn.Module) -> dict[str, Any]:
    losses = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    weight = next((weight for loss, weight in _WEIGHTS.items() if loss in losses), "auto")
    # a loss on patches needs tokens, which lightly's masked transformers give through encode
    method = "encode" if _PATCH_LOSSES & losses else "forward"
    return {"weight": weight, "backbone_method": method}


_LIGHTLY = Conventions(
    backbones=("student_backbone", "online_backbone", "backbone", "student", "encoder"),
    is_head=_is_head,
    defaults=_defaults,
    refused={
        "MAE": "rebuilds masked patches of one view",
        "SimMIM": "rebuilds masked patches of one view",
        "Pixio": "rebuilds masked patches of one view",
        "AIM": "predicts the next patch of one view",
        "IJEPA": "predicts masked blocks of one view",
        "CAPI": "predicts clusters of masked patches of one view",
        "LeWM": "predicts the next frame of a clip from actions",
    },
)
