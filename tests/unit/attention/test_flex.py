"""The parts, their schedule and their merging, with FlexAttention emulated; the kernel itself: tests/gpu."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmt_aqr.attention import (
    AttentionBias,
    QueryWindows,
    TokenLayout,
    WindowSettings,
    attend,
    flex,
    padded_length,
)
from cmt_aqr.attention import schedule as schedule_module
from cmt_aqr.attention.dense import dense_attention
from cmt_aqr.attention.schedule import make_schedule, query_order, query_rank, token_range
from cmt_aqr.tools.attention_cases import make_windows
from tests.unit.attention.emulated_flex import emulated_flex, membership

BLOCK_Q, BLOCK_K = 16, 32
GRIDS = {
    "aligned": TokenLayout(16, 24, 6, 4, 10),
    "edges": TokenLayout(13, 17, 6, 4, 10),
    "hardly any LiDAR": TokenLayout(3, 5, 6, 4, 10),
    "a part of a block each": TokenLayout(3, 5, 2, 2, 5),
    "lidar only": TokenLayout(13, 17),
    "camera only": TokenLayout(0, 0, 6, 4, 10),
}
SETTINGS = {
    "default": WindowSettings(),
    "large": WindowSettings(bev=9, camera=15),
    "one cell": WindowSettings(bev=1, camera=1),
    "every camera": WindowSettings(camera_assignment="all"),
    "corner": WindowSettings(unseen="corner"),
    "whole modality": WindowSettings(is_local=False),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(flex, "BLOCK_Q", BLOCK_Q)
    monkeypatch.setattr(flex, "BLOCK_K", BLOCK_K)
    monkeypatch.setattr(flex, "flex_attention", emulated_flex)


def schedule_of(windows, splits=(4, 2), **options):
    return make_schedule(windows, block_q=BLOCK_Q, block_k=BLOCK_K, splits=splits, **options)


def smaller_grid(layout, share):
    """Cell size of a BEV grid that covers a share of the point range along x and y; None without BEV."""
    return (108 * share / layout.bev_cols, 108 * share / layout.bev_rows) if layout.num_bev else None


def owners(schedule, num_tokens):
    """How many parts every token belongs to, for every row: (B, R, num_tokens)."""
    members = membership(flex.make_block_mask(schedule, num_tokens), len(schedule.sides))
    return members.unflatten(2, (schedule.num_parts, -1)).sum(dim=(1, 2))


def leaves_of(layout, num_queries, batch_size=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch_size, 2, n, 8) for n in (num_queries, layout.num_tokens, layout.num_tokens)]
    shapes.append((batch_size, num_queries, 2))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def gradients(out, lse, leaves):
    generator = torch.Generator().manual_seed(1)
    by_out, by_lse = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, lse))
    loss = (out * by_out.to(out.dtype)).sum() + (torch.where(lse.isfinite(), lse, 0) * by_lse.to(lse.dtype)).sum()
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("splits", [(2, 2), (5, 3)])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("layout", GRIDS.values(), ids=GRIDS)
def test_equals_dense_with_gradients(layout, settings, splits):
    # A fifth of the queries has no BEV window.
    windows = make_windows(layout, 2, 37, device="cpu", bev_cell_size=smaller_grid(layout, 0.9), settings=settings)
    leaves = leaves_of(layout, 37)
    q, k, v, strength = leaves
    expected = dense_attention(q, k, v, AttentionBias(windows, strength))
    schedule = schedule_of(windows, splits)
    actual = flex.attend_to_parts(q, k, v, AttentionBias(windows, strength), schedule, None)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(*actual, leaves), gradients(*expected, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiled_gradients_equal_those_without_a_compiler(dtype):
    """torch 2.11 once lost the gradient of an output that a cast without effect had gone through."""
    schedule = schedule_of(make_windows(GRIDS["edges"], 2, 37, device="cpu"))
    num_sides, num_rows = schedule.order.shape[1:]
    parts = (num_sides, schedule.num_parts)
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    shapes = {(2, 3, 37, 8): dtype, (2, 3, *parts, num_rows): wide, (2, *parts, 37): wide}
    leaves = [torch.randn(s, generator=generator, dtype=wide).to(d).requires_grad_() for s, d in shapes.items()]

    def evaluate(queries, part_lse, added):
        rows = flex._Sort.apply(queries, schedule.order, schedule.rank, schedule.num_parts)
        used = ((0, 0), (0, 1), (1, 3))
        return flex._Merge.apply(rows * rows, part_lse, added, schedule.order, schedule.rank, used)

    torch._dynamo.reset()
    compiled = torch.compile(evaluate, backend="aot_eager", fullgraph=True)
    expected, actual = gradients(*evaluate(*leaves), leaves), gradients(*compiled(*leaves), leaves)
    for mine, theirs in zip(actual, expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("num_queries", [1, 33])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("layout", GRIDS.values(), ids=GRIDS)
def test_every_token_belongs_to_one_part(layout, settings, num_queries):
    windows = make_windows(layout, 2, num_queries, device="cpu", settings=settings, seed=num_queries)
    schedule = schedule_of(windows)
    for num_tokens in (layout.num_tokens, -(-layout.num_tokens // BLOCK_K) * BLOCK_K):
        members = owners(schedule, num_tokens)
        assert (members[..., : layout.num_tokens] == 1).all()
        assert not members[..., layout.num_tokens :].any()


def test_every_token_belongs_to_one_part_of_any_layout(monkeypatch):
    """Edges inside blocks, modalities inside one block, more parts than blocks, fewer queries than rows."""
    draw = random.Random(0)
    for _ in range(100):
        block_q, block_k = draw.choice((4, 8, 16)), draw.choice((8, 16, 32))
        monkeypatch.setattr(flex, "BLOCK_Q", block_q)
        monkeypatch.setattr(flex, "BLOCK_K", block_k)
        views = draw.choice((0, 1, 2, 6))
        bev = draw.choice(((1, 5), (3, 3), (8, 13), (16, 24), (0, 0) if views else (5, 1)))
        layout = TokenLayout(*bev, views, *(draw.choice(((4, 10), (2, 5))) if views else (0, 0)))
        settings = WindowSettings(
            bev=draw.choice((1, 3, 9)),
            camera=draw.choice((1, 8, 15)),
            camera_assignment=draw.choice(("first", "all")),
            is_local=draw.random() < 0.85,
        )
        windows = make_windows(
            layout,
            2,
            draw.randint(1, 40),
            device="cpu",
            settings=settings,
            seed=draw.randrange(1000),
            bev_cell_size=smaller_grid(layout, draw.choice((1.0, 0.9, 0.01))),
        )
        splits, has_token_mask = (draw.randint(2, 7), draw.randint(2, 7)), draw.random() < 0.2
        schedule = make_schedule(
            windows, block_q=block_q, block_k=block_k, splits=splits, has_token_mask=has_token_mask
        )
        members = owners(schedule, -(-layout.num_tokens // block_k) * block_k)
        case = (layout, settings, splits, block_q, block_k, has_token_mask)
        assert (members[..., : layout.num_tokens] == 1).all(), case
        assert not members[..., layout.num_tokens :].any(), case


def test_lists_of_queries_are_the_lists_of_keys_turned_round():
    windows = make_windows(GRIDS["edges"], 2, 50, device="cpu")
    schedule = schedule_of(windows)
    num_rows = schedule.num_parts * schedule.order.shape[2] // BLOCK_Q
    num_blocks = -(-GRIDS["edges"].num_tokens // BLOCK_K)
    for runs in (schedule.full, schedule.partial):
        shape = (2, 2, num_rows, num_blocks)
        of_keys, of_queries = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for b, p, i in torch.cartesian_prod(*(torch.arange(n) for n in shape[:3])).tolist():
            of_keys[b, p, i, runs.indices[b, p, i, : runs.num[b, p, i]].long()] = True
        for b, p, j in torch.cartesian_prod(*(torch.arange(n) for n in (*shape[:2], shape[3]))).tolist():
            of_queries[b, p, runs.indices_q[b, p, j, : runs.num_q[b, p, j]].long(), j] = True
        assert torch.equal(of_keys, of_queries)
        assert of_keys.any()


@pytest.mark.parametrize("layout", [TokenLayout(128, 128, 6, 20, 50), TokenLayout(180, 180, 6, 40, 100)])
def test_most_blocks_need_no_mask(layout):
    """The point of the schedule: on the official grids a tenth of the blocks, and the parts share the rest evenly."""
    windows = make_windows(layout, 1, 900, device="cpu")
    schedule = make_schedule(windows, block_q=64, block_k=128, splits=flex.SPLITS)
    num_blocks, num_parts = -(-layout.num_tokens // 128), schedule.num_parts
    full, partial = (
        x.num[0, :, : num_parts * 15].unflatten(-1, (num_parts, 15)).double() for x in (schedule.full, schedule.partial)
    )
    assert partial[:, 0].sum(dim=0).mean() <= 0.12 * num_blocks
    assert partial[:, 1:].sum(dim=(0, 1)).mean() <= 0.13 * num_blocks
    assert full[:, 0].max() == 0
    for side in schedule.sides:
        rest_full, rest_partial = (x[side.modality, 1 : side.num_parts] for x in (full, partial))
        start, stop = token_range(layout, side.modality)
        assert (rest_full.sum(dim=0) + rest_partial.sum(dim=0) == -(-stop // 128) - start // 128).all()
        # No part of a block of queries is much dearer than the others, a block with the mask counting twice.
        cost = rest_full + 2 * rest_partial
        assert (cost.max(dim=0).values <= 1.7 * cost.mean(dim=0)).all()
        assert not full[side.modality, side.num_parts :].any() and not partial[side.modality, side.num_parts :].any()


@pytest.mark.parametrize("layout", GRIDS.values(), ids=GRIDS)
def test_lists_of_blocks_lie_where_the_kernel_looks(layout):
    """It takes a sample's lists to lie behind those before, but a compiler may fill lists up to 128 bytes."""
    schedule = schedule_of(make_windows(layout, 2, 37, device="cpu"))
    for lists in (schedule.full, schedule.partial):
        for x in (lists.num, lists.indices, lists.num_q, lists.indices_q):
            assert x.dtype == torch.int32 and x.shape[-1] % 32 == 0 and x.is_contiguous()


def test_nothing_of_a_schedule_is_made_on_another_device():
    """Copies from the CPU inside a compiled graph have been overtaken by what used their source again."""

    class Devices(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.seen.update(x.device.type for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    for settings in SETTINGS.values():
        windows = make_windows(GRIDS["edges"], 2, 37, device="cpu", settings=settings)
        cells = (windows.bev_cells.to("meta"), windows.camera_cells.to("meta"))
        with Devices() as devices:
            schedule = schedule_of(QueryWindows(windows.layout, settings, *cells))
            flex.part_bias(AttentionBias(windows, torch.empty(2, 37, 2, device="meta")), schedule)
        assert devices.seen == {"meta"}


def test_queries_are_sorted_by_window_with_the_unseen_last():
    windows = make_windows(TokenLayout(16, 24, 6, 4, 10), 2, 60, device="cpu")
    rank = query_rank(windows, 1)
    order = query_order(rank, 64)
    assert torch.equal(order[:, :60].sort().values, torch.arange(60).expand(2, -1))
    assert torch.equal(order.gather(1, rank), torch.arange(60).expand(2, -1))
    assert (order[:, 60:] == order[:, 59:60]).all()
    view, row, col = windows.camera_cells[:, :, 0].unbind(-1)
    token = torch.where(view >= 0, (view * 4 + row) * 10 + col, 10_000).gather(1, order)
    assert (token.diff(dim=1) >= 0).all()
    assert (view.gather(1, order)[:, -1] == -1).all()


def test_token_mask_and_rows_without_tokens():
    layout = GRIDS["edges"]
    windows = make_windows(layout, 2, 37, device="cpu")
    leaves = leaves_of(layout, 37)
    q, k, v, strength = leaves
    mask = torch.rand(2, layout.num_tokens, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[1] = False
    bias = AttentionBias(windows, strength)
    expected = dense_attention(q, k, v, bias, token_mask=mask)
    actual = flex.attend_to_parts(q, k, v, bias, schedule_of(windows, has_token_mask=True), mask)
    assert actual[0][1].eq(0).all()
    assert actual[1][1].eq(-torch.inf).all()
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(*actual, leaves), gradients(*expected, leaves), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_padded_tokens_change_nothing():
    layout = GRIDS["edges"]
    windows = make_windows(layout, 2, 37, device="cpu")
    q, k, v, strength = leaves_of(layout, 37)
    bias = AttentionBias(windows, strength)
    assert padded_length(layout) == 480
    longer = [torch.nn.functional.pad(x, (0, 0, 0, 480 - layout.num_tokens), value=7.0) for x in (k, v)]
    expected = flex.attend_to_parts(q, k, v, bias, schedule_of(windows), None)
    torch.testing.assert_close(flex.attend_to_parts(q, *longer, bias, schedule_of(windows), None), expected)
    torch.testing.assert_close(attend(q, *longer, bias, backend="dense"), expected)


def test_more_shapes_than_the_compiler_takes_by_itself(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    double = flex._compiled(lambda x: x + x)
    for length in range(2, 2 + 2 * torch._dynamo.config.recompile_limit):
        assert double(torch.ones(length)).sum() == 2 * length


def test_schedules_made_for_something_else():
    layout = GRIDS["edges"]
    windows = make_windows(layout, 2, 37, device="cpu")
    q = torch.zeros(2, 2, 37, 32)
    mask = torch.ones(2, layout.num_tokens, dtype=torch.bool)
    flex.check_schedule(schedule_of(windows), q, None)
    flex.check_schedule(schedule_of(windows, has_token_mask=True), q, mask)
    with pytest.raises(ValueError, match=r"^the schedule was made without a token mask and is used with one$"):
        flex.check_schedule(schedule_of(windows), q, mask)
    with pytest.raises(ValueError, match=r"^the schedule was made with a token mask and is used without one$"):
        flex.check_schedule(schedule_of(windows, has_token_mask=True), q, None)
    with pytest.raises(ValueError, match=r"^the schedule is for batch and queries \(2, 37\), q has \(2, 36\)$"):
        flex.check_schedule(schedule_of(windows), q[:, :, :36], None)
    with pytest.raises(ValueError, match=r"at least 2 parts, got splits \(1, 3\)"):
        schedule_of(windows, (1, 3))


def test_a_plane_of_64_bits(monkeypatch):
    layout = TokenLayout(40, 40, 6, 4, 10)
    plane = schedule_module.code_plane
    monkeypatch.setattr(schedule_module, "code_plane", lambda *a: replace(plane(*a), dtype=torch.int64))
    windows = make_windows(layout, 1, 37, device="cpu")
    schedule = schedule_of(windows)
    assert schedule.token_codes.dtype == schedule.window_codes.dtype == torch.int64
    assert (owners(schedule, layout.num_tokens) == 1).all()


def test_flex_on_the_cpu_is_refused():
    layout = GRIDS["aligned"]
    q, k, v, strength = leaves_of(layout, 5)
    bias = AttentionBias(make_windows(layout, 2, 5, device="cpu"), strength)
    with pytest.raises(ValueError, match="flex backend needs a CUDA GPU, got tensors on cpu; use dense"):
        attend(q, k, v, bias, backend="flex")
    with pytest.raises(ValueError, match="one of auto, flex, dense, lowrank, got 'flash'"):
        attend(q, k, v, bias, backend="flash")
