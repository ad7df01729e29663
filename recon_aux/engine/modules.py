"""Find modules in a model: by name, copies of an encoder, momentum heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, product, zip_longest
from os.path import commonprefix

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def find_module(model: nn.Module, module: str | nn.Module, option: str) -> nn.Module:
    """Resolve a submodule given by itself or by its dotted name.

    Raises:
        ValueError: if it isn't a submodule of the model; the message lists those there are.
    """
    if isinstance(module, str):
        with suppress(AttributeError):
            return model.get_submodule(module)
    elif any(module is known for known in model.modules()):
        return module
    given = module if isinstance(module, str) else type(module).__name__
    raise ValueError(
        f"expected {option}= to name a submodule of {type(model).__name__}, got {given!r}; "
        f"there are: {describe_children(model)}. Pass one of these, or of their submodules."
    )


def members(module: nn.Module) -> list[nn.Module]:
    """Give what a ModuleList or a ModuleDict holds, or else the module itself."""
    several = type(module) in (nn.ModuleList, nn.ModuleDict)
    return list(module.children()) if several else [module]


def find_copies(model: nn.Module, encoder: nn.Module) -> list[nn.Module]:
    """Find the other submodules that are like an encoder: momentum encoders and teachers."""
    known = {id(module) for module in encoder.modules()}
    copies = []
    for module in model.modules():
        if id(module) in known or unwrap(module) is unwrap(encoder):
            continue
        if are_alike(module, encoder):
            copies.append(module)
            known.update(id(inner) for inner in module.modules())
    return copies


def largest_child(module: nn.Module) -> nn.Module:
    """Give the submodule with most parameters, or else the module itself."""
    return max(
        module.children(), key=lambda x: sum(p.numel() for p in x.parameters()), default=module
    )


def are_alike(module: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have parameters and buffers of the same names and shapes.

    Their classes say little: torch.fx makes one for each copy.
    """
    pairs = zip_longest(_tensors(module), _tensors(other))
    return next(module.parameters(), None) is not None and all(a == b for a, b in pairs)


def first_linear(module: nn.Module) -> nn.Linear | None:
    """Find the first linear layer in a module."""
    return next((x for x in module.modules() if isinstance(x, nn.Linear)), None)


def share_weights(module: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are one, or have the very same parameters."""
    pairs = zip_longest(module.parameters(), other.parameters())
    return module is other or all(one is another for one, another in pairs)


def share_values(module: nn.Module, other: nn.Module) -> bool:
    """Whether a weight of one module is about equal to one of another's."""
    pairs = product(module.parameters(), other.parameters())
    alike = ((p, q) for p, q in pairs if p.ndim > 1 and p.shape == q.shape)
    comparable = ((p, q) for p, q in alike if (p.dtype, p.device) == (q.dtype, q.device))
    return any(torch.allclose(p, q, 1e-2, 1e-4) for p, q in comparable)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    named = chain(unwrap(module).named_parameters(), unwrap(module).named_buffers())
    return ((uncompiled(name), tensor.shape) for name, tensor in named)


def find_momentum_heads(
    model: nn.Module,
    encoder: nn.Module,
    momentum_encoders: Sequence[nn.Module],
    heads: Sequence[nn.Module],
) -> list[nn.Module]:
    """Find the heads' copies, which take what a momentum encoder gives.

    First by name: if ``online.encoder`` has the copy ``target.encoder``, ``online.head`` has the
    copy ``target.head``. If no name fits, the frozen modules next to a momentum encoder are paired
    with the trained ones like them, in order.
    """
    around = [
        module
        for module in model.modules()
        if any(e is not module and e in set(module.modules()) for e in momentum_encoders)
    ]
    if not around:
        return []
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    # what was replaced since has no name
    pairs = [(names.get(id(encoder)), names.get(id(copy))) for copy in momentum_encoders]
    found: list[nn.Module] = []
    untrained = find_untrained(model)
    for head in heads:
        alike = {id(module) for module in (head, *find_copies(model, head))}
        candidates = [
            modules.get(name)
            for own, other in pairs
            if own is not None and other is not None and id(head) in names
            for name in _analogous(own, other, names[id(head)])
        ]
        named = [m for m in candidates if m is not None and m is not head and id(m) in alike]
        trained = [m for m in model.modules() if id(m) in alike and m not in untrained]
        in_order = []
        for parent in around:
            copies = [m for m in parent.children() if id(m) in alike and m in untrained]
            in_order += [c for c, own in zip(copies, trained, strict=False) if own is head]
        found += [m for m in named if m in untrained] or in_order or named
    return found


def _analogous(name: str, copy: str, other: str) -> list[str]:
    """Change ``other`` in the way that turns ``name`` into ``copy``; give all possible results.

    Example:
        >>> _analogous("online.encoder", "target.encoder", "online.projector")
        ['target.projector']
        >>> _analogous("backbone", "backbone_ema", "projector")
        ['projector_ema', '_emaprojector']
    """
    # letters are compared, not the parts of a path
    start = len(commonprefix([name, copy]))  # noqa: RUF071
    end = len(commonprefix([name[start:][::-1], copy[start:][::-1]]))  # noqa: RUF071
    was, now = name[start : len(name) - end], copy[start : len(copy) - end]
    if was:
        return [other.replace(was, now, 1)] if was in other else []
    within = [other[:start] + now + other[start:]] if other.startswith(name[:start]) else []
    return [*within, other + now, now + other]


def unwrap(module: nn.Module) -> nn.Module:
    """Look through ``torch.compile`` and ``DataParallel``."""
    inner = getattr(module, "_orig_mod", None)
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = module.module
    return unwrap(inner) if isinstance(inner, nn.Module) else module


def averaged(module: nn.Module) -> nn.Module:
    """Give the model inside an average of weights, torch's or timm's; else the module itself."""
    is_average = isinstance(module, AveragedModel) or type(module).__name__.startswith("ModelEma")
    inner = getattr(module, "module", None)
    return inner if is_average and isinstance(inner, nn.Module) else module


def find_untrained(model: nn.Module) -> set[nn.Module]:
    """Find the modules that no optimizer trains: frozen ones, and averages of weights."""
    averages = (averaged(x) for x in model.modules() if averaged(x) is not x)
    frozen = (x for x in model.modules() if is_frozen(x))
    return {*frozen, *(inner for average in averages for inner in average.modules())}


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters, and trains none of them."""
    trains = [parameter.requires_grad for parameter in module.parameters()]
    return bool(trains) and not any(trains)


def uncompiled(name: str) -> str:
    """Give a module's or a parameter's dotted name as if nothing were compiled."""
    return f"{name}.".replace("_orig_mod.", "").removesuffix(".")


def describe_children(model: nn.Module) -> str:
    """List a model's direct submodules for an error message."""
    children = [f"{name} ({type(child).__name__})" for name, child in model.named_children()]
    return ", ".join(children) or "none"
