"""What is learned: the image-reconstruction task. It needs torch and einops only."""

from recon_aux.task.decoder import CrossAttentionDecoder as CrossAttentionDecoder
from recon_aux.task.options import Options as Options
from recon_aux.task.splitter import FeatureSplitter as FeatureSplitter
from recon_aux.task.task import ReconAux as ReconAux
from recon_aux.task.task import ReconAuxOutput as ReconAuxOutput
from recon_aux.task.terms.reconstruction import ReconstructionLoss as ReconstructionLoss
