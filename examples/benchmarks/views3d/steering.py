"""Draw what the parts of a feature hold: an object rebuilt in the context of another object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.images import as_input
from benchmarks.pictures import save_pictures
from benchmarks.views3d.data import Objects

# views of an object, next to each other
_VIEWS = 9


@torch.no_grad()
def draw(model: Any, data: Objects, path: Path, device: torch.device) -> None:
    """Save a picture: an object's views, and each rebuilt in three contexts.

    A view is rebuilt from its own equivariant part and the invariant part of the view in the first
    column: first another view of the same object, then views of two objects of other classes.

    Args:
        model: trained, with ``backbone`` and ``recon_aux``.
        data: objects that it wasn't trained on.
        path: of the PNG file.
        device: where the model is.
    """
    encoder, aux = model.backbone.eval(), model.recon_aux.to(device).eval()
    classes = [int((data.labels == label).nonzero()[0]) for label in torch.unique(data.labels)]
    shown = min(data.views - 1, _VIEWS)
    rows, labels = [], []
    for turning in (classes[0], classes[len(classes) // 2]):
        views = torch.stack([data.image(turning, view) for view in range(shown + 1)])
        views = as_input(views).to(device)
        others = [row for row in (classes[1], classes[-1]) if row != turning]
        contexts = [views[-1]]
        contexts += [as_input(data.image(row, 0)).to(device) for row in others]
        features = encoder(views[:-1])
        rows.append([torch.zeros_like(views[0]), *views[:-1]])
        labels.append("context, and views")
        for context, label in zip(contexts, ["rebuilt", *["steered"] * len(others)], strict=True):
            other = encoder(context[None]).expand_as(features)
            rows.append([context, *aux.rebuild(features, other)])
            labels.append(label)
    save_pictures(rows, labels, path)
