"""Every precision and memory format: the loss in float32, overflows left to the loss scaler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recon_aux
from helpers import inside
from helpers.data import batch
from helpers.models import InALoop, Siamese, plain_encoder, siamese_loss
from helpers.running import run_python
from helpers.training import fit, scaled_step
from helpers.watching import rebuilt_by
from helpers.weights import assert_trained, decoder_of
from recon_aux import ReconAux
from recon_aux.integrations.lightly import attach

PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "64-true"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_loss_is_float32_and_the_decoder_trains(precision: Any) -> None:
    # steps that are large enough to show on a norm's weight of 1 in bfloat16
    model = attach(Siamese(configure=lambda model: torch.optim.Adam(model.parameters(), lr=0.05)))
    before, outputs = decoder_of(model), rebuilt_by(model)
    fit(model, precision=precision)
    assert_trained(model, before)
    assert len(outputs) == 3
    assert all(output.loss.dtype == torch.float32 for output in outputs)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_process_may_train_in_any_precision_first(precision: str) -> None:
    script = f"""
from helpers.models import Siamese
from helpers.training import fit
from recon_aux.integrations.lightly import attach

for each in ("{precision}", "32-true"):
    fit(attach(Siamese()), precision=each)
"""
    result = run_python("-c", script)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_loss_hardly_depends_on_the_precision(precision: Any) -> None:
    losses = []
    for each in ("32-true", precision):
        model = attach(Siamese())
        outputs = rebuilt_by(model)
        fit(model, precision=each, max_steps=2)
        losses.append(torch.stack([output.loss for output in outputs]))
    torch.testing.assert_close(*losses, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_all_is_what_it_is_without(dtype: torch.dtype) -> None:
    views, features = torch.rand(2, 4, 3, 48, 48), torch.rand(2, 4, 8)
    plain, cast = (ReconAux(8, seed=0) for _ in range(2))
    expected = plain(views, features)
    with torch.autocast("cpu", dtype):
        found = cast(views, features)
        drawn = cast.rebuild(features[0], features[1])
    # the whitening, too, is in float32
    assert torch.equal(found.reconstruction_loss, expected.reconstruction_loss)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(drawn, plain.rebuild(features[0], features[1]))


def test_fp16_with_loss_scaling_skips_an_overflow_and_goes_on() -> None:
    model = attach(InALoop())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    # so large that the first gradients overflow
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = decoder_of(model)
    scaled_step(model, optimizer, scaler, batch(side=16)[0])
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(weight, before[name]) for name, weight in decoder_of(model).items())
    for _ in range(40):
        scaled_step(model, optimizer, scaler, batch(side=16)[0])
    assert scaler.get_scale() < 2.0**39
    assert_trained(model, before)


class Magnified(nn.Module):
    """Features too large for float16 while it is told so."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = plain_encoder()
        self.by = 1.0

    def forward(self, x: Tensor) -> Tensor:
        feature: Tensor = self.encoder(x)
        return feature * self.by


@pytest.mark.slow
def test_features_that_overflow_are_the_scalers_to_skip_but_not_for_ever() -> None:
    encoder = Magnified()
    model = attach(InALoop(encoder))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = decoder_of(model)
    for by in (1e7, 1e7, 1.0, 1e7):
        encoder.by = by
        loss = scaled_step(model, optimizer, scaler, batch(side=16)[0])
        assert torch.isfinite(loss) == (by == 1.0)
    assert scaler.get_scale() == 2.0**7
    assert_trained(model, before)
    with pytest.raises(FloatingPointError, match=r"got nan in step 2; .*features from .*inf"):
        for _ in range(210):
            scaled_step(model, optimizer, scaler, batch(side=16)[0])


def test_a_loss_made_outside_of_autocast_is_the_scalers_too() -> None:
    encoder = Magnified()
    model = attach(InALoop(encoder))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for by in (1e7, 1.0):
        encoder.by = by
        with torch.autocast("cpu", torch.float16):
            z0, z1 = (model(view) for view in batch(side=16)[0])
        loss = recon_aux.add_loss(model, siamese_loss(z0.float(), z1.float()))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9


def test_the_scale_of_pixels_stays_float32_in_half_precision() -> None:
    whitening = inside.whitening_of(attach(Siamese()).to(torch.bfloat16).half().recon_aux)
    assert {buffer.dtype for buffer in whitening.buffers()} == {torch.float32}


@pytest.mark.parametrize("view", [0, 1])
def test_pixels_that_are_not_finite_are_an_error_in_fp16_too(view: int) -> None:
    model = attach(InALoop())
    views = batch(side=16)[0]
    views[view][0, 0, 0, 0] = float("nan")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(FloatingPointError, match="in step 1; the views' pixels range from nan"):
        scaled_step(model, optimizer, torch.amp.GradScaler("cpu"), views)


def test_without_loss_scaling_an_overflow_is_an_error_at_once() -> None:
    aux = ReconAux(8)
    views, features = torch.rand(2, 4, 3, 16, 16), torch.rand(2, 4, 8)
    features[0, 0, -1] = float("inf")
    aux((views[0], views[1]), (features[1], features[1]))
    with (
        pytest.raises(FloatingPointError, match=r"in step 2; .*features from .* to inf"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        aux((views[0], views[1]), (features[1], features[0]))


def test_channels_last_changes_nothing() -> None:
    models = [attach(Siamese()), attach(Siamese()).to(memory_format=torch.channels_last)]
    views = batch(side=16)[0]
    batches = [views, [view.contiguous(memory_format=torch.channels_last) for view in views]]
    losses = []
    for model, given in zip(models, batches, strict=True):
        loss = model.training_step((given, torch.arange(8)), 0)
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert models[1].backbone[0].weight.is_contiguous(memory_format=torch.channels_last)
