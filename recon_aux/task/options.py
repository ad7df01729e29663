"""The options of :class:`ReconAux`: what they mean, which values they take, how they are saved."""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from recon_aux.task.checks import check_choice, check_divides, check_nonnegative, check_whole, plain
from recon_aux.task.splitter import FeatureSplitter, channel_dim
from recon_aux.task.terms.reconstruction import LossKind

Context = Literal["invariant", "equivariant", "both", "none"]
Reconstruct = Literal["alternate", "random", "both"]

Preset = Literal["paper", "geometry"]

PRESETS: dict[Preset, dict[str, float]] = {
    # the paper's method; this weight was measured beside SimCLR's loss
    "paper": {"registration": 0, "statistics": 0, "edges": 0, "weight": 4},
    "geometry": {"edges": 64},
}
"""Options that stand together under a name."""

TERMS = ("registration", "statistics", "edges")
"""The terms next to the reconstruction; each has a weight of this name."""

# Whether training can continue after an option has changed. Without an entry: no.
_ALWAYS = {"may_differ": lambda saved, current: True}
_UNLESS_ZERO = {"may_differ": lambda saved, current: bool(saved and current)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a :class:`ReconAux` is built with. Numbers of numpy and torch become Python's own.

    Args:
        feature_dim: D, the number of channels of the encoder's features.
        equivariant_dim: how many of the last channels are equivariant; half by default. With 0
            there is no split: the method's loss and the decoder both see the whole feature.
        weight: factor of the whole loss. With 0 the task is off: the decoder is frozen.
        registration: weight of the term that moves one view onto the other; 0 leaves it out.
        statistics: weight of the term that predicts how a view's pixels vary; 0 leaves it out.
        edges: weight of the term that predicts where a view's edges run; 0 leaves it out.
        context: which part of the other view's feature the decoder sees: ``"invariant"``,
            ``"equivariant"``, ``"both"``, or ``"none"``, which makes it an autoencoder of one view.
        target_size: height and width of the reconstruction, in pixels.
        patch_size: side of the patch that each of the decoder's queries becomes, in pixels.
        image_channels: channels of the views.
        decoder_dim: width of the decoder.
        decoder_depth: number of cross-attention blocks of the decoder.
        decoder_heads: attention heads of the decoder.
        decoder_tokens: how many tokens the decoder makes from a pooled feature.
        loss: ``"mse"``, ``"l1"`` or ``"smooth_l1"``, on pixels whitened over their channels.
        structure: weight of the same error on patches that are normalised in both images.
        normalize_patches: normalise each patch of the target (He et al., "Masked Autoencoders",
            CVPR 2022, section 3).
        reconstruct: which view an optimizer step rebuilds, in all its calls, such as micro-batches:
            ``"alternate"`` (first, second, ...), ``"random"`` (drawn from ``seed``) or ``"both"``.
            Steps of the encoder alone don't count. If torch never updates the decoder, calls count.
        spatial: features keep positions, ``(B, D, H, W)`` or ``(B, N, D)``, instead of ``(B, D)``.
            The decoder sees the positions; the other terms see the average over them.
        seed: of the decoder's weights and of ``"random"``; by default the seed that torch was last
            given. The global random state is left as it is.
        compile: compile the losses by :func:`torch.compile`, which takes a minute once. A GPU then
            has fewer operations to start. The first batch runs uncompiled.
        preset: ``"paper"`` for reconstruction alone, like the paper's task, with a weight of 4;
            ``"geometry"`` for ``edges=64``, for poses. Options that are given beside it win.

    Raises:
        ValueError: if an option is out of range, or options don't fit each other.
        TypeError: if an option must be a whole number and isn't.

    Example:
        >>> options = Options(512, context="both")
        >>> options.equivariant_dim, options.channels("equivariant"), options.channels("both")
        (256, (256, 256), (0, 512))
    """

    feature_dim: int = field(kw_only=False)
    equivariant_dim: int | None = None
    weight: float = field(default=1.0, metadata=_ALWAYS)
    registration: float = field(default=4.0, metadata=_UNLESS_ZERO)
    statistics: float = field(default=8.0, metadata=_UNLESS_ZERO)
    edges: float = field(default=16.0, metadata=_UNLESS_ZERO)
    context: Context = "invariant"
    target_size: int = 32
    patch_size: int = 8
    image_channels: int = 3
    decoder_dim: int = 128
    decoder_depth: int = 1
    decoder_heads: int = 8
    decoder_tokens: int = 8
    loss: LossKind = field(default="mse", metadata=_ALWAYS)
    structure: float = field(default=0.5, metadata=_ALWAYS)
    normalize_patches: bool = False
    reconstruct: Reconstruct = field(default="alternate", metadata=_ALWAYS)
    spatial: bool = False
    seed: int | None = None
    compile: bool = False
    # replaced by the options that it stands for before they come here
    preset: InitVar[Preset | None] = None

    def __post_init__(self, preset: Preset | None) -> None:
        if preset is not None:
            raise TypeError(
                f"expected preset= in ReconAux or attach, got {preset!r} in Options. Pass "
                f"**expand_preset({{'preset': {preset!r}}})."
            )
        for option in fields(self):
            value = plain(getattr(self, option.name))
            # a type, not its text: this file doesn't postpone its annotations
            _check(option.name, value, option.type)
            object.__setattr__(self, option.name, value)
        splitter = FeatureSplitter(self.feature_dim, self.equivariant_dim)
        object.__setattr__(self, "equivariant_dim", splitter.equivariant_dim)
        check_divides("patch_size", self.patch_size, "target_size", self.target_size)
        check_divides("decoder_heads", self.decoder_heads, "decoder_dim", self.decoder_dim)
        is_one_number = self.patch_size**2 * self.image_channels == 1
        if is_one_number and (self.structure or self.normalize_patches):
            raise ValueError(
                "expected patches of two numbers or more where structure= or normalize_patches= "
                "normalises them, got patch_size=1 and image_channels=1. Pass a larger patch_size=."
            )
        if self.context != "none" and self.channels(self.context)[1] == 0:
            raise ValueError(
                f"expected context= to name a part with channels, got {self.context!r}, which has "
                f"none where equivariant_dim={self.equivariant_dim} is the whole feature. Pass a "
                "smaller equivariant_dim=."
            )
        if self.compile and TorchVersion(torch.__version__) < "2.7":
            raise ValueError(
                f"expected torch 2.7 or later for compile=True, got {torch.__version__}. Leave "
                "compile out, or run: pip install -U torch"
            )
        if self.channels("equivariant")[1] == 1 < self.feature_dim:
            raise ValueError(
                "expected an equivariant_dim of 2 or more, since features are normalised, or 0, "
                f"got 1 of {self.feature_dim} channels. Pass equivariant_dim=0, or 2 or more."
            )

    def channels(self, part: Context) -> tuple[int, int]:
        """Return a part's first channel and its number of channels, as the decoder sees it.

        Without a split every part but ``"none"`` is the whole feature.
        """
        if part == "none":
            return 0, 0
        if part == "both" or not self.equivariant_dim:
            return 0, self.feature_dim
        invariant_dim = self.feature_dim - self.equivariant_dim
        return (0, invariant_dim) if part == "invariant" else (invariant_dim, self.equivariant_dim)

    def part(self, part: Context, feature: Tensor) -> Tensor:
        """Return the channels of a feature that the decoder sees as this part."""
        dim = channel_dim(feature, self.feature_dim)
        first, count = self.channels(part)
        return feature if count == feature.shape[dim] else feature.narrow(dim, first, count)


def _check(name: str, value: Any, kind: Any) -> None:
    """Check an option's value against its annotation."""
    if kind is float:
        check_nonnegative(name, value)
    elif kind is int:
        check_whole(name, value, least=1)
    elif kind != int | None:
        check_choice(name, value, (True, False) if kind is bool else get_args(kind))
    elif value is not None:
        check_whole(name, value)


def expand_preset(options: Mapping[str, Any]) -> dict[str, Any]:
    """Replace ``preset`` by the options that it stands for; those that are given beside it win.

    Raises:
        ValueError: if there is no such preset.

    Example:
        >>> expand_preset({"preset": "paper", "weight": 2.0, "seed": 1})
        {'registration': 0, 'statistics': 0, 'edges': 0, 'weight': 2.0, 'seed': 1}
    """
    given = dict(options)
    preset = given.pop("preset", None)
    if preset is None:
        return given
    check_choice("preset", preset, tuple(PRESETS))
    return {**PRESETS[preset], **given}


def refuse_unknown(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise a TypeError for an option that isn't known; it suggests a similar one."""
    known = sorted(known)
    for name in names:
        if name not in known:
            similar = [f"did you mean {x}=?" for x in get_close_matches(name, known, n=1)]
            advice = "".join(similar) or "leave it out."
            raise TypeError(f"got the option {name}=; {advice} Options are {', '.join(known)}")


P = ParamSpec("P")
Owner = TypeVar("Owner")


def takes(
    options: Callable[P, Options],
) -> Callable[[Callable[[Owner, Options], None]], Callable[Concatenate[Owner, P], None]]:
    """Let an ``__init__`` that takes :class:`Options` be called with the options themselves.

    Type checkers and ``inspect.signature`` see them as its parameters.

    Example:
        >>> class Task:
        ...     @takes(Options)
        ...     def __init__(self, options: Options) -> None: ...
        >>> list(inspect.signature(Task).parameters)[:3]
        ['feature_dim', 'equivariant_dim', 'weight']
        >>> Task(512, wieght=2.0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        TypeError: got the option wieght=; did you mean weight=? Options are compile, ...
    """
    parameters = inspect.signature(options).parameters

    def decorate(init: Callable[[Owner, Options], None]) -> Callable[Concatenate[Owner, P], None]:
        def call(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> None:
            refuse_unknown(kwargs, parameters)
            init(self, options(*args, **expand_preset(kwargs)))

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        call.__signature__ = inspect.Signature([own, *parameters.values()])  # type: ignore[attr-defined]
        return call

    return decorate


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> tuple[str, bool]:
    """Compare saved options with those of the module that loads them.

    Args:
        saved: options by name. An option that is missing here is not compared.
        current: options by name.

    Returns:
        The options that differ, with both values, in words. And whether the saved decoder is
        so different that its training can't go on with the current options.

    Example:
        >>> differences({"weight": 1.0, "edges": 16.0}, {"weight": 2.0, "edges": 16.0})
        ('weight=1.0, not 2.0', False)
        >>> differences({"weight": 1.0, "edges": 16.0}, {"weight": 1.0, "edges": 0})
        ('edges=16.0, not 0', True)
    """
    rules = {option.name: option.metadata.get("may_differ") for option in fields(Options)}
    pairs = {name: (was, current.get(name)) for name, was in saved.items()}
    pairs = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    words = ", ".join(f"{name}={was!r}, not {now!r}" for name, (was, now) in pairs.items())
    return words, not all((rule := rules.get(name)) and rule(*pairs[name]) for name in pairs)


def pack(state: Mapping[str, Any]) -> Tensor:
    """Write plain values as JSON into a tensor of 1024 bytes, for a ``state_dict``.

    Some readers of a ``state_dict`` accept only tensors. The average of two checkpoints can be
    read, if each number that changes in training is a string of fixed width.

    Example:
        >>> early, late = (pack({"calls": f"{calls:012d}", "seed": 1}) for calls in (9, 10))
        >>> unpack(late)
        {'calls': '000000000010', 'seed': 1}
        >>> unpack((early.float() + late) / 2)["seed"]
        1
    """
    return torch.tensor(list(json.dumps(state).ljust(1024).encode()), dtype=torch.uint8)


def unpack(packed: Tensor) -> dict[str, Any] | None:
    """Read what :func:`pack` wrote. Return None if it can't be read, as in some averages."""
    try:
        # an average may be off by a rounding error
        return dict(json.loads(bytes(packed.float().round().to(torch.uint8).tolist())))
    except ValueError:
        return None
