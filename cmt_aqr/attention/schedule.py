"""What FlexAttention is asked to do: parts of the keys, the order of the queries, runs of blocks. Speed only.

The bias of a query is one number over its whole window. So attention with the bias is attention without it over
disjoint parts of the keys (a query's windows; the rest), each with its own lse, put together with the lse of a window
raised by the bias (``flex.py``). No score needs to be changed: whether a key belongs to a part is a mask, and the mask
has to be looked at only in blocks that some window of the block's queries touches, about a tenth of all.

The parts are the heads that share one key head in FlexAttention's grouped-query mode: one kernel computes all of them,
and in the backward pass the gradients of keys and values are summed inside the kernel. The rest of the keys is cut into
several parts to fill the GPU. Each part sorts the queries in its own way, by row of the BEV grid or by view and row of
the camera grids: tokens are stored row by row, so the windows of neighbours touch one run of blocks, and what a part
reads is one run of blocks with the mask and one run without. The kernel then needs no list of block numbers.

Shape letters: B batch, Q queries, N windows of a query in one modality, P parts, R rows of the sorted queries (Q padded
to whole blocks), I blocks of queries, J blocks of keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cmt_aqr.attention.bias import CAMERA, LIDAR, CodePlane, code_plane, token_codes, window_codes
from cmt_aqr.attention.cuts import rest_runs
from cmt_aqr.attention.layout import TokenLayout
from cmt_aqr.attention.windows import QueryWindows, WindowSettings


@dataclass(frozen=True)
class Part:
    """Some of the keys.

    Attributes:
        modality: LIDAR or CAMERA: whose windows and whose order of the queries.
        kind: ``rest``: keys outside the query's windows; ``window``: those inside; ``all``: both.
        index: this is the index-th of the parts that share the keys.
    """

    modality: int
    kind: str
    index: int = 0

    @property
    def is_biased(self) -> bool:
        """Whether the bias is added to the scores of this part."""
        return self.kind != "rest"


@dataclass(frozen=True)
class Runs:
    """One run of blocks of keys for every block of queries, in FlexAttention's form.

    Attributes:
        num: (B, P, I) int32, how many blocks.
        indices: (B, P, I, J) int32, which: the first ``num`` entries.
        num_q, indices_q: (B, P, J) and (B, P, J, I), the same the other way round.
    """

    num: Tensor
    indices: Tensor
    num_q: Tensor
    indices_q: Tensor


@dataclass(frozen=True)
class Schedule:
    """Everything that depends on the windows alone.

    Attributes:
        parts: P parts.
        plane: of the codes.
        order: (B, P, R) int64, which query stands in a row; the rows behind Q repeat the last one.
        rank: (B, P, Q) int64, in which row a query stands.
        token_codes: (P, J * block) codes of the tokens.
        token_bits: (P, J * block) the bits of a difference of codes that count; 0 where the token is not the part's.
        window_codes: (B, P, R, N).
        full, partial: blocks whose keys all belong to the part, and blocks in which the mask decides.
    """

    parts: tuple[Part, ...]
    plane: CodePlane
    order: Tensor
    rank: Tensor
    token_codes: Tensor
    token_bits: Tensor
    window_codes: Tensor
    full: Runs
    partial: Runs


def make_schedule(
    windows: QueryWindows, *, block_q: int, block_k: int, splits: tuple[int, int], has_token_mask: bool = False
) -> Schedule:
    """Sort the queries and find the runs of blocks.

    Args:
        windows: of the batch.
        block_q, block_k: queries and keys in a block.
        splits: into how many parts the rest of the LiDAR tokens and of the camera tokens is cut, at least 2.
        has_token_mask: the mask has to be looked at in every block.
    """
    layout, settings = windows.layout, windows.settings
    parts = make_parts(layout, settings, splits, block_k)
    plane = code_plane(layout, settings)
    num_rows = -(-windows.batch_and_queries[1] // block_q) * block_q
    order, rank, codes, touched, shares = {}, {}, {}, {}, {}
    for modality in sorted({part.modality for part in parts}):
        rank[modality] = query_rank(windows, modality)
        order[modality] = query_order(rank[modality], num_rows)
        codes[modality] = _sorted_codes(windows, plane, modality, order[modality])
        first, last = touched_run(windows, modality, order[modality], block_q, block_k)
        touched[modality] = (first, last if settings.is_local else first)
        count = sum(part.modality == modality and part.kind != "window" for part in parts)
        tokens = token_range(layout, modality)
        shares[modality] = rest_runs(touched[modality], count, tokens, block_k, has_token_mask=has_token_mask)
    full, partial = [], []
    for part in parts:
        nothing = (torch.zeros_like(touched[part.modality][0]),) * 2
        is_window = part.kind == "window"
        runs = (nothing, touched[part.modality]) if is_window else shares[part.modality][part.index]
        full.append(runs[0])
        partial.append(runs[1])
    num_blocks = -(-layout.num_tokens // block_k)
    length, device = num_blocks * block_k, windows.device
    codes_of_tokens, token_bits = part_tables(parts, layout, plane, length, device=device)
    return Schedule(
        parts=parts,
        plane=plane,
        order=torch.stack([order[part.modality] for part in parts], dim=1),
        rank=torch.stack([rank[part.modality] for part in parts], dim=1),
        token_codes=codes_of_tokens,
        token_bits=token_bits,
        window_codes=torch.stack([codes[part.modality] for part in parts], dim=1),
        full=block_runs(full, num_blocks),
        partial=block_runs(partial, num_blocks),
    )


def make_parts(
    layout: TokenLayout, settings: WindowSettings, splits: tuple[int, int], block_k: int
) -> tuple[Part, ...]:
    """Cut the keys into parts; the long ones first."""
    rest, windows = [], []
    for modality, num_tokens in ((LIDAR, layout.num_bev), (CAMERA, layout.num_pv)):
        if num_tokens == 0:
            continue
        start = token_range(layout, modality)[0]
        # An edge in front needs a part more; see rest_runs.
        count = splits[modality] + (start % block_k > 0)
        rest += [Part(modality, "rest" if settings.is_local else "all", i) for i in range(count)]
        if settings.is_local:
            windows.append(Part(modality, "window"))
    return (*rest, *windows)


def token_range(layout: TokenLayout, modality: int) -> tuple[int, int]:
    """First token of a modality and the one behind its last."""
    return (0, layout.num_bev) if modality == LIDAR else (layout.num_bev, layout.num_tokens)


def query_rank(windows: QueryWindows, modality: int) -> Tensor:
    """Place (B, Q) of every query when they are sorted by the token index of their first window.

    Those without a window come last, equals in their order. Counting the smaller ones is one small kernel where a sort
    is several.
    """
    layout = windows.layout
    if modality == LIDAR:
        key = layout.bev_index(windows.bev_cells[..., 0], windows.bev_cells[..., 1])
    else:
        view, row, col = windows.camera_cells.unbind(-1)
        key = torch.where(view >= 0, layout.pv_index(view, row, col), layout.num_tokens).amin(dim=-1)
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
    most = 1 if windows.camera_cells is None else windows.camera_cells.shape[2]
    codes = nn.functional.pad(codes, (0, most - codes.shape[2]), value=plane.nowhere)
    return codes.gather(1, order[..., None].expand(-1, -1, most))


def touched_run(
    windows: QueryWindows, modality: int, order: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    """The run of blocks of keys that holds all windows of a block of queries.

    Returns:
        first (B, I) and the one behind the last (B, I) block, int64; the run is empty, and lies anywhere inside the
        modality, where no query of the block has a window.
    """
    layout = windows.layout
    if modality == LIDAR:
        radius, rows, cols = windows.settings.bev_radius, layout.bev_rows, layout.bev_cols
        row, col = windows.bev_cells[..., None, :].unbind(-1)
        has_window, grid_start = torch.ones_like(row, dtype=torch.bool), 0
    else:
        radius, rows, cols = windows.settings.camera_radius, layout.pv_rows, layout.pv_cols
        view, row, col = windows.camera_cells.unbind(-1)
        has_window, grid_start = view >= 0, layout.pv_index(view, 0, 0)
    first = grid_start + (row - radius).clamp(min=0) * cols + (col - radius).clamp(min=0)
    last = grid_start + (row + radius).clamp(max=rows - 1) * cols + (col + radius).clamp(max=cols - 1)
    start, stop = token_range(layout, modality)
    first = torch.where(has_window, first // block_k, stop // block_k).amin(dim=-1)
    last = torch.where(has_window, last // block_k + 1, start // block_k).amax(dim=-1)
    first = first.gather(1, order).unflatten(1, (-1, block_q)).amin(dim=-1)
    last = last.gather(1, order).unflatten(1, (-1, block_q)).amax(dim=-1)
    return torch.minimum(first, last), last


def part_tables(
    parts: tuple[Part, ...], layout: TokenLayout, plane: CodePlane, length: int, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Codes and bits (P, length) of the tokens as every part sees them; see :class:`Schedule`.

    Computed where they are needed: inside a compiled graph a copy from the CPU may start when its source has been
    overwritten.
    """
    codes = nn.functional.pad(token_codes(layout, plane, device=device), (0, length - layout.num_tokens))
    token = torch.arange(length, device=device)
    all_codes, all_bits = [], []
    for part in parts:
        start, stop = token_range(layout, part.modality)
        is_ours = (token >= start) & (token < stop)
        # The code -1 is outside every window; without bits every token is inside.
        if part.kind == "window":
            all_codes.append(torch.where(is_ours, codes, -1))
            all_bits.append(torch.full_like(token, plane.outside))
        else:
            all_codes.append(codes if part.kind == "rest" else torch.full_like(codes, -1))
            all_bits.append(torch.where(is_ours, plane.outside, 0))
    return tuple(torch.stack(x).to(plane.dtype) for x in (all_codes, all_bits))


def block_runs(runs: list[tuple[Tensor, Tensor]], num_blocks: int) -> Runs:
    """FlexAttention's form of one run per part."""
    first = torch.stack([run[0] for run in runs], dim=1)
    num = torch.stack([run[1] for run in runs], dim=1) - first
    block = torch.arange(num_blocks, device=first.device)
    offset = block - first[..., None]
    is_member = ((offset >= 0) & (offset < num[..., None])).transpose(-2, -1)
    # Blocks of queries in front, in their order: a scatter to the place that counting gives; one place more takes the
    # others.
    count = is_member.cumsum(dim=-1)
    place = torch.where(is_member, count - 1, is_member.shape[-1])
    number = torch.arange(is_member.shape[-1], device=first.device, dtype=torch.int32)
    indices_q = torch.zeros_like(place, dtype=torch.int32)
    indices_q = nn.functional.pad(indices_q, (0, 1)).scatter(-1, place, number.expand(place.shape))
    return Runs(
        num=num.to(torch.int32),
        indices=(first[..., None] + block).clamp(max=num_blocks - 1).to(torch.int32),
        num_q=count[..., -1].to(torch.int32),
        indices_q=indices_q[..., :-1].contiguous(),
    )
