"""How much does an encoder know about what was done to an image? Numbers and a table.

Needs kornia, scikit-learn and rich: ``pip install 'recon-aux[probe]'``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon_aux.engine.encoder import evaluating
from recon_aux.task.splitter import FeatureSplitter, channel_dim

try:
    import kornia
    from rich import box
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.metrics import r2_score
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
except ImportError as error:
    raise ImportError(
        f"recon_aux.probe needs {error.name}; install it with: pip install 'recon-aux[probe]'"
    ) from error

TRANSFORMATIONS: dict[str, tuple[float, float]] = {
    "rotation": (-30.0, 30.0),  # degrees
    "scale": (0.7, 1.3),
    "translation_x": (-0.2, 0.2),  # fractions of the width and height
    "translation_y": (-0.2, 0.2),
    "brightness": (0.6, 1.4),  # factors, as in torchvision's ColorJitter
    "contrast": (0.6, 1.4),
    "saturation": (0.4, 1.6),
    "hue": (-0.15, 0.15),  # fractions of the colour circle
    "blur": (0.003, 0.06),  # standard deviation, a fraction of the width
}
"""What the probe does to images: each parameter is drawn uniformly from its range."""

COMBINED = tuple(name for name in TRANSFORMATIONS if name != "blur")
"""The parameters drawn all at once for the combined transformation."""

Parts = dict[str, np.ndarray]

_NEUTRAL = {"scale": 1.0, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0}


def draw_parameters(
    n: int, names: Sequence[str] = COMBINED, *, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Draw one value an image for each of the named transformations.

    Args:
        n: number of images.
        names: keys of :data:`TRANSFORMATIONS`.
        generator: source of randomness; the global one by default.

    Returns:
        For each name a tensor ``(n,)``.

    Raises:
        ValueError: if a name is unknown.

    Example:
        >>> parameters = draw_parameters(5, ["rotation"])
        >>> bool((parameters["rotation"].abs() <= 30).all())
        True
    """
    unknown = set(names) - set(TRANSFORMATIONS)
    if unknown:
        raise ValueError(f"expected names among {list(TRANSFORMATIONS)}, got {sorted(unknown)}")
    drawn = {}
    for name in names:
        low, high = TRANSFORMATIONS[name]
        drawn[name] = torch.rand(n, generator=generator) * (high - low) + low
    return drawn


def transform(images: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """Transform images, each by its own parameters, with kornia.

    Geometry comes first, then blur, then colour. What moves into the picture is its own
    reflection, so that no border tells how far it moved.

    Args:
        images: ``(B, 3, H, W)``, values from 0 to 1.
        parameters: for any of :data:`TRANSFORMATIONS` a tensor ``(B,)``; the others stay neutral.

    Returns:
        Images of the same shape and range.

    Example:
        >>> images = torch.rand(2, 3, 32, 32)
        >>> transform(images, draw_parameters(2)).shape
        torch.Size([2, 3, 32, 32])
    """
    height, width = images.shape[-2:]

    def value(name: str) -> Tensor:
        neutral = torch.full((len(images),), _NEUTRAL.get(name, 0.0))
        return parameters.get(name, neutral).to(images)

    if parameters.keys() & {"rotation", "scale", "translation_x", "translation_y"}:
        matrix = kornia.geometry.get_affine_matrix2d(
            torch.stack([value("translation_x") * width, value("translation_y") * height], dim=1),
            images.new_tensor([[(width - 1) / 2, (height - 1) / 2]]).expand(len(images), 2),
            value("scale")[:, None].expand(-1, 2),
            value("rotation"),
        )
        images = kornia.geometry.warp_affine(
            images, matrix[:, :2], (height, width), padding_mode="reflection"
        )
    if "blur" in parameters:
        sigma = (value("blur") * width)[:, None].expand(-1, 2)
        size = 2 * round(3 * TRANSFORMATIONS["blur"][1] * width / 2) + 1
        images = kornia.filters.gaussian_blur2d(images, (size, size), sigma)
    for name, adjust in (
        ("brightness", kornia.enhance.adjust_brightness_accumulative),
        ("contrast", kornia.enhance.adjust_contrast_with_mean_subtraction),
        ("saturation", kornia.enhance.adjust_saturation_with_gray_subtraction),
    ):
        if name in parameters:
            images = adjust(images, value(name))
    if "hue" in parameters:
        images = kornia.enhance.adjust_hue(images, value("hue") * 2 * torch.pi)
    return images.clamp(0, 1)


@dataclass
class PartResult:
    """What one part of the feature knows.

    Attributes:
        linear: test accuracy of logistic regression on the labels, in percent.
        knn: test accuracy of a 20-nearest-neighbour vote by cosine similarity, in percent.
        alone: test R² of ridge regression for each parameter, applied alone.
        combined: the same where all of :data:`COMBINED` are applied at once.
    """

    linear: float
    knn: float
    alone: dict[str, float] = field(default_factory=dict)
    combined: dict[str, float] = field(default_factory=dict)

    @property
    def mean_combined(self) -> float:
        """Mean R² over the parameters of the combined transformation."""
        return sum(self.combined.values()) / len(self.combined)


@dataclass
class ProbeResult:
    """What an encoder knows: ``whole``, and where it is split ``invariant`` and ``equivariant``.

    Printing one prints its table.
    """

    parts: dict[str, PartResult]

    def to_dict(self) -> dict[str, Any]:
        """Give plain numbers, ready for JSON."""
        return {name: asdict(part) for name, part in self.parts.items()}

    def __str__(self) -> str:
        return render({"": self})


def table(results: Mapping[str, ProbeResult]) -> Table:
    """Put results side by side, one row for each part of each encoder, as a Markdown table.

    Args:
        results: results by the name of their encoder.

    Returns:
        A table for rich's ``print``.
    """
    grid = markdown_table(["linear %", "k-NN %", "mean R²", *COMBINED])
    for name, result in results.items():
        for part_name, part in result.parts.items():
            numbers = [f"{part.linear:.1f}", f"{part.knn:.1f}", f"{part.mean_combined:.3f}"]
            numbers += [f"{part.combined[parameter]:.2f}" for parameter in COMBINED]
            grid.add_row(f"{name} {part_name}".strip(), *numbers)
    return grid


def markdown_table(columns: Iterable[str]) -> Table:
    """Start a table of encoders, to be printed by rich as Markdown."""
    grid = Table(box=box.MARKDOWN)
    grid.add_column("encoder", no_wrap=True)
    for column in columns:
        grid.add_column(column.replace("translation_", "t"), justify="right", no_wrap=True)
    return grid


def alone_table(results: Mapping[str, ProbeResult]) -> Table:
    """Like :func:`table`, for each transformation alone."""
    grid = markdown_table(TRANSFORMATIONS)
    for name, result in results.items():
        for part_name, part in result.parts.items():
            grid.add_row(
                f"{name} {part_name}".strip(), *(f"{r2:.2f}" for r2 in part.alone.values())
            )
    return grid


def render(results: Mapping[str, ProbeResult]) -> str:
    """Give both tables as text."""
    console = Console(width=140)
    with console.capture() as capture:
        console.print("R² with all transformations combined", table(results))
        console.print("R² with each transformation alone", alone_table(results))
    return capture.get()


def probe(
    encoder: Callable[[Tensor], Tensor],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    equivariant_dim: int = 0,
    normalize: Callable[[Tensor], Tensor] | None = None,
    pairs: tuple[int, int] = (5000, 2000),
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> ProbeResult:
    """Measure what an encoder's features know of classes and of transformations.

    Each transformation is applied to ``pairs`` images with known random parameters, and ridge
    regression (its strength chosen by leave-one-out on the train split, for each parameter)
    predicts the parameters from the features of the original and of the transformed image,
    concatenated.

    Args:
        encoder: images ``(B, 3, H, W)`` -> features ``(B, D)``, ``(B, D, H, W)`` or ``(B, N, D)``;
            a module is put into eval mode for the while.
        train: images ``(N, 3, H, W)``, uint8 or floats from 0 to 1, and integer labels ``(N,)``.
        test: the same, of the test split.
        equivariant_dim: if the features are split, how many of their last channels are equivariant;
            the parts are then measured, too.
        normalize: applied to images after the transformation, before the encoder.
        pairs: how many train and how many test images the regression sees.
        batch_size: images in one call of the encoder.
        device: where images are transformed and encoded.
        seed: of the choice of images and of the parameters; the global random state is left alone.
        progress: show a progress bar.

    Returns:
        Accuracies in percent and R², see :class:`PartResult`.

    Example:
        >>> images, labels = torch.rand(64, 3, 8, 8), torch.arange(64) % 2
        >>> result = probe(lambda x: x.mean((2, 3)), (images, labels), (images, labels))
        >>> sorted(result.parts["whole"].combined)[:3]
        ['brightness', 'contrast', 'hue']
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = [
        torch.randperm(len(images), generator=generator)[:count]
        for (images, _), count in zip((train, test), pairs, strict=True)
    ]
    tasks = {name: (name,) for name in TRANSFORMATIONS} | {"combined": COMBINED}

    def encode(images: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Parts:
        features: dict[str, list[Tensor]] = {}
        for rows in torch.split(torch.arange(len(images)), batch_size):
            batch = images[rows].to(device)
            batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch
            if parameters is not None:
                batch = transform(batch, {name: p[rows] for name, p in parameters.items()})
            feature = encoder(batch if normalize is None else normalize(batch))
            for part, values in _split(feature, equivariant_dim).items():
                features.setdefault(part, []).append(values.flatten(1).float().cpu())
            advance(len(rows))
        return {part: torch.cat(values).numpy() for part, values in features.items()}

    work = len(train[0]) + len(test[0]) + len(tasks) * sum(len(rows) for rows in chosen)
    with _bar(progress, work) as advance, evaluating(encoder), torch.no_grad():
        clean = [encode(images) for images, _ in (train, test)]
        drawn: dict[str, list[dict[str, Tensor]]] = {}
        warped: dict[str, list[Parts]] = {}
        for task, names in tasks.items():
            drawn[task] = [draw_parameters(len(r), names, generator=generator) for r in chosen]
            warped[task] = [
                encode(images[rows], parameters)
                for (images, _), rows, parameters in zip(
                    (train, test), chosen, drawn[task], strict=True
                )
            ]

    labels = [labels.numpy() for _, labels in (train, test)]
    parts = {}
    for part in clean[0]:
        x = [features[part] for features in clean]
        r2: dict[str, dict[str, float]] = {}
        for task in tasks:
            pairs_x = [
                np.concatenate([f[rows], w[part]], axis=1)
                for f, rows, w in zip(x, chosen, warped[task], strict=True)
            ]
            r2[task] = _ridge_r2(pairs_x, drawn[task])
        combined = r2.pop("combined")
        alone = {name: scores[name] for name, scores in r2.items()}
        parts[part] = PartResult(*_accuracies(x, labels), alone=alone, combined=combined)
    return ProbeResult(parts)


def compare(
    models: Mapping[str, Any],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    **options: Any,
) -> dict[str, ProbeResult]:
    """Probe the encoders of several models, to be printed side by side by :func:`render`.

    Args:
        models: models by name, each with its encoder as ``backbone``. Where recon_aux is attached,
            the parts of the feature are measured, too.
        train: as in :func:`probe`.
        test: as in :func:`probe`.
        options: other options of :func:`probe`.

    Returns:
        Results by the name of their model.

    Example:
        >>> model = torch.nn.Module()
        >>> model.backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images, labels = torch.rand(64, 3, 8, 8), torch.arange(64) % 2
        >>> results = compare({"bare": model}, (images, labels), (images, labels))
        >>> print(results["bare"].parts.keys())
        dict_keys(['whole'])
    """
    results = {}
    for name, model in models.items():
        aux = getattr(model, "recon_aux", None)
        split = 0 if aux is None else aux.splitter.equivariant_dim
        results[name] = probe(model.backbone, train, test, equivariant_dim=split, **options)
    return results


def _split(feature: Tensor, equivariant_dim: int) -> dict[str, Tensor]:
    if not equivariant_dim:
        return {"whole": feature}
    channels = feature.shape[channel_dim(feature)]
    invariant, equivariant = FeatureSplitter(channels, equivariant_dim)(feature)
    parts = {"whole": feature, "invariant": invariant, "equivariant": equivariant}
    return {name: part for name, part in parts.items() if part.numel()}


def _ridge_r2(x: Sequence[Any], parameters: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    targets = [torch.stack(list(p.values()), dim=1).numpy() for p in parameters]
    model = linear_regression().fit(x[0], targets[0])
    predicted = model.predict(x[1]).reshape(targets[1].shape)
    scores = r2_score(targets[1], predicted, multioutput="raw_values")
    return dict(zip(parameters[0], scores.tolist(), strict=True))


def _accuracies(x: Sequence[Any], labels: Sequence[Any]) -> tuple[float, float]:
    linear = linear_classifier()
    knn = KNeighborsClassifier(n_neighbors=min(20, len(x[0])), metric="cosine")
    scores = [100 * model.fit(x[0], labels[0]).score(x[1], labels[1]) for model in (linear, knn)]
    return scores[0], scores[1]


def linear_classifier() -> Any:
    """Make what tells classes from features: logistic regression, as scikit-learn's estimator."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))


def linear_regression() -> Any:
    """Make what reads numbers off features: ridge regression, its strength by leave-one-out."""
    # for each number, or those of the largest units, in degrees perhaps, would choose for all
    ridge = RidgeCV(alphas=np.logspace(-1, 5, 7), alpha_per_target=True)
    return make_pipeline(StandardScaler(), ridge)


@contextmanager
def _bar(show: bool, total: int) -> Iterator[Callable[[int], None]]:
    with Progress(disable=not show) as bar:
        task = bar.add_task("probing", total=total)
        yield lambda count: bar.advance(task, count)
