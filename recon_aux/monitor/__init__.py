"""Watch in training what the encoder learns: numbers and a picture, from a few held-out images."""

from recon_aux.monitor.callback import Monitor, as_callback
from recon_aux.monitor.measure import Measurement

__all__ = ["Measurement", "Monitor", "as_callback"]
