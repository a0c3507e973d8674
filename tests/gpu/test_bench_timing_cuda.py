"""The timing that the benchmarks share."""

import pytest
import torch

from cmt_aqr.tools.bench_timing import capture, event_time, extra_memory, gpu_time

pytestmark = pytest.mark.gpu


def test_a_captured_graph_holds_all_the_calls():
    counter = torch.zeros((), device="cuda")
    graph = capture(lambda: counter.add_(1), inner=3)
    counter.zero_()
    graph.replay()
    assert counter.item() == 3


def test_time_of_one_call_does_not_depend_on_how_many_are_in_the_graph():
    x = torch.ones(64 * 2**20, device="cuda")
    few, many = (gpu_time(lambda: x.mul_(1.0), inner=inner) for inner in (2, 20))
    assert few == pytest.approx(many, rel=0.3)
    assert event_time(lambda: x.mul_(1.0)) > 0.5 * many


def test_a_call_that_cannot_be_captured_is_timed_all_the_same():
    x = torch.ones(2**20, device="cuda")
    assert gpu_time(lambda: x.sum().item()) > 0


def test_extra_memory_counts_results_and_temporaries():
    x = torch.ones(2**20, device="cuda")  # 4 MiB
    assert extra_memory(lambda: x + 1) == pytest.approx(4)
    assert extra_memory(lambda: (x + 1) * 2) == pytest.approx(8)
