"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Checkpoint = Annotated[Path, typer.Argument(help="A file that torch.save or a trainer wrote.")]
Arch = Annotated[
    str | None,
    typer.Option(
        help="The encoder's architecture, if it isn't found: timm:NAME, torchvision:NAME, or "
        "package.module:function of your own.",
        show_default=False,
    ),
]
Prefix = Annotated[
    str | None,
    typer.Option(
        help="What the encoder's names begin with, if the file has several.", show_default=False
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-checkpoint",
        help="Open a file that holds code, and run that code.",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu or cuda; by default cuda where there is one.", show_default=False),
]
Regressor = Annotated[
    Literal["ridge", "mlp"],
    typer.Option(help="What reads how an image was changed; mlp is slower."),
]
Output = Annotated[Path, typer.Option("-o", "--output", help="Where to write.")]

Normalize = Annotated[
    str,
    typer.Option(
        help="How the encoder's images are normalised: imagenet, none or MEAN,STD, of all channels "
        "or of each, as 0.49,0.48,0.45,0.25,0.24,0.26."
    ),
]
