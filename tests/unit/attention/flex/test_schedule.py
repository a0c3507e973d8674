"""The partitions, their schedule and their merging, with FlexAttention emulated; the kernel itself: tests/gpu."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmt_aqr.attention import AttentionBias, QueryWindows, TokenLayout, attend
from cmt_aqr.attention.dense import dense_attention
from cmt_aqr.attention.flex import kernel
from cmt_aqr.attention.flex import schedule as schedule_module
from cmt_aqr.attention.flex.merge import merge_partitions, sort_into_rows
from cmt_aqr.attention.flex.schedule import make_schedule, query_order, query_rank
from cmt_aqr.attention.score_mod import compile_for_shapes
from cmt_aqr.tools.attention_cases import fusion_layout, make_windows
from tests.unit.attention.cases import RADAR, sized
from tests.unit.attention.flex.emulated_flex import emulated_flex, membership

BLOCK_Q, BLOCK_K = 16, 32
GRIDS = {
    "aligned": fusion_layout((16, 24), (6, 4, 10)),
    "edges": fusion_layout((13, 17), (6, 4, 10)),
    "hardly any LiDAR": fusion_layout((3, 5), (6, 4, 10)),
    "inside one block each": fusion_layout((3, 5), (2, 2, 5)),
    "lidar only": fusion_layout((13, 17), None),
    "camera only": fusion_layout(None, (6, 4, 10)),
    "three": TokenLayout((*fusion_layout((13, 17), (6, 4, 10)).grids, RADAR)),
}
SETTINGS = {
    "default": sized(5, 8),
    "large": sized(9, 15),
    "one cell": sized(1, 1),
    "every camera": sized(5, 8, camera_assignment="all"),
    "corner": sized(5, 8, unseen="corner"),
    "whole grid": sized(5, 8, is_local=False),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK_Q", BLOCK_Q)
    monkeypatch.setattr(kernel, "BLOCK_K", BLOCK_K)
    monkeypatch.setattr(kernel, "flex_attention", emulated_flex)


def schedule_of(windows, splits=(4, 2, 3), **options):
    splits = splits[: len(windows.cells)]
    return make_schedule(windows, block_q=BLOCK_Q, block_k=BLOCK_K, splits=splits, **options)


def smaller_grid(layout, share):
    """The layout with a LiDAR grid that covers a share of the point range along x and y."""
    lidar = layout.grids[0]
    if lidar.name != "lidar":
        return layout
    smaller = replace(lidar, cell_size=(108 * share / lidar.cols, 108 * share / lidar.rows))
    return replace(layout, grids=(smaller, *layout.grids[1:]))


def owners(schedule, num_tokens):
    """How many partitions every token belongs to, for every row: (B, R, num_tokens)."""
    members = membership(kernel.make_block_mask(schedule, num_tokens), len(schedule.passes))
    return members.unflatten(2, (schedule.num_partitions, -1)).sum(dim=(1, 2))


def leaves_of(layout, num_queries, batch_size=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch_size, 2, n, 8) for n in (num_queries, layout.num_tokens, layout.num_tokens)]
    shapes.append((batch_size, num_queries, len(layout.grids)))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def gradients(out, lse, leaves):
    generator = torch.Generator().manual_seed(1)
    by_out, by_lse = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, lse))
    loss = (out * by_out.to(out.dtype)).sum() + (torch.where(lse.isfinite(), lse, 0) * by_lse.to(lse.dtype)).sum()
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("splits", [(2, 2, 2), (5, 3, 4)])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("layout", GRIDS.values(), ids=GRIDS)
def test_equals_dense_with_gradients(layout, settings, splits):
    # A fifth of the queries has no BEV window.
    windows = make_windows(smaller_grid(layout, 0.9), 2, 37, device="cpu", settings=settings)
    leaves = leaves_of(layout, 37)
    q, k, v, values = leaves
    expected = dense_attention(q, k, v, AttentionBias(windows, values))
    schedule = schedule_of(windows, splits)
    actual = kernel.attend_to_partitions(q, k, v, AttentionBias(windows, values), schedule, None)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(*actual, leaves), gradients(*expected, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiled_gradients_equal_those_without_a_compiler(dtype):
    """torch 2.11 once lost the gradient of an output that a cast without effect had gone through."""
    schedule = schedule_of(make_windows(GRIDS["edges"], 2, 37, device="cpu", settings=SETTINGS["default"]))
    num_passes, num_rows = schedule.order.shape[1:]
    parts = (num_passes, schedule.num_partitions)
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    shapes = {(2, 3, 37, 8): dtype, (2, 3, *parts, num_rows): wide, (2, *parts, 37): wide}
    leaves = [torch.randn(s, generator=generator, dtype=wide).to(d).requires_grad_() for s, d in shapes.items()]

    def evaluate(queries, part_lse, added):
        rows = sort_into_rows(queries, schedule.order, schedule.rank, schedule.num_partitions)
        used = ((0, 0), (0, 1), (1, 3))
        return merge_partitions(rows * rows, part_lse, added, schedule.order, schedule.rank, used)

    torch._dynamo.reset()
    compiled = torch.compile(evaluate, backend="aot_eager", fullgraph=True)
    expected, actual = gradients(*evaluate(*leaves), leaves), gradients(*compiled(*leaves), leaves)
    for mine, theirs in zip(actual, expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("num_queries", [1, 33])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("layout", GRIDS.values(), ids=GRIDS)
def test_every_token_belongs_to_one_partition(layout, settings, num_queries):
    windows = make_windows(layout, 2, num_queries, device="cpu", settings=settings, seed=num_queries)
    schedule = schedule_of(windows)
    for num_tokens in (layout.num_tokens, -(-layout.num_tokens // BLOCK_K) * BLOCK_K):
        members = owners(schedule, num_tokens)
        assert (members[..., : layout.num_tokens] == 1).all()
        assert not members[..., layout.num_tokens :].any()


def test_every_token_belongs_to_one_partition_of_any_layout(monkeypatch):
    """Edges inside blocks, grids inside one block, more partitions than blocks, fewer queries than rows."""
    draw = random.Random(0)
    for _ in range(100):
        block_q, block_k = draw.choice((4, 8, 16)), draw.choice((8, 16, 32))
        monkeypatch.setattr(kernel, "BLOCK_Q", block_q)
        monkeypatch.setattr(kernel, "BLOCK_K", block_k)
        views = draw.choice((0, 1, 2, 6))
        bev = draw.choice(((1, 5), (3, 3), (8, 13), (16, 24), None if views else (5, 1)))
        cameras = (views, *draw.choice(((4, 10), (2, 5)))) if views else None
        layout = smaller_grid(fusion_layout(bev, cameras), draw.choice((1.0, 0.9, 0.01)))
        if draw.random() < 0.3:
            layout = TokenLayout((*layout.grids, RADAR))
        settings = sized(
            draw.choice((1, 3, 9)),
            draw.choice((1, 8, 15)),
            camera_assignment=draw.choice(("first", "all")),
            is_local=draw.random() < 0.85,
        )
        num_queries, seed = draw.randint(1, 40), draw.randrange(1000)
        windows = make_windows(layout, 2, num_queries, device="cpu", settings=settings, seed=seed)
        splits, has_token_mask = tuple(draw.randint(2, 7) for _ in layout.grids), draw.random() < 0.2
        schedule = make_schedule(
            windows, block_q=block_q, block_k=block_k, splits=splits, has_token_mask=has_token_mask
        )
        members = owners(schedule, -(-layout.num_tokens // block_k) * block_k)
        case = (layout, settings, splits, block_q, block_k, has_token_mask)
        assert (members[..., : layout.num_tokens] == 1).all(), case
        assert not members[..., layout.num_tokens :].any(), case


def test_lists_of_queries_are_the_lists_of_keys_turned_round():
    windows = make_windows(GRIDS["edges"], 2, 50, device="cpu", settings=SETTINGS["default"])
    schedule = schedule_of(windows)
    num_rows = schedule.num_partitions * schedule.order.shape[2] // BLOCK_Q
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


@pytest.mark.parametrize("layout", [fusion_layout((128, 128), (6, 20, 50)), fusion_layout((180, 180), (6, 40, 100))])
def test_most_blocks_need_no_mask(layout):
    """The point of the schedule: on the official grids a tenth of the blocks, and the parts share the rest evenly."""
    windows = make_windows(layout, 1, 900, device="cpu", settings=SETTINGS["default"])
    schedule = make_schedule(windows, block_q=64, block_k=128, splits=(kernel.SPLITS_FIRST, kernel.SPLITS_FURTHER))
    num_blocks, num_partitions = -(-layout.num_tokens // 128), schedule.num_partitions
    full, partial = (
        x.num[0, :, : num_partitions * 15].unflatten(-1, (num_partitions, 15)).double()
        for x in (schedule.full, schedule.partial)
    )
    assert partial[:, 0].sum(dim=0).mean() <= 0.12 * num_blocks
    assert partial[:, 1:].sum(dim=(0, 1)).mean() <= 0.13 * num_blocks
    assert full[:, 0].max() == 0
    for number, grid_pass in enumerate(schedule.passes):
        rest_full, rest_partial = (x[number, 1 : grid_pass.num_partitions] for x in (full, partial))
        start, end = layout.token_range(number)
        assert (rest_full.sum(dim=0) + rest_partial.sum(dim=0) == -(-end // 128) - start // 128).all()
        # No partition of a block of queries is much more expensive than the others, a partial block counting twice.
        cost = rest_full + 2 * rest_partial
        assert (cost.max(dim=0).values <= 1.7 * cost.mean(dim=0)).all()
        unused = grid_pass.num_partitions
        assert not full[number, unused:].any() and not partial[number, unused:].any()


@pytest.mark.parametrize("layout", GRIDS.values(), ids=GRIDS)
def test_lists_of_blocks_lie_where_the_kernel_looks(layout):
    """It takes a sample's lists to lie behind those before, but a compiler may fill lists up to 128 bytes."""
    schedule = schedule_of(make_windows(layout, 2, 37, device="cpu", settings=SETTINGS["default"]))
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
        windows = make_windows(GRIDS["three"], 2, 37, device="cpu", settings=settings)
        cells = tuple(x.to("meta") for x in windows.cells)
        with Devices() as devices:
            schedule = schedule_of(QueryWindows(windows.layout, settings, cells))
            kernel.partition_bias(AttentionBias(windows, torch.empty(2, 37, 3, device="meta")), schedule)
        assert devices.seen == {"meta"}


def test_queries_are_sorted_by_window_with_the_unseen_last():
    windows = make_windows(fusion_layout((16, 24), (6, 4, 10)), 2, 60, device="cpu", settings=SETTINGS["default"])
    rank = query_rank(windows, 1)
    order = query_order(rank, 64)
    assert torch.equal(order[:, :60].sort().values, torch.arange(60).expand(2, -1))
    assert torch.equal(order.gather(1, rank), torch.arange(60).expand(2, -1))
    assert (order[:, 60:] == order[:, 59:60]).all()
    view, row, col = windows.cells[1][:, :, 0].unbind(-1)
    token = torch.where(view >= 0, (view * 4 + row) * 10 + col, 10_000).gather(1, order)
    assert (token.diff(dim=1) >= 0).all()
    assert (view.gather(1, order)[:, -1] == -1).all()


def test_token_mask_and_rows_without_tokens():
    layout = GRIDS["edges"]
    windows = make_windows(layout, 2, 37, device="cpu", settings=SETTINGS["default"])
    leaves = leaves_of(layout, 37)
    q, k, v, values = leaves
    mask = torch.rand(2, layout.num_tokens, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[1] = False
    bias = AttentionBias(windows, values)
    expected = dense_attention(q, k, v, bias, token_mask=mask)
    actual = kernel.attend_to_partitions(q, k, v, bias, schedule_of(windows, has_token_mask=True), mask)
    assert actual[0][1].eq(0).all()
    assert actual[1][1].eq(-torch.inf).all()
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(*actual, leaves), gradients(*expected, leaves), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_padded_tokens_change_nothing():
    layout = GRIDS["edges"]
    windows = make_windows(layout, 2, 37, device="cpu", settings=SETTINGS["default"])
    q, k, v, values = leaves_of(layout, 37)
    bias = AttentionBias(windows, values)
    assert -(-layout.num_tokens // BLOCK_K) * BLOCK_K == 480
    longer = [torch.nn.functional.pad(x, (0, 0, 0, 480 - layout.num_tokens), value=7.0) for x in (k, v)]
    expected = kernel.attend_to_partitions(q, k, v, bias, schedule_of(windows), None)
    torch.testing.assert_close(kernel.attend_to_partitions(q, *longer, bias, schedule_of(windows), None), expected)
    torch.testing.assert_close(dense_attention(q, k, v, bias), expected)


def test_more_shapes_than_the_compiler_takes_by_itself(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    double = compile_for_shapes(lambda x: x + x)
    for length in range(2, 2 + 2 * torch._dynamo.config.recompile_limit):
        assert double(torch.ones(length)).sum() == 2 * length


def test_schedules_made_for_something_else():
    layout = GRIDS["edges"]
    windows = make_windows(layout, 2, 37, device="cpu", settings=SETTINGS["default"])
    q = torch.zeros(2, 2, 37, 32)
    mask = torch.ones(2, layout.num_tokens, dtype=torch.bool)
    kernel.check_schedule(schedule_of(windows), q, None)
    kernel.check_schedule(schedule_of(windows, has_token_mask=True), q, mask)
    with pytest.raises(ValueError, match=r"^the schedule was made without a token mask and is used with one$"):
        kernel.check_schedule(schedule_of(windows), q, mask)
    with pytest.raises(ValueError, match=r"^the schedule was made with a token mask and is used without one$"):
        kernel.check_schedule(schedule_of(windows, has_token_mask=True), q, None)
    with pytest.raises(ValueError, match=r"^the schedule is for batch and queries \(2, 37\), q has \(2, 36\)$"):
        kernel.check_schedule(schedule_of(windows), q[:, :, :36], None)
    with pytest.raises(ValueError, match=r"at least 2 partitions, got splits \(1, 3\)"):
        schedule_of(windows, (1, 3, 3))


def test_codes_of_64_bits(monkeypatch):
    layout = fusion_layout((40, 40), (6, 4, 10))
    packing = schedule_module.make_packing
    monkeypatch.setattr(schedule_module, "make_packing", lambda *a: replace(packing(*a), dtype=torch.int64))
    windows = make_windows(layout, 1, 37, device="cpu", settings=SETTINGS["default"])
    schedule = schedule_of(windows)
    assert schedule.token_codes.dtype == schedule.window_codes.dtype == torch.int64
    assert (owners(schedule, layout.num_tokens) == 1).all()


def test_flex_on_the_cpu_is_refused():
    layout = GRIDS["aligned"]
    q, k, v, values = leaves_of(layout, 5)
    bias = AttentionBias(make_windows(layout, 2, 5, device="cpu", settings=SETTINGS["default"]), values)
    with pytest.raises(ValueError, match="flex backend needs a CUDA GPU, got tensors on cpu; use dense"):
        attend(q, k, v, bias, backend="flex")
    with pytest.raises(ValueError, match="one of auto, flex, score_mod, dense, got 'flash'"):
        attend(q, k, v, bias, backend="flash")
