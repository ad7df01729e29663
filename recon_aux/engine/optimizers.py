"""Where the decoder's parameters stand in the optimizers and schedules that a model configures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from recon_aux.task.checks import check_nonnegative

Group = dict[str, Any]

# what a group and a scheduler's lists, one entry for each group, may hold
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_LISTS_OF_RATES = ("base_lrs", "_last_lr", "min_lrs", "max_lrs")
_OTHER_LISTS = ("lr_lambdas", "base_momentums", "max_momentums")


class Settings(NamedTuple):
    """The decoder's learning rate and weight decay, where they aren't the encoder's.

    ``lr`` is its base: what it is where a schedule has the encoder's at its own.
    """

    lr: float | None = None
    weight_decay: float | None = None

    def check(self) -> None:
        """Check that both are finite numbers of 0 or more.

        Raises:
            ValueError: if one is not.
        """
        for option, value in self.given().items():
            check_nonnegative(f"decoder_{option}", value)

    def given(self) -> Group:
        """Give those that are set, as entries of a parameter group."""
        return {option: value for option, value in self._asdict().items() if value is not None}


def enroll(
    configured: Any, decoder: nn.Module, encoders: Sequence[nn.Module], settings: Settings
) -> None:
    """Put the decoder's parameters where the encoder's are, unless they have a place.

    They join the groups of the encoder's like, weights with weights, biases and norms with biases
    and norms, so that they follow the same schedule and the same exceptions from weight decay.
    With settings of their own they move to groups of their own, on the same schedule.

    Args:
        configured: what ``configure_optimizers`` returned, in any form that Lightning takes.
        decoder: whose parameters may have no place.
        encoders: whose parameters show it.
        settings: the decoder's own.

    Raises:
        ValueError: if there is no optimizer, or a scheduler that can't take one more group.
    """
    optimizers = list(_find(configured, lambda value: hasattr(value, "param_groups")))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if not groups:
        raise ValueError(
            "expected configure_optimizers to return an optimizer, which is to train the "
            f"decoder, got {type(configured).__name__}"
        )
    placed = {id(p) for group in groups for p in group["params"]}
    joined = set()
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad and id(parameter) not in placed:
            # joining a group, rather than adding one, keeps schedulers that were built before right
            home = _home(groups, encoders, vector=parameter.ndim < 2)
            home["params"].append(parameter)
            joined.add(id(parameter))
            if "param_names" in home:
                home["param_names"].append(f"recon_aux.{name}")
    ours = {id(p) for p in decoder.parameters()}
    for optimizer in optimizers:
        if settings.given():
            _move_to_own_groups(optimizer, ours, settings, list(_schedulers(configured)))
        hooked = _with_hooks(optimizer)
        # timm's Lookahead has no such hooks, and doesn't go on from a bare run
        if hasattr(hooked, "_optimizer_load_state_dict_pre_hooks"):
            hooked.register_load_state_dict_pre_hook(_FillIn(ours))
        trained = {id(p) for e in encoders for p in e.parameters() if p.requires_grad}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        takes_notice = _TakesNotice(
            [p for p in params if id(p) in joined], [p for p in params if id(p) in trained]
        )
        hooked.register_step_pre_hook(takes_notice.before)
        hooked.register_step_post_hook(takes_notice.after)
        if settings.lr is not None:
            likes = _likes(optimizer.param_groups, ours, encoders)
            # now, before a checkpoint brings rates that a schedule has come far with
            bases = {own: _base(optimizer.param_groups[like]) for own, like in likes.items()}
            hooked.register_step_pre_hook(_InProportion(settings.lr, likes, bases))


def _home(groups: Sequence[Group], encoders: Sequence[nn.Module], *, vector: bool) -> Group:
    """Find the group with most of the encoders' weights, or of their biases and norms."""
    sizes = {id(p): (p.numel(), p.ndim < 2) for e in encoders for p in e.parameters()}

    def alike(group: Group) -> tuple[int, int, float]:
        known = [sizes[id(p)] for p in group["params"] if id(p) in sizes]
        # of layers that are alike, with rates of their own, the one nearest to the heads
        return sum(n for n, kind in known if kind == vector), sum(n for n, _ in known), _base(group)

    return max(groups, key=alike)


def _move_to_own_groups(
    optimizer: Any, ours: set[int], settings: Settings, schedulers: Sequence[Any]
) -> None:
    """Take the decoder's parameters out of the encoder's groups."""
    for index, group in enumerate(list(optimizer.param_groups)):
        is_ours = [id(p) in ours for p in group["params"]]
        if is_ours and all(is_ours) and settings.lr is not None:
            base = _base(group)
            if not math.isclose(base, settings.lr, rel_tol=1e-6):
                raise ValueError(
                    "expected decoder_lr= or a group of the decoder's own in configure_optimizers, "
                    f"got both, decoder_lr={settings.lr} and a group with {base}"
                )
        if not any(is_ours) or all(is_ours):
            continue
        moved = [p for p in group["params"] if id(p) in ours]
        elsewhere = any(
            id(p) in ours and p.ndim > 1
            for other in optimizer.param_groups
            if other is not group
            for p in other["params"]
        )
        only_vectors = all(p.ndim < 2 for p in moved)
        own = _own_group(optimizer, index, settings, schedulers)
        if only_vectors and elsewhere and not group.get("weight_decay"):
            # biases and norms that are exempt from weight decay stay so
            own["weight_decay"] = group.get("weight_decay", 0)
        own["params"] = moved
        group["params"][:] = [p for p in group["params"] if id(p) not in ours]
        if "param_names" in group:
            names = list(zip(group["param_names"], is_ours, strict=True))
            own["param_names"] = [name for name, is_our in names if is_our]
            group["param_names"][:] = [name for name, is_our in names if not is_our]


def _own_group(optimizer: Any, index: int, settings: Settings, schedulers: Sequence[Any]) -> Group:
    """Add an empty group that follows the schedule of the one with an index."""
    schedulers = [s for s in schedulers if s.optimizer is optimizer]
    for scheduler in schedulers:
        if not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
            raise ValueError(
                "expected one of torch's learning-rate schedulers where decoder_lr= or "
                f"decoder_weight_decay= is given, got a {type(scheduler).__name__}; instead let "
                "configure_optimizers make a group of self.recon_aux.parameters()"
            )
    like, groups = optimizer.param_groups[index], len(optimizer.param_groups)
    ratio = 1.0 if settings.lr is None else _ratio(settings.lr, like)
    rates = {key: like[key] * ratio for key in _RATES if key in like}
    decay = {"weight_decay": settings.weight_decay} if settings.weight_decay is not None else {}
    names = [group.get("name") for group in optimizer.param_groups]
    name = "recon_aux" if "recon_aux" not in names else "recon_aux_biases_and_norms"
    own: Group = {**like, **rates, **decay, "name": name}
    optimizer.param_groups.append(own)
    for scheduler in schedulers:
        for name in (*_LISTS_OF_RATES, *_OTHER_LISTS):
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and len(values) == groups:
                is_rate = name in _LISTS_OF_RATES
                values.append(values[index] * ratio if is_rate else values[index])
    return own


def _base(group: Group) -> float:
    """Give the learning rate that a schedule starts from or rises to."""
    return float(next(group[key] for key in ("max_lr", "initial_lr", "lr") if key in group))


def _ratio(lr: float, like: Group) -> float:
    """Give the proportion of the decoder's learning rate to the encoder's."""
    if not (base := _base(like)):
        raise ValueError(
            f"expected the encoder's learning rate above 0 where decoder_lr= is given, got {base}"
        )
    return lr / base


def _with_hooks(optimizer: Any) -> Any:
    """Find torch's optimizer in a wrapper that some frameworks put around it."""
    # LARSWrapper passes for an Optimizer, so isinstance doesn't tell
    while not hasattr(optimizer, "register_step_pre_hook"):
        inner = getattr(optimizer, "optim", None) or getattr(optimizer, "optimizer", None)
        if inner is None:
            raise TypeError(f"expected one of torch's optimizers, got {type(optimizer).__name__}")
        optimizer = inner
    return optimizer


def _likes(
    groups: Sequence[Group], ours: set[int], encoders: Sequence[nn.Module]
) -> dict[int, int]:
    """Say for each group of the decoder's own which of the encoder's it is to follow."""
    others = [g for g in groups if not any(id(p) in ours for p in g["params"])]
    own = [g for g in groups if g["params"] and all(id(p) in ours for p in g["params"])]
    index = {id(group): i for i, group in enumerate(groups)}

    def like(group: Group) -> Group:
        return _home(others, encoders, vector=all(p.ndim < 2 for p in group["params"]))

    return {index[id(group)]: index[id(like(group))] for group in own} if others else {}


class _InProportion:
    """Keeps the decoder's learning rate in proportion to the encoder's, whatever the schedule."""

    def __init__(self, lr: float, likes: dict[int, int], bases: dict[int, float]) -> None:
        self.lr = lr
        self.likes = likes
        self.bases = bases

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Set it before a step."""
        for own, like in self.likes.items():
            group = optimizer.param_groups[like]
            # a schedule that was made later may have a maximum; what else notes an initial rate,
            # as Lightning's search for one, means no base
            ratio = _ratio(self.lr, {"lr": group.get("max_lr", self.bases[own])})
            optimizer.param_groups[own]["lr"] = group["lr"] * ratio


class _TakesNotice:
    """Sees to it that an optimizer takes notice of parameters that joined those it was made of."""

    def __init__(self, joined: list[Tensor], encoders: list[Tensor]) -> None:
        self.joined = joined
        self.encoders = encoders
        self.seen = (0, 0)
        self.settled = not joined

    def before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Note what a step is about to change."""
        if not self.settled:
            self.seen = self._versions()

    def after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """See what a step changed, until it was both."""
        if self.settled:
            return
        both = zip(self._versions(), self.seen, strict=True)
        joined, encoders = (now != before for now, before in both)
        self.settled = joined
        if encoders and not joined and any(p.grad is not None for p in self.joined):
            raise RuntimeError(
                "expected the optimizer to train the decoder, whose parameters joined the "
                f"encoder's in its groups, got a {type(optimizer).__name__} that trains those "
                "alone that it was made of; list self.recon_aux.parameters() with them in "
                "configure_optimizers"
            )

    def _versions(self) -> tuple[int, int]:
        joined, encoders = (sum(p._version for p in x) for x in (self.joined, self.encoders))
        return joined, encoders


class _FillIn:
    """Lets an optimizer with the decoder go on from the saved state of one without."""

    def __init__(self, ours: set[int]) -> None:
        self.ours = ours

    def __call__(self, optimizer: Any, state: dict[str, Any]) -> dict[str, Any] | None:
        """Fill in the decoder's parameters, whose own state then starts anew."""
        groups, saved = optimizer.param_groups, state["param_groups"]
        bare = [sum(id(p) not in self.ours for p in group["params"]) for group in groups]
        sizes = [len(group["params"]) for group in saved]
        if len(saved) != len(groups):
            own = [group for group in [*groups, *saved] if "recon_aux" in str(group.get("name"))]
            raise ValueError(
                f"expected the saved state of an optimizer with {len(groups)} groups, got one with "
                f"{len(saved)}"
                + "; the decoder has a group of its own in one alone: give the decoder_lr= and "
                "decoder_weight_decay= that it was saved with, or load the model's state_dict alone"
                * bool(own)
            )
        if sizes != bare or sizes == [len(group["params"]) for group in groups]:
            return None
        new = count(1 + max(index for group in saved for index in group["params"]))
        filled = []
        for group, old in zip(groups, saved, strict=True):
            following = iter(old["params"])
            params = [next(new if id(p) in self.ours else following) for p in group["params"]]
            names = {"param_names": group["param_names"]} if "param_names" in old else {}
            filled.append({**old, **names, "params": params})
        return {**state, "param_groups": filled}


def _schedulers(configured: Any) -> Iterator[Any]:
    """Find the schedulers, those within others, too."""
    for scheduler in _find(
        configured, lambda value: hasattr(value, "optimizer") and not hasattr(value, "param_groups")
    ):
        yield scheduler
        yield from _schedulers(list(getattr(scheduler, "_schedulers", [])))


def _find(configured: Any, wanted: Callable[[Any], bool]) -> Iterator[Any]:
    """Look through any form that Lightning's configure_optimizers may return."""
    if wanted(configured):
        yield configured
    elif isinstance(configured, Mapping):
        for key in ("optimizer", "lr_scheduler", "scheduler"):
            yield from _find(configured.get(key), wanted)
    elif isinstance(configured, (list, tuple)):
        for item in configured:
            yield from _find(item, wanted)
