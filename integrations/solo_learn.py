"""Attach to solo-learn's methods, or run solo-learn's own scripts with every method attached.

``python -m recon_aux.integrations.solo_learn main_pretrain.py ITS ARGUMENTS ++recon_aux.weight=2``
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

from torch import nn

from recon_aux import ReconAux
from recon_aux.engine.adapter import Conventions, MethodHook, attach_by, decoder_groups

_INSTALL = "pip install --no-deps --no-build-isolation git+https://github.com/vturrisi/solo-learn"

try:
    from solo.methods import METHODS
    from solo.methods.base import BaseMethod
except ImportError as error:
    raise ImportError(
        "recon_aux.integrations.solo_learn needs solo-learn and what it imports "
        f"({error}); install them with, in a clone: pip install '.[solo-learn]' && {_INSTALL}"
    ) from error

Model = TypeVar("Model", bound=nn.Module)

# measured for the same losses in lightly
# BYOL's and NNBYOL's loss is four times lightly's: it sums two views, and squares their distance
_WEIGHTS = {"SimCLR": 1.0, "VICReg": 0.3}
_WEIGHTS |= {"BYOL": 0.8, "NNBYOL": 0.8, "SimSiam": 0.2, "NNSiam": 0.2}

_HEADS = {"projector", "momentum_projector", "head", "momentum_head"}

_SCRIPT = "RECON_AUX_SOLO_LEARN_SCRIPT"


def attach(
    model: Model,
    *,
    backbone: str | nn.Module | None = None,
    heads: Sequence[str | nn.Module] | None = None,
    weight: float | Literal["auto"] | None = None,
    **options: Any,
) -> Model:
    """Attach to a method; the one line.

    The decoder's parameters are a group of their own, ``"recon_aux"``, in the ``learnable_params``
    that ``configure_optimizers`` gets; the online classifier and k-NN see the whole feature.

    Args:
        model: one of solo-learn's two-view methods, or a subclass of one.
        backbone: the encoder, or its name; by default ``backbone`` (``encoder`` in 1.0.2).
        heads: the modules that take the encoder's features, or their names; by default the
            projector or head, and the momentum one.
        weight: weight of the task's loss; by default what was measured for the method,
            else ``"auto"``, see :func:`recon_aux.attach`.
        options: those of :func:`recon_aux.attach` and :class:`recon_aux.ReconAux`.

    Returns:
        The same model, changed in place; ``model.recon_aux`` is the :class:`recon_aux.ReconAux`.

    Raises:
        TypeError: if the method has no two views: MAE, linear evaluation.
        ValueError: if no encoder or no head is found; the message lists the submodules.

    Example:
        >>> from solo.methods import METHODS
        >>> model = attach(METHODS["simclr"](cfg))                         # doctest: +SKIP
        >>> trainer.fit(model, loader)                                     # doctest: +SKIP
        >>> [g["name"] for g in trainer.optimizers[0].param_groups]        # doctest: +SKIP
        ['backbone', 'classifier', 'recon_aux', 'projector']
    """
    attach_by(_SOLO_LEARN, model, backbone=backbone, heads=heads, weight=weight, **options)
    MethodHook(model, "configure_optimizers", _with_the_decoders_group)
    return model


def _defaults(model: nn.Module) -> dict[str, Any]:
    classes = (base.__name__ for base in type(model).__mro__)
    return {"weight": next((_WEIGHTS[name] for name in classes if name in _WEIGHTS), "auto")}


_SOLO_LEARN = Conventions(
    backbones=("backbone", "encoder"),
    is_head=lambda name, module: name in _HEADS,
    defaults=_defaults,
    refused={
        "MAE": "rebuilds masked patches of one view",
        "LinearModel": "trains a classifier on an encoder that is trained already",
    },
)


def _with_the_decoders_group(
    model: nn.Module, configure: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Add the decoder to ``learnable_params``, a class's property, while ``configure`` reads it."""
    declared = BaseMethod.learnable_params

    def learnable_params(self: nn.Module) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = declared.fget(self)
        return [*groups, *decoder_groups(self)] if self is model else groups

    BaseMethod.learnable_params = property(learnable_params)
    try:
        return configure(*args, **kwargs)
    finally:
        BaseMethod.learnable_params = declared


# --- solo-learn's own scripts ---


class _Attached:
    """Stands in for a method's class in METHODS; the models that it makes come attached."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def __getattr__(self, name: str) -> Any:
        # copying and unpickling ask before there is a method
        if name == "method":
            raise AttributeError(name)
        return getattr(self.method, name)

    def __call__(self, cfg: Any) -> nn.Module:
        _SOLO_LEARN.refuse(self.method)
        options = _options(cfg.get("recon_aux", {}))
        model: nn.Module = attach(self.method(cfg), **options)
        aux: ReconAux = model.get_submodule("recon_aux")  # type: ignore[assignment]
        found = {"weight": aux.options["weight"], "equivariant_dim": aux.splitter.equivariant_dim}
        # the checkpointer saves cfg
        cfg.recon_aux = {**options, **found}
        print(f"recon_aux is attached to {type(model).__name__}: {dict(cfg.recon_aux)}")
        return model


def _options(section: Any) -> dict[str, Any]:
    if not isinstance(section, Mapping):
        raise TypeError(f"expected recon_aux.OPTION=VALUE in the config, got recon_aux={section!r}")
    return dict(section)


def run() -> None:
    """Run the script that the command line names, with its arguments and every method attached."""
    arguments = sys.argv[1:]
    # Lightning starts this module again for each further device, with the arguments alone
    script = os.environ.get(_SCRIPT, "")
    if arguments and arguments[0].endswith(".py"):
        script = arguments.pop(0)
    if "cfg" not in inspect.signature(BaseMethod.__init__).parameters:
        raise SystemExit(
            "expected solo-learn 1.0.6, from GitHub, whose methods take a config, got an older "
            f"one; install it with: {_INSTALL}"
        )
    if not Path(script).is_file():
        raise SystemExit(
            "expected: python -m recon_aux.integrations.solo_learn main_pretrain.py ARGUMENTS, "
            f"with the path of solo-learn's script; got {script or 'no script'!r}"
        )
    script = os.environ[_SCRIPT] = str(Path(script).resolve())
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    # let solo-learn resume only a run with the same recon_aux options
    importlib.import_module("solo.utils.auto_resumer").AutoResumer.SHOULD_MATCH.append("recon_aux")
    METHODS.update({name: _Attached(method) for name, method in METHODS.items()})
    main = ModuleType("__main__")
    main.__file__ = script
    main.__spec__ = sys.modules["__main__"].__spec__
    sys.modules["__main__"] = main
    code = compile(Path(script).read_bytes(), script, "exec", dont_inherit=True)
    exec(code, vars(main))


if __name__ == "__main__":
    # the script replaces __main__, where pickle couldn't find our classes
    importlib.import_module("recon_aux.integrations.solo_learn").run()
