"""Put a callback in place of one method of a live module: record an encoder, mask a head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch._guards import TracingContext
from torch.fx import Proxy

from recon_aux.engine.compiling import is_recomputing
from recon_aux.engine.encoder import (
    EncoderShape,
    Features,
    image_of,
    source_of,
    take_feature,
)
from recon_aux.engine.step import EncoderCall, tensors_in, version_in_place

if TYPE_CHECKING:
    from recon_aux.engine.drivers import Driver

Callback = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Called with the module, its method, and the method's arguments. Returns what the method would."""


class MethodHook:
    """Calls a callback in place of one method of one module.

    Unlike torch's own hooks it also sees calls of ``module.forward`` and of any other method. It
    is an attribute of the instance: the module's class, parameters and ``state_dict`` stay as they
    are. A deep copy of the module has a copy of the hook. What is pickled of the module has none,
    unless it is the attached model.

    Args:
        module: whose method it is.
        method: the method's name.
        callback: called with the module, the method, its arguments and its keyword arguments.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> hook = MethodHook(layer, "forward", lambda module, call, args, kwargs: "replaced")
        >>> layer(None)
        'replaced'
        >>> hook.remove()
        >>> vars(layer).keys() == vars(nn.Linear(2, 2)).keys()
        True
    """

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Pose as a method, since inspect and torch.jit.script read the source of nothing else.

        But not while torch compiles: torch 2.6 would replace the hook by the module's own method.
        """
        return MethodType if TracingContext.try_get() is None else MethodHook

    def __init__(self, module: nn.Module, method: str, callback: Callback) -> None:
        self.module = module
        self.method = method
        self.callback: Callback | None = callback
        # an instance may have a method of its own over its class's
        self.replaced: Callable[..., Any] | None = vars(module).get(method)
        self.original: Callable[..., Any] | None = self.replaced
        if isinstance(self.replaced, MethodHook):
            self.original = self.replaced.original
        vars(module)[method] = self
        is_attached = "recon_aux" in vars(module).get("_modules", ())
        if not is_attached and "__reduce_ex__" not in vars(module):
            MethodHook(module, "__reduce_ex__", _without_hooks)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method itself, where Lightning and inspect look for its signature."""
        if self.original is not None:
            return self.original
        # looked up anew each time: a copy is bound to itself
        bound: Callable[..., Any] = getattr(type(self.module), self.method).__get__(self.module)
        return bound

    def __getattr__(self, name: str) -> Any:
        """Give the method's own attributes: torch.export and torch.jit.script read its code."""
        if name == "__wrapped__" or not vars(self):
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the module's own method. Only an attached model keeps its hooks."""
        if self.callback is None or "__reduce_ex__" in vars(self.module):
            return getattr, (self.module, self.method)
        return object.__new__, (MethodHook,), vars(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodHook:
        """Hook the copied module."""
        twin = memo[id(self)] = object.__new__(MethodHook)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method through the callback."""
        # torch.compile would look a bound method up by its name, and find the hook
        method = self.replaced
        if method is None:
            method = partial(getattr(type(self.module), self.method), self.module)
        is_traced = any(isinstance(x, Proxy) for x in (*args, *kwargs.values()))
        if self.callback is None or is_traced:
            return method(*args, **kwargs)
        return self.callback(self.module, method, args, kwargs)

    def remove(self) -> None:
        """Give the module its method back. Code that still holds the hook calls that method."""
        self.callback = None
        if vars(self.module).get(self.method) is self:
            del vars(self.module)[self.method]
            if self.replaced is not None:
                vars(self.module)[self.method] = self.replaced
        if list(_State(vars(self.module)).hooks) == ["__reduce_ex__"]:
            vars(self.module)["__reduce_ex__"].remove()


class _State(dict[str, Any]):
    """A module's attributes without its hooks. A deep copy gets the hooks, a pickle doesn't."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.hooks = {k: x for k, x in state.items() if isinstance(x, MethodHook) and x.method == k}
        own = {k: x.original for k, x in self.hooks.items() if x.original is not None}
        super().__init__({k: x for k, x in state.items() if k not in self.hooks} | own)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy({**self, **self.hooks}, memo)


def _without_hooks(module: nn.Module, reduce: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    function, given, *state = reduce(*args, **kwargs)
    given = (dict(_State(x)) if isinstance(x, dict) else x for x in given)
    return function, tuple(given), *(_State(x) if isinstance(x, dict) else x for x in state)


def find_hooks(*models: nn.Module) -> list[MethodHook]:
    """Find every hook in some modules, also those that came with a copied submodule."""
    modules = (module for model in models for module in model.modules())
    values = (value for module in modules for value in vars(module).values())
    hooks = (value for value in values if isinstance(value, MethodHook))
    return [hook for hook in hooks if vars(hook.module).get(hook.method) is hook]


class EncoderRecorder:
    """A callback that hands each call of an encoder, images and feature, to the driver."""

    def __init__(self, features: Features | None, shape: EncoderShape, driver: Driver) -> None:
        self.features = features
        self.shape = shape
        self.driver = driver

    def __call__(
        self,
        encoder: nn.Module,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the encoder and record the call."""
        was, self.driver.is_encoding = self.driver.is_encoding, True
        # try, and no context manager: torch 2.6 can't compile a user's
        try:
            result = call(*args, **kwargs)
        finally:
            self.driver.is_encoding = was
        step = self.driver.step
        if step is not None and not is_recomputing():
            image = image_of(args, kwargs, self.shape.image_channels)
            taken = take_feature(result, self.features)
            feature = take_feature(taken, dim=self.shape.channel_dim)
            returned = [x for x in tensors_in(result) if x.requires_grad]
            output = source_of(taken, returned)
            if output.requires_grad and not any(x is output for x in returned):
                returned.append(output)
            versions = version_in_place(image), version_in_place(output)
            self.driver.record(
                step,
                EncoderCall(encoder, image, output, feature, returned, encoder.training, versions),
            )
        return result

    def hook(self, encoder: nn.Module, method: str) -> MethodHook:
        """Hook an encoder. A copy of a hooked one comes with a hook already."""
        known = vars(encoder).get(method)
        if not isinstance(known, MethodHook):
            return MethodHook(encoder, method, self)
        known.callback = self
        return known


class HeadMask:
    """A callback that zeroes the equivariant channels of what a head receives.

    A linear layer that is fed zeros computes what a narrower layer would, and its unused weights
    get no gradient. That isn't so for LARS and layer norm, which look at a whole layer or feature.

    Args:
        shape: of the encoder's feature.
        equivariant_dim: how many of the last channels are equivariant.
        driver: to which the masked features are handed.
        name: the head's, for errors.
    """

    def __init__(
        self, shape: EncoderShape, equivariant_dim: int, driver: Driver, name: str
    ) -> None:
        self.shape = shape
        self.equivariant_dim = equivariant_dim
        self.driver = driver
        self.name = name
        # for each argument, by its position: whether it was seen to be a feature
        self.takes: dict[int, bool] = {}

    def __call__(
        self,
        head: nn.Module,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the head with its features masked: its first tensor, and others of that shape."""
        values = [*args, *kwargs.values()]
        tensors = [value for value in values if isinstance(value, Tensor) and value.ndim]
        if not tensors:
            raise ValueError(
                f"expected the head {self.name} to be called with features, got no "
                "tensor. Pass heads=[...]: the modules that take the encoder's features as their "
                "first tensor."
            )
        for i, value in enumerate(values):
            is_alike = isinstance(value, Tensor) and value.shape == tensors[0].shape
            if is_alike and self._receives_feature(head, i, value, value is tensors[0]):
                values[i] = self.mask(value)
                self.driver.record_masked(head, values[i])
        named = dict(zip(kwargs, values[len(args) :], strict=True))
        return call(*values[: len(args)], **named)

    def _receives_feature(self, head: nn.Module, place: int, value: Tensor, is_first: bool) -> bool:
        known, seen = self.takes.get(place), self.driver.feeds(head, value, is_first)
        if seen is None:
            return self.driver.may_feed(is_first) if known is None else known
        # once seen to be a feature, it counts as one where a later call can't show what it is
        if seen or known is None:
            self.takes[place] = seen
        return seen

    def mask(self, feature: Tensor) -> Tensor:
        """Zero the last channels of a feature.

        Args:
            feature: ``(B, D)``, tokens ``(B, N, D)``, a map ``(B, D, H, W)`` or, with channels
                last, ``(B, H, W, D)``, or one of them flattened, ``(B, D * H * W)``.

        Returns:
            The masked feature, in the same shape.

        Raises:
            ValueError: if the feature isn't the encoder's.
        """
        width, rank = self.shape.feature_dim, self.shape.feature_rank
        # if two dimensions have the channels' size, the encoder's own place counts; in stacked
        # features the last
        comes_second = self.shape.channel_dim == 1 and (feature.ndim != 3 or rank == 3)
        last = feature.ndim - 1
        places = [1, last] if comes_second else [last, 1]
        dim = [*(d for d in places if d <= last and feature.shape[d] == width), last][0]
        # a compiled head may have sizes that divmod doesn't take
        positions, rest = feature.shape[dim] // width, feature.shape[dim] % width
        flattened = positions > 1 and feature.ndim == 2 and rank != 2
        # a layer before the encoder may receive images
        is_image = feature.ndim == 4 and dim == 3 and rank == 2 and feature.shape[2] > 1
        is_other = is_image or feature.ndim not in (2, 3, 4)
        if is_other or rest or (positions != 1 and not flattened):
            raise ValueError(
                f"expected the head {self.name} to receive the encoder's "
                f"{width} channels, got {tuple(feature.shape)}. "
                "Pass heads=[...]: the modules that take the encoder's features. If they take "
                "another tensor than the encoder returns, pass features=lambda output: that tensor."
            )
        if flattened and self.shape.channel_dim != 1:
            tokens = rearrange(feature, "b (n d) -> b n d", n=positions)
            return self.mask(tokens).flatten(1)
        # a flattened map is channel-major, so its equivariant channels are last, too
        hidden = self.equivariant_dim * positions
        after = [0, 0] * (feature.ndim - 1 - dim)
        return F.pad(feature.narrow(dim, 0, feature.shape[dim] - hidden), [*after, 0, hidden])
