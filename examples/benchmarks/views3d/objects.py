"""Objects composed of parts with random proportions, none with a rotational symmetry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyvista as pv

Part = tuple[pv.PolyData, float]
"""A surface, and how bright it is in the object's own colour, from 0 to 1."""

Random = np.random.Generator
Point = tuple[float, float, float]


def box(center: Point, size: Point, tint: float = 0.8) -> Part:
    """A box."""
    x, y, z = size
    return pv.Cube(center=center, x_length=x, y_length=y, z_length=z), tint


def rod(start: Point, end: Point, radius: float, tint: float = 0.8) -> Part:
    """A cylinder from one point to another."""
    return pv.Cylinder(radius=radius, resolution=24, **_between(start, end)), tint


def ball(center: Point, radii: Point, tint: float = 0.8) -> Part:
    """An ellipsoid."""
    sphere = pv.Sphere(radius=1.0, theta_resolution=24, phi_resolution=24)
    return sphere.scale(radii).translate(center), tint


def cone(base: Point, tip: Point, radius: float, tint: float = 0.8) -> Part:
    """A cone."""
    return pv.Cone(radius=radius, resolution=24, **_between(base, tip)), tint


def _between(start: Point, end: Point) -> dict[str, Any]:
    a, b = np.array(start), np.array(end)
    return {"center": (a + b) / 2, "direction": b - a, "height": float(np.linalg.norm(b - a))}


def ring(center: Point, radius: float, thickness: float, normal: str, tint: float = 0.6) -> Part:
    """A torus around the x, y or z axis."""
    torus = pv.ParametricTorus(radius, thickness, u_res=32, v_res=16, w_res=2)
    turned = {"z": torus, "x": torus.rotate_y(90), "y": torus.rotate_x(90)}[normal]
    return turned.translate(center), tint


def chair(r: Random) -> list[Part]:
    w, d, h, back = r.uniform(0.5, 0.8), r.uniform(0.5, 0.8), r.uniform(0.4, 0.8), r.uniform(0.5, 1)
    leg = r.uniform(0.03, 0.07)
    parts = [box((0, 0, h), (w, d, 0.08)), box((0, -d / 2, h + back / 2), (w, 0.06, back), 0.6)]
    for x in (-1, 1):
        for y in (-1, 1):
            corner = (x * (w / 2 - leg), y * (d / 2 - leg))
            parts.append(rod((*corner, 0), (*corner, h), leg, 0.4))
    # one armrest
    parts.append(box((w / 2, 0, h + 0.25), (0.08, d, 0.06), 0.9))
    return [*parts, rod((w / 2, d / 3, h), (w / 2, d / 3, h + 0.25), leg * 0.7, 0.4)]


def table(r: Random) -> list[Part]:
    w, d, h = r.uniform(0.9, 1.4), r.uniform(0.5, 0.8), r.uniform(0.5, 0.8)
    leg, drawer = r.uniform(0.03, 0.07), r.uniform(0.2, 0.4)
    parts = [box((0, 0, h), (w, d, 0.07))]
    for x in (-1, 1):
        for y in (-1, 1):
            corner = (x * (w / 2 - leg), y * (d / 2 - leg))
            parts.append(rod((*corner, 0), (*corner, h), leg, 0.5))
    # drawers on one side, which open to the front
    parts.append(box((w / 2 - drawer / 2, 0, h - 0.2), (drawer, d * 0.9, 0.35), 0.65))
    return [*parts, ball((w / 2 - drawer / 2, d / 2, h - 0.2), (0.05, 0.05, 0.05), 1.0)]


def mug(r: Random) -> list[Part]:
    radius, h, handle = r.uniform(0.3, 0.5), r.uniform(0.6, 1.0), r.uniform(0.18, 0.3)
    parts = [rod((0, 0, 0), (0, 0, h), radius), ring((radius, 0, h * 0.55), handle, 0.06, "y")]
    parts.append(rod((0, 0, h), (0, 0, h + 0.01), radius * 0.88, 0.2))
    # a teabag's label hangs out on another side
    label = (0, radius * 1.03, h - r.uniform(0.2, 0.4))
    return [*parts, box(label, (0.16, 0.03, 0.2), 1.0)]


def lamp(r: Random) -> list[Part]:
    h, reach, drop = r.uniform(0.6, 0.9), r.uniform(0.4, 0.8), r.uniform(0.0, 0.3)
    base, shade = r.uniform(0.2, 0.35), r.uniform(0.18, 0.3)
    elbow: Point = (-0.2, 0, h)
    head: Point = (reach, 0, h + 0.3 - drop)
    parts = [rod((0, 0, 0), (0, 0, 0.06), base, 0.4), rod((0, 0, 0), elbow, 0.035, 0.6)]
    parts += [rod(elbow, head, 0.035, 0.6), ball(elbow, (0.06, 0.06, 0.06), 0.3)]
    parts.append(cone((reach, 0, head[2] - 0.25), (reach, 0, head[2] + 0.1), shade, 0.95))
    return [*parts, box((0, base * 0.7, 0.08), (0.1, 0.08, 0.06), 1.0)]


def aeroplane(r: Random) -> list[Part]:
    length, span, body = r.uniform(1.2, 1.6), r.uniform(0.9, 1.5), r.uniform(0.1, 0.16)
    sweep, tail = r.uniform(-0.1, 0.2), r.uniform(0.3, 0.5)
    parts = [rod((-length / 2, 0, 0), (length / 2, 0, 0), body)]
    parts.append(cone((length / 2, 0, 0), (length / 2 + 0.25, 0, 0), body, 0.6))
    parts.append(box((0.1 - sweep, 0, 0), (0.3, span, 0.04), 0.6))
    parts.append(box((-length / 2 + 0.1, 0, 0), (0.18, tail, 0.03), 0.6))
    parts.append(box((-length / 2 + 0.1, 0, 0.18), (0.2, 0.03, 0.3), 0.4))
    return [*parts, ball((length / 4, 0, body), (0.18, 0.08, 0.08), 0.2)]


def car(r: Random) -> list[Part]:
    length, w, h = r.uniform(1.1, 1.5), r.uniform(0.5, 0.65), r.uniform(0.2, 0.3)
    cabin, wheel = r.uniform(0.4, 0.7), r.uniform(0.12, 0.17)
    parts = [box((0, 0, h), (length, w, h)), box((-0.12, 0, 1.8 * h), (cabin, w * 0.9, 0.22), 0.35)]
    for x in (-1, 1):
        for y in (-1, 1):
            hub = (x * length * 0.3, y * w / 2)
            parts.append(rod((*hub, wheel), (hub[0], hub[1] + y * 0.08, wheel), wheel, 0.15))
    for y in (-1, 1):
        parts.append(ball((length / 2, y * w * 0.3, h * 1.1), (0.04, 0.07, 0.06), 1.0))
    return parts


def sofa(r: Random) -> list[Part]:
    w, d, h = r.uniform(0.9, 1.5), r.uniform(0.45, 0.65), r.uniform(0.2, 0.35)
    parts = [box((0, 0, h / 2), (w, d, h)), box((0, -d / 2, h), (w, 0.15, h * 2), 0.6)]
    parts += [box((x * w / 2, 0, h * 0.8), (0.14, d, h * 1.4), 0.7) for x in (-1, 1)]
    # a footstool before one end
    return [*parts, box((w * 0.3, d, h * 0.4), (w * 0.35, d * 0.8, h * 0.8), 0.9)]


def bed(r: Random) -> list[Part]:
    w, length, h = r.uniform(0.6, 1.0), r.uniform(1.1, 1.4), r.uniform(0.15, 0.3)
    head = r.uniform(0.4, 0.7)
    parts = [box((0, 0, h), (w, length, 0.2), 0.9)]
    parts.append(box((0, -length / 2, head / 2), (w, 0.06, head), 0.4))
    parts.append(box((0, length / 2, h), (w, 0.06, h * 2), 0.4))
    parts.append(box((-w * 0.2, -length * 0.35, h + 0.14), (w * 0.4, 0.25, 0.1), 1.0))
    # a bedside table
    return [*parts, box((w * 0.5 + 0.2, -length * 0.4, h * 0.7), (0.3, 0.3, h * 1.4), 0.6)]


def boat(r: Random) -> list[Part]:
    length, w, mast = r.uniform(1.0, 1.4), r.uniform(0.3, 0.45), r.uniform(0.8, 1.2)
    parts = [
        ball((0, 0, 0), (length / 2, w / 2, 0.16)),
        box((-0.2, 0, 0.15), (0.35, 0.25, 0.2), 0.5),
    ]
    parts.append(rod((0.1, 0, 0), (0.1, 0, mast), 0.025, 0.3))
    sail = pv.Triangle([(0.08, 0.02, 0.25), (0.08, 0.02, mast), (-length * 0.45, 0.12, 0.25)])
    jib = pv.Triangle([(0.13, -0.02, 0.2), (0.13, -0.02, mast * 0.9), (length * 0.45, -0.1, 0.2)])
    return [*parts, (sail, 1.0), (jib, 0.8)]


def guitar(r: Random) -> list[Part]:
    w, neck, hole = r.uniform(0.3, 0.42), r.uniform(0.7, 1.0), r.uniform(0.08, 0.12)
    parts = [ball((0, 0, 0), (w, 0.1, 0.32)), ball((0, 0, 0.35), (w * 0.75, 0.1, 0.25))]
    parts.append(box((0, 0.06, 0.5 + neck / 2), (0.08, 0.05, neck), 0.4))
    parts.append(box((0.02, 0.04, 0.5 + neck), (0.16, 0.05, 0.2), 0.3))
    parts.append(rod((0, 0.09, 0.1), (0, 0.11, 0.1), hole, 0.1))
    # the cutaway's horn, on one side alone
    return [*parts, ball((w * 0.7, 0, 0.5), (0.1, 0.08, 0.14), 0.7)]


def hammer(r: Random) -> list[Part]:
    length, head, radius = r.uniform(0.9, 1.4), r.uniform(0.3, 0.5), r.uniform(0.09, 0.15)
    parts = [rod((0, 0, 0), (0, 0, length), 0.05, 0.9)]
    parts.append(rod((0, 0, length), (head, 0, length), radius, 0.4))
    parts.append(cone((0, 0, length), (-head * 0.9, 0, length - 0.12), radius, 0.4))
    return [
        *parts,
        ring((0, 0.1, 0.05), 0.08, 0.02, "x", 0.2),
        box((0, -0.06, 0.3), (0.1, 0.04, 0.3), 0.2),
    ]


def watering_can(r: Random) -> list[Part]:
    radius, h, spout = r.uniform(0.28, 0.4), r.uniform(0.5, 0.8), r.uniform(0.5, 0.8)
    parts = [rod((0, 0, 0), (0, 0, h), radius), ring((-radius, 0, h * 0.6), 0.22, 0.04, "y", 0.4)]
    tip = (radius + spout, 0, h + r.uniform(-0.1, 0.15))
    parts += [rod((radius * 0.9, 0, 0.15), tip, 0.05, 0.6), ball(tip, (0.1, 0.1, 0.1), 0.9)]
    return [*parts, box((0, radius, h * 0.5), (0.2, 0.03, 0.25), 1.0)]


def camera(r: Random) -> list[Part]:
    w, h, lens = r.uniform(0.7, 1.0), r.uniform(0.45, 0.6), r.uniform(0.15, 0.23)
    reach = r.uniform(0.2, 0.5)
    parts = [box((0, 0, 0), (w, 0.3, h)), rod((0.05, 0.15, 0), (0.05, 0.15 + reach, 0), lens, 0.3)]
    parts.append(rod((0.05, 0.15 + reach, 0), (0.05, 0.17 + reach, 0), lens * 0.8, 0.9))
    parts.append(box((-w * 0.25, 0, h / 2 + 0.08), (0.25, 0.2, 0.16), 0.6))
    return [*parts, rod((w * 0.35, 0, h / 2), (w * 0.35, 0, h / 2 + 0.08), 0.07, 1.0)]


def tricycle(r: Random) -> list[Part]:
    front, back, length = r.uniform(0.25, 0.35), r.uniform(0.14, 0.2), r.uniform(0.6, 0.9)
    parts = [ring((length, 0, front), front, 0.05, "y", 0.2)]
    parts += [ring((0, y, back), back, 0.05, "y", 0.2) for y in (-0.3, 0.3)]
    parts += [
        rod((0, -0.3, back), (0, 0.3, back), 0.03, 0.5),
        rod((0, 0, back), (length, 0, 0.65), 0.04),
    ]
    parts += [rod((length, 0, front), (length - 0.1, 0, 0.85), 0.03, 0.5)]
    parts.append(rod((length - 0.1, -0.28, 0.85), (length - 0.1, 0.28, 0.85), 0.03, 0.9))
    return [
        *parts,
        box((0.15, 0, 0.5), (0.25, 0.2, 0.08), 0.4),
        ball((length - 0.1, 0.28, 0.9), (0.07,) * 3, 1.0),
    ]


OBJECTS: dict[str, Callable[[Random], list[Part]]] = {
    function.__name__: function
    for function in (
        aeroplane, bed, boat, camera, car, chair, guitar, hammer, lamp, mug, sofa, table, tricycle,
        watering_can,
    )
}  # fmt: skip
"""Makers of the classes' objects, in the order of their labels."""


def make(name: str, random: Random) -> list[Part]:
    """Make an object of a class, around the origin, with its farthest point at a distance of 0.85.

    Args:
        name: one of :data:`OBJECTS`.
        random: of its proportions.

    Returns:
        Its parts.
    """
    parts = OBJECTS[name](random)
    points = np.concatenate([surface.points for surface, _ in parts])
    middle = (points.min(0) + points.max(0)) / 2
    scale = 0.85 / np.linalg.norm(points - middle, axis=1).max()
    return [(surface.translate(-middle).scale(scale), tint) for surface, tint in parts]
