"""The objects, their views and the comparison with SIE: a small version of each."""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import nn

from helpers.running import call_example, fail_once, render_objects, rows

pytest.importorskip("pyvista", reason="the extra views3d is not installed")
from lightly.loss.vicreg_loss import covariance_loss

from benchmarks.sie import SIE, HyperPredictor, variance_loss
from benchmarks.views3d import compare, render
from benchmarks.views3d.data import Objects, targets
from benchmarks.views3d.objects import OBJECTS, make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_objects(tmp_path_factory.mktemp("objects"))


def test_the_layout_is_3diebenchs(folder: Path) -> None:
    images, labels = (np.load(folder / f"train_{name}.npy") for name in ("images", "labels"))
    assert len(images) == len(labels) == len(OBJECTS) == 14
    assert images[0].startswith("/")
    latents = np.stack([np.load(path) for path in folder.glob("*/*/latent_*.npy")])
    assert latents.shape == (14 * 2 * 4, 7)
    low, high = [-np.pi / 2] * 3 + [0] * 4, [np.pi / 2] * 3 + [1, np.pi / 4, 2 * np.pi, 1]
    assert (latents >= low).all()
    assert (latents <= high).all()
    assert (folder / "contact_sheet.png").is_file()
    assert not set(images) & set(np.load(folder / "val_images.npy"))


def test_views_are_the_same_again_and_differ_from_each_other(folder: Path, tmp_path: Path) -> None:
    for label in (0, 5):
        again = render.render_object(tmp_path, label, 0, views=4, size=32, seed=0)
        first = folder / again.relative_to(tmp_path)
        files, expected = (
            {path.name: path.read_bytes() for path in one.iterdir()} for one in (again, first)
        )
        assert files == expected
    ours = Objects(folder, "train", size=32, views=4)
    assert ours.images is not None
    views = ours.images.flatten(0, 1).float()
    assert all((a - b).abs().mean() > 1 for a, b in pairwise(views))
    # the object stands out from the floor, in the middle
    assert (views[:, :, 12:20, 12:20].std((2, 3)).mean(1) > 1).float().mean() > 0.9


def test_a_folder_of_other_objects_is_refused(folder: Path) -> None:
    with pytest.raises(SystemExit, match=r"--views 4, not 50, --size 32, not 64, --val 0.5, not"):
        call_example(render.main, folder, "--objects", "2", "--size", "64")


def test_a_folder_without_objects_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"expected .*train_images\.npy, as render\.py makes it"):
        Objects(tmp_path, "train")


def test_a_pairs_target_is_what_changed(folder: Path) -> None:
    data = Objects(folder, "val", size=32, views=4, cached=False)
    torch.manual_seed(0)
    (x0, x1), (label, target) = data[3]
    assert x0.shape == x1.shape == (3, 32, 32)
    assert label == 3
    latents = data.latents[3]
    changes = [
        targets(latents[i : i + 1], latents[j : j + 1])[0]
        for i in range(4)
        for j in range(4)
        if i != j
    ]
    assert any(torch.equal(target, change) for change in changes)
    start, end = (Rotation.from_euler("xyz", latents[i, :3]) for i in (0, 1))
    turned = start * Rotation.from_quat(changes[0][:4].numpy())
    np.testing.assert_allclose(turned.as_matrix(), end.as_matrix(), atol=1e-6)
    np.testing.assert_allclose(changes[0][4:], (latents[1] - latents[0])[[3, 6]], atol=1e-6)


@pytest.mark.parametrize("name", OBJECTS)
def test_no_object_looks_the_same_after_a_turn(name: str) -> None:
    parts = make(name, np.random.default_rng(0))
    points = np.concatenate([part.points for part, _ in parts])
    assert np.linalg.norm(points, axis=1).max() == pytest.approx(0.85, abs=1e-3)

    def occupied(matrix: Any) -> set[tuple[int, ...]]:
        return {tuple(point) for point in np.round(points @ matrix.T / 0.15).astype(int)}

    still = occupied(np.eye(3))
    for axis in "xyz":
        for degrees in (90, 180, 270):
            turned = occupied(Rotation.from_euler(axis, degrees, degrees=True).as_matrix())
            assert len(still & turned) < 0.95 * len(still)


def test_sies_predictor_is_linear_in_the_change_and_in_the_embedding() -> None:
    predictor = HyperPredictor(8)
    nn.init.normal_(predictor.products.weight)
    x, change = torch.randn(4, 8), torch.randn(4, 4)
    hypernetwork = predictor.products.weight.view(8, 4, 8)
    expected = torch.einsum("ikj, bk, bj -> bi", hypernetwork, change, x)
    torch.testing.assert_close(predictor(x, change), expected)
    torch.testing.assert_close(predictor(2 * x, 3 * change), 6 * expected)


def test_sies_predictor_begins_as_if_nothing_turned() -> None:
    x, still = torch.randn(4, 8), torch.tensor([[0.0, 0.0, 0.0, 1.0]]).expand(4, 4)
    assert torch.equal(HyperPredictor(8)(x, still), x)


def test_sies_variance_and_covariance_in_closed_form() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert variance_loss(x).item() == pytest.approx((1 - 0.5001**0.5) / 2, abs=1e-6)
    # both covariances are 0.5, over two channels
    assert covariance_loss(x).item() == pytest.approx(0.25)
    assert variance_loss(10 * x).item() == 0


class Turn(nn.Module):
    """Predicts the second view's orientation, a matrix, from the first's and what changed."""

    def forward(self, embedding: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        turned = Rotation.from_matrix(embedding.unflatten(1, (3, 3)).numpy())
        turned = turned * Rotation.from_quat(change.numpy())
        return torch.from_numpy(turned.as_matrix()).float().flatten(1)


def test_of_many_objects_fewer_pairs_each_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Objects(folder, "val", size=32, views=4, cached=False)
    monkeypatch.setattr(compare, "_MANY_PAIRS", 3 * len(data) + 1)
    rows, first, second = compare.pairs(data, 60, seed=0)
    assert np.bincount(rows).tolist() == [3] * len(data)
    assert (first != second).all()


def test_right_predictions_are_retrieved_and_collapsed_ones_are_not(folder: Path) -> None:
    data = Objects(folder, "val", size=32, views=4, cached=False)
    model: Any = SIE(nn.Identity(), 10, 1e-3)
    model.heads[1], model.predictor = nn.Identity(), Turn()
    turned = Rotation.from_euler("xyz", data.latents[..., :3].reshape(-1, 3)).as_matrix()
    features = torch.from_numpy(turned).float().view(len(data), 4, 9)
    features = torch.cat([torch.zeros(len(data), 4, 5), features], dim=-1)
    assert compare.retrieve(model, features, data) == {"MRR": 1, "H@1": 1, "H@5": 1}
    same = features[:1, :1].expand_as(features)
    model.predictor = HyperPredictor(9)
    assert compare.retrieve(model, same, data)["H@1"] == 0


def test_what_changed_is_read_from_features_that_hold_it(folder: Path) -> None:
    splits = [Objects(folder, name, size=32, views=4, cached=False) for name in ("train", "val")]
    data = splits[0], splits[1]
    first, second = (torch.from_numpy(objects.latents).float() for objects in data)
    read = compare.measure((first, second), data, torch.device("cpu"), steps=100)
    assert read["color linear"] > 0.99
    assert read["color mlp"] > 0.95
    assert read["rotation mlp"] > 0.4
    mixed = second.flatten(0, 1)[torch.randperm(second[..., 0].numel())].view_as(second)
    read = compare.measure((first, mixed), data, torch.device("cpu"), steps=10)
    assert max(read["color linear"], read["color mlp"], read["rotation mlp"]) < 0.5


def test_the_comparison_makes_a_table_and_goes_on_where_it_was(
    folder: Path, tmp_path: Path
) -> None:
    options = ["--out", tmp_path, "--seeds", "0", "--steps", "2", "--batch-size", "8"]
    options += ["--width", "8", "--size", "32", "--views", "4", "--device", "cpu"]
    options += ["--mlp-steps", "2"]
    arms = ["VICReg", "SIE, dim=16, change_dim=6", "VICReg + recon_aux, edges=1", "supervised"]
    call_example(compare.main, folder, *options, "--arms", *arms[:2])
    first = (tmp_path / "SIE-dim=16-change_dim=6-0.json").read_text()
    call_example(compare.main, folder, *options, "--arms", *arms)
    assert (tmp_path / "SIE-dim=16-change_dim=6-0.json").read_text() == first
    shown = [row[0] for row in rows((tmp_path / "table.md").read_text())[1:]]
    parts = ["whole", "invariant", "equivariant"]
    split = [f"{arm}, {part}" for arm in arms[1:3] for part in parts]
    assert sorted(shown) == sorted(["VICReg, whole", *split, "supervised, whole"])
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["VICReg-recon_aux-edges=1-0.png", "table.png"]
    assert {"MRR", "H@1"} <= json.loads(first)["results"]["whole"].keys()
    attached = json.loads((tmp_path / "VICReg-recon_aux-edges=1-0.json").read_text())
    assert attached["recon_aux"]["edges"] == 1
    assert attached["recon_aux"]["weight"] == 0.3


def test_an_interrupted_arm_goes_on_from_its_last_tenth(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = argparse.Namespace(
        steps=20,
        batch_size=8,
        width=8,
        lr=1e-3,
        workers=0,
        precision="32-true",
        device="cpu",
    )
    data = Objects(folder, "train", size=32, views=4)
    begun = fail_once(monkeypatch, compare.Supervised, at=6)
    path = tmp_path / "supervised.json"
    with pytest.raises(OSError, match="the power went"):
        compare.train("supervised", data, 0, path, args)
    last = tmp_path / "supervised" / "checkpoints" / "last.ckpt"
    saved = torch.load(last)
    saved["callbacks"]["Timer"]["time_elapsed"]["train"] += 1000
    torch.save(saved, last)
    _, seconds = compare.train("supervised", data, 0, path, args)
    assert begun == [*range(6), *range(4, 20)]
    assert seconds > 1000
    # with its record gone, it isn't trained again
    model, again = compare.train("supervised", data, 0, path, args)
    assert 1000 < again <= seconds
    assert len(begun) == 6 + 16
    trained = torch.load(last)["state_dict"]
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
