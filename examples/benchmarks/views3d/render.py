"""Render a small data set in 3DIEBench's layout: objects turned at random over a coloured floor.

``python examples/benchmarks/views3d/render.py FOLDER`` makes FOLDER/CLASS/OBJECT/image_k.jpg and
latent_k.npy, the lists of train and val objects with their labels, and a contact sheet. Beside
each image is mask_k.png, which 3DIEBench doesn't have: white where the object is. The same command
again adds the masks to a folder that was made without.

The latents are those of Garrido, Najman and LeCun (2023, arXiv 2302.10283, section 4): three
Tait-Bryan angles (radians, extrinsic xyz), the floor's hue, the lamp's theta and phi, its hue.
"""

from __future__ import annotations

import argparse
import colorsys
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyvista as pv
from PIL import Image
from rich.progress import track
from scipy.spatial.transform import Rotation

# let this file be run by its path
sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.options import note_options
from benchmarks.views3d.objects import OBJECTS, make

LOW = np.array([-np.pi / 2] * 3 + [0, 0, 0, 0])
HIGH = np.array([np.pi / 2] * 3 + [1, np.pi / 4, 2 * np.pi, 1])


def spherical(radius: float, theta: float, phi: float) -> np.ndarray:
    """Spherical to Cartesian coordinates."""
    ring = np.sin(theta)
    return radius * np.array([ring * np.cos(phi), ring * np.sin(phi), np.cos(theta)])


class Scene:
    """One object over the floor, in the light of a lamp, seen from above at 45 degrees."""

    def __init__(self, name: str, random: np.random.Generator, size: int) -> None:
        # rendered at twice the size and reduced, against jagged edges
        self.plotter = plotter = pv.Plotter(
            off_screen=True, window_size=[2 * size, 2 * size], lighting="none"
        )
        self.size = size
        hue, saturation = random.uniform(), random.uniform(0.0, 0.5)
        self.parts = [
            plotter.add_mesh(
                surface,
                color=colorsys.hsv_to_rgb(hue, saturation, tint),
                smooth_shading=True,
                split_sharp_edges=True,
                ambient=0.1,
            )
            for surface, tint in make(name, random)
        ]
        floor = pv.Plane(center=(0, 0, -1), i_size=40, j_size=40)
        self.floor: Any = plotter.add_mesh(floor, ambient=0.4)
        self.lamp = pv.Light(positional=True, cone_angle=60, intensity=0.9, exponent=2)
        plotter.add_light(self.lamp)
        plotter.add_light(pv.Light(position=(0, 4, 6), intensity=0.5))
        plotter.camera.position = tuple(spherical(2.9, np.pi / 4, np.pi / 2))
        plotter.camera.focal_point = (0.0, 0.0, 0.0)
        plotter.camera.up = (0.0, 0.0, 1.0)
        plotter.camera.view_angle = 40

    def image(self, latent: np.ndarray) -> Image.Image:
        """Render one view."""
        matrix = np.eye(4)
        matrix[:3, :3] = Rotation.from_euler("xyz", latent[:3]).as_matrix()
        for part in self.parts:
            part.user_matrix = matrix
        self.floor.prop.color = colorsys.hsv_to_rgb(latent[3], 0.6, 0.6)
        self.lamp.position = tuple(spherical(4, latent[4], latent[5]))
        self.lamp.diffuse_color = colorsys.hsv_to_rgb(latent[6], 0.7, 1.0)
        return self._draw()

    def mask(self) -> Image.Image:
        """Render where the object is in the last view: white on black."""
        # the object stands above the floor, which hides nothing of it
        self.floor.visibility = False
        seen = self._draw(transparent_background=True).getchannel("A")
        self.floor.visibility = True
        return seen.point(lambda share: 255 * (share > 127)).convert("1")

    def _draw(self, **options: Any) -> Image.Image:
        self.plotter.render()
        pixels: Any = self.plotter.screenshot(return_img=True, **options)
        return Image.fromarray(pixels).resize((self.size, self.size), Image.Resampling.BOX)


def render_object(root: Path, label: int, index: int, *, views: int, size: int, seed: int) -> Path:
    """Render an object's views, unless they are all there."""
    name = list(OBJECTS)[label]
    folder = root / name / f"{index:04d}"
    if (folder / f"mask_{views - 1}.png").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng([seed, label, index])
    scene = Scene(name, random, size)
    for view in range(views):
        latent = random.uniform(LOW, HIGH)
        scene.image(latent).save(folder / f"image_{view}.jpg", quality=95)
        np.save(folder / f"latent_{view}.npy", latent)
        scene.mask().save(folder / f"mask_{view}.png")
    scene.plotter.close()
    return folder


def render(root: Path, args: argparse.Namespace) -> None:
    """Render every object, in parallel, and write the lists."""
    jobs = [(label, index) for label in range(len(OBJECTS)) for index in range(args.objects)]
    options = {"views": args.views, "size": args.size, "seed": args.seed}
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(render_object, root, *job, **options) for job in jobs]
        for job in track(as_completed(running), "rendering objects", len(running)):
            job.result()
    held_out = max(1, round(args.objects * args.val))
    for split, indices in (
        ("train", range(held_out, args.objects)),
        ("val", range(held_out)),
    ):
        chosen = [(f"/{name}/{i:04d}", k) for k, name in enumerate(OBJECTS) for i in indices]
        np.save(root / f"{split}_images.npy", np.array([path for path, _ in chosen]))
        np.save(root / f"{split}_labels.npy", np.array([label for _, label in chosen]))


def contact_sheet(root: Path, size: int, columns: int = 12) -> Path:
    """Put some views of the first objects of each class on one sheet."""
    sheet = Image.new("RGB", (columns * size, len(OBJECTS) * size))
    for row, name in enumerate(OBJECTS):
        images = [
            path
            for folder in sorted((root / name).iterdir())
            for path in sorted(folder.glob("image_*.jpg"))[: columns // 4]
        ]
        for column, path in enumerate(images[:columns]):
            sheet.paste(Image.open(path), (column * size, row * size))
    path = root / "contact_sheet.png"
    sheet.save(path)
    return path


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path)
    add("--objects", type=int, default=60, help="of each class")
    add("--views", type=int, default=50, help="of each object")
    add("--size", type=int, default=64, help="side of an image, in pixels")
    add("--val", type=float, default=0.2, help="share of the objects that are held out")
    add("--seed", type=int, default=0)
    add("--workers", type=int, help="processes; as many as there are cores if not given")
    args = parser.parse_args()
    note_options(args.folder, args)
    render(args.folder, args)
    sheet = contact_sheet(args.folder, args.size)
    print(f"rendered {len(OBJECTS) * args.objects} objects; look at {sheet}")


if __name__ == "__main__":
    main()
