"""The MLP that is trained on frozen features, as the papers do."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STEPS, _BATCH_SIZE, _HIDDEN = 1000, 256, 256


def mlp_regression(
    x: Any, numbers: Any, test_x: Any, *, seed: int = 0, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Predict numbers from features by a light MLP.

    The papers give neither its size nor how it is trained, so both are ours. It has one hidden
    layer of 256 channels, with batch normalisation, ReLU and dropout of 0.5. AdamW trains it on
    1000 batches of 256. The learning rate falls from 0.002 to 0 along a cosine, and weight decay is
    0.05. Features and numbers are standardised.

    Args:
        x: train features ``(N, D)``.
        numbers: what is predicted, ``(N, K)``.
        test_x: test features ``(M, D)``.
        seed: of the first weights, the batches and the dropout. The global random state is left as
            it is.
        device: where it is trained.

    Returns:
        Predictions ``(M, K)``.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(500, 2))
        >>> error = mlp_regression(x[:400], x[:400, :1] ** 2, x[400:]) - x[400:, :1] ** 2
        >>> bool(error.var() < 0.2 * (x[400:, 0] ** 2).var())
        True
    """
    inputs, wanted, test = (
        torch.as_tensor(values, dtype=torch.float32, device=device)
        for values in (x, numbers, test_x)
    )
    (center, scale), (mean, spread) = _scale(inputs), _scale(wanted)
    inputs, wanted, test = (inputs - center) / scale, (wanted - mean) / spread, test - center
    devices = range(torch.cuda.device_count()) if inputs.is_cuda else []
    # the caller may have switched gradients off
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        # torch.manual_seed would seed the GPUs, too
        (torch.default_generator if inputs.is_cpu else torch).manual_seed(seed)
        mlp = nn.Sequential(
            nn.Linear(inputs.shape[1], _HIDDEN),
            nn.BatchNorm1d(_HIDDEN),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(_HIDDEN, wanted.shape[1]),
        ).to(device)
        optimizer = torch.optim.AdamW(mlp.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
        for _ in range(_STEPS):
            rows = torch.randint(len(inputs), (_BATCH_SIZE,), device=inputs.device)
            optimizer.zero_grad()
            torch.autograd.backward(F.mse_loss(mlp(inputs[rows]), wanted[rows]))
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        predicted: Tensor = mlp.eval()(test / scale) * spread + mean
    return predicted.cpu().numpy()


def _scale(values: Tensor) -> tuple[Tensor, Tensor]:
    """Give each channel's mean and standard deviation, or 1 where nothing varies."""
    spread = values.std(0, unbiased=False)
    return values.mean(0), torch.where(spread > 1e-6, spread, 1.0)
