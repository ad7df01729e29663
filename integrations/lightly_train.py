"""LightlyTrain's ``pretrain``, with recon_aux attached to the method that it builds.

``python -m recon_aux.integrations.lightly_train pretrain out=OUT data=DATA recon_aux.weight=1``
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from recon_aux import attach
from recon_aux.engine.adapter import check_options, expand_preset

try:
    import lightly_train
    from omegaconf import OmegaConf
except ImportError as error:
    raise ImportError(
        f"recon_aux.integrations.lightly_train needs LightlyTrain ({error}); "
        "install it with, in a clone: pip install '.[lightly-train]'"
    ) from error

_GOT_ANOTHER = (
    f"whose methods train_helpers.get_method builds, got {lightly_train.__version__}; "
    "install the former with: pip install 'lightly-train==0.18.*'"
)

try:
    from lightly_train._commands import train, train_helpers
    from lightly_train._methods.method_helpers import get_method_cls
except ImportError as error:
    raise ImportError(f"expected LightlyTrain 0.18, {_GOT_ANOTHER}") from error


def pretrain(*, recon_aux: Mapping[str, Any] | None = None, **arguments: Any) -> None:
    """Call ``lightly_train.pretrain`` with recon_aux attached; the one line.

    Args:
        recon_aux: options of :func:`recon_aux.attach` and :class:`recon_aux.ReconAux`. By default
            ``weight`` is 1, for DINO ``"auto"``.
        arguments: those of ``lightly_train.pretrain``.

    Raises:
        TypeError: if the method has no two views, as distillation, or an option is unknown. Nothing
            is written then.
        ImportError: if this version of LightlyTrain builds its methods another way.

    Example:
        >>> pretrain(out="out", data="images", model="torchvision/resnet18", method="simclr",
        ...          recon_aux={"weight": 1})                              # doctest: +SKIP
    """
    options = {} if recon_aux is None else recon_aux
    if not isinstance(options, Mapping):
        raise TypeError(
            f"expected recon_aux= as a dict of options, got {options!r}. "
            'Pass recon_aux={"weight": 1}, or leave it out.'
        )
    check_options(options)
    given = inspect.signature(lightly_train.pretrain).bind(**arguments)
    given.apply_defaults()
    method = get_method_cls(given.arguments["method"]).__name__
    if method not in _METHODS:
        raise TypeError(
            f"expected a method that encodes two views, got {method}, which "
            f"{_REFUSED.get(method, 'recon_aux does not know')}. Pass method= one of "
            f"{sorted(map(str.lower, _METHODS))}, or call lightly_train.pretrain itself."
        )
    # None, as of a config's "weight: null", stands for the default
    options = {name: value for name, value in options.items() if value is not None}
    with _attaching({**_METHODS[method], **expand_preset(options)}):
        lightly_train.pretrain(**arguments)


@contextmanager
def _attaching(options: Mapping[str, Any]) -> Iterator[None]:
    """Attach to the method that LightlyTrain builds in the meantime."""
    build = getattr(train_helpers, "get_method", None)
    # stop here: else the training would run without the task, unnoticed
    if build is None or "get_method" not in train.train_from_config.__code__.co_names:
        raise ImportError(f"expected LightlyTrain 0.18, {_GOT_ANOTHER}")

    def get_method(*args: Any, **kwargs: Any) -> Any:
        method = attach(build(*args, **kwargs), **options)
        log = logging.getLogger("lightly_train").info  # into out/train.log, too
        log(f"recon_aux is attached to {type(method).__name__}: {method.recon_aux.options}")
        return method

    train_helpers.get_method = get_method
    try:
        yield
    finally:
        train_helpers.get_method = build


def _one_tensor(output: dict[str, Tensor]) -> Tensor:
    """Join class token and patches, and put parts of the result in their place.

    What the method makes of either then depends on one tensor: the feature.
    """
    patches = output["features"]
    tokens = torch.cat([output["cls_token"][:, None], patches.flatten(2).mT], dim=1)
    output["cls_token"] = tokens[:, 0]
    output["features"] = tokens[:, 1:].mT.reshape(patches.shape)
    return tokens


# recon_aux finds the teachers' heads by the students'
_DINOV2: dict[str, Any] = {
    "backbone": "student_embedding_model.wrapped_model",
    "backbone_method": "forward_features",
    "features": _one_tensor,
    # KoLeo's loss takes the class token itself
    "heads": ["student_head.dino_head", "student_head.ibot_head", "koleo_loss"],
    # "auto" would be in the hundreds, for KoLeo's gradient is in the first batch
    "weight": 1.0,
}

_METHODS: dict[str, dict[str, Any]] = {
    # the weight is measured for the same loss in lightly
    "SimCLR": {"backbone": "embedding_model", "heads": ["projection_head"], "weight": 1.0},
    "DINO": {"backbone": "student_embedding_model", "heads": ["student_projection_head"]},
    "DINOv2": _DINOV2,
    "DINOv31": {**_DINOV2, "heads": [*_DINOV2["heads"], "student_paka_head"]},
}

_DISTILS = "encodes one view and learns a teacher's features of it"
_REFUSED = dict.fromkeys(["Distillation", "DistillationV2", "DistillationV3"], _DISTILS)
_REFUSED["DenseCL"] = "pairs positions by their whole features, equivariant channels included"


def run() -> None:
    """Call ``pretrain`` with the arguments of the command line."""
    arguments = sys.argv[1:]
    if arguments[:1] != ["pretrain"] or not arguments[1:]:
        raise SystemExit(
            "expected: python -m recon_aux.integrations.lightly_train pretrain out=OUT data=DATA "
            f"model=MODEL method=METHOD recon_aux.OPTION=VALUE, got {arguments}"
        )
    given: Any = OmegaConf.to_container(OmegaConf.from_cli(arguments[1:]), resolve=True)
    pretrain(**given)


if __name__ == "__main__":
    run()
