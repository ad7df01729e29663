"""Attach the task to a live model, add its loss in a loop, and take it off again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from recon_aux.engine.attachment import Attachment
from recon_aux.engine.auto_weight import AttachedReconAux
from recon_aux.engine.drivers import driver_for, has_training_step, refuse_manual_optimization
from recon_aux.engine.encoder import EncoderShape, Features, encoder_shape
from recon_aux.engine.hooks import EncoderRecorder
from recon_aux.engine.logs import Logs
from recon_aux.engine.modules import find_module, first_linear, members, unwrap
from recon_aux.engine.optimizers import DecoderGroup
from recon_aux.task import ReconAux
from recon_aux.task.checks import check_nonnegative, check_whole
from recon_aux.task.contexts import evaluating
from recon_aux.task.options import expand_preset, refuse_unknown

Model = TypeVar("Model", bound=nn.Module)

_ATTACHMENT = "_recon_aux_attachment"


def attach(
    model: Model,
    *,
    backbone: str | nn.Module,
    heads: Sequence[str | nn.Module],
    backbone_method: str = "forward",
    step_method: str = "training_step",
    image_channels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    features: Features | None = None,
    example_input: Any = None,
    views: int | None = None,
    interleaved: bool = False,
    momentum_encoders: Sequence[str | nn.Module] = (),
    decoder_lr: float | None = None,
    decoder_weight_decay: float | None = None,
    log: bool = True,
    **options: Any,
) -> Model:
    """Add the task to a model.

    The adapters call it, and find ``backbone`` and ``heads`` for you. The model is changed in
    place. ``model.recon_aux`` is the :class:`ReconAux`. The heads see zeros in place of the
    equivariant channels. ``training_step`` returns the method's loss plus the task's.
    ``configure_optimizers`` also trains the decoder, in the encoder's parameter group. A model
    without these two methods is trained by a loop of your own, see :func:`add_loss`.

    Args:
        model: a LightningModule, or any module.
        backbone: the encoder that the training step calls with gradient, or its name.
        heads: all modules that take the encoder's features as their first tensor, or their
            names. A head's frozen copy next to a momentum encoder is found, unless such a copy is
            listed.
        backbone_method: the encoder's method that the training step calls, if it isn't called
            itself: ``"encode"`` of lightly's masked transformers, ``"forward_features"`` of timm's.
        step_method: the model's method that returns the method's loss, if that isn't
            ``training_step``; with it a model may optimize by hand. The task is trained while the
            model is in training mode.
        image_channels: channels of the views; by default what the first convolution takes.
        image_size: side of the blank image that is encoded once to find the feature's width, or
            its height and width, for an encoder that accepts one size alone.
        features: takes the feature from what the encoder returns, if that isn't one: ``lambda out:
            out.last_hidden_state[:, 0]``.
        example_input: is encoded in place of the blank image, for an encoder that is called with
            more than images: a tuple of its arguments, or a dict of its keyword arguments.
        views: how many concatenated views one call of the encoder gets; by default the batch
            shows it. With 1, a momentum encoder's images are taken to be in the encoder's order,
            which is needed where the step makes them and the batch doesn't hold them.
        interleaved: whether the views of one call alternate, image by image, as by
            ``x.repeat_interleave(2, 0)``. By default the batch shows it; else they don't alternate.
        momentum_encoders: momentum encoders, or their names, that ``attach`` can't find: they stand
            outside the model, or aren't built like the encoder. List their heads in ``heads``.
        decoder_lr: the decoder's base learning rate, on the encoder's schedule; by default the
            encoder's.
        decoder_weight_decay: its weight decay; by default the encoder's.
        log: whether a step's losses are collected, and logged by a trainer's model.
        options: those of :class:`ReconAux`, with ``weight="auto"`` by default. The first batch
            sets that weight: to 1, or to the larger value that makes the task's gradient on the
            views' features twice as large as the method's. Until then the task trains the decoder
            alone. ``model.recon_aux.weight`` holds it, and ``recon_aux/weight`` in the log.

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
    _refuse_model(model, step_method)
    own = DecoderGroup(decoder_lr, decoder_weight_decay)
    _check(model, step_method, {"views": views, "image_channels": image_channels}, own, options)
    options = expand_preset(options)
    encoder = find_module(model, backbone, "backbone")
    found = _find_modules(model, heads, "heads")
    _refuse_heads_within(encoder, found)
    momentum = _find_modules(model, momentum_encoders, "momentum_encoders")
    # the whole model: the encoder may run a head that stands outside it
    with evaluating(model):
        shape = encoder_shape(
            unwrap(encoder),
            method=backbone_method,
            image_channels=image_channels,
            image_size=image_size,
            features=features,
            example_input=example_input,
            widths=[m.in_features for m in map(first_linear, found) if m is not None],
        )
    aux = _build(shape, options)
    like = next(encoder.parameters(), torch.empty(0))
    model.add_module("recon_aux", aux.to(like.device))
    recorder = EncoderRecorder(features, shape, driver_for(model, step_method))
    encoders = [encoder, *momentum]
    attached = Attachment(
        model, encoders, backbone_method, recorder, views, interleaved, own, step_method, Logs(log)
    )
    attached.mask_heads(found)
    attached.mask_momentum_heads()
    if attached.driver.is_loop:
        attached.start()
    setattr(model, _ATTACHMENT, attached)
    return model


def add_loss(model: nn.Module, loss: Tensor, batch: Any = ()) -> Tensor:
    """Add the task's loss in a loop of your own, for an attached model without a trainer.

    It rebuilds what went through the encoder since the last call. So call it once for each loss.
    Where gradients are accumulated, divide what it returns, not what it is given. Make the
    optimizer after attaching: the decoder is among ``model.parameters()``.

    Args:
        model: one that ``attach`` returned.
        loss: the method's own loss of this step, with gradient.
        batch: the step's batch. It shows how many images a view has, if one call encodes several
            views, and which call of a momentum encoder encodes a view; else that is the last.

    Returns:
        The method's loss plus ``weight`` times the weighted sum of the four terms. Under
        ``torch.no_grad()``, as in validation, the method's loss as it is.

    Raises:
        ValueError: if nothing is attached, or the loss isn't one number.
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
        raise TypeError(
            f"expected the method's loss as a tensor, got {type(loss).__name__}. Pass the loss "
            "that backward() is called on."
        )
    attached = attachment_of(model)
    if not attached.driver.is_loop:
        raise TypeError(
            f"expected a model that a loop of your own trains, got {type(model).__name__}, whose "
            f"{attached.step_method} returns the sum of both losses already. Leave add_loss out."
        )
    try:
        total: Tensor = attached.add_loss(loss, batch) if torch.is_grad_enabled() else loss
    finally:
        attached.start()
    return total


def logs(model: nn.Module) -> dict[str, Tensor]:
    """Give what the last step's loss was made of, for a logger in a loop of your own.

    Args:
        model: one that ``attach`` returned.

    Returns:
        Tensors of one number, by the names that a trainer's logger gets, as ``recon_aux/loss``.
        Empty before the first step, and with ``log=False``.

    Raises:
        ValueError: if nothing is attached.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.Conv2d(3, 8, 16), "head": nn.Flatten()})
        >>> model = attach(model, backbone="encoder", heads=["head"], image_size=16)
        >>> z0, z1 = (model["head"](model["encoder"](x)) for x in torch.rand(2, 4, 3, 16, 16))
        >>> loss = add_loss(model, (z0 - z1).square().mean())
        >>> sorted(logs(model))[:3]
        ['recon_aux/edges', 'recon_aux/loss', 'recon_aux/reconstruction']
    """
    return attachment_of(model).logs.numbers()


def detach(model: Model) -> Model:
    """Take the task off again: the decoder and all hooks.

    Args:
        model: one that ``attach`` returned.

    Returns:
        The same model. Its encoder and heads keep what they learned. The heads see all channels
        from here on. Their weights for equivariant channels were never trained.

    Raises:
        ValueError: if nothing is attached.
        FloatingPointError: if a loss was not finite, and a GPU reports it only now. The task is
            taken off nevertheless.
    """
    attached = attachment_of(model)
    attached.remove()
    check = attached.aux.finite_check
    delattr(attached.model, _ATTACHMENT)
    del attached.model.recon_aux
    check.flush()
    return model


def is_attached(model: nn.Module) -> bool:
    """Whether ``attach`` has been called on this model."""
    return hasattr(unwrap(model), _ATTACHMENT)


def attachment_of(model: nn.Module) -> Attachment:
    """Give what :func:`attach` keeps of a model: its hooks and its plan.

    Raises:
        ValueError: if it has none.
    """
    inner = unwrap(model)
    if not hasattr(inner, _ATTACHMENT):
        raise ValueError(
            f"expected a model that attach() returned, got a bare {type(inner).__name__}. Pass it "
            "to attach first."
        )
    attached: Attachment = getattr(inner, _ATTACHMENT)
    return attached


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse what is no model, or one that is compiled or wrapped already.

    Raises:
        TypeError: that says what to do first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a model, an instance of its class, got {model!r}. Build the model first."
        )
    if unwrap(model) is not model:
        raise TypeError(
            f"expected a model as it was built, got it in a {type(model).__name__}: attach first, "
            "then compile or wrap it"
        )


def _refuse_model(model: nn.Module, step_method: str) -> None:
    if is_attached(model):
        raise ValueError(
            f"expected a bare {type(model).__name__}, got one with a recon_aux already. Call "
            "recon_aux.detach(model) first."
        )
    refuse_wrapped(model)
    if step_method == "training_step":
        refuse_manual_optimization(model)
    elif not has_training_step(model, step_method):
        raise ValueError(
            f"expected step_method= to name a method of {type(model).__name__} beside its "
            f"configure_optimizers, got {step_method!r}. Pass the name of the method that returns "
            "the loss. If there is no configure_optimizers, leave step_method= out, and call "
            "recon_aux.add_loss in your loop."
        )
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(
            f"expected layers whose sizes are known, got lazy ones: {lazy}. Call the encoder and "
            "its heads on images once, then attach."
        )
    if hasattr(model, "recon_aux"):
        raise ValueError(
            f"expected {type(model).__name__} without a recon_aux, got one that is its own: attach "
            "makes it. Give yours another name."
        )


def check_options(options: Iterable[str]) -> None:
    """Refuse what is no option of ``attach`` and none of ``ReconAux``.

    Raises:
        TypeError: that suggests a similar one.
    """
    known = {*signature(ReconAux).parameters, *signature(attach).parameters}
    refuse_unknown(options, known - {"model", "options", "feature_dim", "spatial"})


def _check(
    model: nn.Module,
    step_method: str,
    numbers: dict[str, Any],
    own: DecoderGroup,
    options: dict[str, Any],
) -> None:
    check_options(options)
    for option, number in numbers.items():
        if number is not None:
            check_whole(option, number, least=1)
    for option, value in own.given().items():
        check_nonnegative(f"decoder_{option}", value)
    if own.given() and not has_training_step(model, step_method):
        raise ValueError(
            "expected decoder_lr= and decoder_weight_decay= for a model that configures its "
            f"optimizers, got {type(model).__name__}, which doesn't: in a loop of your own give "
            "model.recon_aux.parameters() a group in the optimizer"
        )


def _build(shape: EncoderShape, options: dict[str, Any]) -> AttachedReconAux:
    aux = AttachedReconAux(
        shape.feature_dim,
        image_channels=shape.image_channels,
        spatial=shape.feature_rank != 2,
        **options,
    )
    if aux.splitter.invariant_dim == 0:
        raise ValueError(
            f"expected equivariant_dim below the feature's {shape.feature_dim} channels, got "
            f"{aux.splitter.equivariant_dim}, which leaves the method's own loss nothing to see. "
            "Pass a smaller equivariant_dim=."
        )
    return aux


def _find_modules(
    model: nn.Module, given: Sequence[str | nn.Module], option: str
) -> list[nn.Module]:
    found: list[nn.Module] = []
    for one in [given] if isinstance(given, (str, nn.Module)) else given:
        # a criterion that takes the features may stand outside the model
        module = one if isinstance(one, nn.Module) else find_module(model, one, option)
        found.extend(members(module))
    return found


def _refuse_heads_within(encoder: nn.Module, found: Sequence[nn.Module]) -> None:
    for head in found:
        if any(head is inner for inner in encoder.modules()):
            raise ValueError(
                f"expected heads outside the encoder, got {type(head).__name__} within a "
                f"{type(encoder).__name__}; backbone= has to be the encoder alone, "
                'as "student.backbone", heads= the heads. A head that is the encoder\'s last '
                "layer, as a ResNet's fc, has to stand beside it: put nn.Identity() in its place."
            )
