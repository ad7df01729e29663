"""Stand before one method of one module: the encoder's to see, the heads' to mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recon_aux.engine.autograd import reached
from recon_aux.engine.compiled import is_recomputing
from recon_aux.engine.encoder import Features, take_tensor

# what stands in a method's place gets the module, the method, and what it was called with
Guard = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Door:
    """Stands in for one method of one module, also where a call goes past forward hooks.

    It is an attribute of the instance: the module's class, its parameters and its ``state_dict``
    stay as they are, and a copy of the module has a copy of it.
    """

    def __init__(self, module: nn.Module, method: str, guard: Guard) -> None:
        self.module = module
        self.method = method
        self.guard: Guard | None = guard
        # an instance may have a method of its own over its class's
        self.own: Callable[..., Any] | None = vars(module).get(method)
        vars(module)[method] = self

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method itself, where Lightning and inspect look for its signature."""
        if isinstance(self.own, Door):
            return self.own.__wrapped__
        if self.own is not None:
            return self.own
        # looked up anew each time: a copy is bound to itself
        bound: Callable[..., Any] = getattr(type(self.module), self.method).__get__(self.module)
        return bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method, through the guard."""
        # no bound method, which torch.compile would look up by its name, and find the door
        method = self.own
        if method is None:
            method = partial(getattr(type(self.module), self.method), self.module)
        if self.guard is None:
            return method(*args, **kwargs)
        return self.guard(self.module, method, args, kwargs)

    def close(self) -> None:
        """Give the module its method back; who holds the door calls the method through it."""
        self.guard = None
        if vars(self.module).get(self.method) is self:
            del vars(self.module)[self.method]
            if self.own is not None:
                vars(self.module)[self.method] = self.own


def watch(encoder: nn.Module, method: str, capture: Capture) -> Door:
    """Let a capture see an encoder; a copy of a watched one comes with a door already."""
    door = vars(encoder).get(method)
    if not isinstance(door, Door):
        return Door(encoder, method, capture)
    door.guard = capture
    return door


def version(module: nn.Module) -> int:
    """Give a number that grows with each change of a module's parameters."""
    return sum(parameter._version for parameter in module.parameters())


def doors(*models: nn.Module) -> list[Door]:
    """Find every door in some modules, those that came with copied submodules, too."""
    modules = (module for model in models for module in model.modules())
    values = (value for module in modules for value in vars(module).values())
    return [value for value in values if isinstance(value, Door)]


# more than any method makes in one step
_MANY_CALLS = 32
# as many as a step's momentum encoders may make, without gradient
_FEW_CALLS = 8


def _refuse_looking_for_unused_parameters() -> None:
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is not None and wrapper.find_unused_parameters:
        raise TypeError(
            "expected DistributedDataParallel with find_unused_parameters=False, got True: it "
            "looks for them before the decoder is used, and takes the decoder's for unused"
        )


class EncoderCall(NamedTuple):
    """Which encoder was called, in which mode, the images, and the very tensor that it gave."""

    encoder: nn.Module
    image: Tensor
    output: Tensor
    in_training: bool

    @property
    def pixels(self) -> int:
        """How many pixels an image has."""
        return self.image.shape[-2:].numel()

    @property
    def evaluates(self) -> bool:
        """Whether this is no call of the encoder that is trained, as far as it shows."""
        return not (self.output.requires_grad and self.in_training)


class Capture:
    """A guard that sees image and feature together, while it is recording."""

    def __init__(self, features: Features | None) -> None:
        self.features = features
        self.recording = False
        self.in_a_loop = False
        # whether calls without gradient are of interest: not to a copy that is a teacher or average
        self.is_trained = True
        # all that are watched, and what their heads receive
        self.encoders: list[nn.Module] = []
        self.mask: Mask | None = None
        # of each encoder's parameters, when it was called last in training
        self.versions: dict[int, int] = {}
        self.calls: list[EncoderCall] = []

    def start(self, *, in_a_loop: bool = False) -> None:
        """Forget, and record from here on; in a loop that isn't ours, only what is training."""
        self.recording, self.in_a_loop, self.calls = True, in_a_loop, []
        self.versions = {}

    def stop(self) -> None:
        """Forget, and record nothing."""
        self.recording, self.calls = False, []

    def __call__(
        self,
        encoder: nn.Module,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the encoder, and remember."""
        result = call(*args, **kwargs)
        if self.recording and not is_recomputing():
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            # a mask of patches may come first
            image = next((x for x in tensors if x.ndim == 4), None)
            if image is None:
                raise ValueError(
                    "expected the encoder to be called with images (B, C, H, W), got "
                    f"{[tuple(x.shape) for x in tensors]}"
                )
            output = take_tensor(result, self.features)
            # a momentum encoder may be in eval mode throughout; what is compiled would be anew
            may_be = () if torch.compiler.is_compiling() else self.encoders
            is_training = encoder.training or any(known.training for known in may_be)
            if not self.in_a_loop or output.requires_grad or is_training:
                self.remember(EncoderCall(encoder, image, output, encoder.training))
        return result

    def remember(self, call: EncoderCall) -> None:
        """Keep a call until the step is over; in a loop, few of those that evaluate."""
        if self.in_a_loop and not torch.compiler.is_compiling():
            _refuse_looking_for_unused_parameters()
            self.is_trained |= call.output.requires_grad
            if not self.is_trained:
                return
            if call.evaluates:
                self.make_room(call)
            else:
                self.expect_add_loss(call)
        self.calls.append(call)

    def make_room(self, call: EncoderCall) -> None:
        """Forget the oldest of many calls that may be of an evaluation between steps."""
        by_gradient = call.output.requires_grad
        many = _MANY_CALLS if by_gradient else _FEW_CALLS
        alike = [
            known
            for known in self.calls
            if known.output.requires_grad == by_gradient and known.evaluates
        ]
        if len(alike) >= many:
            self.calls = [known for known in self.calls if known is not alike[0]]
            if self.mask and by_gradient:
                self.mask.forget(alike[0].output)

    def expect_add_loss(self, call: EncoderCall) -> None:
        """See to it that a loop doesn't forget the reconstruction loss."""
        now = version(call.encoder)
        before = self.versions.setdefault(id(call.encoder), now)
        trained = [known for known in self.calls if not known.evaluates]
        if before != now or len(trained) >= _MANY_CALLS:
            raise RuntimeError(
                "expected recon_aux.add_loss(model, loss) once a step, saw the encoder change or "
                f"{_MANY_CALLS} calls of it without; for evaluation use model.eval() and "
                "torch.no_grad(); to train on without the task recon_aux.detach(model)"
            )

    def __deepcopy__(self, memo: Any) -> Capture:
        """Copy, but let a momentum encoder that is copied within a step report to that step."""
        if self.recording and not self.in_a_loop:
            return self
        copied = Capture(self.features)
        copied.is_trained = False
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Leave the tensors of a running step out, and what an attachment tells its own anew."""
        alone: dict[str, Any] = {"encoders": [], "mask": None}
        return {**vars(self), "recording": False, "is_trained": False, "calls": [], **alone}


class Mask:
    """A guard that zeroes the equivariant channels of what a head receives.

    A linear layer fed zeros computes what a narrower layer would, and its unused weights get zero
    gradient: zero-masking is slicing, but for what looks at the layer's weights or input as a
    whole, as LARS and layer norm do.
    """

    def __init__(self, feature_dim: int, equivariant_dim: int, feature_rank: int) -> None:
        self.feature_dim = feature_dim
        self.equivariant_dim = equivariant_dim
        self.feature_rank = feature_rank
        # what the heads received in a running step
        self.masked: list[Tensor] | None = None
        # whether one received something without gradient
        self.without_gradient = False
        # of each head's parameters, when a backward pass past the step went through it
        self.versions: dict[int, int] = {}

    def start(self) -> None:
        """Note what the heads receive, from here on."""
        self.masked, self.versions = [], {}

    def expect_a_step(self, head: nn.Module, masked: Tensor) -> None:
        """See to it that the heads aren't trained past the step that adds the loss."""
        trains = masked.requires_grad and head.training
        if not trains or torch.compiler.is_compiling() or is_recomputing():
            return
        now, versions = version(head), self.versions
        hooked: Any = masked
        hooked.register_hook(lambda gradient: versions.update({id(head): now}))
        if versions.get(id(head), now) != now:
            raise RuntimeError(
                f"expected the head {type(head).__name__}, which is masked, to be trained by the "
                "attached training_step, which adds the reconstruction loss, saw it change past "
                "it; replace training_step before attaching, call it in a loop of your own, or "
                "take all off by recon_aux.detach(model)"
            )

    def forget(self, feature: Tensor) -> None:
        """Let go of what was masked of one of the encoder's outputs."""
        self.masked = [x for x in self.masked or [] if not reached(x, [feature])[0]]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the tensors of a running step out of copies."""
        return {**vars(self), "masked": None, "versions": {}}

    def __call__(
        self,
        head: nn.Module,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the head with its first tensor masked."""
        for index, value in enumerate(args):
            if isinstance(value, Tensor):
                return call(*args[:index], self.mask(value, head), *args[index + 1 :], **kwargs)
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                return call(*args, **{**kwargs, name: self.mask(value, head)})
        raise ValueError(
            f"expected the head {type(head).__name__} to be called with features, got no tensor; "
            "heads= tells which modules take the encoder's features, as their first tensor"
        )

    def mask(self, feature: Tensor, head: nn.Module) -> Tensor:
        """Zero the last channels of any feature.

        That is ``(B, D)``, tokens ``(B, N, D)``, a map ``(B, D, H, W)``, the same with channels
        last, ``(B, H, W, D)``, or flattened, ``(B, D * H * W)``.
        """
        maps_first = feature.ndim == 4 and feature.shape[1] == self.feature_dim
        dim = 1 if maps_first else feature.ndim - 1
        positions, rest = divmod(feature.shape[dim], self.feature_dim)
        flattened = positions > 1 and feature.ndim == 2 and self.feature_rank != 2
        # images, perhaps, which a layer before the encoder receives
        is_other = (
            feature.ndim == 4 and not maps_first and self.feature_rank == 2 and feature.shape[2] > 1
        )
        is_other |= feature.ndim not in (2, 3, 4)
        if is_other or rest or (positions != 1 and not flattened):
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
        masked = F.pad(feature.narrow(dim, 0, feature.shape[dim] - width), [*after, 0, width])
        if self.masked is None:
            self.expect_a_step(head, masked)
        elif not masked.requires_grad:
            if not self.without_gradient:
                self.without_gradient = True
        elif not is_recomputing():
            self.masked.append(masked)
        return masked
