"""Put a ReconAux on a live model and take it off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .aux import ReconAux
from .encoder import Features, as_feature, encoder_shape
from .find import Conventions, describe_children, find_copies, find_module, unwrap
from .graph import reached
from .intercept import Capture, Door, EncoderCall, Guard, Mask, doors, watch
from .verify import Progress, gradients_to, past_masks, trained_encoders
from .views import two_views, verify_views

Model = TypeVar("Model", bound=nn.Module)

_ATTACHMENT = "_recon_aux_attachment"


def attach(
    model: Model,
    *,
    backbone: str | nn.Module,
    heads: Sequence[str | nn.Module],
    backbone_method: str = "forward",
    image_channels: int | None = None,
    image_size: int | None = None,
    features: Features | None = None,
    views: int | None = None,
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
        heads: every module that takes the encoder's features, as its first tensor, those of
            momentum encoders too, or their names.
        backbone_method: the encoder's method that the training step calls, if it isn't called
            itself: ``"encode"`` of lightly's masked transformers, ``"forward_features"`` of timm's.
        image_channels: channels of the views; by default what the first convolution takes.
        image_size: side of the blank image that is encoded once to find the feature's width, for
            an encoder that accepts one size alone.
        features: takes the feature from what the encoder returns, if that isn't a tensor.
        views: how many views one call of the encoder gets concatenated; by default read off the
            batch that the training step gets. 1 says that a momentum encoder's view, made within
            the step, is in the order of the encoder's.
        options: those of :class:`ReconAux`.

    Returns:
        The same model.

    Raises:
        TypeError: if the model optimizes by hand, or is wrapped by ``torch.compile``.
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
    _refuse_manual_optimization(model)
    if hasattr(model, "recon_aux"):
        raise ValueError(
            f"expected {type(model).__name__} without a recon_aux, got one that is its own: attach "
            "makes it"
        )
    if views is not None and views < 1:
        raise ValueError(f"expected views= of 1 or more, got {views}")
    encoder = find_module(model, backbone, "backbone")
    # a criterion that takes the features may stand outside the model
    masked = [
        head if isinstance(head, nn.Module) else find_module(model, head, "heads") for head in heads
    ]
    shape = encoder_shape(
        unwrap(encoder),
        method=backbone_method,
        image_channels=image_channels,
        image_size=image_size,
        features=features,
    )
    aux = ReconAux(
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
    attachment = Attachment(model, encoder, backbone_method, Capture(features), views)
    if aux.splitter.equivariant_dim:
        attachment.hide_from(
            masked, Mask(shape.feature_dim, aux.splitter.equivariant_dim, shape.feature_rank)
        )
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
    weight: float | None = None,
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

    It rebuilds what went through the encoder since the last call, so call it once for each loss.
    Make the optimizer after attaching: the decoder is among ``model.parameters()``.

    Args:
        model: one that ``attach`` returned.
        loss: the method's own loss of this step, with gradient.
        batch: what shows how many images a view has, where one call encodes several concatenated.

    Returns:
        The method's loss plus ``weight`` times the reconstruction loss.

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
    attachment = _attachment(unwrap(model))
    if not attachment.in_a_loop:
        raise TypeError(
            f"expected a model without training_step, got {type(model).__name__}, whose "
            "training_step returns the sum of both losses already"
        )
    try:
        total: Tensor = attachment.add_loss(loss, batch)
    finally:
        attachment.start()
    return total


def detach(model: Model) -> Model:
    """Take the reconstruction task off again: the decoder and what stands before methods.

    Args:
        model: one that ``attach`` returned.

    Returns:
        The same model; its encoder and heads keep what they learned.

    Raises:
        ValueError: if nothing is attached.
    """
    given = _attachment(model).heads
    # a copied module may have brought a door along, behind ours
    while opened := doors(model, *given):
        for door in opened:
            door.close()
    delattr(model, _ATTACHMENT)
    del model.recon_aux
    return model


def is_attached(model: nn.Module) -> bool:
    """Whether ``attach`` has been called on this model."""
    return hasattr(model, _ATTACHMENT)


def _attachment(model: nn.Module) -> Attachment:
    if not is_attached(model):
        raise ValueError(
            f"expected a model that attach() returned, got a bare {type(model).__name__}"
        )
    attachment: Attachment = getattr(model, _ATTACHMENT)
    return attachment


class Attachment:
    """What one model was given: doors, and what they have seen in the current step."""

    def __init__(
        self,
        model: nn.Module,
        encoder: nn.Module,
        backbone_method: str,
        capture: Capture,
        views: int | None,
    ) -> None:
        self.model = model
        self.backbone_method = backbone_method
        self.encoder = self._with_method(encoder)
        self.capture = capture
        self.views = views
        self.verified = False
        self.heads: list[nn.Module] = []
        self.mask: Mask | None = None
        self.watched = [self.encoder]
        watch(self.encoder, backbone_method, capture)
        self.watch_copies()
        # whether the loss may depend on features past the heads, though without gradient
        self.past_is_harmless = False
        self.other_is_a_copys = False
        self.progress = Progress()
        guards: dict[str, Guard] = {"training_step": self.step, "configure_optimizers": self.enroll}
        self.in_a_loop = not all(callable(getattr(model, method, None)) for method in guards)
        for method in () if self.in_a_loop else guards:
            Door(model, method, guards[method])

    @property
    def aux(self) -> ReconAux:
        """The model's ReconAux."""
        aux: ReconAux = self.model.get_submodule("recon_aux")  # type: ignore[assignment]
        return aux

    def watch_copies(self) -> None:
        """Watch momentum encoders, too: their features are the other view's in MoCo."""
        for copy in map(self._with_method, find_copies(self.model, self.encoder)):
            if not any(copy is known for known in self.watched):
                self.watched.append(copy)
                watch(copy, self.backbone_method, self.capture)

    def _with_method(self, encoder: nn.Module) -> nn.Module:
        # torch.compile's wrapper has no methods of its own but forward
        return encoder if self.backbone_method == "forward" else unwrap(encoder)

    def hide_from(self, heads: Sequence[nn.Module], mask: Mask) -> None:
        """Hide the equivariant channels from the heads."""
        self.mask = mask
        for head in heads:
            if not any(head is known for known in self.heads):
                self.heads.append(head)
                Door(head, "forward", mask)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on in a copy of the model; a copy of the encoder alone sees nothing."""
        vars(self).update(state)
        if self.in_a_loop:
            self.capture.start(in_a_loop=True)

    def step(self, model: nn.Module, training_step: Callable[..., Any], args: Any, kw: Any) -> Any:
        """Run the method's training step and add the reconstruction loss to what it returns."""
        if not torch.is_grad_enabled():
            # validation by the training step
            return training_step(*args, **kw)
        self.start()
        try:
            result = training_step(*args, **kw)
            _refuse_manual_optimization(self.model)
            if result is None:
                return None
            loss = result.get("loss") if isinstance(result, Mapping) else result
            if not isinstance(loss, Tensor):
                raise TypeError(
                    "expected training_step to return the loss, a dict with 'loss', or None, got "
                    f"{sorted(result) if isinstance(result, Mapping) else type(result).__name__}"
                )
            total = self.add_loss(loss, (args, kw))
            return {**result, "loss": total} if isinstance(result, Mapping) else total
        finally:
            self.stop()

    def start(self) -> None:
        """Forget what was seen, and look from here on."""
        if not self.verified or self.other_is_a_copys:
            # momentum encoders may have been made since
            self.watch_copies()
        self.capture.start(in_a_loop=self.in_a_loop)
        if self.mask:
            self.mask.masked = []

    def stop(self) -> None:
        """Forget what was seen, and look no more."""
        self.capture.stop()
        if self.mask:
            self.mask.masked = None

    def add_loss(self, loss: Tensor, given: Any) -> Tensor:
        """Add the reconstruction loss to the method's."""
        calls = self.capture.calls
        if self.in_a_loop and loss.requires_grad:
            # the loop may have encoded other images since
            belongs = reached(loss, [call.output for call in calls])
            calls = [
                call
                for call, is_its in zip(calls, belongs, strict=True)
                if is_its or not call.output.requires_grad
            ]
        online = [call for call in calls if call.output.requires_grad]
        if not self.verified and online and loss.requires_grad:
            self._verify_encoder(loss, online)
        online = [call for call in online if call.encoder is self.encoder]
        if not online:
            raise RuntimeError(self._no_call())
        if self.mask and loss.requires_grad:
            self._verify_mask(loss, [call.output for call in online], self.mask.masked or [])
        views, outputs = two_views(calls, online, given, self.views)
        if not self.verified:
            verify_views(views, given)
            self.verified = loss.requires_grad
        self.other_is_a_copys = not outputs[1].requires_grad
        if not self.aux.enabled:
            return loss
        self.progress.verify(self.encoder, self.aux)
        output = self.aux(views, [self._feature(y) for y in outputs])
        self._log("recon_aux/loss", output.reconstruction_loss, len(views[0]))
        total: Tensor = loss + output.loss
        return total

    def enroll(self, model: nn.Module, configure: Callable[..., Any], args: Any, kw: Any) -> Any:
        """Put the decoder's parameters where the encoder's are, unless they have a place."""
        configured = configure(*args, **kw)
        optimizers = list(_optimizers(configured))
        if not optimizers:
            raise ValueError(
                "expected configure_optimizers to return an optimizer, which is to train the "
                f"decoder, got {type(configured).__name__}"
            )
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        placed = {id(p) for group in groups for p in group["params"]}
        missing = [
            (f"recon_aux.{name}", p)
            for name, p in self.aux.named_parameters()
            if p.requires_grad and id(p) not in placed
        ]
        if not missing:
            return configured
        encoders = {id(p) for encoder in self.watched for p in encoder.parameters()}

        def encoder_size(group: dict[str, Any]) -> int:
            return sum(p.numel() for p in group["params"] if id(p) in encoders)

        group = max(groups, key=encoder_size)
        # joining a group, rather than adding one, keeps schedulers that were already built right
        group["params"].extend(p for _, p in missing)
        if "param_names" in group:
            group["param_names"].extend(name for name, _ in missing)
        return configured

    def _no_call(self) -> str:
        where = "each step, before add_loss," if self.in_a_loop else "training_step"
        return (
            f"expected {where} to call {self.backbone_method} of the encoder "
            f"{self._name(self.encoder)} with gradient, saw {len(self.capture.calls)} calls "
            "without and none with; backbone= tells which of these is the encoder: "
            f"{describe_children(self.model)}; backbone_method= tells what of it is called"
        )

    def _verify_encoder(self, loss: Tensor, online: list[EncoderCall]) -> None:
        encoders = trained_encoders(loss, online)
        if len(encoders) != 1:
            raise RuntimeError(
                "expected the method's loss to train one encoder, but it depends on "
                f"{[self._name(encoder) for encoder in encoders] or 'none'} of those like "
                f"{self._name(self.encoder)}; backbone= tells which it is, of these: "
                f"{describe_children(self.model)}; what a momentum encoder gives is to be detached"
            )
        # names are a first guess: a teacher may be called backbone
        (self.encoder,) = encoders

    def _verify_mask(self, loss: Tensor, outputs: list[Tensor], masked: list[Tensor]) -> None:
        """Check every step, since heads may be exchanged, but look at gradients only once."""
        past = [] if self.past_is_harmless else past_masks(loss, outputs, masked)
        gradients = [] if self.verified else gradients_to(outputs, masked)
        if past:
            gradients += torch.autograd.grad(loss, past, retain_graph=True)
            self.past_is_harmless = True
        if any(self.aux.equivariant(self._feature(g)).any() for g in gradients):
            raise RuntimeError(
                "expected the method's loss to see the invariant channels alone, but it sees the "
                f"equivariant ones {'past' if past else 'mixed into'} what the heads "
                f"{[self._name(head) for head in self.heads]} receive; heads= tells every module "
                "that takes the encoder's features as they are, of these: "
                f"{describe_children(self.model)}; equivariant_dim=0 trains without a split"
            )

    def _feature(self, output: Tensor) -> Tensor:
        return as_feature(output, spatial=self.aux.decoder.spatial)

    def _name(self, module: nn.Module) -> str:
        names = (name for name, known in self.model.named_modules() if known is module)
        return next(names, type(module).__name__)

    def _log(self, name: str, value: Tensor, batch_size: int) -> None:
        try:
            trainer = getattr(self.model, "trainer", None)
        except RuntimeError:  # Lightning's way to say that there is none
            return
        if trainer is not None:
            log: Callable[..., None] = self.model.log  # type: ignore[assignment]
            log(name, value, batch_size=batch_size)


def _refuse_wrapped(model: nn.Module) -> None:
    if unwrap(model) is not model:
        raise TypeError(
            f"expected a model as it was built, got it in a {type(model).__name__}: attach first, "
            "then compile or wrap it"
        )


def _refuse_manual_optimization(model: nn.Module) -> None:
    if getattr(model, "automatic_optimization", True) is False:
        raise TypeError(
            f"expected automatic optimization, but {type(model).__name__} sets "
            "automatic_optimization=False, so no loss passes through what training_step returns; "
            "call recon_aux.ReconAux in its step instead, see the README"
        )


def _optimizers(configured: Any) -> Iterator[torch.optim.Optimizer]:
    """Find the optimizers in any form that Lightning's configure_optimizers may return."""
    if hasattr(configured, "param_groups"):
        yield configured
    elif isinstance(configured, Mapping):
        yield from _optimizers(configured.get("optimizer"))
    elif isinstance(configured, (list, tuple)):
        for item in configured:
            yield from _optimizers(item)
