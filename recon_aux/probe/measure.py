"""Encode images, as they are and transformed, and predict labels and parameters from features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from sklearn.metrics import r2_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from recon_aux.probe.encoding import (
    as_input,
    call_of,
    equivariant_dim_of,
    evaluating_encoder,
    undisturbed,
    without_wrapper,
)
from recon_aux.probe.inputs import (
    as_floats,
    as_tensors,
    check_normalize,
    check_pairs,
    checked_feature,
)
from recon_aux.probe.linear import linear_classifier, linear_regression
from recon_aux.probe.mlp import mlp_regression
from recon_aux.probe.results import PartResult, ProbeResult
from recon_aux.probe.transformations import SETS, transform
from recon_aux.task.checks import check_choice
from recon_aux.task.splitter import FeatureSplitter, channel_dim

REGRESSORS = ("ridge", "mlp")

# an MLP's R² depends a little on its seed
_MLP_SEEDS = 3

# features ``(N, D)`` of each part
Parts = dict[str, np.ndarray]


def probe(
    encoder: Callable[[Tensor], Tensor],
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    *,
    equivariant_dim: int = 0,
    normalize: Callable[[Tensor], Tensor] | None = None,
    regressor: str = "ridge",
    transformations: str = "standard",
    pairs: tuple[int, int] = (5000, 2000),
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> ProbeResult:
    """Measure what an encoder's features know of classes and of transformations.

    Each transformation is applied to some images of each split, as many as ``pairs`` says, with
    known random parameters. A regression predicts the parameters from the features of the original
    and of the transformed image, concatenated.

    To measure as Wang et al. do (2025, arXiv 2503.18753), pass ``regressor="mlp"`` and
    ``transformations="paper"``.

    Args:
        encoder: images ``(B, 3, H, W)`` -> features ``(B, D)``, ``(B, D, H, W)`` or ``(B, N, D)``.
            A module is in eval mode meanwhile, and so is each module that a function calls. Of maps
            and tokens all positions are kept; the monitor averages over them.
        train: images ``(N, 3, H, W)``, uint8 or floats from 0 to 1, and integer labels ``(N,)`` of
            two classes or more, or None if there are none. Accuracies are then ``nan``. Arrays and
            lists will do. Images get the type of the encoder's weights.
        test: the same, of the test split.
        equivariant_dim: if the features are split, how many of their last channels are
            equivariant. The parts are then measured, too.
        normalize: applied to images after the transformation, before the encoder.
        regressor: ``"ridge"`` for ridge regression. Its strength is chosen for each parameter, by
            leave-one-out on the train split. ``"mlp"`` for a light MLP with three seeds, see
            :func:`mlp_regression`.
        transformations: which are made, a key of :data:`SETS`.
        pairs: how many train and how many test images the regression sees.
        batch_size: images in one call of the encoder.
        device: where images are transformed and encoded, and where the MLP is trained.
        seed: of the choice of images and of the parameters. The global random state is left as it
            is.
        progress: show a progress bar.

    Returns:
        Accuracies in percent and R², see :class:`PartResult`.

    Raises:
        TypeError: if ``train`` or ``test`` isn't a pair of images and labels, or ``normalize`` is
            no function, or the encoder returns no feature.
        ValueError: if ``equivariant_dim`` is larger than the feature, or the feature has another
            rank or isn't finite, or images have another shape or aren't from 0 to 1, or labels
            don't fit them, or there is no such regressor or set of transformations.

    Example:
        >>> images, labels = torch.rand(64, 3, 8, 8), torch.arange(64) % 2
        >>> result = probe(lambda x: x.mean((2, 3)), (images, labels), (images, labels))
        >>> sorted(result.parts["whole"].combined)[:3]
        ['brightness', 'contrast', 'hue']
    """
    train, test = as_tensors("train", train), as_tensors("test", test)
    check_pairs(pairs)
    check_normalize(normalize)
    regressions = _regressions(regressor, seed, device)
    check_choice("transformations", transformations, list(SETS))
    made, generator = SETS[transformations], torch.Generator().manual_seed(seed)
    chosen = [
        torch.randperm(len(images), generator=generator)[:count]
        for (images, _), count in zip((train, test), pairs, strict=True)
    ]

    def encode(images: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Parts:
        features: list[dict[str, Tensor]] = []
        for rows in torch.split(torch.arange(len(images)), batch_size):
            batch = as_floats(images[rows].to(device))
            if parameters is not None:
                batch = transform(batch, {name: x[rows] for name, x in parameters.items()})
            seen = batch if normalize is None else normalize(batch)
            parts = split_parts(checked_feature(encoder(as_input(encoder, seen))), equivariant_dim)
            features.append({name: x.flatten(1).float().cpu() for name, x in parts.items()})
            bar.advance(shown, len(rows))
        return {name: torch.cat([x[name] for x in features]).numpy() for name in features[0]}

    work = len(train[0]) + len(test[0]) + len(made.tasks) * sum(map(len, chosen))
    with Progress(disable=not progress) as bar, evaluating_encoder(encoder), torch.no_grad():
        shown = bar.add_task("probing", total=work)
        clean = [encode(images) for images, _ in (train, test)]
        pairs_of = {}
        for task, names in made.tasks.items():
            drawn = [made.draw(len(rows), names, generator) for rows in chosen]
            changed = [
                encode(images[rows], values)
                for (images, _), rows, values in zip((train, test), chosen, drawn, strict=True)
            ]
            pairs_of[task] = drawn, changed
    parts = {}
    for part in clean[0]:
        x = [features[part] for features in clean]
        scores = {}
        for task, (drawn, changed) in pairs_of.items():
            both = _side_by_side(x, chosen, [features[part] for features in changed])
            scores[task] = [r2(both, drawn) for r2 in regressions]
        parts[part] = _part_result(_accuracies(x, [y for _, y in (train, test)]), scores)
    return ProbeResult(parts)


def _side_by_side(
    before: Sequence[np.ndarray], rows: Sequence[Tensor], after: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Concatenate the features of each chosen image before and after, in each split."""
    splits = zip(before, rows, after, strict=True)
    return [np.concatenate([x[chosen], y], axis=1) for x, chosen, y in splits]


def compare(
    models: Mapping[str, Any],
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    **options: Any,
) -> dict[str, ProbeResult]:
    """Probe the encoders of several models, to be printed side by side by :func:`render`.

    Args:
        models: by name. Each is an attached model, a bare model whose encoder is called
            ``backbone`` or ``encoder``, an encoder, or a function of images. Where recon_aux is
            attached, the feature that the task gets is measured, and its parts, too.
        train: as in :func:`probe`.
        test: as in :func:`probe`.
        options: other options of :func:`probe`.

    Returns:
        Results by the name of their model.

    Raises:
        ValueError: if a model has a head or a training step, but no encoder that is found.

    Example:
        >>> model = torch.nn.Module()
        >>> model.backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images, labels = torch.rand(64, 3, 8, 8), torch.arange(64) % 2
        >>> results = compare({"bare": model}, (images, labels), (images, labels))
        >>> print(results["bare"].parts.keys())
        dict_keys(['whole'])
    """
    results = {}
    for name, given in models.items():
        model = without_wrapper(given) if isinstance(given, nn.Module) else given
        split = equivariant_dim_of(model)
        with undisturbed(model):
            encode = call_of(name, model)
            results[name] = probe(encode, train, test, equivariant_dim=split, **options)
    return results


def split_parts(feature: Tensor, equivariant_dim: int) -> dict[str, Tensor]:
    """Give the whole feature and, where it is split, its two parts."""
    if not equivariant_dim:
        return {"whole": feature}
    channels = feature.shape[channel_dim(feature)]
    invariant, equivariant = FeatureSplitter(channels, equivariant_dim)(feature)
    parts = {"whole": feature, "invariant": invariant, "equivariant": equivariant}
    return {name: part for name, part in parts.items() if part.numel()}


def _regressions(regressor: str, seed: int, device: torch.device | str) -> list[Any]:
    """Give what scores pairs of features: ridge regression, or several MLPs."""
    check_choice("regressor", regressor, REGRESSORS)
    if regressor == "ridge":
        return [ridge_r2]
    return [partial(mlp_r2, seed=seed + i, device=device) for i in range(_MLP_SEEDS)]


def ridge_r2(x: Sequence[Any], parameters: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Return for each parameter the test R² of ridge regression fitted on the train split."""
    train, test = _targets(parameters)
    model = linear_regression().fit(x[0], train)
    predicted = model.predict(x[1]).reshape(test.shape)
    return _scores(test, predicted, parameters[0])


def mlp_r2(
    x: Sequence[Any],
    parameters: Sequence[Mapping[str, Tensor]],
    *,
    seed: int,
    device: torch.device | str,
) -> dict[str, float]:
    """Return for each parameter the test R² of an MLP trained on the train split."""
    train, test = _targets(parameters)
    return _scores(test, mlp_regression(x[0], train, x[1], seed=seed, device=device), parameters[0])


def _targets(parameters: Sequence[Mapping[str, Tensor]]) -> list[np.ndarray]:
    return [torch.stack(list(p.values()), dim=1).numpy() for p in parameters]


def _scores(wanted: np.ndarray, predicted: np.ndarray, names: Iterable[str]) -> dict[str, float]:
    """Give the R² of each parameter."""
    scores = r2_score(wanted, predicted, multioutput="raw_values")
    return dict(zip(names, scores.tolist(), strict=True))


def _part_result(
    accuracies: tuple[float, float], scores: dict[str, list[dict[str, float]]]
) -> PartResult:
    """Give means over the regressions, and standard deviations if there are several.

    Args:
        accuracies: on the labels.
        scores: for each transformation, the R² of its parameters by each regression.
    """
    combined = scores.pop("combined", [])
    names = combined[0] if combined else {}
    alone = {task: [fmean(run.values()) for run in runs] for task, runs in scores.items()}
    together = {name: [run[name] for run in combined] for name in names}
    spread: dict[str, dict[str, float]] = {}
    for kind, found in (("alone", alone), ("combined", together)):
        by_seed = [fmean(values) for values in zip(*found.values(), strict=True)]
        if len(by_seed) > 1:
            spread[kind] = {name: stdev(values) for name, values in found.items()}
            spread[kind]["mean"] = stdev(by_seed)
    return PartResult(
        *accuracies,
        alone={name: fmean(values) for name, values in alone.items()},
        combined={name: fmean(values) for name, values in together.items()},
        spread=spread,
    )


def _accuracies(x: Sequence[Any], labels: Sequence[Tensor | None]) -> tuple[float, float]:
    """Return the test accuracies of logistic regression and of nearest neighbours, in percent."""
    y = [known.numpy() for known in labels if known is not None]
    if len(y) < len(labels):
        return math.nan, math.nan
    linear = linear_classifier().fit(x[0], y[0])
    return 100 * linear.score(x[1], y[1]), knn_accuracy(x, y)


def knn_accuracy(x: Sequence[Any], labels: Sequence[Any]) -> float:
    """Return the test accuracy of a 20-nearest-neighbour vote by cosine similarity, in percent."""
    knn = KNeighborsClassifier(n_neighbors=min(20, len(x[0])), metric="cosine")
    return 100 * float(knn.fit(x[0], labels[0]).score(x[1], labels[1]))
