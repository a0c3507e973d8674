"""Building shapes out of upright boxes: what the LiDAR hits (parts) and what the cameras draw (quads).

A shape lives in its object's own frame: x forward, y left, z up from the ground (m). Its parts are axis-aligned boxes
in that frame; both sensors see the same boxes, cameras also see flat decals (windows, lights, stripes) painted on them.
"""

from dataclasses import dataclass

import numpy as np

GROUND_CLEARANCE = 0.03
"""Bottom of every annotation box above the ground (m), so that no noisy ground point is ever counted inside one."""

INSET = 0.06
"""Gap (m) between an annotation box and what is solid in it: more than the LiDAR noise, so that points stay inside."""

Span = tuple[float, float]
Colour = tuple[float, float, float]

PAINT, SECOND_PAINT = 1, 2
"""May stand for a colour: each object brings its own paints."""

# Per face: outward normal, then the four corners as (x, y, z) picks of low (0) or high (1) ends. Corner 0 -> 1 is the
# face's u axis and 0 -> 3 its v axis; decals are placed in that (u, v) unit square.
_FACES = {
    "front": ((1, 0, 0), ((1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 0, 1))),
    "back": ((-1, 0, 0), ((0, 1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 1))),
    "left": ((0, 1, 0), ((1, 1, 0), (0, 1, 0), (0, 1, 1), (1, 1, 1))),
    "right": ((0, -1, 0), ((0, 0, 0), (1, 0, 0), (1, 0, 1), (0, 0, 1))),
    "top": ((0, 0, 1), ((0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1))),
    "bottom": ((0, 0, -1), ((0, 1, 0), (1, 1, 0), (1, 0, 0), (0, 0, 0))),
}
SIDES = ("front", "back", "left", "right")


@dataclass(frozen=True)
class Template:
    """The solid boxes and painted quads of a kind of object, in units of its size (see ShapeBuilder).

    parts (P, 6): centre x, centre y, half length, half width, bottom z, top z. reflectivity (P,) in 0..1.
    corners (Q, 4, 3), normals (Q, 3), colours (Q, 3) BGR 0..255, paint (Q,): 0, or which of the object's own paints
    replaces the colour, glow (Q,) bool (a lamp: bright at night), is_decal (Q,) bool, group (Q,): quads of one
    group are drawn together, in this order. group_centres (G, 2) x, y.
    """

    parts: np.ndarray
    reflectivity: np.ndarray
    corners: np.ndarray
    normals: np.ndarray
    colours: np.ndarray
    paint: np.ndarray
    glow: np.ndarray
    is_decal: np.ndarray
    group: np.ndarray
    group_centres: np.ndarray


@dataclass(frozen=True)
class Shape:
    """One object: a template, its scale (3,) x y z (m per unit), bottom (m above the ground) and two paints BGR."""

    template: Template
    scale: tuple[float, float, float]
    bottom: float
    paints: tuple[Colour, Colour]


def fitted(template: Template, size: tuple[float, float, float], paints: tuple[Colour, Colour]) -> Shape:
    """A shape that fills an annotation box of a size (width, length, height; m) but for the inset."""
    width, length, height = (value - 2 * INSET for value in size)
    return Shape(template, (length, width, height), GROUND_CLEARANCE + INSET, paints)


class ShapeBuilder:
    """Collects boxes and decals of a template.

    Of a template of unit size, x and y run from -0.5 to 0.5 over the length and width, and z from 0 to 1 over the
    height.
    """

    def __init__(self):
        self._parts: list[list[float]] = []
        self._reflectivity: list[float] = []
        self._quads: list[tuple[np.ndarray, tuple, Colour, int, bool, bool, int]] = []
        self._centres: list[np.ndarray] = []

    def box(
        self,
        x: Span,
        y: Span,
        z: Span,
        colour: Colour | int,
        *,
        reflectivity: float | None = 0.4,
        faces=(*SIDES, "top"),
        new_group: bool = False,
        decals=(),
    ) -> None:
        """Add a box. decals: (face, (u0, u1), (v0, v1), colour, glow) rectangles painted on its faces.

        new_group starts a separately depth-sorted piece; long objects need several. Only cameras see a
        box whose reflectivity is None.
        """
        low, high = np.array([x[0], y[0], z[0]]), np.array([x[1], y[1], z[1]])
        if reflectivity is not None:
            self._add_part(low, high, reflectivity)
        if new_group or not self._centres:
            self._centres.append((low + high)[:2] / 2)
        for face in faces:
            self._add_quad(low, high, face, (0.0, 1.0), (0.0, 1.0), colour, False)
            for decal_face, u, v, decal_colour, glow in decals:
                if decal_face == face:
                    self._add_quad(low, high, face, u, v, decal_colour, glow)

    def long_box(
        self,
        x: Span,
        y: Span,
        z: Span,
        colour: Colour | int,
        *,
        sections: int,
        reflectivity: float = 0.4,
        decals=(),
        below=(),
    ) -> None:
        """A box that is drawn in several sections along x, but is one box to the LiDAR; side decals repeat on each.

        below: (section, x, y, z, colour, decals) boxes under it, each drawn just before its section: the cameras look
        down on undercarriages, so that whatever is above hides them.
        """
        edges = np.linspace(x[0], x[1], sections + 1)
        for index in range(sections):
            self._centres.append(np.array([(edges[index] + edges[index + 1]) / 2, (y[0] + y[1]) / 2]))
            for section, *spans, low_colour, low_decals in below:
                if section == index:
                    self.box(*spans, low_colour, reflectivity=0.2, decals=low_decals)
            ends = [name for name, at in (("back", 0), ("front", sections - 1)) if index == at]
            self.box(
                (edges[index], edges[index + 1]),
                y,
                z,
                colour,
                faces=(*ends, "left", "right", "top"),
                decals=decals,
                reflectivity=None,
            )
        self._add_part(np.array([x[0], y[0], z[0]]), np.array([x[1], y[1], z[1]]), reflectivity)

    def build(self) -> Template:
        """The finished template."""
        corners, normals, colours, paint, glow, is_decal, group = zip(*self._quads, strict=True)
        return Template(
            parts=np.array(self._parts),
            reflectivity=np.array(self._reflectivity),
            corners=np.array(corners),
            normals=np.array(normals, dtype=np.float64),
            colours=np.array(colours, dtype=np.float64),
            paint=np.array(paint),
            glow=np.array(glow),
            is_decal=np.array(is_decal),
            group=np.array(group),
            group_centres=np.array(self._centres),
        )

    def _add_part(self, low: np.ndarray, high: np.ndarray, reflectivity: float) -> None:
        middle, half = (low + high) / 2, (high - low) / 2
        self._parts.append([middle[0], middle[1], half[0], half[1], low[2], high[2]])
        self._reflectivity.append(reflectivity)

    def _add_quad(
        self, low: np.ndarray, high: np.ndarray, face: str, u: Span, v: Span, colour: Colour | int, glow: bool
    ) -> None:
        normal, picks = _FACES[face]
        full = np.where(np.array(picks, dtype=bool), high, low)
        along_u, along_v = full[1] - full[0], full[3] - full[0]
        corners = np.stack(
            [full[0] + a * along_u + b * along_v for a, b in ((u[0], v[0]), (u[1], v[0]), (u[1], v[1]), (u[0], v[1]))]
        )
        fixed, paint = ((0.0, 0.0, 0.0), colour) if isinstance(colour, int) else (colour, 0)
        is_decal = (u, v) != ((0.0, 1.0), (0.0, 1.0))
        self._quads.append((corners, normal, fixed, paint, glow, is_decal, len(self._centres) - 1))
