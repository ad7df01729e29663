"""Masks of the rendered objects, and what a linear map draws of them from frozen features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation
from torch import Tensor

from helpers.running import call_example, render_objects, rows

pytest.importorskip("pyvista", reason="the extra views3d is not installed")

from benchmarks.encoders import small_resnet18
from benchmarks.images import as_input, encode
from benchmarks.views3d import compare, render, segmentation
from benchmarks.views3d.segmentation import MAP, MEANS, POOLED, mean_iou


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_objects(tmp_path_factory.mktemp("objects"))


@pytest.mark.parametrize("name", ["car", "guitar", "mug"])
def test_a_mask_is_where_the_object_hides_the_floor(name: str) -> None:
    random = np.random.default_rng(0)
    scene = render.Scene(name, random, 64)
    for _ in range(3):
        latent = random.uniform(render.LOW, render.HIGH)
        image = np.asarray(scene.image(latent), float)
        mask = np.asarray(scene.mask())
        # the mask leaves the scene as it was
        assert np.array_equal(np.asarray(scene.image(latent), float), image)
        for part in scene.parts:
            part.visibility = False
        floor = np.asarray(scene.image(latent), float)
        for part in scene.parts:
            part.visibility = True
        hidden = np.abs(image - floor).max(-1)
        assert mask.any()
        # pixels at the edge show both
        assert (hidden[~binary_dilation(mask, iterations=2)] == 0).all()
        assert (hidden[mask] > 4).mean() > 0.9
    scene.plotter.close()


def test_masks_are_added_to_a_folder_that_was_made_without(tmp_path: Path) -> None:
    options: dict[str, Any] = {"views": 2, "size": 32, "seed": 0}
    made = render.render_object(tmp_path, 4, 1, **options)
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    assert {"mask_0.png", "mask_1.png"} <= files.keys()
    for view in range(2):
        (made / f"mask_{view}.png").unlink()
    render.render_object(tmp_path, 4, 1, **options)
    assert {path.name: path.read_bytes() for path in made.iterdir()} == files


def test_images_and_masks_belong_together(folder: Path) -> None:
    images, masks = segmentation.read(folder, "val", size=32, views=4)
    assert images.shape == (14 * 4, 3, 32, 32)
    assert masks.shape == (14 * 4, 32, 32)
    # on the floor at the border, colours hardly change; at the mask's edge they do
    x = as_input(images)
    step = (x[..., 1:] - x[..., :-1]).abs().sum(1)
    edge = masks[..., 1:] != masks[..., :-1]
    assert step[edge].mean() > 5 * step[~edge & ~masks[..., 1:]].mean()
    small = segmentation.read(folder, "val", size=16, views=4)[1]
    assert small.shape[1:] == (16, 16)
    assert small.float().mean() == pytest.approx(masks.float().mean().item(), rel=0.1)


def test_objects_without_masks_are_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith("mask"):
            target = tmp_path / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(path)
    with pytest.raises(SystemExit, match=r"expected mask_0\.png in .* Run render\.py again"):
        segmentation.read(tmp_path, "val", size=32, views=4)


def test_the_mean_iou_in_closed_form() -> None:
    mask = np.array([True, True, False, False])
    assert mean_iou(mask, mask) == 100
    assert mean_iou(mask, ~mask) == 0
    # the object: 1 of 2 pixels; the background: 2 of 3
    assert mean_iou(mask, np.array([True, False, False, False])) == pytest.approx(100 * 7 / 12)


def blobs(count: int) -> Tensor:
    """Masks ``(N, 8, 8)``: the left or the right half, and pixels of their own."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.rand(count, 1, 1, generator=generator) < 0.8
    halves = (torch.arange(8) < 4).expand(count, 8, 8) == sides
    return halves ^ (torch.rand(count, 8, 8, generator=generator) < 0.2)


def test_a_map_that_is_the_mask_gives_all_and_an_ignorant_one_the_mean_mask() -> None:
    masks = blobs(600).split([400, 200])
    maps = [mask[:, None].float() for mask in masks]
    found, drawn = segmentation.measure((maps[0], maps[1]), (masks[0], masks[1]))
    assert found[MAP] == 100
    assert torch.equal(drawn, masks[1])
    # a mask's size says little of where it is
    assert found[POOLED] < 80
    # four of five are the left half, a fifth of their pixels is wrong
    mean_mask = (torch.arange(8) < 4).expand(200, 8, 8)
    assert found[MEANS] == mean_iou(masks[1], mean_mask) < 60
    same = [torch.ones(len(mask), 3, 2, 2) for mask in masks]
    ignorant, _ = segmentation.measure((same[0], same[1]), (masks[0], masks[1]))
    assert ignorant[MAP] == ignorant[POOLED] == ignorant[MEANS] == found[MEANS]


def test_maps_are_what_the_encoder_pools() -> None:
    encoder = small_resnet18(8, stride=2).eval()
    assert isinstance(encoder, torch.nn.Sequential)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    maps = encode(encoder[:-2], images, torch.device("cpu"))
    assert maps.shape == (5, 64, 2, 2)
    torch.testing.assert_close(maps.mean((2, 3)), encoder(as_input(images)))


def test_every_encoder_of_a_comparison_is_measured(folder: Path, tmp_path: Path) -> None:
    options: list[Any] = ["--seeds", "0", "--steps", "1", "--batch-size", "8", "--width", "8"]
    options += ["--size", "32", "--views", "4", "--mlp-steps", "2", "--device", "cpu"]
    arms = ["VICReg", "VICReg + recon_aux"]
    call_example(compare.main, folder, *options, "--out", tmp_path, "--arms", *arms)
    printed = call_example(segmentation.main, tmp_path, folder, "--device", "cpu")
    out = tmp_path / "segmentation"
    records = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    assert [record["arm"] for record in records] == arms
    assert all(record["trained"]["options"]["steps"] == "1" for record in records)
    head, *shown = rows(printed)
    assert head[2:] == [MAP, POOLED, MEANS]
    for record, row in zip(records, shown, strict=True):
        assert row[2:] == [f"{record['results'][key]:.2f}" for key in head[2:]]
        assert 40 < record["results"][MAP] < 100
    drawn = {path.stem for path in out.glob("*.png")}
    assert drawn == {"table", *(path.stem for path in out.glob("*.json"))}
