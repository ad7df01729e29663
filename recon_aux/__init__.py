"""Keep what augmentation changes: an image-reconstruction task for joint-embedding methods."""

from .attach import add_loss, attach, detach, is_attached
from .aux import ReconAux, ReconAuxOutput
from .checkpoint import export_backbone, strip
from .decoder import CrossAttentionDecoder
from .loss import ReconstructionLoss
from .splitter import FeatureSplitter

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
