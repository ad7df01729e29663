"""Keep what augmentation changes: an image-reconstruction task for joint-embedding methods."""

from recon_aux.engine.api import add_loss, attach, detach, is_attached
from recon_aux.engine.checkpoint import export_backbone, strip
from recon_aux.task.decoder import CrossAttentionDecoder
from recon_aux.task.splitter import FeatureSplitter
from recon_aux.task.task import ReconAux, ReconAuxOutput
from recon_aux.task.terms.reconstruction import ReconstructionLoss

__version__ = "0.1.0"

__all__ = [
    "CrossAttentionDecoder",
    "FeatureSplitter",
    "ReconAux",
    "ReconAuxOutput",
    "ReconstructionLoss",
    "add_loss",
    "attach",
    "detach",
    "export_backbone",
    "is_attached",
    "strip",
]
