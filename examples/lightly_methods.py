"""The methods that the lightly examples train, by name."""

from __future__ import annotations

from typing import Any

from lightly_byol import BYOL
from lightly_simclr import SimCLR
from lightly_vicreg import VICReg

METHODS: dict[str, Any] = {"SimCLR": SimCLR, "BYOL": BYOL, "VICReg": VICReg}
