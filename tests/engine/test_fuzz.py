"""Whatever goes in: a finite loss with gradients where they belong, or one of our own errors."""

from __future__ import annotations

import math
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import recon_aux
from helpers.models import InALoop, Siamese
from helpers.running import ROOT
from recon_aux import ReconAux
from recon_aux.integrations.lightly import attach

pytestmark = pytest.mark.slow

many = settings(
    max_examples=500, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
OURS = (ValueError, TypeError, RuntimeError, FloatingPointError)
# grows with each example that isn't refused
TRAINED: list[bool] = []

# what is out of range among what isn't: one in ten
GOOD: dict[str, list[Any]] = {
    "weight": [0, 0.5, 1, 3.0],
    "equivariant_dim": [None, 0, 1, 4, 7],
    "context": ["invariant", "equivariant", "both", "none"],
    "target_size": [8, 16],
    "patch_size": [4, 8],
    "decoder_dim": [8, 16],
    "decoder_depth": [1, 2],
    "decoder_heads": [1, 4],
    "decoder_tokens": [1, 3],
    "loss": ["mse", "l1", "smooth_l1"],
    "structure": [0, 0.5],
    "normalize_patches": [True, False],
    "reconstruct": ["alternate", "random", "both"],
    "seed": [None, 0, -1, 2**40],
    "image_channels": [3],
}
BAD: dict[str, list[Any]] = {
    "weight": [-1, math.inf, math.nan, "1", None],
    "equivariant_dim": [-1, 8, 9],
    "context": ["all"],
    "target_size": [0, 1, 12],
    "patch_size": [0, 5],
    "decoder_dim": [0, 3],
    "decoder_depth": [0],
    "decoder_heads": [0, 3],
    "decoder_tokens": [0],
    "loss": ["l2"],
    "structure": [-1, math.nan, "1", None],
    "reconstruct": ["all"],
    "image_channels": [0, 1, 4],
}


@st.composite
def options(draw: Any) -> dict[str, Any]:
    chosen = {
        name: draw(st.sampled_from(values)) for name, values in GOOD.items() if draw(st.booleans())
    }
    if rarely(draw):
        name = draw(st.sampled_from(list(BAD)))
        chosen[name] = draw(st.sampled_from(BAD[name]))
    return chosen


def rarely(draw: Any) -> bool:
    return bool(draw(st.integers(0, 9)) == 0)


sizes = st.integers(0, 6)
real = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
whole = st.sampled_from([torch.uint8, torch.int64, torch.bool, torch.complex64])


def ours(error: Exception) -> None:
    """One of our own errors says what was expected, and no library raised it."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    is_ours = any(ROOT / name in raised_in.parents for name in ("recon_aux", "integrations"))
    if not str(error).startswith("expected") or not is_ours:
        raise error
    event("refused: " + type(error).__name__)


def some(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    numbers = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return (numbers * 4).to(dtype)


def shape_like(draw: Any, usual: list[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(draw(st.lists(sizes, max_size=5) if rarely(draw) else st.sampled_from(usual)))


@st.composite
def views(draw: Any) -> list[Tensor]:
    shapes: list[tuple[int, ...]] = [(4, 3, 8, 8), (4, 3, 5, 9), (4, 3, 1, 30), (4, 3, 0, 8)]
    first = shape_like(draw, shapes)
    given = [first, shape_like(draw, shapes) if rarely(draw) else first]
    return [some(shape, draw(whole if rarely(draw) else real)) for shape in given]


@st.composite
def features(draw: Any) -> list[Tensor]:
    shapes: list[tuple[int, ...]] = [(4, 8), (4, 8, 2, 3), (4, 5, 8), (4, 8, 1, 1), (4, 0, 8)]
    first = shape_like(draw, shapes)
    given = [first, shape_like(draw, shapes) if rarely(draw) else first]
    made = [some(shape, draw(whole if rarely(draw) else real)) for shape in given]
    return [x.requires_grad_(draw(st.booleans())) if x.is_floating_point() else x for x in made]


@many
@given(options=options(), views=views(), features=features(), extra=st.integers(0, 30))
def check_recon_aux(
    options: dict[str, Any], views: list[Tensor], features: list[Tensor], extra: int
) -> None:
    try:
        aux = ReconAux(8, spatial=features[0].ndim != 2, **options)
        # one view, or three
        output = aux(views[:1] if extra == 0 else views, features * 2 if extra == 1 else features)
    except OURS as error:
        return ours(error)
    event("trained")
    TRAINED.append(True)
    assert torch.isfinite(output.loss)
    assert output.loss.dtype == torch.float32
    if not aux.enabled:
        return None
    output.loss.backward()
    assert all(p.grad is not None for p in aux.decoder.parameters())
    for index, feature in enumerate(features):
        if feature.requires_grad and index in output.rebuilt:
            assert feature.grad is not None
            assert torch.isfinite(feature.grad).all()
    live = [index for index in (0, 1) if features[index].requires_grad]
    assert len(live) != 1 or output.rebuilt == tuple(live)
    return None


class AnyEncoder(nn.Module):
    """Gives a vector, a map, tokens, or something else."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(3, 16, 4, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        kinds: dict[str, Any] = {
            "vector": lambda: y.mean((2, 3)),
            "pooled map": lambda: y.mean((2, 3), keepdim=True),
            "map": lambda: y,
            "tokens": lambda: y.flatten(2).mT,
            "tuple": lambda: (y.mean((2, 3)), y),
            "dict": lambda: {"feature": y.mean((2, 3))},
            "five": lambda: y[..., None],
        }
        return kinds[self.kind]()


class AnyHead(nn.Module):
    """Takes any of these."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 4)

    def forward(self, feature: Any) -> Tensor:
        if isinstance(feature, dict):
            feature = feature["feature"]
        if isinstance(feature, tuple):
            feature = feature[0]
        if feature.ndim >= 4:
            feature = feature.flatten(2).mean(2)
        z: Tensor = self.project(feature)
        return z.flatten(1)


class InSteps(Siamese):
    """Its training step is what a test says."""

    losses: Any

    def training_step(self, batch: Any, names: Any) -> Tensor:
        return self.losses(names)


calls = st.lists(
    st.sampled_from(["view 0", "view 1", "both", "small", "twice", "without gradient",
                     "in eval mode", "encoder alone", "odd", "one image"]),
    max_size=6,
)  # fmt: skip
kinds = st.sampled_from(3 * ["vector", "pooled map", "map", "tokens"] + ["tuple", "dict", "five"])


def heads_outputs(model: Any, call: str, views: list[Tensor]) -> list[Tensor]:
    """What one of the calls gives to the method's loss."""
    images = {
        "view 1": [views[1]],
        "both": [torch.cat(views)],
        "small": [view[..., :4, :4] for view in views],
        "twice": [views[0], views[0]],
        "odd": [views[0][:3], views[1][:2]],
        "one image": [views[0][:1]],
    }.get(call, [views[0]])
    if call == "encoder alone":
        model.backbone(views[0])
        return []
    model.train(call != "in eval mode")
    with torch.set_grad_enabled(call != "without gradient"):
        outputs = [model.projection_head(model.backbone(image)) for image in images]
    model.train()
    return [z.square().mean() for z in outputs if z.requires_grad]


def trains_or_refuses(model: Any, step: Any) -> None:
    try:
        loss = step()
    except OURS as error:
        return ours(error)
    event("trained")
    TRAINED.append(True)
    assert torch.isfinite(loss)
    if loss.requires_grad:
        model.zero_grad()
        loss.backward()
        assert torch.isfinite(model.backbone.stem.weight.grad).all()
        decoders = list(model.recon_aux.decoder.parameters())
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in decoders)
    return None


@settings(many, max_examples=250)
@given(
    kind=kinds,
    steps=st.lists(calls, min_size=1, max_size=3),
    options=st.fixed_dictionaries(
        {},
        optional={
            "equivariant_dim": st.sampled_from([0, 1, 8, 15] * 3 + [16]),
            "views": st.sampled_from([1, 2] * 4 + [0, 3]),
            "reconstruct": st.sampled_from(["alternate", "both"]),
        },
    ),
    loop=st.booleans(),
    shown=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    taken=st.booleans(),
)
def check_any_order_of_calls(
    kind: str,
    steps: list[list[str]],
    options: dict[str, Any],
    loop: bool,
    shown: bool,
    dtype: torch.dtype,
    taken: bool,
) -> None:
    views = [some((4, 3, 8, 8), dtype), some((4, 3, 8, 8), dtype).flip(3)]
    model: Any = InALoop(AnyEncoder(kind)) if loop else InSteps(AnyEncoder(kind))
    model.projection_head = AnyHead()
    model.to(dtype)
    if taken and kind in ("tuple", "dict"):
        options["features"] = lambda output: output[0]
    try:
        attach(model, heads=["projection_head"], **options)
    except OURS as error:
        return ours(error)
    batch = [views, torch.arange(4)] if shown else []

    def losses(names: list[str]) -> Tensor:
        outputs = [z for name in names for z in heads_outputs(model, name, views)]
        return torch.stack([torch.zeros((), dtype=dtype), *outputs]).sum()

    model.losses = losses
    for names in steps:
        if loop:
            trains_or_refuses(
                model, lambda names=names: recon_aux.add_loss(model, losses(names), batch)
            )
        else:
            trains_or_refuses(model, lambda names=names: model.training_step(batch, names))
    recon_aux.detach(model)
    return None


@pytest.mark.parametrize("check", [check_recon_aux, check_any_order_of_calls])
def test_what_is_drawn_trains_or_is_refused(check: Any) -> None:
    TRAINED.clear()
    check()
    assert len(TRAINED) > 50
