"""The parts, their schedule and their merging, with FlexAttention emulated; the kernel itself: tests/gpu."""

import pytest
import torch

from cmt_aqr.attention import AttentionBias, TokenLayout, WindowSettings, attend, flex, padded_length
from cmt_aqr.attention.dense import dense_attention
from cmt_aqr.attention.schedule import make_schedule, query_order, query_rank
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
    windows = make_windows(layout, 2, 37, device="cpu", settings=settings)
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
    num_parts, num_rows = schedule.order.shape[1:]
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    shapes = {(2, 3, 37, 8): dtype, (2, 3, num_parts, num_rows): wide, (2, num_parts, 37): wide}
    leaves = [torch.randn(s, generator=generator, dtype=wide).to(d).requires_grad_() for s, d in shapes.items()]

    def evaluate(queries, part_lse, added):
        rows = flex._Sort.apply(queries, schedule.order, schedule.rank)
        return flex._Merge.apply(rows * rows, part_lse, added, schedule.order, schedule.rank)

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
        members = membership(flex.make_block_mask(schedule, num_tokens), len(schedule.parts))
        assert (members.sum(dim=1)[..., : layout.num_tokens] == 1).all()
        assert not members[..., layout.num_tokens :].any()


def test_lists_of_queries_are_the_lists_of_keys_turned_round():
    windows = make_windows(GRIDS["edges"], 2, 50, device="cpu")
    schedule = schedule_of(windows)
    for runs in (schedule.full, schedule.partial):
        shape = runs.indices.shape
        of_keys, of_queries = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for b, p, i in torch.cartesian_prod(*(torch.arange(n) for n in shape[:3])).tolist():
            of_keys[b, p, i, runs.indices[b, p, i, : runs.num[b, p, i]].long()] = True
        for b, p, j in torch.cartesian_prod(*(torch.arange(n) for n in (*shape[:2], shape[3]))).tolist():
            of_queries[b, p, runs.indices_q[b, p, j, : runs.num_q[b, p, j]].long(), j] = True
        assert torch.equal(of_keys, of_queries)
        assert of_keys.any()


def test_most_blocks_need_no_mask():
    """The point of the schedule: on the official grids a tenth of the blocks, and the parts share the rest evenly."""
    layout = TokenLayout(128, 128, 6, 20, 50)
    schedule = make_schedule(make_windows(layout, 1, 900, device="cpu"), block_q=64, block_k=128, splits=(4, 2))
    num_blocks = schedule.full.indices.shape[-1]
    is_window = torch.tensor([part.kind == "window" for part in schedule.parts])
    partial = schedule.partial.num.double()
    assert partial[:, is_window].sum(dim=1).mean() <= 0.12 * num_blocks
    assert partial[:, ~is_window].sum(dim=1).mean() <= 0.12 * num_blocks
    full = schedule.full.num[:, ~is_window]
    assert (full.sum(dim=1) + partial[:, ~is_window].sum(dim=1) == num_blocks).all()
    assert full.max() <= 0.25 * num_blocks


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


def test_flex_on_the_cpu_is_refused():
    layout = GRIDS["aligned"]
    q, k, v, strength = leaves_of(layout, 5)
    bias = AttentionBias(make_windows(layout, 2, 5, device="cpu"), strength)
    with pytest.raises(ValueError, match="flex backend needs a CUDA GPU, got tensors on cpu; use dense"):
        attend(q, k, v, bias, backend="flex")
    with pytest.raises(ValueError, match="one of auto, flex, dense, lowrank, got 'flash'"):
        attend(q, k, v, bias, backend="flash")
