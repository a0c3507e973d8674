"""What FlexAttention is asked to do: parts of the keys, the order of the queries, runs of blocks. Speed only.

The bias of a query is one number over its whole window. So attention with the bias is attention without it over
disjoint parts of the keys (a query's windows; the rest), each with its own lse, put together with the lse of a window
raised by the bias (``flex.py``). No score needs to be changed: whether a key belongs to a part is a mask, and the mask
has to be looked at only in blocks that some window of the block's queries touches, about a tenth of all.

One kernel computes all parts. The queries are sorted in two ways, by row of the BEV grid and by view and row of the
camera grids: tokens are stored row by row, so the windows of neighbours touch one run of blocks, and what a part reads
is one run of blocks with the mask and one run without; the kernel then needs no list of block numbers. The two orders,
called sides, are the heads that share one key head in FlexAttention's grouped-query mode, so that the kernel itself
sums the gradients of keys and values. On a side the queries are repeated once per part, one copy behind the other:
first those that see their windows, then those that share the rest of the side's keys, cut into several parts to fill
the GPU.

Shape letters: B batch, Q queries, N windows of a query in one modality, S sides, G parts on a side, R rows of the
sorted queries (Q padded to whole blocks), I blocks of queries, J blocks of keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cmt_aqr.attention.bias import CAMERA, LIDAR, CodePlane, code_plane, token_codes, window_codes
from cmt_aqr.attention.cuts import Run, rest_runs
from cmt_aqr.attention.layout import TokenLayout
from cmt_aqr.attention.windows import QueryWindows

# Elements to which the last dimension of a list of blocks is filled up. FlexAttention's kernels take the lists of a
# sample to lie behind those of the one before without a gap, but the compiler may leave one, up to 128 bytes, behind
# what it computes itself.
LIST_ALIGNMENT = 32


@dataclass(frozen=True)
class Side:
    """The parts of one modality's keys.

    Attributes:
        modality: LIDAR or CAMERA: whose tokens, windows and order of the queries.
        has_windows: the first part is the queries' windows, the others share the rest; False: they share all keys.
        num_rest: parts that share the rest, or all.
    """

    modality: int
    has_windows: bool
    num_rest: int

    @property
    def num_parts(self) -> int:
        """How many parts have keys; the side may hold more, without any."""
        return self.has_windows + self.num_rest


@dataclass(frozen=True)
class BlockLists:
    """One run of blocks of keys for every block of queries, in FlexAttention's form.

    The last dimension of each is filled up to a multiple of ``LIST_ALIGNMENT``.

    Attributes:
        num: (B, S, G I) int32, how many blocks.
        indices: (B, S, G I, J) int32, which: the first ``num`` entries.
        num_q, indices_q: (B, S, J) and (B, S, J, G I), the same the other way round.
    """

    num: Tensor
    indices: Tensor
    num_q: Tensor
    indices_q: Tensor


@dataclass(frozen=True)
class Schedule:
    """Everything that depends on the windows alone.

    Attributes:
        sides: S sides.
        num_parts: G, on every side.
        plane: of the codes.
        order: (B, S, R) int64, which query stands in a row; the rows behind Q repeat the last one.
        rank: (B, S, Q) int64, in which row a query stands.
        token_codes: (S, J * block) codes of the tokens as ``membership_codes`` has them.
        window_codes: (B, S, R, N).
        full, partial: blocks whose keys all belong to the part, and blocks in which the mask decides.
        has_token_mask: whether it was made for a token mask: then no block is full.
    """

    sides: tuple[Side, ...]
    num_parts: int
    plane: CodePlane
    order: Tensor
    rank: Tensor
    token_codes: Tensor
    window_codes: Tensor
    full: BlockLists
    partial: BlockLists
    has_token_mask: bool


def make_schedule(
    windows: QueryWindows, *, block_q: int, block_k: int, splits: tuple[int, int], has_token_mask: bool = False
) -> Schedule:
    """Sort the queries and find the runs of blocks.

    Args:
        windows: of the batch.
        block_q, block_k: queries and keys in a block.
        splits: into how many parts the rest of the LiDAR tokens and of the camera tokens is cut, at least 2.
        has_token_mask: the mask has to be looked at in every block.

    Raises:
        ValueError: fewer than 2 splits.
    """
    if min(splits) < 2:
        raise ValueError(f"the rest of the tokens must be cut into at least 2 parts, got splits {splits}")
    layout, settings = windows.layout, windows.settings
    sides = make_sides(layout, settings.is_local, splits, block_k)
    num_parts = max(side.num_parts for side in sides)
    # The kernels leave out their checks at the end where the length is a multiple of 128, two blocks of 64 queries.
    num_parts += num_parts % 2
    plane = code_plane(layout, settings)
    num_rows = -(-windows.batch_and_queries[1] // block_q) * block_q
    num_blocks = -(-layout.num_tokens // block_k)
    orders, ranks, codes, tables, full, partial = [], [], [], [], [], []
    for side in sides:
        rank = query_rank(windows, side.modality)
        order = query_order(rank, num_rows)
        first, last = touched_run(windows, side.modality, order, block_q, block_k)
        touched = (first, last if settings.is_local else first)
        tokens = token_range(layout, side.modality)
        nothing = (torch.zeros_like(first), torch.zeros_like(first))
        runs = [(nothing, touched)] if side.has_windows else []
        runs += rest_runs(touched, side.num_rest, tokens, block_k, has_token_mask=has_token_mask)
        runs += [(nothing, nothing)] * (num_parts - side.num_parts)
        full += [run[0] for run in runs]
        partial += [run[1] for run in runs]
        orders.append(order)
        ranks.append(rank)
        codes.append(_sorted_codes(windows, plane, side.modality, order))
        tables.append(membership_codes(layout, plane, side.modality, num_blocks * block_k, device=windows.device))
    return Schedule(
        sides=sides,
        num_parts=num_parts,
        plane=plane,
        order=torch.stack(orders, dim=1),
        rank=torch.stack(ranks, dim=1),
        token_codes=torch.stack(tables),
        window_codes=torch.stack(codes, dim=1),
        full=block_lists(full, len(sides), num_blocks),
        partial=block_lists(partial, len(sides), num_blocks),
        has_token_mask=has_token_mask,
    )


def make_sides(layout: TokenLayout, is_local: bool, splits: tuple[int, int], block_k: int) -> tuple[Side, ...]:
    """A side for every modality that has tokens."""
    sides = []
    for modality, num_tokens in ((LIDAR, layout.num_bev), (CAMERA, layout.num_pv)):
        if num_tokens:
            # An edge in front needs a part more; see rest_runs.
            has_edge = token_range(layout, modality)[0] % block_k > 0
            sides.append(Side(modality, has_windows=is_local, num_rest=splits[modality] + has_edge))
    return tuple(sides)


def token_range(layout: TokenLayout, modality: int) -> tuple[int, int]:
    """First token of a modality and the one behind its last."""
    return (0, layout.num_bev) if modality == LIDAR else (layout.num_bev, layout.num_tokens)


def query_rank(windows: QueryWindows, modality: int) -> Tensor:
    """Place (B, Q) of every query when they are sorted by the token index of their first window.

    Those without a window come last, equals in their order. Counting the smaller ones is one small kernel where a sort
    is several.
    """
    layout = windows.layout
    view, row, col = (windows.bev_cells if modality == LIDAR else windows.camera_cells).unbind(-1)
    index = layout.bev_index(row, col) if modality == LIDAR else layout.pv_index(view, row, col)
    key = torch.where(view >= 0, index, layout.num_tokens).amin(dim=-1)
    number = torch.arange(key.shape[1], device=key.device)
    key = key * key.shape[1] + number
    return (key[:, None, :] < key[:, :, None]).sum(dim=-1)


def query_order(rank: Tensor, num_rows: int) -> Tensor:
    """The query (B, R) in every row; the rows behind Q repeat the last one."""
    batch_size, num_queries = rank.shape
    number = torch.arange(num_queries, device=rank.device).expand(batch_size, -1)
    order = torch.zeros_like(rank).scatter(1, rank, number)
    return torch.cat((order, order[:, -1:].expand(-1, num_rows - num_queries)), dim=1)


def _sorted_codes(windows: QueryWindows, plane: CodePlane, modality: int, order: Tensor) -> Tensor:
    """Window codes (B, R, N) of the sorted queries; N is that of the camera windows for both modalities."""
    codes = window_codes(windows, plane, modality)
    if not windows.settings.is_local:
        codes = torch.full_like(codes, plane.nowhere)
    most = 1 if windows.camera_cells is None else windows.camera_cells.shape[2]
    codes = nn.functional.pad(codes, (0, most - codes.shape[2]), value=plane.nowhere)
    return codes.gather(1, order[..., None].expand(-1, -1, most))


def touched_run(windows: QueryWindows, modality: int, order: Tensor, block_q: int, block_k: int) -> Run:
    """The run of blocks of keys that holds all windows of a block of queries.

    Returns:
        first (B, I) and the one behind the last (B, I) block, int64; the run is empty, and lies anywhere inside the
        modality, where no query of the block has a window.
    """
    layout = windows.layout
    if modality == LIDAR:
        radius, rows, cols = windows.settings.bev_radius, layout.bev_rows, layout.bev_cols
        view, row, col = windows.bev_cells.unbind(-1)
        grid_start = 0
    else:
        radius, rows, cols = windows.settings.camera_radius, layout.pv_rows, layout.pv_cols
        view, row, col = windows.camera_cells.unbind(-1)
        grid_start = layout.pv_index(view, 0, 0)
    has_window = view >= 0
    first = grid_start + (row - radius).clamp(min=0) * cols + (col - radius).clamp(min=0)
    last = grid_start + (row + radius).clamp(max=rows - 1) * cols + (col + radius).clamp(max=cols - 1)
    start, stop = token_range(layout, modality)
    first = torch.where(has_window, first // block_k, stop // block_k).amin(dim=-1)
    last = torch.where(has_window, last // block_k + 1, start // block_k).amax(dim=-1)
    first = first.gather(1, order).unflatten(1, (-1, block_q)).amin(dim=-1)
    last = last.gather(1, order).unflatten(1, (-1, block_q)).amax(dim=-1)
    return torch.minimum(first, last), last


def membership_codes(
    layout: TokenLayout, plane: CodePlane, modality: int, length: int, *, device: torch.device
) -> Tensor:
    """Codes (length,) of the tokens for a test whose answer is known from one comparison.

    With ``high`` an otherwise unused bit of the codes,

        x = ((code + high - window code) & outside) ^ high

    is 0 inside the window and below 2 high outside. What is no token of the modality has the code 3 high: x is then at
    least 2 high for every window.

    Computed where they are needed: in a compiled graph a copy from the CPU may begin when its source has been
    overwritten already.
    """
    codes = nn.functional.pad(token_codes(layout, plane, device=device), (0, length - layout.num_tokens))
    token = torch.arange(length, device=device)
    start, stop = token_range(layout, modality)
    is_ours = (token >= start) & (token < stop)
    return torch.where(is_ours, codes + plane.high, 3 * plane.high).to(plane.dtype)


def block_lists(runs: list[Run], num_sides: int, num_blocks: int) -> BlockLists:
    """FlexAttention's form of one run per part.

    Args:
        runs: of all parts, those of a side together.
        num_sides: S.
        num_blocks: J.
    """
    ends = zip(*runs, strict=True)
    first, last = (torch.stack(end, dim=1).unflatten(1, (num_sides, -1)).flatten(2) for end in ends)
    num = last - first
    block = torch.arange(num_blocks + -num_blocks % LIST_ALIGNMENT, device=first.device)
    offset = block[:num_blocks] - first[..., None]
    is_member = ((offset >= 0) & (offset < num[..., None])).transpose(-2, -1)
    # Blocks of queries in front, in their order: a scatter to the place that counting gives; the place behind the last
    # takes the others.
    count = is_member.cumsum(dim=-1)
    length = is_member.shape[-1]
    place = torch.where(is_member, count - 1, length)
    number = torch.arange(length, dtype=torch.int32, device=first.device)
    indices_q = torch.zeros(*place.shape[:-1], length + 1, dtype=torch.int32, device=first.device)
    indices_q = indices_q.scatter(-1, place, number.expand(place.shape))[..., :length]
    return BlockLists(
        num=_filled_up(num.to(torch.int32)),
        indices=(first[..., None] + block).clamp(max=num_blocks - 1).to(torch.int32),
        num_q=_filled_up(count[..., -1].to(torch.int32)),
        indices_q=_filled_up(indices_q),
    )


def _filled_up(x: Tensor) -> Tensor:
    return nn.functional.pad(x, (0, -x.shape[-1] % LIST_ALIGNMENT)).contiguous()
