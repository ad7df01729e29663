"""Find the encoder in a checkpoint: its tensors, its architecture, and what recon_aux saved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recon_aux.cli.architectures import EXAMPLES, SMALL_STEMS, build, likely, on_meta, options_of
from recon_aux.cli.errors import UserError
from recon_aux.engine.auto_weight import AttachedReconAux
from recon_aux.engine.checkpoint import pair_names
from recon_aux.engine.encoder import declared_image_size
from recon_aux.task.options import unpack

# parts of names of momentum encoders and teachers
_MOMENTUM = re.compile(r"momentum|teacher|target|averag|(^|[._])(ema|key)([._]|$)|encoder_k|_ema")


@dataclass
class Encoder:
    """An encoder that stands in a checkpoint.

    Attributes:
        arch: the architecture's name, for ``--arch``.
        options: what it is built with besides.
        prefix: what all its tensors' names begin with in the checkpoint.
        state: its tensors by the architecture's names.
        others: prefixes of further encoders in the checkpoint, such as momentum encoders.
    """

    arch: str
    options: dict[str, Any]
    prefix: str
    state: dict[str, Tensor]
    others: list[str]

    def __str__(self) -> str:
        sizes = "".join(f", {name} {value}" for name, value in self.options.items())
        said = f"{self.arch}{sizes}, its names begin with {self.prefix or 'nothing more'}"
        if self.arch.endswith(SMALL_STEMS):
            said += "; its 3x3 stem is taken to have stride 1, and no pooling after it"
        if self.others:
            said += f"; left alone: {', '.join(self.others)}"
        return said

    def build(self) -> nn.Module:
        """Build it with its weights, in eval mode."""
        module = build(self.arch, self.options)
        # checkpoints of early torch don't count batches
        lacking = module.load_state_dict(self.state, strict=False).missing_keys
        assert all(_is_counter(name) for name in lacking), lacking
        return module.eval()

    def how_to_load(self, path: Path) -> str:
        """Give the line of Python that loads what ``export`` wrote."""
        library, _, name = self.arch.partition(":")
        load = f'load_state_dict(torch.load("{path}")'
        sizes = "".join(f", {key}={value}" for key, value in self.options.items())
        if library == "timm":
            return f'timm.create_model("{name}", num_classes=0{sizes}).{load})'
        if self.arch.endswith(SMALL_STEMS):
            return f"encoder.{load}, strict=False), where encoder is {name}, with its own stem"
        if library == "torchvision":
            return f'torchvision.models.get_model("{name}"{sizes}).{load}, strict=False)'
        return f"{library}.{name}().{load})"

    def input_size(self, module: nn.Module) -> int | None:
        """Give the side of its images, if it accepts one size alone."""
        size = declared_image_size(module)
        return size if size is None or isinstance(size, int) else size[0]


@dataclass
class Saved:
    """What recon_aux saved in a checkpoint.

    Attributes:
        values: the options, the calls, the encoder's name, and the weight if it is automatic.
            Empty if they can't be read, as in an average of checkpoints.
        state: the decoder's tensors.
    """

    values: dict[str, Any]
    state: dict[str, Tensor]

    @property
    def options(self) -> dict[str, Any]:
        """The task's options; empty if they can't be read."""
        return dict(self.values.get("options", {}))

    @property
    def equivariant_dim(self) -> int:
        """How many of the last channels are equivariant; 0 if that can't be read."""
        return int(self.options.get("equivariant_dim", 0))

    @property
    def keeps_positions(self) -> bool:
        """Whether the task learned from a feature map or from tokens."""
        return bool(self.options.get("spatial", False))

    @property
    def is_off(self) -> bool:
        """Whether it was attached with ``weight=0``: its decoder was never trained."""
        return bool(self.options.get("weight") == 0)

    @property
    def weight(self) -> str:
        """The weight in words: a number, and where it is automatic what it came to."""
        weight = self.options["weight"]
        if weight != "auto":
            return str(weight)
        came_to = self.values["weight"]
        return f"auto, not set yet: {came_to}" if came_to == "due" else f"auto: {float(came_to):g}"

    def build(self) -> AttachedReconAux | None:
        """Build the task with its decoder; None if this version can't."""
        try:
            options = self.options
            aux = AttachedReconAux(options.pop("feature_dim"), **options)
            aux.load_state_dict(self.state)
        except (KeyError, TypeError, ValueError, RuntimeError):
            return None
        return aux.eval()


def find_saved(tensors: Mapping[str, Tensor]) -> Saved | None:
    """Find what recon_aux saved; None if nothing was attached."""
    ours = {key: key.split(".") for key in tensors if "recon_aux" in key.split(".")}
    if not ours:
        return None
    # there may be copies, as an average of the weights; the first is the model's
    first = next(iter(ours.values()))
    prefix = ".".join([*first[: first.index("recon_aux")], "recon_aux", ""])
    state = {key[len(prefix) :]: tensors[key] for key in ours if key.startswith(prefix)}
    extra = state.get("_extra_state")
    return Saved((unpack(extra) if extra is not None else None) or {}, state)


def find_encoder(
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    saved: Saved | None = None,
    arch: str | None = None,
    prefix: str | None = None,
) -> Encoder:
    """Find the encoder among a checkpoint's tensors.

    Args:
        tensors: of the checkpoint, by dotted names.
        path: of the file, for messages.
        saved: what :func:`find_saved` found among them: it names the trained encoder.
        arch: the architecture; by default likely ones are tried.
        prefix: what the encoder's names begin with; by default all are tried. Momentum encoders
            and teachers are taken only if there is no other.

    Raises:
        UserError: if no architecture fits, or several encoders do.
    """
    own = {
        key: x
        for key, x in tensors.items()
        if "recon_aux" not in key.split(".") and not _is_counter(key)
    }
    if not own:
        raise UserError(
            f"expected a checkpoint with an encoder, got {path}, which holds no tensors. "
            "Pass one that holds weights."
        )
    if prefix is not None:
        own = {key: x for key, x in own.items() if f"{key}.".startswith(prefix.rstrip(".") + ".")}
        if not own:
            raise UserError(
                f"expected --prefix to begin names in {path}, got {prefix!r}; there are: "
                f"{describe(tensors)}. Pass one of these."
            )
    name = saved.values.get("encoder", "") if saved is not None else ""
    below = _below(own)
    named = [(arch, {}), (arch, options_of(arch, own))] if arch else likely(own)
    for candidate, options in named:
        names = _names(candidate, options, own)
        if names and (found := _matches(below, names)):
            chosen = _choose(found, own, name, path)
            others = [other for other in found if other != chosen]
            state = {name: own[key] for name, key in found[chosen].items()}
            return Encoder(candidate, options, chosen, state, others)
    raise UserError(_unknown(own, path, arch, name))


def describe(tensors: Mapping[str, Tensor]) -> str:
    """List the first parts of names, of nested dicts the second, too."""
    names = (key.split(".") for key in tensors)
    firsts = dict.fromkeys(".".join(parts[:2]) for parts in names if parts[0] != "callbacks")
    shown = list(firsts)[:12]
    return ", ".join(shown) + (", ..." if len(firsts) > len(shown) else "")


def _names(arch: str, options: dict[str, Any], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = on_meta(arch, options)
    if names is None and not options:
        # the user named this architecture: let its own error say why it can't be built
        names = build(arch).state_dict()
    return {key: x for key, x in (names or {}).items() if not _is_counter(key)}


def _below(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Give the tensors below each prefix, the longest prefixes first."""
    below: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        parts = key.split(".")
        for depth in range(len(parts)):
            prefix = "".join(f"{part}." for part in parts[:depth])
            below.setdefault(prefix, {})[key[len(prefix) :]] = value
    return dict(sorted(below.items(), key=lambda pair: -len(pair[0])))


def _matches(
    below: Mapping[str, Mapping[str, Tensor]], names: Mapping[str, Tensor]
) -> dict[str, dict[str, str]]:
    """Give the prefixes at which an architecture stands, with the key of each of its tensors."""
    found: dict[str, dict[str, str]] = {}
    for prefix, state in below.items():
        if len(state) < len(names):
            continue
        pairs = pair_names(state, names)
        # all of the encoder, not its first layers
        if pairs is None or len(pairs) < len(names):
            continue
        keys = {name: prefix + key for name, key in pairs.items()}
        if keys not in found.values():
            found[prefix] = keys
    return found


def _choose(
    found: Mapping[str, dict[str, str]], tensors: Mapping[str, Tensor], name: str, path: Path
) -> str:
    """Choose one of several encoders by its prefix: the trained one, if that can be known."""
    ends = [prefix for prefix in found if name and f".{prefix}".endswith(f".{name}.")]
    trained = [prefix for prefix in found if not _MOMENTUM.search(prefix)]
    among = ends or trained or list(found)
    first = [tensors[key] for key in found[among[0]].values()]
    for other in among[1:]:
        same = (tensors[key] for key in found[other].values())
        if not all(torch.equal(x, y) for x, y in zip(first, same, strict=True)):
            ask = " or ".join(f"--prefix {prefix.rstrip('.')}" for prefix in sorted(among))
            raise UserError(
                f"expected one encoder in {path}, found {len(among)} of one architecture. "
                f"Pass {ask}."
            )
    # of equal ones the shortest name, the model's own
    return min(among, key=len)


def _unknown(tensors: Mapping[str, Tensor], path: Path, arch: str | None, name: str) -> str:
    if name and not arch:
        return (
            f"expected an encoder that torchvision or timm has: {path} holds one of another "
            f"architecture, {name}. Pass --arch with a function that builds it, as "
            "--arch my_code:build_encoder."
        )
    here = f"{path} has {len(tensors)} tensors: {describe(tensors)}"
    if arch:
        return (
            f"expected the weights of {arch}, and none of it fits: {here}. Pass --arch with the "
            f"architecture that was trained, as {EXAMPLES}."
        )
    return (
        f"expected the weights of an encoder that torchvision or timm has, and found none: {here}. "
        f"Pass --arch with its architecture, as {EXAMPLES}."
    )


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")
