"""Six cameras: quads of shapes, shaded and painted far to near over a backdrop."""

from dataclasses import dataclass

import cv2
import numpy as np

from cmt_aqr.synthetic.backdrop import Backdrop, Ground, Spoiler, ground_homography, headlight_gain, scene_light
from cmt_aqr.synthetic.calibration import CAMERAS, CameraMount, intrinsic_matrix, rotation_matrix
from cmt_aqr.synthetic.scenes import EGO_PROFILE, NO_LABEL, Scene

NEAR = 0.4
"""Nothing nearer (m) than this in front of a camera is drawn; quads are cut there."""

MIN_FACE_AREA, MIN_DECAL_AREA = 0.6, 3.0
"""Faces and decals smaller than this (square pixels) are left out."""

MIN_SHADOW_ROWS = 1.0

_SUBPIXEL_BITS = 4
_MAX_MARKS = 255
_FAR_PIXELS = 1e5
_COUNT_WIDTH = 400
"""Visible pixels are counted on a grid of about this many columns."""

_SHADOW_HEIGHT = 0.02
_SHADOW_LEVEL = 0.45


@dataclass(frozen=True)
class View:
    """One drawn image. image (H, W, 3) uint8 BGR; ego: global x (m), y (m), yaw (rad) it was taken from.

    marks (H, W) uint8: 0 or the mark of what is seen there; mark_owner (256,): index into actors for each mark, or -1.
    actors (n,): scene indices of the actors in view. drawn (n,) and visible (n,): grid pixels each labelled one would
    cover were nothing in front of it, and still covers in the finished image.
    """

    image: np.ndarray
    ego: tuple[float, float, float]
    marks: np.ndarray
    mark_owner: np.ndarray
    actors: np.ndarray
    drawn: np.ndarray
    visible: np.ndarray


class Camera:
    """One camera in the light of one scene."""

    def __init__(
        self, mount: CameraMount, image_size: tuple[int, int], scene: Scene, ground: Ground, rng: np.random.Generator
    ):
        self.mount = mount
        self._size = image_size
        self._intrinsic = intrinsic_matrix(mount, image_size)
        self._to_ego = rotation_matrix(mount.rotation)
        self._light = scene_light(scene.conditions)
        self._scene = scene
        self._ground = ground
        self._backdrop = Backdrop(mount, image_size, self._light)
        self._spoiler = Spoiler(mount.channel, image_size, scene.conditions, self._light, rng)
        corner = np.abs(np.linalg.inv(self._intrinsic) @ np.array([[0, image_size[0]], [0, 0], [1, 1]]))[0]
        self._half_view = float(np.arctan(corner.max())) + 0.03
        sun = np.array([0.55, -0.35, 0.75])
        self._sun = sun / np.linalg.norm(sun)

    def render(self, time: float, actors: np.ndarray, rng: np.random.Generator) -> View:
        """Draw actors (n,) indices as they and the ego are at a time (s)."""
        scene = self._scene
        ego = scene.ego_pose(time)
        to_global, position = self._pose(ego)
        to_texels = self._ground.to_texels() @ ground_homography(to_global, position, self._intrinsic)
        canvas = self._backdrop.draw(self._ground.image, to_texels)
        poses = scene.poses(np.array([time]), actors)[0]
        seen = self._in_view(poses, position, to_global, actors)
        actors, poses = actors[seen], poses[seen]
        is_labelled = scene.label[actors] != NO_LABEL
        self._draw_shadows(canvas, actors[is_labelled], poses[is_labelled], to_global, position)
        quads = self._visible_quads(actors, poses, to_global, position)
        marks, owner = _marks(quads, is_labelled)
        covered = self._paint(canvas, quads, self._shade(quads, position, ego), marks, to_global, position)
        grid = np.ascontiguousarray(self._grid(canvas))
        left = cv2.calcHist([grid], [0], None, [_MAX_MARKS + 1], [0, _MAX_MARKS + 1]).ravel().astype(np.int64)
        drawn, visible = np.zeros(len(actors), dtype=np.int64), np.zeros(len(actors), dtype=np.int64)
        np.add.at(drawn, owner[1:][owner[1:] >= 0], covered[1:][owner[1:] >= 0])
        np.add.at(visible, owner[1:][owner[1:] >= 0], left[1:][owner[1:] >= 0])
        image = self._spoiler.apply(cv2.cvtColor(canvas, cv2.COLOR_BGRA2BGR), rng)
        return View(image, ego, canvas[..., 3], owner, actors, drawn, visible)

    def _pose(self, ego: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
        x, y, yaw = ego
        turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        return turn @ self._to_ego, turn @ np.array(self.mount.translation) + np.array([x, y, 0.0])

    def _in_view(
        self, poses: np.ndarray, position: np.ndarray, to_global: np.ndarray, actors: np.ndarray
    ) -> np.ndarray:
        """Which actors (bool) may be in the image, by their distance and direction on the ground."""
        radius = self._scene.radius[actors]
        offset = poses[:, :2] - position[:2]
        axis = to_global[:2, 2] / np.linalg.norm(to_global[:2, 2])
        forward = offset @ axis
        aside = np.abs(offset[:, 0] * axis[1] - offset[:, 1] * axis[0])
        # Distance to the nearer of the two planes that bound the view.
        beyond = aside * np.cos(self._half_view) - forward * np.sin(self._half_view)
        return (beyond < radius) & (forward > -radius)

    def _project(self, points: np.ndarray, to_global: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Global points (..., 3) to u, v (px) and depth (m); u and v mean nothing where depth is not positive."""
        local = (points - position) @ to_global
        depth = local[..., 2]
        safe = np.maximum(depth, 1e-3)
        fx, fy = self._intrinsic[0, 0], self._intrinsic[1, 1]
        cx, cy = self._intrinsic[0, 2], self._intrinsic[1, 2]
        return np.stack([local[..., 0] / safe * fx + cx, local[..., 1] / safe * fy + cy, depth], -1)

    def _draw_shadows(self, canvas, actors, poses, to_global, position) -> None:
        """A dark patch under every labelled object, before any object is drawn."""
        if len(actors) == 0:
            return
        half = self._scene.size[actors][:, [1, 0]] / 2 + 0.12
        signs = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]])
        cos, sin = np.cos(poses[:, 2])[:, None], np.sin(poses[:, 2])[:, None]
        along, across = signs[:, 0] * half[:, :1], signs[:, 1] * half[:, 1:]
        points = np.stack(
            [
                poses[:, :1] + along * cos - across * sin,
                poses[:, 1:2] + along * sin + across * cos,
                np.full_like(along, _SHADOW_HEIGHT),
            ],
            -1,
        )
        pixels = self._project(points, to_global, position)
        (u, v, depth), (width, height) = np.moveaxis(pixels, -1, 0), self._size
        seen = (depth.min(1) > NEAR) & (u.max(1) > 0) & (u.min(1) < width) & (v.min(1) < height)
        seen &= np.ptp(v, axis=1) > MIN_SHADOW_ROWS
        level = self._light.ambient * _SHADOW_LEVEL * 90.0
        fade = np.exp(-depth[seen].mean(1) / self._light.visibility)[:, None]
        colours = level * fade + np.array(self._light.horizon) * (1 - fade)
        colours = np.column_stack([colours, np.zeros(len(colours))]).tolist()
        for polygon, colour in zip(_fixed_point(pixels[seen][..., :2]), colours, strict=True):
            cv2.fillConvexPoly(canvas, polygon, colour, cv2.LINE_8, _SUBPIXEL_BITS)

    def _visible_quads(self, actors, poses, to_global, position) -> "_Quads":
        """Quads that face the camera and reach into the image, in painting order (far to near)."""
        scene = self._scene
        slot = np.full(len(scene.s), -1)
        slot[actors] = np.arange(len(actors))
        owner = slot.take(scene.quad_actor)
        quads = np.flatnonzero(owner >= 0)
        owner = owner.take(quads)
        cos, sin = np.cos(poses[:, 2]), np.sin(poses[:, 2])
        offset = position[:2] - poses[:, :2]
        # The camera in each actor's own frame tells which faces it sees; only those are moved to the global frame.
        eye = np.column_stack([_turn(offset, cos, -sin), np.full(len(actors), position[2])]).take(owner, axis=0)
        normals = scene.normals.take(quads, axis=0)
        first_corner = scene.corners[:, 0].take(quads, axis=0)
        facing = np.flatnonzero(((eye - first_corner) * normals).sum(-1) > 0)
        quads, owner, normals = quads.take(facing), owner.take(facing), normals.take(facing, axis=0)
        cos, sin = cos.take(owner), sin.take(owner)
        corners = _turn(scene.corners.take(quads, axis=0), cos[:, None], sin[:, None])
        corners[..., :2] += poses[owner, None, :2]
        pixels = self._project(corners, to_global, position)
        (u, v, depth), (width, height) = np.moveaxis(pixels, -1, 0), self._size
        area = 0.5 * np.abs((u[:, 2] - u[:, 0]) * (v[:, 3] - v[:, 1]) - (u[:, 3] - u[:, 1]) * (v[:, 2] - v[:, 0]))
        on_screen = (u.max(1) > 0) & (u.min(1) < width) & (v.max(1) > 0) & (v.min(1) < height)
        on_screen &= area > np.where(scene.is_decal[quads], MIN_DECAL_AREA, MIN_FACE_AREA)
        is_cut = (depth.min(1) <= NEAR) & (depth.max(1) > NEAR)
        keep = np.flatnonzero(np.where(depth.min(1) > NEAR, on_screen, is_cut))
        group = scene.quad_group[quads[keep]]
        centre = _turn(scene.group_centres[group], cos[keep], sin[keep]) + poses[owner[keep], :2]
        distance = np.hypot(centre[:, 0] - position[0], centre[:, 1] - position[1])
        order = np.lexsort((quads[keep], group, -distance))
        keep, group = keep[order], group[order]
        normals = _turn(normals[keep], cos[keep], sin[keep])
        return _Quads(quads[keep], owner[keep], group, normals, corners[keep], pixels[keep], is_cut[keep])

    def _shade(self, quads: "_Quads", position: np.ndarray, ego: tuple[float, float, float]) -> np.ndarray:
        """Colours (q, 3) BGR of quads: paint times light, then haze."""
        light = self._light
        centre = quads.corners.mean(1)
        offset = centre[:, :2] - np.array(ego[:2])
        forward = offset[:, 0] * np.cos(ego[2]) + offset[:, 1] * np.sin(ego[2])
        left = offset[:, 1] * np.cos(ego[2]) - offset[:, 0] * np.sin(ego[2])
        sun = light.sun * (quads.normals @ self._sun).clip(0.0, None)
        lamps = headlight_gain(light, forward, left) - headlight_gain(light, -1.0, 0.0)
        level = np.where(self._scene.glow[quads.index], max(light.ambient, 0.95), light.ambient + sun + lamps)
        fade = np.exp(-np.linalg.norm(centre - position, axis=1) / light.visibility)[:, None]
        colours = self._scene.colours[quads.index] * level[:, None]
        return (colours.clip(0, 255) * fade + np.array(light.horizon) * (1 - fade)).clip(0, 255)

    def _paint(
        self,
        canvas: np.ndarray,
        quads: "_Quads",
        colours: np.ndarray,
        marks: np.ndarray,
        to_global: np.ndarray,
        position: np.ndarray,
    ) -> np.ndarray:
        """Fill quads in order, writing marks (q,) into the fourth channel.

        Returns (256,): grid pixels that bore each mark right after the last quad of its group was painted.
        """
        grid, step = self._grid(canvas), self._grid_step()
        covered = np.zeros(_MAX_MARKS + 1, dtype=np.int64)
        polygons = _fixed_point(quads.pixels[..., :2])
        low = (quads.pixels[..., :2].min(1) / step).clip(0).astype(int)
        high = (quads.pixels[..., :2].max(1) / step).clip(0, max(self._size)).astype(int) + 2
        is_last = np.append(quads.group[1:] != quads.group[:-1], True)
        starts = np.flatnonzero(np.append(True, is_last[:-1]))
        if len(starts):
            low, high = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
        painted = np.column_stack([colours, marks]).tolist()
        group = 0
        for index, (polygon, colour) in enumerate(zip(polygons, painted, strict=True)):
            if quads.is_cut[index]:
                polygon = self._clipped(quads.corners[index], to_global, position)
            cv2.fillConvexPoly(canvas, polygon, colour, cv2.LINE_8, _SUBPIXEL_BITS)
            if is_last[index]:
                mark = int(marks[index])
                if mark:
                    part = (
                        slice(None)
                        if quads.is_cut[starts[group] : index + 1].any()
                        else (slice(low[group, 1], high[group, 1]), slice(low[group, 0], high[group, 0]))
                    )
                    covered[mark] = np.count_nonzero(grid[part] == mark)
                group += 1
        return covered

    def _clipped(self, corners: np.ndarray, to_global: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Fixed-point polygon of a quad (4, 3), global, without what lies behind the near plane."""
        depth = (corners - position) @ to_global[:, 2] - NEAR
        kept = []
        for index in range(4):
            here, before = depth[index], depth[index - 1]
            if (here > 0) != (before > 0):
                kept.append(corners[index - 1] + (corners[index] - corners[index - 1]) * before / (before - here))
            if here > 0:
                kept.append(corners[index])
        return _fixed_point(self._project(np.array(kept), to_global, position)[:, :2])

    def _grid(self, canvas: np.ndarray) -> np.ndarray:
        """Every so many-th pixel of the marks, on which visible pixels are counted."""
        step = self._grid_step()
        return canvas[::step, ::step, 3]

    def _grid_step(self) -> int:
        return max(1, self._size[0] // _COUNT_WIDTH)


@dataclass(frozen=True)
class _Quads:
    """Quads to paint, in order. index into the scene's quads, owner into the actors in view, group of the scene;
    normals (q, 3), corners (q, 4, 3) global; pixels (q, 4, 3) u, v, depth; is_cut (q,): crosses the near plane."""

    index: np.ndarray
    owner: np.ndarray
    group: np.ndarray
    normals: np.ndarray
    corners: np.ndarray
    pixels: np.ndarray
    is_cut: np.ndarray


def _turn(vectors: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Vectors (..., 2 or 3) turned about z."""
    turned = vectors.copy()
    turned[..., 0] = vectors[..., 0] * cos - vectors[..., 1] * sin
    turned[..., 1] = vectors[..., 0] * sin + vectors[..., 1] * cos
    return turned


def _fixed_point(pixels: np.ndarray) -> np.ndarray:
    """Pixel coordinates as cv2 takes them with _SUBPIXEL_BITS."""
    return np.rint(pixels.clip(-_FAR_PIXELS, _FAR_PIXELS) * (1 << _SUBPIXEL_BITS)).astype(np.int32)


def _marks(quads: _Quads, is_labelled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A mark 1..255 for each group of a labelled actor, 0 for the rest, and the owner (256,) of each mark.

    When there are more groups than marks, the farthest go without.
    """
    starts = np.flatnonzero(np.append(True, quads.group[1:] != quads.group[:-1])) if len(quads.group) else []
    first_of = np.zeros(len(quads.group), dtype=np.int64)
    first_of[starts] = 1
    run = np.cumsum(first_of) - 1
    labelled_runs = is_labelled[quads.owner[starts]]
    rank = np.cumsum(labelled_runs[::-1])[::-1]
    mark_of_run = np.where(labelled_runs & (rank <= _MAX_MARKS), rank, 0)
    owner = np.full(_MAX_MARKS + 1, -1)
    owner[mark_of_run] = quads.owner[starts]
    owner[0] = -1
    return mark_of_run[run] if len(run) else run, owner


class CameraRig:
    """All six cameras of a scene."""

    def __init__(self, scene: Scene, image_size: tuple[int, int], seed: int):
        travelled = float(scene.profiles.distance[:, EGO_PROFILE].max())
        ground = Ground(scene.road, (0.0, travelled), scene.crossings, np.random.default_rng([seed, scene.index, 2]))
        self.cameras = tuple(
            Camera(mount, image_size, scene, ground, np.random.default_rng([seed, scene.index, 3, view]))
            for view, mount in enumerate(CAMERAS)
        )
