"""Put a ReconAux on a live model and take it off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .aux import ReconAux
from .encoder import Features, as_feature, encoder_shape, take_tensor

Model = TypeVar("Model", bound=nn.Module)

_ATTACHMENT = "_recon_aux_attachment"


def attach(
    model: Model,
    *,
    backbone: str | nn.Module,
    heads: Sequence[str | nn.Module],
    image_channels: int | None = None,
    image_size: int | None = None,
    features: Features | None = None,
    views: int | None = None,
    **options: Any,
) -> Model:
    """Add the reconstruction task to a model that trains through ``training_step``.

    The engine behind the adapters, which find ``backbone`` and ``heads`` for you. The model is
    changed in place: ``model.recon_aux`` is the :class:`ReconAux`; the heads see zeros in place of
    the equivariant channels; ``training_step`` returns the method's loss plus the reconstruction
    loss; ``configure_optimizers`` also trains the decoder, in the encoder's parameter group.

    Args:
        model: has ``training_step`` and ``configure_optimizers`` as a LightningModule does.
        backbone: the encoder that the training step calls with gradient, or its name.
        heads: every module that takes the encoder's features, those of momentum encoders too, or
            their names.
        image_channels: channels of the views; by default what the first convolution takes.
        image_size: side of the blank image that is encoded once to find the feature's width, for
            an encoder that accepts one size alone.
        features: takes the feature from what the encoder returns, if that isn't a tensor.
        views: how many views one call of the encoder gets concatenated; by default read off the
            batch that the training step gets.
        options: those of :class:`ReconAux`.

    Returns:
        The same model.

    Raises:
        TypeError: if the model doesn't train the way a LightningModule does.
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
    for method in _WRAPPERS:
        if not callable(getattr(model, method, None)):
            raise TypeError(
                f"expected a LightningModule, got {type(model).__name__} without {method}(); "
                "for a loop of your own use recon_aux.ReconAux, see the README"
            )
    _refuse_manual_optimization(model)
    encoder = find_module(model, backbone, "backbone")
    masked = [find_module(model, head, "heads") for head in heads]
    shape = encoder_shape(
        encoder, image_channels=image_channels, image_size=image_size, features=features
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
    mask = Mask(shape.feature_dim, aux.splitter.equivariant_dim, shape.feature_rank)
    setattr(model, _ATTACHMENT, Attachment(model, encoder, masked, mask, features, views))
    return model


def detach(model: Model) -> Model:
    """Take the reconstruction task off again: hooks, decoder and wrapped methods.

    Args:
        model: one that ``attach`` returned.

    Returns:
        The same model; its encoder and heads keep what they learned.

    Raises:
        ValueError: if nothing is attached.
    """
    if not is_attached(model):
        raise ValueError(
            f"expected a model that attach() returned, got a bare {type(model).__name__}"
        )
    getattr(model, _ATTACHMENT).remove(model)
    delattr(model, _ATTACHMENT)
    del model.recon_aux
    return model


def is_attached(model: nn.Module) -> bool:
    """Whether ``attach`` has been called on this model."""
    return hasattr(model, _ATTACHMENT)


def find_module(model: nn.Module, module: str | nn.Module, option: str) -> nn.Module:
    """Resolve a submodule given by itself or by its dotted name.

    Raises:
        ValueError: if it isn't a submodule of the model; the message lists those there are.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if isinstance(module, str) and module in modules:
        return modules[module]
    if isinstance(module, nn.Module) and any(module is known for known in modules.values()):
        return module
    given = module if isinstance(module, str) else type(module).__name__
    raise ValueError(
        f"expected {option}= to name a submodule of {type(model).__name__}, got {given!r}; "
        f"there are: {describe_children(model)}"
    )


def describe_children(model: nn.Module) -> str:
    """List a model's direct submodules for an error message."""
    children = [f"{name} ({type(child).__name__})" for name, child in model.named_children()]
    return ", ".join(children) or "none"


class EncoderCall(NamedTuple):
    """The images that one call of the encoder took, and the very tensor that it gave."""

    image: Tensor
    output: Tensor


class Capture:
    """A forward hook that sees image and feature together, while it is recording."""

    def __init__(self, features: Features | None) -> None:
        self.features = features
        self.stop()

    def start(self) -> None:
        """Forget, and record from here on."""
        self.stop()
        self.recording = True

    def stop(self) -> None:
        """Forget, and record nothing."""
        self.recording = False
        self.calls: list[EncoderCall] = []
        self.without_gradient = 0

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Remember images and feature of one call."""
        if not self.recording:
            return
        image = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if image is None or image.ndim != 4:
            shape = None if image is None else tuple(image.shape)
            raise ValueError(
                f"expected the encoder to be called with images (B, C, H, W), got {shape}"
            )
        output = take_tensor(output, self.features)
        if not output.requires_grad:
            self.without_gradient += 1
        else:
            self.calls.append(EncoderCall(image, output))


class Mask:
    """A forward pre-hook that zeroes the equivariant channels of what a head receives.

    A linear layer fed zeros computes what a narrower layer would, and its unused weights get zero
    gradient: zero-masking is slicing.
    """

    def __init__(self, feature_dim: int, equivariant_dim: int, feature_rank: int) -> None:
        self.feature_dim = feature_dim
        self.equivariant_dim = equivariant_dim
        self.feature_rank = feature_rank

    def __call__(self, head: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Give the head its arguments with the first tensor masked."""
        args, kwargs = list(args), dict(kwargs)
        for holder in (args, kwargs):
            for key in range(len(args)) if holder is args else list(kwargs):
                if isinstance(holder[key], Tensor):
                    holder[key] = self.mask(holder[key], head)
                    return tuple(args), kwargs
        raise ValueError(
            f"expected the head {type(head).__name__} to be called with features, got no tensor; "
            "heads= tells which modules take the encoder's features"
        )

    def mask(self, feature: Tensor, head: nn.Module) -> Tensor:
        """Zero the last channels of any feature, a flattened ``(B, D * H * W)`` too."""
        dim = 1 if feature.ndim == 4 else feature.ndim - 1
        positions, rest = divmod(feature.shape[dim], self.feature_dim)
        flattened = positions > 1 and feature.ndim == 2 and self.feature_rank != 2
        if feature.ndim not in (2, 3, 4) or rest or (positions != 1 and not flattened):
            raise ValueError(
                f"expected the head {type(head).__name__} to receive the encoder's "
                f"{self.feature_dim} channels, got {tuple(feature.shape)}; "
                "heads= tells which modules take the encoder's features"
            )
        if flattened and self.feature_rank == 3:
            tokens = rearrange(feature, "b (n d) -> b n d", n=positions)
            return self.mask(tokens, head).flatten(1)
        # a flattened map is channel-major, so the equivariant channels are last there, too
        width = self.equivariant_dim * positions
        after = [0, 0] * (feature.ndim - 1 - dim)
        return F.pad(feature.narrow(dim, 0, feature.shape[dim] - width), [*after, 0, width])


class _Wrapper:
    """Stands in for a method of one model; a copy of the model gets a copy with it."""

    def __init__(self, method: Callable[..., Any], attachment: Attachment) -> None:
        # Lightning reads a hook's signature through __wrapped__
        self.__wrapped__ = method
        self.attachment = attachment


class _TrainingStep(_Wrapper):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        capture = self.attachment.capture
        capture.start()
        try:
            return self.attachment.add_loss(self.__wrapped__(*args, **kwargs), (args, kwargs))
        finally:
            capture.stop()


class _ConfigureOptimizers(_Wrapper):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        configured = self.__wrapped__(*args, **kwargs)
        self.attachment.enroll(configured)
        return configured


_WRAPPERS: dict[str, type[_Wrapper]] = {
    "training_step": _TrainingStep,
    "configure_optimizers": _ConfigureOptimizers,
}


class Attachment:
    """The hooks on one model and what they have seen in the current step."""

    def __init__(
        self,
        model: nn.Module,
        encoder: nn.Module,
        heads: Sequence[nn.Module],
        mask: Mask,
        features: Features | None,
        views: int | None,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.heads = list(heads)
        self.verified = False
        self.capture = Capture(features)
        self.views = views
        self.handles: list[RemovableHandle] = [
            encoder.register_forward_hook(self.capture, with_kwargs=True)
        ]
        if mask.equivariant_dim:
            self.handles += [
                head.register_forward_pre_hook(mask, with_kwargs=True) for head in self.heads
            ]
        # an instance may have methods of its own over its class's
        self.replaced: dict[str, Any] = {
            name: vars(model)[name] for name in _WRAPPERS if name in vars(model)
        }
        for name, wrapper in _WRAPPERS.items():
            setattr(model, name, wrapper(getattr(model, name), self))

    @property
    def aux(self) -> ReconAux:
        """The model's ReconAux."""
        aux: ReconAux = self.model.get_submodule("recon_aux")  # type: ignore[assignment]
        return aux

    def remove(self, model: nn.Module) -> None:
        """Take off hooks and wrapped methods."""
        for handle in self.handles:
            handle.remove()
        for name in _WRAPPERS:
            delattr(model, name)
        vars(model).update(self.replaced)

    def add_loss(self, result: Any, given: Any) -> Any:
        """Add the reconstruction loss to what the method's training step returned."""
        _refuse_manual_optimization(self.model)
        if result is None:
            return None
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(loss, Tensor):
            raise TypeError(
                "expected training_step to return the loss, a dict with 'loss', or None, got "
                f"{sorted(result) if isinstance(result, Mapping) else type(result).__name__}"
            )
        views, features = self._two_views(given)
        if not self.verified:
            self._verify(loss)
            self.verified = True
        if not self.aux.enabled:
            return result
        output = self.aux(views, features)
        self._log("recon_aux/loss", output.reconstruction_loss, len(views[0]))
        total = loss + output.loss
        return {**result, "loss": total} if isinstance(result, Mapping) else total

    def enroll(self, configured: Any) -> None:
        """Put the decoder's parameters where the encoder's are, unless they have a place."""
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
            return
        encoder = {id(p) for p in self.encoder.parameters()}

        def encoder_size(group: dict[str, Any]) -> int:
            return sum(p.numel() for p in group["params"] if id(p) in encoder)

        group = max(groups, key=encoder_size)
        # joining a group, rather than adding one, keeps schedulers that were already built right
        group["params"].extend(p for _, p in missing)
        if "param_names" in group:
            group["param_names"].extend(name for name, _ in missing)

    def _two_views(self, given: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        calls = self.capture.calls
        if not calls:
            raise RuntimeError(
                f"expected training_step to call the encoder {self._name(self.encoder)} with "
                f"gradient, saw {self.capture.without_gradient} calls without and none with; "
                f"backbone= tells which of these is the encoder: {describe_children(self.model)}"
            )
        largest = max(call.image.shape[-2:].numel() for call in calls)
        views: dict[int, EncoderCall] = {}
        for call in calls:
            if call.image.shape[-2:].numel() == largest:
                # of several calls with the same images the first counts
                views.setdefault(id(call.image), call)
        images = [call.image for call in views.values()]
        features = [as_feature(call.output) for call in views.values()]
        if len(views) == 1:
            size = self._view_size(images[0], given)
            return torch.split(images[0], size)[:2], torch.split(features[0], size)[:2]
        return tuple(images[:2]), tuple(features[:2])

    def _view_size(self, image: Tensor, given: Any) -> int:
        """Say how many images each of the views has that one call got concatenated."""
        if self.views is None:
            given = [x for x in _tensors(given) if len(x)]
            images = {len(x) for x in given if x.ndim == 4}
            sizes = images or {len(x) for x in given if x.ndim == 1}
        else:
            sizes = {len(image) // self.views} if len(image) % self.views == 0 else set()
        fitting = {size for size in sizes if len(image) % size == 0}
        if len(fitting) == 1 and (size := fitting.pop()) * 2 <= len(image):
            return size
        seen = [tuple(call.image.shape) for call in self.capture.calls]
        raise RuntimeError(
            "expected two views, one in each call of the encoder or concatenated in one, saw calls "
            f"with gradient of images {seen} and {self.capture.without_gradient} without, where "
            f"images and labels of the batch number {sorted(sizes)}; recon_aux needs two views of "
            "one size that the encoder gets with gradient, and views= tells how many are "
            "concatenated where the batch doesn't show it"
        )

    def _verify(self, loss: Tensor) -> None:
        """Once: does the method's loss really leave the equivariant channels alone?"""
        if not self.aux.splitter.equivariant_dim or not loss.requires_grad:
            return
        outputs = [call.output for call in self.capture.calls]
        gradients = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
        reached = [self.aux.equivariant(as_feature(g)) for g in gradients if g is not None]
        if any(part.any() for part in reached):
            raise RuntimeError(
                "expected the method's loss to see the invariant channels alone, but its gradient "
                "reaches the equivariant ones past the heads "
                f"{[self._name(head) for head in self.heads]}; heads= tells every module that "
                f"takes the encoder's features, of these: {describe_children(self.model)}; "
                "equivariant_dim=0 trains without a split"
            )

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


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.ndim:
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
