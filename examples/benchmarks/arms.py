"""Arms: a method, bare or attached, with options, as ``--arms`` names it."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import nn

from recon_aux.integrations.lightly import attach


class Arm(NamedTuple):
    """One of the models that a study compares."""

    method: str
    attached: bool
    options: dict[str, Any]
    """Options of attach, or of the method where the arm is bare."""


def read_arm(
    text: str, methods: Collection[str], *, attached: str, examples: Collection[str]
) -> Arm:
    """Read an arm, such as ``"SimCLR, attached, weight=2"`` or ``"BYOL, momentum=0.9"``.

    Args:
        text: the arm, as it is given to ``--arms``.
        methods: names that are allowed.
        attached: what stands behind the method's name where recon_aux is attached.
        examples: arms that the error message shows.

    Raises:
        SystemExit: if the method is unknown, or the options aren't ``name=value``.
    """
    found = re.fullmatch(rf"(.+?)({re.escape(attached)})?(?:, (.*))?", text)
    if found is None or found[1] not in methods:
        raise SystemExit(
            f"--arms expects any of {list(examples)}, with options behind, got {text!r}"
        )
    return Arm(found[1], found[2] is not None, parse_options(found[3] or ""))


def parse_options(text: str) -> dict[str, Any]:
    """Read options as they are written in a call: ``"weight=2, context='both'"``."""
    try:
        call = ast.parse(f"attach({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        return {str(given.arg): ast.literal_eval(given.value) for given in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise SystemExit(f"expected options as name=value, ..., got {text!r}") from error


def build_model(
    arm: Arm, methods: Mapping[str, Any], encoder: nn.Module, width: int, lr: float
) -> Any:
    """Make an arm's model.

    Args:
        arm: which one.
        methods: classes of the methods, by name.
        encoder: images -> features.
        width: channels of the features.
        lr: highest learning rate; an option of the arm's method may be another one.
    """
    own = {} if arm.attached else arm.options
    model = methods[arm.method](encoder, width, **({"lr": lr} | own))
    if not arm.attached:
        return model
    return attach(model, **(model.attach_options | arm.options))


def attached_with(model: Any) -> dict[str, Any]:
    """Give all options that a model was attached with, for its record; nothing of a bare one."""
    if not hasattr(model, "recon_aux"):
        return {}
    return {"recon_aux": model.recon_aux.options | {"weight": model.recon_aux.weight}}
