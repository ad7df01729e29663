"""The commands of ``recon-aux``, and how they speak to the user."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from typer.core import TyperGroup

import recon_aux
from recon_aux.cli.demo import NORMALIZE, SimCLR, train
from recon_aux.cli.errors import UserError
from recon_aux.cli.finding import Encoder, Saved, find_encoder, find_saved
from recon_aux.cli.images import Images, load_images, parse_normalization
from recon_aux.cli.opening import open_checkpoint, tensors_in
from recon_aux.cli.options import (
    Arch,
    Checkpoint,
    Device,
    Normalize,
    Output,
    Prefix,
    Regressor,
    Trust,
)
from recon_aux.cli.picture import Rebuilder, check_picture, save_picture
from recon_aux.cli.probing import Probed, probe_all, short_names
from recon_aux.cli.report import in_megabytes, parts_table, saved_table, side_by_side
from recon_aux.probe import compare


class Commands(TyperGroup):
    """Commands that end with one sentence and exit code 1 if the user can mend what is wrong."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"recon-aux: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def about() -> None:
    """Measure, export and look into the checkpoints of self-supervised models.

    [bold]Start here[/bold]

      recon-aux demo

      recon-aux probe last.ckpt --data digits

      recon-aux probe bare.ckpt attached.ckpt --data photos/ --picture probe.png

      recon-aux export last.ckpt -o encoder.pt --like timm:resnet50

    Every command explains itself: recon-aux probe --help
    """


@app.command("probe")
def probe_command(
    checkpoints: Annotated[list[Path], typer.Argument(help="One file or more.")],
    data: Annotated[
        str, typer.Option(help="digits, cifar10, or a folder of images or of class folders.")
    ],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers here.", show_default=False)
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Draw the checkpoints side by side, as PNG, PDF or SVG.", show_default=False
        ),
    ] = None,
    arch: Arch = None,
    prefix: Prefix = None,
    normalize: Normalize = "imagenet",
    size: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Side of the images; by default 32, of a folder its own.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(min=20, help="Train on so many images at most, and test on half as many.")
    ] = 2000,
    regressor: Regressor = "ridge",
    device: Device = None,
    trust: Trust = False,
) -> None:
    """Measure what encoders know of an image's class, and of how it was moved and coloured.

    Plain, torchvision, timm, lightly, solo-learn, stable-pretraining and Lightning checkpoints
    are read. The encoder in them is found.

    [bold]Examples[/bold]

      recon-aux probe last.ckpt --data digits

      recon-aux probe bare.ckpt attached.ckpt --data photos/ --picture probe.png --json probe.json

      recon-aux probe resnet50.pth --data cifar10 --arch timm:resnet50

      recon-aux probe last.ckpt --data photos/ --arch my_code:build_encoder --normalize 0.5,0.25
    """
    normalization = parse_normalization(normalize)
    for output in (json_file, picture):
        _check_output(output)
        _refuse_source(output, checkpoints)
    if picture is not None:
        check_picture(picture)
    where = _device(device)
    console = _console()
    # all are opened first: a mistake in the last one shall not cost the others' time
    found = {
        name: _find(path, arch, prefix, trust) for name, path in short_names(checkpoints).items()
    }

    @cache
    def read(side: int | None) -> Images:
        return load_images(data, side, images)

    probed = probe_all(
        found, lambda own: read(size or own), normalization, where, console, regressor
    )
    _print_images(probed, normalize, console)
    console.print(side_by_side(probed.results))
    if json_file is not None:
        json_file.write_text(json.dumps(probed.to_dict(), indent=2))
    if picture is not None:
        _save_picture(picture, probed, console)
    for saved in filter(None, (json_file, picture)):
        console.print(f"Saved {saved}.")


def _print_images(probed: Probed, normalize: str, console: Console) -> None:
    """Say which images were seen, and if they differ, by which encoder."""
    seen = {str(images) for images in probed.images.values()}
    lines = list(seen) if len(seen) == 1 else [f"{n}: {x}" for n, x in probed.images.items()]
    if len(seen) > 1:
        lines.append("These images differ. Pass --size with one that all encoders take")
    lines[-1] += f". Normalised as --normalize {normalize}"
    for line in lines:
        console.print(f"{line}.")


def _save_picture(path: Path, probed: Probed, console: Console) -> None:
    unseen = save_picture(path, probed.results, probed.rebuilders)
    for label in unseen:
        console.print(
            f"In {path}, what is {' '.join(label.split())} is mostly darker than black or brighter "
            "than white. Pass --normalize as in the training.",
        )


@app.command()
def export(
    checkpoint: Checkpoint,
    output: Output,
    like: Annotated[
        str | None,
        # messages of finding an encoder say --arch
        typer.Option(
            "--like",
            "--arch",
            help="Name the weights as this architecture does: timm:NAME, torchvision:NAME, or "
            "package.module:function. By default the one that is found.",
            show_default=False,
        ),
    ] = None,
    prefix: Prefix = None,
    trust: Trust = False,
) -> None:
    """Write the encoder alone, under its architecture's own names, without heads and decoder.

    [bold]Examples[/bold]

      recon-aux export last.ckpt -o encoder.pt --like timm:resnet50

      recon-aux export last.ckpt -o encoder.pt

    Then: timm.create_model("resnet50", num_classes=0).load_state_dict(torch.load("encoder.pt"))
    """
    _check_output(output, checkpoint)
    encoder, _ = _find(checkpoint, like, prefix, trust)
    # through the module, so that what the file lacks, as counters of batches, is there
    state = encoder.build().state_dict()
    torch.save(state, output)
    console = _console()
    console.print(f"{encoder}")
    console.print(
        f"{output} has {len(state)} tensors, {in_megabytes(state)}. "
        f"Load it as: {encoder.how_to_load(output)}",
        soft_wrap=True,
    )


@app.command()
def strip(checkpoint: Checkpoint, output: Output, trust: Trust = False) -> None:
    """Leave out recon_aux's decoder. The bare model loads the rest.

    [bold]Example[/bold]

      recon-aux strip last.ckpt -o bare.ckpt
    """
    _check_output(output, checkpoint)
    opened = open_checkpoint(checkpoint, trust=trust)
    before = tensors_in(opened)
    if find_saved(before) is None:
        raise UserError(
            f"expected a checkpoint of an attached model, got {checkpoint}, which holds nothing of "
            "recon_aux. Use it as it is."
        )
    if not isinstance(opened, Mapping):
        raise UserError(
            f"expected a dict of tensors, got {checkpoint}, which holds a whole "
            f"{type(opened).__name__}. Save its state_dict() instead."
        )
    stripped = recon_aux.strip(opened)
    torch.save(stripped, output)
    left = tensors_in(stripped)
    _console().print(
        f"{output} has {len(left)} of {len(before)} tensors: the decoder's are left out. Start a "
        "bare model from there with a new optimizer.",
    )


@app.command()
def show(
    checkpoint: Checkpoint, arch: Arch = None, prefix: Prefix = None, trust: Trust = False
) -> None:
    """Show what is in a checkpoint: its parts, its encoder, and recon_aux's options and weight.

    [bold]Example[/bold]

      recon-aux show last.ckpt
    """
    console = _console()
    opened = open_checkpoint(checkpoint, trust=trust)
    tensors = tensors_in(opened)
    console.print(parts_table(tensors))
    if isinstance(opened, Mapping):
        plain = {key: x for key, x in opened.items() if isinstance(x, (int, float, str))}
        for key, value in plain.items():
            console.print(f"{key}: {value}")
    saved = find_saved(tensors)
    try:
        encoder = find_encoder(tensors, checkpoint, saved=saved, arch=arch, prefix=prefix)
        console.print(f"encoder: {encoder}")
    except UserError as error:
        # the rest is worth showing nevertheless
        console.print(f"encoder: {error}")
    if saved is None:
        console.print("recon_aux: not attached")
    elif not saved.values:
        console.print("recon_aux: attached; its options can't be read, as in an average of weights")
    else:
        console.print(f"recon_aux: attached to {saved.values.get('encoder') or 'an encoder'}")
        console.print(saved_table(saved))


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each training.")] = 30,
    seed: Annotated[int, typer.Option(help="Of weights, batches and views.")] = 0,
    images: Annotated[
        int, typer.Option(min=128, max=1400, help="Train on so many, and test on 397 at most.")
    ] = 1400,
    picture: Annotated[Path, typer.Option(help="Where to draw the result.")] = Path(
        "recon_aux_demo.png"
    ),
    device: Device = None,
) -> None:
    """Train SimCLR on scikit-learn's digits, bare and attached, and compare what both know.

    It takes a few minutes on two CPU cores.

    [bold]Examples[/bold]

      recon-aux demo

      recon-aux demo --epochs 5 --images 500 --picture quick.png
    """
    _check_output(picture)
    check_picture(picture)
    where = _device(device)
    data = load_images("digits", 16, images)
    models = {}
    with Progress() as bar:
        for name in ("bare", "attached"):
            torch.manual_seed(seed)
            model = SimCLR().to(where)
            if name == "attached":
                model = recon_aux.attach(
                    model, backbone="backbone", heads=["projection_head"], weight=1.0
                )
            models[name] = train(model, data.train[0], epochs, bar, name)
    results = compare(
        models, data.train, data.test, normalize=NORMALIZE, device=where, progress=True
    )
    console = _console()
    console.print(side_by_side(results))
    attached: Any = models["attached"]
    rebuilder = Rebuilder(attached.backbone, attached.recon_aux, NORMALIZE, data.test[0])
    save_picture(picture, results, {"attached": rebuilder})
    console.print(
        f"Whole, invariant and equivariant are parts of the feature. Use the whole. The picture is "
        f"{picture}.",
    )


def _console() -> Console:
    """Give a console as wide as the terminal; where there is none, 160 characters wide."""
    # what is printed names files, whose brackets are no markup
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(width=160, highlight=False, markup=False)


def _find(
    path: Path, arch: str | None, prefix: str | None, trust: bool
) -> tuple[Encoder, Saved | None]:
    tensors = tensors_in(open_checkpoint(path, trust=trust))
    saved = find_saved(tensors)
    return find_encoder(tensors, path, saved=saved, arch=arch, prefix=prefix), saved


def _check_output(path: Path | None, source: Path | None = None) -> None:
    """Refuse an output path that can't be written, before anything is computed."""
    if path is None:
        return
    if not path.parent.is_dir() or path.is_dir():
        came = "is a folder" if path.is_dir() else f"is in {path.parent}, which doesn't exist"
        raise UserError(f"expected a file to write, got {path}, which {came}. Pass another path.")
    _refuse_source(path, [] if source is None else [source])
    if source is not None and path.suffix == ".safetensors":
        raise UserError(
            f"expected a file for torch.save, got {path}. Pass -o with one that ends in .pt."
        )


def _refuse_source(path: Path | None, sources: list[Path]) -> None:
    """Refuse to write over a checkpoint that is read."""
    if path is not None and path.resolve() in [source.resolve() for source in sources]:
        raise UserError(f"expected another file than {path} itself to write. Pass another path.")


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"expected --device as one that this machine has, got {name!r}. Pass cpu."
        ) from error
    return device
