"""Put a ReconAux on a live model and take it off again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from numbers import Integral
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from recon_aux.engine.attachment import Attachment, refuse_manual_optimization, trains_by_itself
from recon_aux.engine.auto_weight import AttachedReconAux
from recon_aux.engine.encoder import Features, encoder_shape
from recon_aux.engine.hooks import Capture, Mask, doors
from recon_aux.engine.modules import Conventions, find_module, unwrap
from recon_aux.engine.optimizers import Settings
from recon_aux.task.task import ReconAux

Model = TypeVar("Model", bound=nn.Module)

_ATTACHMENT = "_recon_aux_attachment"


def attach(
    model: Model,
    *,
    backbone: str | nn.Module,
    heads: Sequence[str | nn.Module],
    backbone_method: str = "forward",
    image_channels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    features: Features | None = None,
    views: int | None = None,
    decoder_lr: float | None = None,
    decoder_weight_decay: float | None = None,
    **options: Any,
) -> Model:
    """Add the reconstruction task to a model.

    The engine behind the adapters, which find ``backbone`` and ``heads`` for you. The model is
    changed in place: ``model.recon_aux`` is the :class:`ReconAux`; the heads see zeros in place of
    the equivariant channels; ``training_step`` returns the method's loss plus the reconstruction
    loss; ``configure_optimizers`` also trains the decoder, in the encoder's parameter group. A
    model without these two methods is trained by a loop of your own, see :func:`add_loss`.

    Args:
        model: a LightningModule, or any module.
        backbone: the encoder that the training step calls with gradient, or its name.
        heads: every module that takes the encoder's features, as its first tensor, or their
            names. If none is a momentum encoder's, their frozen copies next to one are.
        backbone_method: the encoder's method that the training step calls, if it isn't called
            itself: ``"encode"`` of lightly's masked transformers, ``"forward_features"`` of timm's.
        image_channels: channels of the views; by default what the first convolution takes.
        image_size: side of the blank image that is encoded once to find the feature's width, or
            its height and width, for an encoder that accepts one size alone.
        features: takes the feature from what the encoder returns, if that isn't a tensor.
        views: how many views one call of the encoder gets concatenated, one after the other, not
            interleaved; by default read off the batch that the training step gets. 1 says that a
            momentum encoder's view, made within the step, is in the order of the encoder's.
        decoder_lr: the decoder's base learning rate, on the encoder's schedule; by default the
            encoder's.
        decoder_weight_decay: its weight decay; by default the encoder's.
        options: those of :class:`ReconAux`, with ``weight="auto"`` by default: 1, or more where
            the method's loss pulls on the views' features more than half as strongly, twice as
            much. It is set after the first batch; until then the task trains the decoder alone.
            ``model.recon_aux.weight`` tells, and ``recon_aux/weight`` in the log.

    Returns:
        The same model.

    Raises:
        TypeError: if the model optimizes by hand, or is wrapped by ``torch.compile``, or an option
            is unknown.
        ValueError: if it is attached already, a module isn't found, or an option is out of range.

    Example:
        >>> class Method(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8))
        ...         self.head = nn.Linear(8, 4)
        ...     def training_step(self, batch, batch_idx):
        ...         z0, z1 = (self.head(self.encoder(x)) for x in batch)
        ...         return (z0 - z1).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> model = attach(Method(), backbone="encoder", heads=["head"], image_size=16)
        >>> loss = model.training_step(torch.rand(2, 4, 3, 16, 16), 0)
        >>> detach(model).state_dict().keys() == Method().state_dict().keys()
        True
    """
    if is_attached(model):
        raise ValueError(
            f"expected a bare {type(model).__name__}, got one with a recon_aux already; "
            "recon_aux.detach(model) takes it off"
        )
    _refuse_wrapped(model)
    refuse_manual_optimization(model)
    if hasattr(model, "recon_aux"):
        raise ValueError(
            f"expected {type(model).__name__} without a recon_aux, got one that is its own: attach "
            "makes it"
        )
    given: Any = views
    if given is not None and not (isinstance(given, Integral) and int(given) >= 1):
        raise ValueError(f"expected views= as a whole number of 1 or more, got {views!r}")
    settings = Settings(decoder_lr, decoder_weight_decay)
    settings.check()
    if settings.given() and not trains_by_itself(model):
        raise ValueError(
            "expected decoder_lr= and decoder_weight_decay= for a model that configures its "
            f"optimizers, got {type(model).__name__}, which doesn't: in a loop of your own give "
            "model.recon_aux.parameters() a group in the optimizer"
        )
    _refuse_unknown(options)
    encoder = find_module(model, backbone, "backbone")
    masked = _find_heads(model, heads, encoder)
    shape = encoder_shape(
        unwrap(encoder),
        method=backbone_method,
        image_channels=image_channels,
        image_size=image_size,
        features=features,
    )
    aux = AttachedReconAux(
        shape.feature_dim,
        image_channels=shape.image_channels,
        spatial=shape.feature_rank != 2,
        **options,
    )
    if aux.splitter.invariant_dim == 0:
        raise ValueError(
            f"expected equivariant_dim below the feature's {shape.feature_dim} channels, got "
            f"{aux.splitter.equivariant_dim}, which leaves the method's own loss nothing to see"
        )
    like = next(encoder.parameters(), torch.empty(0))
    model.add_module("recon_aux", aux.to(like.device))
    attachment = Attachment(model, encoder, backbone_method, Capture(features), views, settings)
    if aux.splitter.equivariant_dim:
        mask = Mask(shape.feature_dim, aux.splitter.equivariant_dim, shape.feature_rank)
        attachment.hide_from(masked, mask)
        attachment.hide_from_copies()
    if attachment.in_a_loop:
        attachment.start()
    setattr(model, _ATTACHMENT, attachment)
    return model


def attach_by(
    conventions: Conventions,
    model: Model,
    *,
    backbone: str | nn.Module | None = None,
    heads: Sequence[str | nn.Module] | None = None,
    weight: float | Literal["auto"] | None = None,
    **options: Any,
) -> Model:
    """Attach, and find by a framework's conventions what isn't given.

    Args:
        conventions: the framework's.
        model: as for :func:`attach`.
        backbone: by default what the conventions find.
        heads: likewise.
        weight: of the reconstruction loss; by default the conventions' for this method.
        options: those of :func:`attach` and :class:`ReconAux`.

    Returns:
        The same model.

    Raises:
        TypeError: if the conventions know the method for one without two views.
        ValueError: if no encoder or no head is found, and as :func:`attach` does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, an instance of its class, got {model!r}")
    _refuse_wrapped(model)
    conventions.refuse(type(model))
    if backbone is None:
        backbone = conventions.find_encoder(model)
    if heads is None:
        heads = [] if options.get("equivariant_dim") == 0 else conventions.find_heads(model)
    options = {**conventions.defaults(model), **options}
    if weight is not None:
        options["weight"] = weight
    return attach(model, backbone=backbone, heads=heads, **options)


def add_loss(model: nn.Module, loss: Tensor, batch: Any = ()) -> Tensor:
    """Add the reconstruction loss in a loop of your own, for an attached model without a trainer.

    It rebuilds what went through the encoder since the last call, so call it once for each loss,
    and where gradients are accumulated divide what it returns, not what it is given.
    Make the optimizer after attaching: the decoder is among ``model.parameters()``.

    Args:
        model: one that ``attach`` returned.
        loss: the method's own loss of this step, with gradient.
        batch: what shows how many images a view has, where one call encodes several concatenated,
            and which of a momentum encoder's calls is a view's; else it is the last.

    Returns:
        The method's loss plus ``weight`` times the reconstruction loss; as in validation, under
        ``torch.no_grad()``, the method's loss as it is.

    Raises:
        ValueError: if nothing is attached.
        TypeError: if the loss is no tensor, or the model has a ``training_step``, which adds it.
        RuntimeError: if no two views went through the encoder.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.Conv2d(3, 8, 16), "head": nn.Flatten()})
        >>> model = attach(model, backbone="encoder", heads=["head"], image_size=16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> z0, z1 = (model["head"](model["encoder"](x)) for x in torch.rand(2, 4, 3, 16, 16))
        >>> loss = add_loss(model, (z0 - z1).square().mean())
        >>> loss.backward()
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"expected the method's loss as a tensor, got {type(loss).__name__}")
    attachment = _attachment(model)
    if not attachment.in_a_loop:
        raise TypeError(
            f"expected a model without training_step, got {type(model).__name__}, whose "
            "training_step returns the sum of both losses already"
        )
    try:
        total: Tensor = attachment.add_loss(loss, batch) if torch.is_grad_enabled() else loss
    finally:
        attachment.start()
    return total


def detach(model: Model) -> Model:
    """Take the reconstruction task off again: the decoder and what stands before methods.

    Args:
        model: one that ``attach`` returned.

    Returns:
        The same model; its encoder and heads keep what they learned. The heads see all channels
        from here on, those of the equivariant part by weights that are as they were at the start.

    Raises:
        ValueError: if nothing is attached.
        FloatingPointError: if a GPU has not told until now that a loss was not finite; it is
            detached nevertheless.
    """
    attachment = _attachment(model)
    opened = attachment.doors
    while opened:
        for door in opened:
            door.close()
        # a copied module may have brought one along, behind ours; what others hold may stay, closed
        opened = [
            door
            for door in doors(attachment.model, *attachment.heads)
            if door.guard is not None or vars(door.module).get(door.method) is door
        ]
    check = attachment.aux.finite_check
    delattr(attachment.model, _ATTACHMENT)
    del attachment.model.recon_aux
    check.flush()
    return model


def trained_encoder(model: nn.Module) -> nn.Module:
    """Give the encoder that an attached model trains, to be handed out.

    Raises:
        ValueError: if nothing is attached.
        FloatingPointError: if a GPU has not told until now that a loss was not finite.
    """
    attachment = _attachment(model)
    attachment.aux.finite_check.flush()
    return attachment.trained_encoder


def decoder_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Give the decoder as a parameter group, for a framework where modules declare theirs.

    Returns:
        One group, named ``"recon_aux"``, with the settings that ``attach`` was given; none where
        nothing is to be trained.

    Raises:
        ValueError: if nothing is attached.
    """
    attachment = _attachment(model)
    params = [p for p in attachment.aux.parameters() if p.requires_grad]
    group = {"name": "recon_aux", "params": params, **attachment.settings.given()}
    return [group] if params else []


def is_attached(model: nn.Module) -> bool:
    """Whether ``attach`` has been called on this model."""
    return hasattr(unwrap(model), _ATTACHMENT)


def _attachment(model: nn.Module) -> Attachment:
    inner = unwrap(model)
    if not hasattr(inner, _ATTACHMENT):
        raise ValueError(
            f"expected a model that attach() returned, got a bare {type(inner).__name__}"
        )
    attachment: Attachment = getattr(inner, _ATTACHMENT)
    return attachment


def _find_heads(
    model: nn.Module, heads: Sequence[str | nn.Module], encoder: nn.Module
) -> list[nn.Module]:
    # a criterion that takes the features may stand outside the model
    found = [
        head if isinstance(head, nn.Module) else find_module(model, head, "heads")
        for head in ([heads] if isinstance(heads, (str, nn.Module)) else heads)
    ]
    for head in found:
        if any(head is inner for inner in encoder.modules()):
            raise ValueError(
                f"expected heads outside the encoder, got {type(head).__name__} within a "
                f"{type(encoder).__name__}; backbone= tells the encoder, which may be a part of "
                'it, as "student.backbone", heads= the heads; one that is its last layer, as a '
                "ResNet's fc, is to stand beside it, with nn.Identity() in its place"
            )
    return found


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    known = {*signature(ReconAux).parameters, *signature(attach).parameters}
    known -= {"model", "options", "feature_dim", "spatial"}
    for name in options.keys() - known:
        similar = get_close_matches(name, known, n=1)
        raise TypeError(
            f"expected options among {sorted(known)}, got {name}="
            + "".join(f"; did you mean {other}=?" for other in similar)
        )


def _refuse_wrapped(model: nn.Module) -> None:
    if unwrap(model) is not model:
        raise TypeError(
            f"expected a model as it was built, got it in a {type(model).__name__}: attach first, "
            "then compile or wrap it"
        )
