"""The methods that the lightly examples train, by name."""

from __future__ import annotations

from typing import Any

from lightly_byol import BYOL
from lightly_more import MORE
from lightly_simclr import SimCLR
from lightly_vicreg import VICReg

METHODS: dict[str, Any] = {"SimCLR": SimCLR, "BYOL": BYOL, "VICReg": VICReg}
MORE_METHODS: dict[str, Any] = {method.__name__: method for method in MORE}
