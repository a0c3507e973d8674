"""What cameras see of a scene's objects: coloured polygons in painting order.

All views of a sample are worked out together, their rows end to end, because for so few numbers the calls cost more
than the arithmetic. Coordinates are float32 metres from the row's own camera along the global axes; corners of quads
are (4, q) arrays of one coordinate each.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cmt_aqr.synthetic.backdrop import Light, headlight_gain
from cmt_aqr.synthetic.scenes import NO_LABEL, Scene

NEAR = 0.4
"""Nothing nearer (m) than this in front of a camera is drawn; quads are cut there."""

MIN_FACE_AREA, MIN_DECAL_AREA = 0.6, 3.0
"""Faces and decals smaller than this (square pixels) are left out."""

MIN_SHADOW_ROWS = 1.0

SUBPIXEL_BITS = 4
"""Binary places of the polygons' coordinates."""

MAX_MARKS = 255

_FAR_PIXELS = 1e5
_SHADOW_HEIGHT = 0.02
_SHADOW_LEVEL = 0.45
_SHADOW_MARGIN = 0.12
_SUN = np.array([0.55, -0.35, 0.75]) / np.linalg.norm([0.55, -0.35, 0.75])
"""Direction to the sun in the global frame."""

Window = tuple[slice, slice]


@dataclass(frozen=True)
class Viewpoints:
    """V cameras at their time stamps. axes (V, 3, 3): camera axes as columns in the global frame; position (V, 3) and
    offset (V, 3): metres from the global and from the ego's origin, along the global axes; yaw (V,): the ego's, rad;
    pinhole (V, 4): fx, cx, fy, cy (px); half_view (V,): greatest angle of a ray from the axis, level, rad."""

    axes: np.ndarray
    position: np.ndarray
    offset: np.ndarray
    yaw: np.ndarray
    pinhole: np.ndarray
    half_view: np.ndarray


@dataclass(frozen=True)
class PaintList:
    """What to paint in one image, in this order: shadows, then quads, far to near.

    actors (n,): scene indices of the actors that may be in view. Polygons (m, 2) are int32 pixels in units of 2 **
    -SUBPIXEL_BITS; colours are BGR and a mark: 0, or 1 to MAX_MARKS for a group of quads of a labelled actor.
    mark_owner (256,): index into actors for each mark, or -1. last_of_group: for each quad None or, for the last of a
    marked group, the group's mark and the rows and columns of the counting grid that it can cover.
    """

    actors: np.ndarray
    shadows: list[tuple[np.ndarray, list[float]]]
    polygons: list[np.ndarray]
    colours: list[list[float]]
    mark_owner: np.ndarray
    last_of_group: list[tuple[int, Window] | None]


class Projector:
    """Projects the objects of one scene into images of one size (width, height), lit by the scene's light.

    grid_step: one pixel in so many, in both directions, is on the counting grid.
    """

    def __init__(self, scene: Scene, image_size: tuple[int, int], light: Light, grid_step: int):
        self._scene, self._size, self._light, self._grid_step = scene, image_size, light, grid_step
        self._planes = np.empty((4, len(scene.normals)), dtype=np.float32)
        self._planes[:3] = scene.normals.T
        self._planes[3] = (scene.normals * scene.corners[:, 0]).sum(-1)
        self._corners = scene.corners.transpose(2, 1, 0).astype(np.float32, order="C")
        self._min_area = np.where(scene.is_decal, MIN_DECAL_AREA, MIN_FACE_AREA)
        self._group_centres = scene.group_centres.T.astype(np.float32, order="C")
        self._first_quad = np.searchsorted(scene.quad_actor, np.arange(len(scene.s) + 1))

    def paint_lists(self, viewpoints: Viewpoints, actors: np.ndarray, poses: np.ndarray) -> list[PaintList]:
        """One paint list per viewpoint. actors (n,): scene indices; poses (V, n, 3): theirs at its time stamp."""
        views = np.arange(len(viewpoints.axes) + 1)
        placed = self._in_view(viewpoints, actors, poses)
        shadows = self._shadows(placed, viewpoints)
        quads = self._visible_quads(placed, viewpoints)
        marks = self._marks(quads, placed, len(views) - 1)
        polygons = list(_fixed_point(*quads.pixels))
        for index in np.flatnonzero(quads.is_cut):
            polygons[index] = _clipped(quads.corners[:, :, index], quads.view[index], viewpoints)
        colours = np.column_stack([self._shade(quads, placed, viewpoints), marks]).tolist()
        last_of_group = self._last_of_groups(quads, marks)
        quad_bounds, row_bounds = (np.searchsorted(rows.view, views).tolist() for rows in (quads, placed))
        paint_lists = []
        for view in views[:-1]:
            own = slice(*quad_bounds[view : view + 2])
            first, end = row_bounds[view : view + 2]
            owner = np.full(MAX_MARKS + 1, -1)
            owner[marks[own]] = quads.row[own] - first
            owner[0] = -1
            paint_lists.append(
                PaintList(
                    placed.actor[first:end], shadows[view], polygons[own], colours[own], owner, last_of_group[own]
                )
            )
        return paint_lists

    def _in_view(self, viewpoints: Viewpoints, actors: np.ndarray, poses: np.ndarray) -> "_Placed":
        """Those of actors (n,) that may be in each image, by their distance and direction on the ground."""
        radius = self._scene.radius[actors]
        x, y = poses[..., 0] - viewpoints.position[:, :1], poses[..., 1] - viewpoints.position[:, 1:2]
        axis_x, axis_y = (viewpoints.axes[:, :2, 2] / np.hypot(*viewpoints.axes[:, :2, 2].T)[:, None]).T[..., None]
        forward, aside = x * axis_x + y * axis_y, np.abs(x * axis_y - y * axis_x)
        # Distance to the nearer of the two planes that bound the view.
        beyond = aside * np.cos(viewpoints.half_view)[:, None] - forward * np.sin(viewpoints.half_view)[:, None]
        seen = (beyond < radius) & (forward > -radius)
        view, slot = np.nonzero(seen)
        yaw = poses[..., 2][seen]
        places = np.stack([x[seen], y[seen], np.cos(yaw), np.sin(yaw)]).astype(np.float32)
        return _Placed(view, actors.take(slot), *places)

    def _shadows(self, placed: "_Placed", viewpoints: Viewpoints) -> list[list[tuple[np.ndarray, list[float]]]]:
        """For each view the polygons and colours of dark patches under the labelled objects."""
        placed = placed.take(np.flatnonzero(self._scene.label.take(placed.actor) != NO_LABEL))
        width, length, _ = (self._scene.size.take(placed.actor, axis=0).T / 2 + _SHADOW_MARGIN).astype(np.float32)
        signs = np.array([[1, 1, -1, -1], [1, -1, -1, 1]], dtype=np.float32)[..., None]
        x, y = placed.turn(signs[0] * length, signs[1] * width)
        z = _SHADOW_HEIGHT - viewpoints.position[:, 2].take(placed.view)
        u, v, depth = _project(x + placed.x, y + placed.y, z, placed.view, viewpoints)
        low_v, high_v = v.min(0), v.max(0)
        seen = self._overlaps(u.min(0), low_v, u.max(0), high_v) & (depth.min(0) > NEAR)
        seen = np.flatnonzero(seen & (high_v - low_v > MIN_SHADOW_ROWS))
        level = self._light.ambient * _SHADOW_LEVEL * 90.0
        colours = np.zeros((len(seen), 4))
        colours[:, :3] = self._hazy(np.full((1, 3), level), depth.take(seen, axis=1).mean(0))
        polygons = list(_fixed_point(u.take(seen, axis=1), v.take(seen, axis=1)))
        painted = list(zip(polygons, colours.tolist(), strict=True))
        bounds = np.searchsorted(placed.view.take(seen), np.arange(len(viewpoints.axes) + 1)).tolist()
        return [painted[start:end] for start, end in pairwise(bounds)]

    def _overlaps(self, low_u, low_v, high_u, high_v) -> np.ndarray:
        """Which rectangles (n,) in pixels reach into the image."""
        width, height = self._size
        return (high_u > 0) & (low_u < width) & (high_v > 0) & (low_v < height)

    def _visible_quads(self, placed: "_Placed", viewpoints: Viewpoints) -> "_Quads":
        """Quads that face their camera and reach into its image, in painting order (far to near) view after view."""
        quad, row = self._facing_quads(placed, viewpoints)
        at = placed.take(row)
        x, y, z = self._corners.take(quad, axis=2)
        x, y = at.turn(x, y)
        x, y, z = x + at.x, y + at.y, z - viewpoints.position[:, 2].astype(np.float32).take(at.view)
        u, v, depth = _project(x, y, z, at.view, viewpoints)
        area = 0.5 * np.abs((u[2] - u[0]) * (v[3] - v[1]) - (u[3] - u[1]) * (v[2] - v[0]))
        box = np.stack([u.min(0), v.min(0), u.max(0), v.max(0)])
        on_screen = self._overlaps(*box) & (area > self._min_area.take(quad))
        is_behind = depth.min(0) <= NEAR
        keep = np.flatnonzero(np.where(is_behind, depth.max(0) > NEAR, on_screen))
        at, group = at.take(keep), self._scene.quad_group.take(quad.take(keep))
        centre_x, centre_y = at.turn(*self._group_centres.take(group, axis=1))
        # Quads of one group share its distance and stay in their own order.
        order = np.lexsort((group, -np.hypot(centre_x + at.x, centre_y + at.y), at.view))
        keep = keep.take(order)
        corners, pixels = (np.stack([axis.take(keep, axis=1) for axis in axes]) for axes in ((x, y, z), (u, v)))
        return _Quads(
            at.view.take(order),
            quad.take(keep),
            row.take(keep),
            group.take(order),
            corners,
            pixels,
            box.take(keep, axis=1),
            is_behind.take(keep),
        )

    def _facing_quads(self, placed: "_Placed", viewpoints: Viewpoints) -> tuple[np.ndarray, np.ndarray]:
        """Scene indices (q,) of the quads whose front is towards their camera, and their rows (q,) of placed."""
        first = self._first_quad.take(placed.actor)
        count = self._first_quad.take(placed.actor + 1) - first
        row = np.repeat(np.arange(len(count)), count)
        quad = np.arange(len(row)) + (first - np.cumsum(count) + count).take(row)
        # The camera in the actor's own frame tells which faces it sees.
        viewpoint = np.empty((3, len(count)), dtype=np.float32)
        viewpoint[0] = -placed.x * placed.cos - placed.y * placed.sin
        viewpoint[1] = placed.x * placed.sin - placed.y * placed.cos
        viewpoint[2] = viewpoints.position[:, 2].take(placed.view)
        normal_x, normal_y, normal_z, plane = self._planes.take(quad, axis=1)
        viewpoint_x, viewpoint_y, viewpoint_z = viewpoint.take(row, axis=1)
        facing = np.flatnonzero(viewpoint_x * normal_x + viewpoint_y * normal_y + viewpoint_z * normal_z > plane)
        return quad.take(facing), row.take(facing)

    def _shade(self, quads: "_Quads", placed: "_Placed", viewpoints: Viewpoints) -> np.ndarray:
        """Colours (q, 3) BGR of quads: paint times light, then haze."""
        light, at = self._light, placed.take(quads.row)
        level = np.full(len(quads.index), light.ambient)
        x, y, z = quads.corners.mean(1)
        if light.sun > 0:
            normal_x, normal_y, normal_z, _ = self._planes.take(quads.index, axis=1)
            normal_x, normal_y = at.turn(normal_x, normal_y)
            level += light.sun * (normal_x * _SUN[0] + normal_y * _SUN[1] + normal_z * _SUN[2]).clip(0.0, None)
        if light.headlight > 0:
            offset_x, offset_y, _ = viewpoints.offset.T.take(quads.view, axis=1)
            cos, sin = np.cos(viewpoints.yaw).take(quads.view), np.sin(viewpoints.yaw).take(quads.view)
            from_ego_x, from_ego_y = x + offset_x, y + offset_y
            forward, left = from_ego_x * cos + from_ego_y * sin, from_ego_y * cos - from_ego_x * sin
            level += headlight_gain(light, forward, left) - headlight_gain(light, -1.0, 0.0)
        level[self._scene.glow.take(quads.index)] = max(light.ambient, 0.95)
        colours = (self._scene.colours.take(quads.index, axis=0) * level[:, None]).clip(0, 255)
        return self._hazy(colours, np.sqrt(x * x + y * y + z * z)).clip(0, 255)

    def _hazy(self, colours: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """Colours (n, 3) BGR as they look from a distance (n,) in metres."""
        fade = np.exp(distance / -self._light.visibility)[:, None]
        return colours * fade + np.array(self._light.horizon) * (1 - fade)

    def _marks(self, quads: "_Quads", placed: "_Placed", views: int) -> np.ndarray:
        """A mark (q,) of 1 to MAX_MARKS for each group of a labelled actor, different within a view, 0 for the rest.

        When there are more groups than marks, the farthest go without.
        """
        starts = quads.starts()
        labelled = self._scene.label.take(placed.actor.take(quads.row.take(starts))) != NO_LABEL
        # Counted from the nearest group of each view, which is the last.
        rank = np.cumsum(labelled[::-1])[::-1]
        next_view = np.searchsorted(quads.view.take(starts), np.arange(1, views + 1))
        rank -= np.append(rank, 0).take(next_view).take(quads.view.take(starts))
        mark = np.where(labelled & (rank <= MAX_MARKS), rank, 0)
        return np.repeat(mark, np.diff(starts, append=len(quads.view)))

    def _last_of_groups(self, quads: "_Quads", marks: np.ndarray) -> list[tuple[int, Window] | None]:
        """PaintList.last_of_group for all quads."""
        last: list[tuple[int, Window] | None] = [None] * len(marks)
        starts = quads.starts()
        if len(starts) == 0:
            return last
        far = max(self._size)
        low, high = np.where(quads.is_cut, 0, quads.box[:2]), np.where(quads.is_cut, far, quads.box[2:])
        low = (np.minimum.reduceat(low, starts, axis=1) / self._grid_step).clip(0, far).astype(int)
        high = (np.maximum.reduceat(high, starts, axis=1) / self._grid_step).clip(0, far).astype(int) + 2
        ends = np.append(starts[1:], len(marks)) - 1
        rows = np.stack([ends, marks.take(ends), *low, *high], -1)
        for end, mark, left, top, right, bottom in rows[rows[:, 1] > 0].tolist():
            last[end] = mark, (slice(top, bottom), slice(left, right))
        return last


@dataclass(frozen=True)
class _Placed:
    """Rows (k,) of actors in views: view; actor of the scene; place x, y (m); cosine and sine of the yaw."""

    view: np.ndarray
    actor: np.ndarray
    x: np.ndarray
    y: np.ndarray
    cos: np.ndarray
    sin: np.ndarray

    def take(self, indices: np.ndarray) -> "_Placed":
        """The rows at indices."""
        return _Placed(
            *(values.take(indices) for values in (self.view, self.actor, self.x, self.y, self.cos, self.sin))
        )

    def turn(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (..., k) of the actors' own frames along the global axes."""
        return x * self.cos - y * self.sin, x * self.sin + y * self.cos


@dataclass(frozen=True)
class _Quads:
    """Quads to paint. view; index into the scene's quads; row of _Placed; group of the scene; corners (3, 4, q);
    pixels (2, 4, q) u, v; box (4, q): least u, v, greatest u, v; is_cut (q,): crosses NEAR."""

    view: np.ndarray
    index: np.ndarray
    row: np.ndarray
    group: np.ndarray
    corners: np.ndarray
    pixels: np.ndarray
    box: np.ndarray
    is_cut: np.ndarray

    def starts(self) -> np.ndarray:
        """Index of the first quad of each group in each view."""
        is_first = (np.diff(self.group, prepend=-1) != 0) | (np.diff(self.view, prepend=-1) != 0)
        return np.flatnonzero(is_first)


def _project(x, y, z, view: np.ndarray, viewpoints: Viewpoints) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels u, v and depth (m) of points (..., n) of views (n,); u and v mean nothing where depth is not positive."""
    axes = viewpoints.axes.reshape(-1, 9).T.astype(np.float32).take(view, axis=1).reshape(3, 3, -1)
    right, down, depth = (x * axes[0, k] + y * axes[1, k] + z * axes[2, k] for k in range(3))
    fx, cx, fy, cy = viewpoints.pinhole.T.astype(np.float32).take(view, axis=1)
    inverse = 1.0 / np.maximum(depth, np.float32(1e-3))
    return right * inverse * fx + cx, down * inverse * fy + cy, depth


def _clipped(corners: np.ndarray, view: int, viewpoints: Viewpoints) -> np.ndarray:
    """Polygon of a quad (3, 4) without what lies behind the near plane."""
    local = (viewpoints.axes[view].T @ corners).T.tolist()
    fx, cx, fy, cy = viewpoints.pinhole[view].tolist()
    kept = []
    for (x, y, depth), (last_x, last_y, last_depth) in zip(local, [local[-1], *local[:-1]], strict=True):
        if (depth > NEAR) != (last_depth > NEAR):
            share = (last_depth - NEAR) / (last_depth - depth)
            kept.append((last_x + (x - last_x) * share, last_y + (y - last_y) * share, NEAR))
        if depth > NEAR:
            kept.append((x, y, depth))
    right, down, depth = np.array(kept).T
    return _fixed_point(right / depth * fx + cx, down / depth * fy + cy)


def _fixed_point(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Pixels u, v, both (4, q) or (n,), as polygons (q, 4, 2) or (n, 2) for cv2 with SUBPIXEL_BITS."""
    pixels = np.rint(np.stack([u, v]).clip(-_FAR_PIXELS, _FAR_PIXELS) * (1 << SUBPIXEL_BITS))
    return np.ascontiguousarray(pixels.T, dtype=np.int32)
