"""Put a picture where a trainer's logger can take one."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def log_picture(loggers: Iterable[Any], name: str, picture: Any, step: int) -> None:
    """Log a picture to each logger: W&B's image, TensorBoard's image, or else a PNG file.

    A logger without a folder gets none, and a warning says so.

    Args:
        loggers: a trainer's.
        name: of the picture, with a slash.
        picture: a ``PIL.Image``.
        step: of the training.
    """
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[picture], step=step)
        elif hasattr(experiment, "add_image"):
            import numpy as np  # noqa: PLC0415

            experiment.add_image(name, np.array(picture), step, dataformats="HWC")
        elif folder := _folder_of(logger):
            path = folder / f"{name}-{step:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        else:
            warnings.warn(
                "recon_aux.Monitor: expected a logger that takes pictures or has a folder, got "
                f"{type(logger).__name__}. Pass Monitor(..., rows=0) to draw none.",
                stacklevel=2,
            )


def _folder_of(logger: Any) -> Path | None:
    """Give the folder of a logger's run; where it has one for all runs, a folder in that."""
    if getattr(logger, "log_dir", None):
        return Path(logger.log_dir)
    all_runs = getattr(logger, "save_dir", None)
    return all_runs and Path(all_runs, str(logger.name), str(logger.version))
