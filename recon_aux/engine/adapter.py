"""What integrations are made of: a framework's conventions, and a call that attaches by them.

``docs/adapters.md`` shows how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from recon_aux.engine.api import Model, attach, attachment_of, check_options, refuse_wrapped
from recon_aux.engine.hooks import MethodHook
from recon_aux.engine.modules import averaged, describe_children, members, unwrap
from recon_aux.task.options import expand_preset

__all__ = [
    "Conventions",
    "MethodHook",
    "attach_by",
    "check_options",
    "decoder_groups",
    "expand_preset",
]


@dataclass(frozen=True)
class Conventions:
    """How a framework names the parts of its methods.

    Args:
        backbones: names that the encoder may have, the likeliest first; dots name nested modules.
        is_head: whether a submodule, given with its dotted name, takes the encoder's features.
        defaults: gives a model's options, above all ``weight``: ``"auto"`` if nothing was measured.
        refused: methods without two views: the name of each one's class or function, with what the
            method does instead.

    Example:
        >>> its = Conventions(("trunk",), lambda name, module: name == "neck", lambda m: {}, {})
        >>> its.find_encoder(nn.ModuleDict({"trunk": nn.Linear(8, 4), "neck": nn.Linear(4, 2)}))
        Linear(in_features=8, out_features=4, bias=True)
    """

    backbones: Sequence[str]
    is_head: Callable[[str, nn.Module], bool]
    defaults: Callable[[nn.Module], dict[str, Any]]
    refused: Mapping[str, str]

    def refuse(self, method: type | Callable[..., Any]) -> None:
        """Refuse the class, or the function, of a method without two views.

        Raises:
            TypeError: that names the method and the reason.
        """
        # a functools.partial has its function in func
        method = getattr(method, "func", method)
        for name in (getattr(x, "__name__", "") for x in getattr(method, "__mro__", [method])):
            if name in self.refused:
                raise TypeError(
                    f"expected a method that encodes two views, got {method.__name__}, which "
                    f"{self.refused[name]}. If this one encodes two, pass backbone= and heads=."
                )

    def find_encoder(self, model: nn.Module) -> nn.Module:
        """Find the encoder that is trained, by its usual names.

        Raises:
            ValueError: that lists the submodules, if none has a name that means an encoder.
        """
        children = dict(model.named_children())
        similar = [child for child in children if any(name in child for name in self.backbones)]
        # named_modules lists a submodule that has two names under the first one only
        modules = {**dict(model.named_modules()), **children}
        for name in [*self.backbones, *similar]:
            child: nn.Module | None = modules.get(name)
            if child is not None and any(p.requires_grad for p in child.parameters()):
                return child
        raise ValueError(
            f"expected a trainable encoder named one of {tuple(self.backbones)} in "
            f"{type(model).__name__}. Pass backbone=: one of {describe_children(model)}"
        )

    def find_heads(self, model: nn.Module) -> list[nn.Module]:
        """Find the heads, those of momentum encoders too. Nothing within a head is one.

        Raises:
            ValueError: that lists the submodules, if there is none.
        """
        heads: list[nn.Module] = []

        def walk(parent: nn.Module, prefix: str) -> None:
            for name, child in parent.named_children():
                if self.is_head(prefix + name, unwrap(child)):
                    heads.extend(map(averaged, members(child)))
                else:
                    walk(child, f"{prefix}{name}.")

        walk(model, "")
        if not heads:
            raise ValueError(
                f"expected a projection head in {type(model).__name__}, found none. Pass "
                "heads=[...]: those that take the encoder's features, of these: "
                f"{describe_children(model)}. If it has none, pass equivariant_dim=0 to train "
                "without a split."
            )
        return heads


def attach_by(
    conventions: Conventions,
    model: Model,
    *,
    backbone: str | nn.Module | None = None,
    heads: Sequence[str | nn.Module] | None = None,
    weight: float | Literal["auto"] | None = None,
    **options: Any,
) -> Model:
    """Attach to a model, and let the conventions find what isn't given.

    Args:
        conventions: the framework's.
        model: as for :func:`recon_aux.attach`.
        backbone: by default what the conventions find.
        heads: likewise.
        weight: of the task's loss; by default the conventions' for this method.
        options: those of :func:`recon_aux.attach` and :class:`recon_aux.ReconAux`.

    Returns:
        The same model.

    Raises:
        TypeError: if the conventions know the method for one without two views, and the encoder or
            its heads aren't given.
        ValueError: if no encoder or no head is found, and as :func:`recon_aux.attach` does.
    """
    refuse_wrapped(model)
    if backbone is None or heads is None:
        conventions.refuse(type(model))
    if backbone is None:
        backbone = conventions.find_encoder(model)
    if heads is None:
        heads = [] if options.get("equivariant_dim") == 0 else conventions.find_heads(model)
    options = {**conventions.defaults(model), **expand_preset(options)}
    if weight is not None:
        options["weight"] = weight
    return attach(model, backbone=backbone, heads=heads, **options)


def decoder_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Give the decoder as a parameter group, for a framework where modules declare theirs.

    Args:
        model: one that ``attach`` returned.

    Returns:
        One group, named ``"recon_aux"``, with the learning rate and weight decay that ``attach``
        was given; none where nothing is to be trained.

    Raises:
        ValueError: if nothing is attached.
    """
    attached = attachment_of(model)
    params = [p for p in attached.aux.parameters() if p.requires_grad]
    group = {"name": "recon_aux", "params": params, **attached.decoder_group.given()}
    return [group] if params else []
