"""What the examples share: options, data, views, encoders, and the side-by-side report."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torchvision
from records import record
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import VisionDataset
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import v2

from recon_aux import ReconAux
from recon_aux.probe import ProbeResult, draw_parameters, probe, render, transform

try:
    from pytorch_lightning import Trainer
except ImportError:
    from lightning import Trainer

Split = tuple[Tensor, Tensor]


# --- data: uint8 images (N, 3, H, W) and labels (N,), in memory ---


def load(data: str, image_size: int, limit: int | None = None) -> tuple[Split, Split]:
    """Load the train split and the test split."""
    if data == "digits":
        train, test = _digits(image_size)
        train = (train[0][:limit], train[1][:limit])
    elif data == "cifar10":
        splits = [torchvision.datasets.CIFAR10("datasets", s, download=True) for s in (True, False)]
        train, test = _stack(*splits, image_size, limit)
    else:
        train, test = _folder(Path(data), image_size, limit)
    return train, test


def _digits(image_size: int) -> tuple[Split, Split]:
    """scikit-learn's handwritten digits in orange ink on blue paper.

    In one shade for all: were each image of its own, SimCLR would learn to tell them by that.
    """
    digits = load_digits()
    strokes = torch.from_numpy(digits.images).float()[:, None] / 16
    strokes = nn.functional.interpolate(strokes, image_size - 8, mode="bilinear")
    strokes = nn.functional.pad(strokes, (4, 4, 4, 4))
    ink = torch.tensor([0.9, 0.6, 0.3])[:, None, None]
    paper = torch.tensor([0.2, 0.3, 0.5])[:, None, None]
    images = (strokes * ink + (1 - strokes) * paper) * 255
    labels = torch.from_numpy(digits.target)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(images), generator=generator).split([1400, len(images) - 1400])
    train, test = ((images[r].to(torch.uint8), labels[r]) for r in rows)
    return train, test


def _folder(root: Path, image_size: int, limit: int | None) -> tuple[Split, Split]:
    expected = (
        f"--data expects digits, cifar10, or a folder with train/ and test/ (or val/), {root}"
    )
    if not root.is_dir():
        raise SystemExit(f"{expected} is not a folder")
    splits = [root / "train", root / "test" if (root / "test").is_dir() else root / "val"]
    for split in splits:
        if not split.is_dir():
            raise SystemExit(f"{expected} has no {split.name}/")
        classes = [folder for folder in split.iterdir() if folder.is_dir()]
        if len(classes) < 2:
            raise SystemExit(
                f"expected two or more class folders of images in {split}, found {len(classes)}"
            )
    try:
        datasets = [torchvision.datasets.ImageFolder(str(split)) for split in splits]
    except FileNotFoundError as error:
        raise SystemExit(f"expected images in every class folder of {root}: {error}") from error
    train, test = datasets
    if train.classes != test.classes:
        raise SystemExit(f"expected the same class folders in {splits[0]} and in {splits[1]}")
    return _stack(train, test, image_size, limit)


def _stack(
    train: VisionDataset, test: VisionDataset, image_size: int, limit: int | None
) -> tuple[Split, Split]:
    """Read images into memory, of the train split ``limit`` at random."""
    prepare = v2.Compose(
        [
            v2.RGB(),
            v2.Resize(image_size),
            v2.CenterCrop(image_size),
            v2.PILToTensor(),
        ]
    )
    shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    splits = []
    for name, dataset, rows in (
        ("train", train, shuffled[:limit]),
        ("test", test, range(len(test))),
    ):
        images, labels = [], []
        for row in track(rows, f"reading {name} images"):
            image, label = dataset[row]
            images.append(prepare(image))
            labels.append(label)
        splits.append((torch.stack(images), torch.tensor(labels)))
    return splits[0], splits[1]


class TwoViews:
    """Collate images into two augmented views of each.

    That is ``[x0, x1], labels``, lightly's layout, or, ``indexed``, solo-learn's, with the indexes
    first, which none of the examples' methods looks at.
    """

    def __init__(self, *, flip: bool, indexed: bool = False) -> None:
        self.flip = flip
        self.indexed = indexed

    def __call__(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[Any, ...]:
        images = torch.stack([image for image, _ in samples]).float() / 255
        labels = torch.stack([label for _, label in samples])
        views = [normalize(self._view(images)) for _ in range(2)]
        return (torch.arange(len(labels)), views, labels) if self.indexed else (views, labels)

    def _view(self, images: Tensor) -> Tensor:
        if self.flip:
            images = flip_half(images)
        return transform(images, draw_parameters(len(images)))


def flip_half(images: Tensor) -> Tensor:
    """Mirror each image, or leave it, at random."""
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)


def normalize(images: Tensor) -> Tensor:
    """From 0..1 to about -2..2, what the encoders see."""
    return (images - 0.5) / 0.25


# --- encoders ---


def small_resnet18(width: int = 64, stride: int = 1) -> nn.Module:
    """Build torchvision's ResNet-18 with a 3x3 stem and no pooling after it: ``(B, 8 * width)``."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    channels = width
    for stage in range(4):
        out = width * 2**stage
        for block in range(2):
            stride = 2 if stage and not block else 1
            downsample = None
            if stride != 1:
                downsample = nn.Sequential(
                    nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
                )
            layers.append(BasicBlock(channels, out, stride, downsample))
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def vit(image_size: int, patch_size: int, layers: int, width: int) -> nn.Module:
    """Build torchvision's vision transformer, with heads of 64 channels: ``(B, width)``."""
    sizes = {"num_heads": width // 64, "hidden_dim": width, "mlp_dim": 4 * width}
    model = torchvision.models.VisionTransformer(image_size, patch_size, layers, **sizes)
    model.heads = nn.Identity()
    return model


ENCODERS = {
    "tiny-resnet18": lambda: small_resnet18(width=32, stride=2),
    "small-resnet18": small_resnet18,
    "tiny-vit": lambda: vit(32, 4, layers=6, width=192),
    "vit-small": lambda: vit(224, 16, layers=12, width=384),
}


def build_encoder(name: str) -> nn.Module:
    """Build one of ``ENCODERS``, or any torchvision classifier without its last layer."""
    if name in ENCODERS:
        return ENCODERS[name]()
    if name not in torchvision.models.list_models(torchvision.models):
        raise SystemExit(f"--backbone expects {list(ENCODERS)} or torchvision's name, got {name!r}")
    encoder = torchvision.models.get_model(name)
    for last in ("fc", "classifier", "heads", "head"):
        if hasattr(encoder, last):
            setattr(encoder, last, nn.Identity())
    return encoder


def width_of(encoder: nn.Module, image_size: int) -> int:
    """Find the width of an encoder's features."""
    with torch.random.fork_rng(), torch.no_grad():
        blank = torch.zeros(1, 3, image_size, image_size)
        width = encoder.eval()(blank).flatten(1).shape[1]
    encoder.train()
    return int(width)


# --- one study: bare and attached, with the same seed, data and budget ---


class Study:
    """Reads the command line, holds the data, and measures what is trained on it."""

    def __init__(self, description: str | None, trainer: Any = Trainer) -> None:
        self.args = args = _parse(description)
        # there are two packages of Lightning, and a model trains with its own's
        self.trainer_class = trainer
        self.out = Path(
            args.out or Path("runs") / f"{Path(sys.argv[0]).stem}-{Path(args.data).name}"
        )
        if self.out.exists() and any(self.out.iterdir()) and not args.overwrite:
            raise SystemExit(
                f"expected a new output folder, {self.out} holds another run; "
                "--overwrite replaces it, --out names another"
            )
        self.console = Console()
        self.train, self.test = load(args.data, args.image_size, args.limit)
        # where Lightning's --device trains
        self.device = self.trainer().strategy.root_device
        self.results: dict[str, ProbeResult] = {}
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()
        self.aux: tuple[nn.Module, ReconAux] | None = None

    def autocast(self) -> torch.autocast:
        """What --precision asks for, for a loop without Lightning."""
        known = {"32-true": None, "bf16-mixed": torch.bfloat16}
        if self.args.precision not in known:
            raise SystemExit(f"--precision expects {list(known)}, got {self.args.precision!r}")
        dtype = known[self.args.precision]
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=bool(dtype))

    @property
    def compare(self) -> bool:
        """Whether the bare method is trained, too."""
        return not self.args.no_compare

    @property
    def options(self) -> dict[str, Any]:
        """The options for attach() that the command line gives."""
        given = {"weight": self.args.weight, "equivariant_dim": self.args.equivariant_dim}
        return {name: value for name, value in given.items() if value is not None}

    def encoder(self) -> tuple[nn.Module, int]:
        """Seed everything, then build an encoder; give it and its feature's width."""
        torch.manual_seed(self.args.seed)
        encoder = build_encoder(self.args.backbone).to(memory_format=torch.channels_last)
        width = width_of(encoder, self.args.image_size)
        self.started = time.perf_counter()
        return encoder, width

    def loader(self, *, indexed: bool = False) -> DataLoader[Any]:
        """Batches of two views, see :class:`TwoViews`."""
        return DataLoader(
            TensorDataset(*self.train),
            self.args.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=self.args.workers,
            persistent_workers=self.args.workers > 0,
            collate_fn=TwoViews(flip=self.args.data != "digits", indexed=indexed),
        )

    def trainer(self) -> Any:
        """A plain Lightning trainer with a progress bar."""
        return self.trainer_class(
            max_epochs=self.args.epochs,
            accelerator=self.args.device,
            devices=1,
            precision=self.args.precision,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )

    def measure(self, name: str, encoder: nn.Module, aux: ReconAux | None = None) -> None:
        """Probe a trained encoder, whole and, if it is split, in its parts."""
        self.seconds[name] = time.perf_counter() - self.started
        # Lightning brings a model back to the CPU after training
        torch.nn.ModuleList([encoder] if aux is None else [encoder, aux]).to(self.device)
        self.results[name] = probe(
            encoder,
            self.train,
            self.test,
            equivariant_dim=0 if aux is None else aux.splitter.equivariant_dim,
            normalize=normalize,
            device=self.device,
            seed=self.args.seed,
            progress=True,
        )
        if aux is not None:
            self.aux = (encoder, aux)

    def report(self) -> None:
        """Print the table; save it, the numbers and the reconstructions."""
        self.out.mkdir(parents=True, exist_ok=True)
        text = render(self.results)
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        (self.out / "table.md").write_text(text)
        results = {name: result.to_dict() for name, result in self.results.items()}
        told = record(self.args, self.device, sum(self.seconds.values()), results)
        told["seconds"] = {name: round(seconds, 1) for name, seconds in self.seconds.items()}
        (self.out / "results.json").write_text(json.dumps(told, indent=1))
        if self.aux is not None:
            path = self.out / "reconstructions.png"
            save_reconstructions(*self.aux, self.test[0], self.args.seed, path)
        for name, seconds in self.seconds.items():
            self.console.print(f"{name} trained in {seconds:.0f} s")
        self.console.print(f"saved table.md, results.json, reconstructions.png in {self.out}")


@torch.no_grad()
def save_reconstructions(
    encoder: nn.Module, aux: ReconAux, images: Tensor, seed: int, path: Path
) -> None:
    """Save a picture of views of some images, each rebuilt in the context of another view."""
    device = next(encoder.parameters()).device
    encoder.eval(), aux.to(device).eval()
    images = images[:: max(1, len(images) // 10)][:10]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        views, _ = TwoViews(flip=False)([(image, torch.tensor(0)) for image in images])
    view, other = (view.to(device) for view in views)
    rebuilt = aux.rebuild(encoder(view), encoder(other))
    rows = {"view": view, "other view": other, "reconstruction": rebuilt}
    save_pictures(list(rows.values()), list(rows), path)


def save_pictures(rows: Sequence[Sequence[Tensor]], labels: Sequence[str], path: Path) -> None:
    """Save rows of images as the encoders see them, each row with what it shows."""
    shape = len(rows), len(rows[0])
    figure, axes = plt.subplots(*shape, figsize=(shape[1] * 1.1, shape[0] * 1.15), squeeze=False)
    for label, pictures, line in zip(labels, rows, axes, strict=True):
        for picture, axis in zip(pictures, line, strict=True):
            axis.imshow((picture.float().cpu() * 0.25 + 0.5).clamp(0, 1).permute(1, 2, 0))
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=12)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="digits", help="digits, cifar10, or a folder with train/ and test/")
    add("--limit", type=int, help="use so many train images, drawn at random")
    add("--epochs", type=int, default=30)
    add("--batch-size", type=int, default=128)
    add("--lr", type=float, default=2e-3)
    add("--backbone", default="tiny-resnet18", help=f"{', '.join(ENCODERS)}, or torchvision's name")
    add("--image-size", type=int, help="pixels; 16 for digits, else 32 if not given")
    add(
        "--weight",
        type=float,
        help="of what is added to the loss; the method's default if not given",
    )
    add("--equivariant-dim", type=int, help="half of the feature's channels if not given")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, gpu, mps: Lightning's accelerator")
    add("--precision", default="32-true", help="Lightning's, e.g. bf16-mixed")
    add("--workers", type=int, default=0, help="processes that make the views")
    add("--out", help="output folder; runs/SCRIPT-DATA if not given")
    add("--overwrite", action="store_true", help="replace what is in the output folder")
    add("--no-compare", action="store_true", help="train the attached model alone")
    args = parser.parse_args()
    args.image_size = args.image_size or (16 if args.data == "digits" else 32)
    return args
