"""A few steps of a loop are recorded, and the files are told."""

import gzip
import json

import torch

from cmt_aqr.training.profiling import RECORDED, SKIPPED, TABLE, TRACE, WARM_UP, profiled_steps


def train(folder, num_steps):
    said = []
    with profiled_steps(folder, said.append) as after_step:
        for number in range(num_steps):
            with torch.profiler.record_function(f"step {number}"):
                torch.ones(20, 20) @ torch.ones(20, 20)
            after_step()
    return said


def test_the_recorded_steps_are_those_after_the_first_ones(tmp_path):
    (said,) = train(tmp_path / "profile", 12)
    trace = json.loads(gzip.decompress((tmp_path / "profile" / TRACE).read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    first = SKIPPED + WARM_UP
    assert {name for name in names if str(name).startswith("step ")} == {
        f"step {number}" for number in range(first, first + RECORDED)
    }
    table = (tmp_path / "profile" / TABLE).read_text()
    assert "aten::mm" in table and said.startswith(table.rstrip("\n"))
    assert said.endswith(
        f"--profile: 3 steps in {tmp_path / 'profile' / TRACE}, this table in {tmp_path / 'profile' / TABLE}"
    )


def test_a_run_that_is_too_short_says_so(tmp_path):
    (said,) = train(tmp_path / "profile", 2)
    assert said == f"--profile: 2 steps were too few, it takes 7 for a trace in {tmp_path / 'profile'}"
    assert not (tmp_path / "profile").exists()
    (said,) = train(tmp_path / "profile", 5)
    assert said == f"--profile: 5 steps were too few, it takes 7 for a trace in {tmp_path / 'profile'}"
    assert not (tmp_path / "profile").exists()
