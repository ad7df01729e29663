"""Keep what augmentation changes: an image-reconstruction task for joint-embedding methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recon_aux.engine.api import add_loss, attach, detach, is_attached, logs
from recon_aux.engine.checkpoint import export_backbone, strip
from recon_aux.monitor.summary import summary
from recon_aux.task.decoder import CrossAttentionDecoder
from recon_aux.task.splitter import FeatureSplitter
from recon_aux.task.task import ReconAux, ReconAuxOutput
from recon_aux.task.terms.reconstruction import ReconstructionLoss

if TYPE_CHECKING:
    from recon_aux.monitor import Monitor

__version__ = "0.1.0"

__all__ = [
    "CrossAttentionDecoder",
    "FeatureSplitter",
    "Monitor",
    "ReconAux",
    "ReconAuxOutput",
    "ReconstructionLoss",
    "add_loss",
    "attach",
    "detach",
    "export_backbone",
    "is_attached",
    "logs",
    "strip",
    "summary",
]


def __getattr__(name: str) -> Any:
    """Make ``Monitor`` on first use: a callback of each Lightning package imported so far."""
    if name != "Monitor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from recon_aux.monitor import Monitor, as_callback  # noqa: PLC0415

    globals()[name] = as_callback(Monitor)
    return globals()[name]
