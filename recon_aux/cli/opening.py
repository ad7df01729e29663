"""Open a checkpoint, and run no code from it."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from recon_aux.cli.errors import UserError
from recon_aux.engine.modules import uncompiled


def open_checkpoint(path: Path, *, trust: bool = False) -> Any:
    """Read a file that ``torch.save`` wrote, or safetensors, on the CPU.

    Args:
        path: of the file.
        trust: run the code in it, too. Without it a file with code is refused.

    Raises:
        UserError: if there is no such file, it can't be read, or it holds code.
    """
    if not path.is_file():
        came = "is a folder" if path.is_dir() else "doesn't exist"
        raise UserError(
            f"expected a checkpoint, got {path}, which {came}. Pass the path of a file."
        )
    unreadable = f"expected a checkpoint that torch.save wrote, got {path}, which can't be read"
    try:
        if path.suffix == ".safetensors":
            return _safetensors(path)
        # timm's and torchvision's scripts save options as a Namespace, which runs no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except UnpicklingError as error:
        if code := re.search(r"(?:GLOBAL|unrecognized \w+|unsupported class) (\S+)", str(error)):
            raise UserError(
                f"expected a checkpoint of numbers alone, got {path}, which holds code "
                f"({code[1].rstrip('.')}). Opening it would run that code. If you trust who wrote "
                "it, pass --trust-checkpoint."
            ) from error
        raise UserError(f"{unreadable}. Pass another file.") from error
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(
            f"expected the code of {path} to be installed, but there is no module {error.name}. "
            "Install it, or run this command from the folder where it is."
        ) from error
    except Exception as error:
        # the file's own code may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{unreadable} ({reason[:200]}). Pass another file.") from error


def _safetensors(path: Path) -> Any:
    try:
        safetensors: Any = importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise UserError(f"{path} needs safetensors. Run: pip install safetensors") from error
    return safetensors.load_file(path)


def tensors_in(checkpoint: Any) -> dict[str, Tensor]:
    """Give all tensors of a checkpoint under dotted names, those of nested dicts, too.

    Example:
        >>> list(tensors_in({"epoch": 3, "state_dict": {"_orig_mod.bias": torch.ones(2)}}))
        ['state_dict.bias']
    """
    return {uncompiled(name): value for name, value in _walk(checkpoint, ())}


def _walk(value: Any, parents: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield ".".join(parents), value
    elif isinstance(value, nn.Module):
        # a whole model was saved
        yield from _walk(value.state_dict(), parents)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _walk(inner, (*parents, str(key)))
