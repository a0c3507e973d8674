"""Common mistakes of ports, each undone or repeated to see whether it explains a difference.

Every function here yields (words, x, y) such that x and y agree if the mistake was made: either y is the port's tensor
and x is A's with the mistake, or x is A's tensor and y is the port's with the mistake undone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cmt_aqr.attention.windows import NO_WINDOW, camera_cells
from cmt_aqr.boxes import decode_boxes
from cmt_aqr.geometry import to_metres, to_unit
from cmt_aqr.golden.bundle import Source
from cmt_aqr.golden.measure import YAW, same_turn
from cmt_aqr.golden.rebuild import rebuild_layout
from cmt_aqr.models.position import camera_rays, ray_depths, sine_embedding
from cmt_aqr.predictions import BOX_BRANCHES

Attempts = Iterator[tuple[str, Tensor, Tensor]]

BOX_CODE_ORDERS = {
    "box code order: read as cx cy cz log-l log-w log-h; its third number is log length, its fifth z (quirk Q1)": (
        0, 1, 3, 4, 2, 5, 6, 7, 8, 9,
    ),
    "box code order: log width was read before log length, length comes first (quirk Q2)": (
        0, 1, 3, 2, 4, 5, 6, 7, 8, 9,
    ),
    "box code order: cosine was read before sine, the sine of the yaw comes first": (0, 1, 2, 3, 4, 5, 7, 6, 8, 9),
    "box code order: vy was read before vx": (0, 1, 2, 3, 4, 5, 6, 7, 9, 8),
}  # fmt: skip
SIZES = slice(3, 6)
# View, row and column that stand for a query without a window.
NOWHERE = torch.tensor([NO_WINDOW, 0, 0])


@dataclass(frozen=True)
class Case:
    """One tensor past its limit.

    Attributes:
        name: of the tensor.
        a: the reference, with its manifest.
        left, right: A's and B's values; rows are paired where something identifies them, and whole turns between the
            angles of boxes are removed.
        given: as ``right``, with the angles as B has them.
        rows: of A that are in ``left``; None for all.
        is_first: no tensor of the stage before this one differs.
    """

    name: str
    a: Source
    left: Tensor
    right: Tensor
    given: Tensor
    rows: Tensor | None = None
    is_first: bool = True

    @property
    def constants(self) -> dict:
        """Sizes and settings of the model."""
        return self.a.manifest.get("constants", {})

    def has(self, *names: str) -> bool:
        """Whether A holds these tensors, and the constants."""
        return bool(self.constants) and all(name in self.a for name in names)


def rows_and_cols(case: Case) -> Attempts:
    """Cells and maps whose rows and columns are swapped."""
    words = "rows and columns are swapped: rows run along y (or v), columns along x (or u)"
    left, right = case.left, case.right
    if case.name.startswith("windows/"):
        yield words, left, right[..., [0, 2, 1]]
    elif left.ndim >= 3 and right.transpose(-1, -2).shape == left.shape:
        yield words, left, right.transpose(-1, -2)


def voxel_axes(case: Case) -> Attempts:
    """Cells of voxels in another order of the axes; rows are compared as sets."""
    orders = {
        "x, y, z instead of z, y, x": [0, 3, 2, 1],
        "z, x, y instead of z, y, x: rows and columns are swapped": [0, 1, 3, 2],
    }
    names_a, names_b = case.a[case.name].long(), case.right.long()
    if names_a.shape == names_b.shape:
        for words, order in orders.items():
            yield f"cells are stored as {words}", sort_rows(names_a), sort_rows(names_b[:, order])


def sort_rows(table: Tensor) -> Tensor:
    """Rows in lexicographic order."""
    return torch.unique(table, dim=0)


def token_order(case: Case) -> Attempts:
    """Tokens (B, K, C) column by column, or the grids in the opposite order."""
    grids = case.constants.get("grids", [])
    sizes = [grid["views"] * grid["rows"] * grid["cols"] for grid in grids]
    if not grids or case.right.ndim != 3 or case.right.shape != case.left.shape or sum(sizes) != case.left.shape[1]:
        return
    parts = []
    for grid, part in zip(grids, case.right.split(sizes, dim=1), strict=True):
        cells = part.unflatten(1, (grid["views"], grid["cols"], grid["rows"]))
        parts.append(cells.transpose(2, 3).flatten(1, 3))
    for number, grid in enumerate(grids):
        own = list(case.right.split(sizes, dim=1))
        own[number] = parts[number]
        words = (
            f"{grid['name']} tokens come column by column: rows and columns are swapped, the order is row * cols + col"
        )
        yield words, case.left, torch.cat(own, dim=1)
    if len(grids) > 1:
        yield "tokens of all grids come column by column, the order is row * cols + col", case.left, torch.cat(parts, 1)
        turned = torch.cat(case.right.split(sizes[::-1], dim=1)[::-1], dim=1)
        yield "the grids are in the opposite order: BEV tokens come first, then cameras", case.left, turned


def view_order(case: Case) -> Attempts:
    """Views in another order, found by the view of B that is nearest to each of A's."""
    views = next((grid["views"] for grid in case.constants.get("grids", []) if grid["views"] > 1), 0)
    left, right = case.left, case.right
    if not views or left.shape != right.shape or left.ndim < 3:
        return
    axis = next((axis for axis in range(2) if left.shape[axis] == views), None)
    if axis is None:
        return
    x, y = (tensor.movedim(axis, 0).flatten(1).double() for tensor in (left, right))
    order = torch.cdist(x, y).argmin(dim=1)
    if len(set(order.tolist())) == views and order.tolist() != list(range(views)):
        words = f"the views are in another order: A's views 0 to {views - 1} are B's {order.tolist()}"
        yield words, left, right.index_select(axis, order)


def x_and_y(case: Case) -> Attempts:
    """x and y, or their halves of a sine embedding, swapped."""
    right = case.right
    if case.name.endswith("sine"):
        words = "the half of x comes before that of y: the sine embedding has y before x (quirk Q3)"
        yield words, case.left, right.roll(right.shape[-1] // 2, -1)
        return
    order = [1, 0, *range(2, right.shape[-1])]
    yield "y comes before x: coordinates have x first", case.left, right[..., order]


def embedded_x_and_y(case: Case) -> Attempts:
    """Position embeddings whose BEV part was made from a sine embedding with x first; needs A's weights."""
    mlp = "weights/bev_embedding.mlp"
    weights = [f"{mlp}.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
    sine = "positions/bev_sine" if case.name.startswith("tokens/") else "queries/sine"
    if not case.has(*weights, sine) or case.left.shape != case.right.shape:
        return
    first, first_bias, second, second_bias = (case.a[name].double() for name in weights)
    own = case.a[sine].double()

    def embed(x: Tensor) -> Tensor:
        return (x @ first.T + first_bias).relu() @ second.T + second_bias

    change = embed(own.roll(own.shape[-1] // 2, -1)) - embed(own)
    wrong = case.left.double().clone()
    wrong[:, : change.shape[-2]] += change
    yield "the sine embedding has x before y, it needs y before x (quirk Q3)", wrong, case.right


def half_cell(case: Case) -> Attempts:
    """Corners of cells where centres are meant, or the other way round."""
    grids = {grid["views"] > 1: grid for grid in case.constants.get("grids", [])}
    left, right = case.left, case.right
    if case.name == "positions/bev_xy" and False in grids:
        half = torch.tensor([0.5 / grids[False]["cols"], 0.5 / grids[False]["rows"]], dtype=torch.float64)
        yield (
            "half-pixel offset: BEV cells are embedded at their centres, not at their corners (quirk Q4)",
            left,
            right + half,
        )
    elif case.name == "positions/bev_sine" and case.has("positions/bev_xy") and False in grids:
        half = torch.tensor([0.5 / grids[False]["cols"], 0.5 / grids[False]["rows"]], dtype=torch.float64)
        wrong = sine_embedding(case.a["positions/bev_xy"].double() - half, left.shape[-1] // 2)
        yield (
            "half-pixel offset: BEV cells are embedded at their centres, not at their corners (quirk Q4)",
            wrong,
            right,
        )
    elif case.name in ("positions/pixels", "positions/rays") and True in grids:
        yield from _pixel_offsets(case, grids[True])


def _pixel_offsets(case: Case, grid: dict) -> Attempts:
    height, width = case.constants["image_size"]
    offsets = {
        "half-pixel offset: rays start at the corners of camera cells, not at their centres (quirk Q4)": (
            width / grid["cols"] / 2, height / grid["rows"] / 2,
        ),
        "half-pixel offset: pixels are whole numbers here, not pixel centres": (0.5, 0.5),
    }  # fmt: skip
    if not case.has("positions/pixels", "cameras/img2lidar"):
        return
    pixels = case.a["positions/pixels"].double()
    for words, (u, v) in offsets.items():
        moved = pixels + torch.tensor([u, v, 0], dtype=torch.float64)
        if case.name == "positions/rays":
            point_range = case.constants["point_range"]
            depths = ray_depths(case.left.shape[-1] // 3, point_range[3], dtype=moved.dtype, device=moved.device)
            moved = camera_rays(moved, case.a["cameras/img2lidar"].double(), depths, point_range)
        yield words, moved, case.right


def bev_windows(case: Case) -> Attempts:
    """BEV cells that are stretched over the range, or rounded to the nearest instead of down."""
    grid = next((grid for grid in case.constants.get("grids", []) if grid["cell_size"]), None)
    if grid is None or not case.has("queries/reference_points") or case.name != f"windows/{grid['name']}":
        return
    points = case.a["queries/reference_points"].double()[:, -case.left.shape[1] :]
    shape = torch.tensor([grid["rows"], grid["cols"]])
    stretched = points[..., [1, 0]] * shape
    low, high = torch.tensor(case.constants["point_range"], dtype=torch.float64).chunk(2)
    metres = points[..., :2] * (high - low)[:2] + low[:2] - torch.tensor(grid["origin"], dtype=torch.float64)
    metric = (metres / torch.tensor(grid["cell_size"], dtype=torch.float64)).flip(-1)
    attempts = (
        (
            "stretched windows: the point range was divided by the number of cells, BEV cells are metric: "
            "floor((metres - origin) / cell size) (quirk Q13)", stretched, torch.floor,
        ),
        ("cells were rounded to the nearest; a point lies in cell floor(offset / cell size)", metric, torch.round),
        (
            "stretched windows, and cells rounded to the nearest: floor((metres - origin) / cell size)",
            stretched, torch.round,
        ),
    )  # fmt: skip
    for words, place, to_cell in attempts:
        is_on_grid = ((place >= 0) & (place <= shape)).all(dim=-1)
        cells = torch.minimum(to_cell(place).long(), shape - 1)
        windows = torch.cat((torch.zeros_like(cells[..., :1]), cells), dim=-1)
        yield words, torch.where(is_on_grid[..., None], windows, NOWHERE)[:, :, None], case.right


def camera_choice(case: Case) -> Attempts:
    """The window of a point that several cameras see, in the wrong one."""
    constants = case.constants
    if constants.get("camera_assignment") != "first" or not case.has("queries/reference_points", "inputs/lidar2img"):
        return
    points = to_metres(case.a["queries/reference_points"].double()[:, -case.left.shape[1] :], constants["point_range"])
    grid = next(grid for grid in rebuild_layout(case.a).grids if grid.cell_size is None)
    cells, is_seen = camera_cells(points, case.a["inputs/lidar2img"].double(), tuple(constants["image_size"]), grid)
    last = grid.views - 1 - is_seen.flip(-1).int().argmax(dim=-1, keepdim=True)
    chosen = torch.cat((last[..., None], cells.gather(2, last[..., None].expand(*last.shape, 2))), dim=-1)
    words = "the window is in the last camera that sees the point: the first one in order has it (quirk Q11)"
    yield words, torch.where(is_seen.any(-1)[..., None, None], chosen, case.left), case.right


def channel_order(case: Case) -> Attempts:
    """Colours in the other order, before or after the mean was taken off."""
    right = case.right.double()
    order = case.constants.get("channel_order", "bgr")
    needed = "blue first (BGR)" if order == "bgr" else "red first (RGB)"
    words = f"BGR/RGB: the channels are in the opposite order, the network needs {needed} (quirk Q16)"
    yield words, case.left, right.flip(-3)
    if case.constants.get("mean"):
        mean, std = (torch.tensor(case.constants[key], dtype=torch.float64)[:, None, None] for key in ("mean", "std"))
        again = ((right * std + mean).flip(-3) - mean) / std
        yield f"{words}; mean and std were in the right one", case.left, again


def box_code(case: Case) -> Attempts:
    """Boxes decoded from a code in another order."""
    part = case.name.rpartition(".")[2]
    codes = selected_codes(case, part)
    if codes is not None and case.right.shape == case.left.shape:
        for words, order in BOX_CODE_ORDERS.items():
            yield words, decode_boxes(codes[:, order]), case.right


def selected_codes(case: Case, part: str) -> Tensor | None:
    """Box codes (n, 10) of A's boxes of one sample, from its heads; None where A lacks a tensor for that."""
    tasks = case.constants.get("tasks", [])
    heads = [[f"heads/task{task}.{branch}" for branch in BOX_BRANCHES] for task in range(len(tasks))]
    names = [f"boxes/queries.{part}", f"boxes/labels.{part}", *(name for task in heads for name in task)]
    if not part.isdecimal() or not case.has(*names):
        return None
    queries, labels = (case.a[name].long() for name in names[:2])
    owner = torch.zeros(16, dtype=torch.int64)
    for task, members in enumerate(tasks):
        owner[members] = task
    codes = [torch.cat([case.a[name][-1, int(part)].double() for name in task], dim=-1) for task in heads]
    matching = torch.stack(codes)[:, -case.constants["num_queries"] :]
    selected = matching[owner[labels], queries]
    return selected if case.rows is None else selected[case.rows]


def other_angle(case: Case) -> Attempts:
    """Yaw with the opposite sign, measured from the other axis, off by a half or quarter turn, or in degrees."""
    left, right = case.left.double(), case.right.double()
    if left.shape != right.shape:
        return
    attempts = {
        "yaw sign: the angle is counter-clockwise about +z": -right[:, YAW],
        "yaw is measured from +y: it is 0 when the heading is +x": math.pi / 2 - right[:, YAW],
        "yaw is off by half a turn": right[:, YAW] + math.pi,
        "yaw is off by a quarter turn": right[:, YAW] + math.pi / 2,
        "yaw is off by a quarter turn the other way": right[:, YAW] - math.pi / 2,
        "yaw is in degrees, expected radians": case.given[:, YAW].double().deg2rad(),
    }
    for words, yaw in attempts.items():
        fixed = right.clone()
        fixed[:, YAW] = same_turn(left[:, YAW], yaw)
        yield words, left, fixed


def sigmoids(case: Case) -> Attempts:
    """A sigmoid that was applied twice or not at all."""
    left, right = case.left.double(), case.right.double()
    twice, missing = "sigmoid twice: the values are scores already", "sigmoid missing: these are logits"
    if case.name.endswith(".center") and case.constants:
        point_range = case.constants["point_range"]
        flat = [*point_range[:2], 0.0, *point_range[3:5], 1.0]
        unit = to_unit(torch.nn.functional.pad(left, (0, 1)), flat)
        yield "sigmoid twice on the centre", to_metres(unit.sigmoid(), flat)[..., :2], right
        return
    yield twice, left.sigmoid(), right
    yield missing, left, right.sigmoid()


def weight_activation(case: Case) -> Attempts:
    """Sigmoid instead of tanh, and the other way round."""
    left = case.left.double()
    if case.constants.get("activation") == "sigmoid":
        yield "the activation of the weights is sigmoid, not tanh", left.logit().tanh(), case.right
    else:
        yield "the activation of the weights is tanh, not sigmoid", left.atanh().sigmoid(), case.right


def log_base(case: Case) -> Attempts:
    """Logarithms to base 2 or 10 instead of natural ones."""
    left, right = case.left.double(), case.right.double()
    for base, name in ((2.0, "2"), (10.0, "10")):
        if case.name.startswith("boxes/") and left.shape == right.shape:
            fixed = right.clone()
            fixed[:, SIZES] = (right[:, SIZES].log() / math.log(base)).exp()
            yield f"log base: sizes were raised from base {name}, their logarithms are natural", left, fixed
        elif case.name.endswith(".lse"):
            yield f"log base: this lse has base {name}, expected the natural logarithm", left, right * math.log(base)


def bias_limits(case: Case) -> Attempts:
    """A bias that was not clamped, or has the wrong sign or no scale."""
    limit, scale = case.constants.get("max_bias"), case.constants.get("scale")
    left, right = case.left.double(), case.right.double()
    if limit is not None:
        yield f"the bias was not clamped to {limit:g}", left, right.clamp(-limit, limit)
    yield "the sign of the bias: it is clamp(scale * weight), added to the scores", -left, right
    if scale is not None:
        again = scale * right if limit is None else (scale * right).clamp(-limit, limit)
        yield f"the scale of {scale:g} is missing: the bias is clamp(scale * weight)", left, again


def shared_norm(case: Case) -> Attempts:
    """A layer's output after the shared norm, which is for the heads alone."""
    layer = case.name.removeprefix("decoder/layer").partition(".")[0]
    if layer.isdecimal() and case.has("decoder/hidden") and case.name.endswith(".output"):
        words = "the shared norm was applied; the next layer is given the output without it (quirk Q7)"
        yield words, case.a["decoder/hidden"][int(layer)], case.right


def anything(case: Case) -> Attempts:
    """A constant factor or offset, and rounding."""
    left, right = case.left.double(), case.right.double()
    if left.shape != right.shape or not left.numel() or not case.left.is_floating_point():
        return
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        yield f"B holds A's values rounded to {name}", left.to(dtype).double(), right
    x, y = left.nan_to_num(0, 0, 0), right.nan_to_num(0, 0, 0)
    if y.square().sum() > 0 and x.square().sum() > 0:
        factor = ((x * y).sum() / x.square().sum()).item()
        if factor != 0:
            yield f"all values are {factor:.6g} times those of A", left * factor, right
    offset = (y - x).median().item()
    yield f"all values are those of A plus {offset:.6g}", left + offset, right
