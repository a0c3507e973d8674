"""Six cameras: objects painted far to near over a backdrop, then spoiled by weather, dirt and noise."""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from cmt_aqr.rotations import rotation_matrix
from cmt_aqr.synthetic.backdrop import Backdrop, Ground, Spoiler, ground_homography, scene_light
from cmt_aqr.synthetic.calibration import CAMERAS, CameraMount, intrinsic_matrix
from cmt_aqr.synthetic.projection import MAX_MARKS, SUBPIXEL_BITS, PaintList, Projector, Viewpoints
from cmt_aqr.synthetic.scenes import EGO_PROFILE, Scene

_COUNT_WIDTH = 400
"""Visible pixels are counted on a grid of about this many columns."""


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


class CameraRig:
    """All six cameras of a scene."""

    def __init__(self, scene: Scene, image_size: tuple[int, int], seed: int):
        self._scene = scene
        travelled = float(scene.profiles.distance[:, EGO_PROFILE].max())
        light, rng = scene_light(scene.conditions), np.random.default_rng([seed, scene.index, 2])
        ground = Ground(scene.road, (0.0, travelled), scene.crossings, light, rng)
        grid_step = max(1, image_size[0] // _COUNT_WIDTH)
        self._projector = Projector(scene, image_size, light, grid_step)
        self.cameras = tuple(
            Camera(mount, image_size, scene, ground, grid_step, np.random.default_rng([seed, scene.index, 3, view]))
            for view, mount in enumerate(CAMERAS)
        )

    def render(self, times: np.ndarray, actors: np.ndarray, rng: np.random.Generator) -> Iterator[View]:
        """The images of the cameras at times (6,) in s, with actors (n,), indices, and the ego where they are then."""
        egos, poses = self._scene.ego_poses(times), self._scene.poses(times, actors)
        viewpoints = [camera.viewpoint(ego) for camera, ego in zip(self.cameras, egos, strict=True)]
        viewpoints = Viewpoints(*(np.array(column) for column in zip(*viewpoints, strict=True)))
        for number, paint_list in enumerate(self._projector.paint_lists(viewpoints, actors, poses)):
            ego = tuple(egos[number].tolist())
            yield self.cameras[number].draw(paint_list, ego, viewpoints.axes[number], viewpoints.position[number], rng)


class Camera:
    """One camera in the light of one scene."""

    def __init__(
        self,
        mount: CameraMount,
        image_size: tuple[int, int],
        scene: Scene,
        ground: Ground,
        grid_step: int,
        rng: np.random.Generator,
    ):
        self.mount = mount
        self._grid_step = grid_step
        self._intrinsic = intrinsic_matrix(mount, image_size)
        self._to_ego = rotation_matrix(mount.rotation)
        light = scene_light(scene.conditions)
        self._ground = ground
        self._backdrop = Backdrop(mount, image_size, light)
        self._spoiler = Spoiler(mount.channel, image_size, scene.conditions, light, rng)
        self._pinhole = self._intrinsic[[0, 0, 1, 1], [0, 2, 1, 2]]
        focal, centre, _, _ = self._pinhole
        self._half_view = float(np.arctan(max(centre, image_size[0] - centre) / focal)) + 0.03

    def viewpoint(self, ego: np.ndarray) -> tuple:
        """This camera's row of every field of Viewpoints when the ego is at x, y (m), yaw (rad)."""
        x, y, yaw = ego
        turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        offset = turn @ np.array(self.mount.translation)
        return turn @ self._to_ego, offset + np.array([x, y, 0.0]), offset, yaw, self._pinhole, self._half_view

    def draw(
        self,
        paint_list: PaintList,
        ego: tuple[float, float, float],
        axes: np.ndarray,
        position: np.ndarray,
        rng: np.random.Generator,
    ) -> View:
        """Draw a paint list; axes (3, 3) and position (3,) are those of Viewpoints."""
        to_texels = self._ground.to_texels() @ ground_homography(axes, position, self._intrinsic)
        canvas = self._backdrop.draw(self._ground, to_texels)
        grid = canvas[:: self._grid_step, :: self._grid_step, 3]
        covered = _paint(canvas, grid, paint_list)
        left = _count_marks(grid, paint_list)
        has_owner = paint_list.mark_owner >= 0
        owner, count = paint_list.mark_owner[has_owner], len(paint_list.actors)
        drawn, visible = (np.bincount(owner, pixels[has_owner], count).astype(int) for pixels in (covered, left))
        image = self._spoiler.apply(cv2.cvtColor(canvas, cv2.COLOR_BGRA2BGR), rng)
        return View(image, ego, canvas[..., 3], paint_list.mark_owner, paint_list.actors, drawn, visible)


def _paint(canvas: np.ndarray, grid: np.ndarray, paint_list: PaintList) -> np.ndarray:
    """Fill the polygons of a paint list, writing marks into the fourth channel of canvas, of which grid is a view.

    Returns (256,): grid pixels that bore each mark right after the last quad of its group was painted.
    """
    covered = np.zeros(MAX_MARKS + 1, dtype=np.int64)
    for polygon, colour in paint_list.shadows:
        cv2.fillConvexPoly(canvas, polygon, colour, cv2.LINE_8, SUBPIXEL_BITS)
    for polygon, colour, finished in zip(
        paint_list.polygons, paint_list.colours, paint_list.last_of_group, strict=True
    ):
        cv2.fillConvexPoly(canvas, polygon, colour, cv2.LINE_8, SUBPIXEL_BITS)
        if finished is not None:
            mark, window = finished
            covered[mark] = np.count_nonzero(grid[window] == mark)
    return covered


def _count_marks(grid: np.ndarray, paint_list: PaintList) -> np.ndarray:
    """Pixels of the grid that bear each mark (256,) of a drawn paint list; those without a mark are not all counted."""
    rows = [finished[1][0] for finished in paint_list.last_of_group if finished is not None]
    top, bottom = min((row.start for row in rows), default=0), max((row.stop for row in rows), default=1)
    marked = np.ascontiguousarray(grid[top:bottom])
    return cv2.calcHist([marked], [0], None, [MAX_MARKS + 1], [0, MAX_MARKS + 1]).ravel()
