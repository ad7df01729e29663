"""Put the decoder's parameters into the optimizers and schedules that a model configures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Group = dict[str, Any]


class DecoderGroup(NamedTuple):
    """The decoder's learning rate and weight decay, where they aren't the encoder's.

    The decoder has the rate ``lr`` while the encoder has its base rate; a schedule scales both.
    """

    lr: float | None = None
    weight_decay: float | None = None

    def given(self) -> Group:
        """Give those that are set, as entries of a parameter group."""
        return {option: value for option, value in self._asdict().items() if value is not None}


def add_decoder_params(
    configured: Any, decoder: nn.Module, encoders: Sequence[nn.Module], own: DecoderGroup
) -> None:
    """Put the decoder's parameters into the encoder's groups, unless they are in a group already.

    Weights join a group of the encoder's weights. Biases and norms join a group of its biases and
    norms. So they follow the same schedule and the same exceptions from weight decay. With
    settings of their own they get groups of their own, on the same schedule.

    Args:
        configured: what ``configure_optimizers`` returned, in any form that Lightning takes.
        decoder: its parameters are put into groups.
        encoders: their parameters show into which groups.
        own: the decoder's own settings.

    Raises:
        ValueError: if there is no optimizer, or a scheduler that can't take one more group.
    """
    optimizers = list(_find(configured, lambda value: hasattr(value, "param_groups")))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if not groups:
        raise ValueError(
            "expected configure_optimizers to return an optimizer, which is to train the decoder, "
            f"got {type(configured).__name__}. Return an optimizer."
        )
    _join(groups, decoder, encoders)
    ours = {id(p) for p in decoder.parameters()}
    for optimizer in optimizers:
        if own.given():
            _move_to_own_groups(optimizer, ours, own, list(_schedulers(configured)))
        _add_hooks(optimizer, ours, encoders, own)


def _join(groups: Sequence[Group], decoder: nn.Module, encoders: Sequence[nn.Module]) -> None:
    """Put the parameters that have no place into the encoder's groups."""
    placed = {id(p) for group in groups for p in group["params"]}
    for name, parameter in decoder.named_parameters():
        if id(parameter) not in placed:
            # a new group would break schedulers that were made before
            home = _home(groups, encoders, vector=parameter.ndim < 2)
            home["params"].append(parameter)
            if "param_names" in home:
                home["param_names"].append(f"recon_aux.{name}")


def _home(groups: Sequence[Group], encoders: Sequence[nn.Module], *, vector: bool) -> Group:
    """Find the group with most of the encoders' weights, or of their biases and norms.

    A rate of 0, as of layers that stay as they are, would leave the decoder untrained.
    """
    sizes = {id(p): (p.numel(), p.ndim < 2) for e in encoders for p in e.parameters()}

    def alike(group: Group) -> tuple[int, int, float]:
        known = [sizes[id(p)] for p in group["params"] if id(p) in sizes]
        # of equal groups the one with the highest rate: often the layers nearest to the heads
        rate = _base(group) * group.get("lr_scale", 1)
        return sum(n for n, kind in known if kind == vector), sum(n for n, _ in known), rate

    return max([group for group in groups if _base(group) > 0] or groups, key=alike)


def _move_to_own_groups(
    optimizer: Any, ours: set[int], own: DecoderGroup, schedulers: Sequence[Any]
) -> None:
    """Take the decoder's parameters out of groups that aren't theirs alone."""
    for index, group in enumerate(list(optimizer.param_groups)):
        is_ours = [id(p) in ours for p in group["params"]]
        if is_ours and all(is_ours):
            _refuse_both(own, _base(group))
        if not any(is_ours) or all(is_ours):
            continue
        moved = [p for p in group["params"] if id(p) in ours]
        others = [other for other in optimizer.param_groups if other is not group]
        elsewhere = any(id(p) in ours and p.ndim > 1 for other in others for p in other["params"])
        new = _own_group(optimizer, index, own, schedulers)
        if all(p.ndim < 2 for p in moved) and elsewhere and not group.get("weight_decay"):
            # biases and norms that are exempt from weight decay stay so
            new["weight_decay"] = group.get("weight_decay", 0)
        for key in ("params", "param_names"):
            if key in group:
                pairs = list(zip(group[key], is_ours, strict=True))
                new[key] = [value for value, is_our in pairs if is_our]
                group[key][:] = [value for value, is_our in pairs if not is_our]


def _refuse_both(own: DecoderGroup, base: float) -> None:
    if own.lr is not None and not math.isclose(base, own.lr, rel_tol=1e-6):
        raise ValueError(
            "expected decoder_lr= or a group of the decoder's own in configure_optimizers, "
            f"got both, decoder_lr={own.lr} and a group with {base}. Leave one of them out."
        )


def _own_group(optimizer: Any, index: int, own: DecoderGroup, schedulers: Sequence[Any]) -> Group:
    """Add a group that follows the schedule of the group with an index."""
    schedulers = [s for s in schedulers if s.optimizer is optimizer]
    for scheduler in schedulers:
        if not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
            raise ValueError(
                "expected one of torch's learning-rate schedulers where decoder_lr= or "
                f"decoder_weight_decay= is given, got a {type(scheduler).__name__}; instead let "
                "configure_optimizers make a group of self.recon_aux.parameters()"
            )
    like, size = optimizer.param_groups[index], len(optimizer.param_groups)
    ratio = 1.0 if own.lr is None else _ratio(own.lr, _base(like))
    rates = {key: x * ratio for key, x in like.items() if _is_rate(key) and x is not None}
    decay = {"weight_decay": own.weight_decay} if own.weight_decay is not None else {}
    names = [group.get("name") for group in optimizer.param_groups]
    name = "recon_aux" if "recon_aux" not in names else "recon_aux_biases_and_norms"
    new: Group = {**like, **rates, **decay, "name": name}
    optimizer.param_groups.append(new)
    for scheduler in schedulers:
        for key, values in vars(scheduler).items():
            # torch's lists with an entry for each group; a list of the user's own may be as long
            is_rate = _is_rate(key.removesuffix("s"))
            of_groups = is_rate or key == "lr_lambdas" or key.endswith("_momentums")
            if of_groups and isinstance(values, list) and len(values) == size:
                values.append(values[index] * ratio if is_rate else values[index])
    return new


def _add_hooks(
    optimizer: Any, ours: set[int], encoders: Sequence[nn.Module], own: DecoderGroup
) -> None:
    """Let an optimizer load a bare run's state, and keep rates in proportion."""
    hooked = _with_hooks(optimizer)
    # timm's Lookahead has no such hooks, and can't continue a bare run
    if hasattr(hooked, "_optimizer_load_state_dict_pre_hooks"):
        hooked.register_load_state_dict_pre_hook(_fill_in(ours))
    if own.lr is not None:
        if hooked is None:
            raise TypeError(
                "expected one of torch's optimizers where decoder_lr= is given, got "
                f"{type(optimizer).__name__}, which runs no hooks. Leave decoder_lr= out, or give "
                "self.recon_aux.parameters() a group in configure_optimizers."
            )
        keep = _in_proportion(own.lr, optimizer.param_groups, ours, encoders)
        hooked.register_step_pre_hook(keep)


def _is_rate(key: str) -> bool:
    """Whether a group's entry is a learning rate: ``lr``, ``max_lr``, ``initial_lr``, ..."""
    return key == "lr" or key.endswith("_lr")


def _base(group: Group) -> float:
    """Give the rate that a schedule starts from or rises to; 0 if the optimizer sets its own."""
    rates = (group.get(key) for key in ("max_lr", "initial_lr", "lr"))
    return float(next((rate for rate in rates if rate is not None), 0))


def _ratio(lr: float, base: float) -> float:
    """Give the proportion of the decoder's learning rate to the encoder's."""
    if not base:
        raise ValueError(
            f"expected the encoder's learning rate above 0 where decoder_lr= is given, got {base}. "
            "Leave decoder_lr= out, or give the encoder a learning rate."
        )
    return lr / base


def _with_hooks(optimizer: Any) -> Any:
    """Find torch's optimizer in a wrapper that some frameworks put around it, if there is one."""
    # wrappers may pass for an Optimizer, or be one whose own __init__ was never called
    seen = []
    while optimizer is not None and not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        seen.append(id(optimizer))
        inside = [x for x in getattr(optimizer, "__dict__", {}).values() if id(x) not in seen]
        optimizer = next((x for x in inside if hasattr(x, "param_groups")), None)
    return optimizer


def _in_proportion(
    lr: float, groups: Sequence[Group], ours: set[int], encoders: Sequence[nn.Module]
) -> Callable[..., None]:
    """Keep the decoder's learning rate in proportion to the encoder's, whatever the schedule."""
    others = [g for g in groups if not any(id(p) in ours for p in g["params"])]
    index = {id(group): i for i, group in enumerate(groups)}
    pairs = []
    for own, group in enumerate(groups):
        if others and group["params"] and all(id(p) in ours for p in group["params"]):
            like = _home(others, encoders, vector=all(p.ndim < 2 for p in group["params"]))
            # read the base now: a checkpoint may bring rates that a schedule has changed
            pairs.append((own, index[id(like)], _base(like)))

    def set_rates(optimizer: Any, args: Any, kwargs: Any) -> None:
        for own, like, base in pairs:
            group = optimizer.param_groups[like]
            # a scheduler made later may set max_lr: use it. Ignore a later initial_lr, which
            # Lightning's rate finder sets
            ratio = _ratio(lr, float(group.get("max_lr", base)))
            optimizer.param_groups[own]["lr"] = group["lr"] * ratio

    return set_rates


def _fill_in(ours: set[int]) -> Callable[[Any, dict[str, Any]], dict[str, Any] | None]:
    """Let an optimizer with the decoder load the saved state of one without."""

    def fill_in(optimizer: Any, state: dict[str, Any]) -> dict[str, Any] | None:
        groups, saved = optimizer.param_groups, state["param_groups"]
        if len(saved) != len(groups):
            own = [group for group in [*groups, *saved] if "recon_aux" in str(group.get("name"))]
            raise ValueError(
                f"expected the saved state of an optimizer with {len(groups)} groups, got one with "
                f"{len(saved)}; "
                + ("only one of them has a separate group for the decoder: " if own else "")
                + "give the decoder_lr= and decoder_weight_decay= that it was saved with, or load "
                "the model's state_dict alone"
            )
        bare = [sum(id(p) not in ours for p in group["params"]) for group in groups]
        sizes = [len(group["params"]) for group in saved]
        if sizes != bare or sizes == [len(group["params"]) for group in groups]:
            return None
        # the decoder's own state starts anew
        new = count(1 + max(index for group in saved for index in group["params"]))
        filled = []
        for group, old in zip(groups, saved, strict=True):
            following = iter(old["params"])
            params = [next(new if id(p) in ours else following) for p in group["params"]]
            names = {"param_names": group["param_names"]} if "param_names" in old else {}
            filled.append({**old, **names, "params": params})
        return {**state, "param_groups": filled}

    return fill_in


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
