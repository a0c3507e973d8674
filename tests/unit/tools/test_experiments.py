"""Plans of experiments: what is wrong in them, how runs are done, stopped and resumed, and the table's numbers."""

import json
import re
import sys
import time

import pytest

from cmt_aqr.config import ConfigError
from cmt_aqr.errors import UserError
from cmt_aqr.evaluation.nuscenes_eval import Metrics
from cmt_aqr.tools import experiment_runner, experiments
from cmt_aqr.tools.experiment_plan import read_plan
from cmt_aqr.tools.experiment_report import comparison_table, half_width
from cmt_aqr.tools.experiment_runner import commands, result_file, run_folder, run_plan
from tests.parity.golden import REPOSITORY

PLAN = """
reference: base
settings: [training.epochs=2]
failures: [mome]
variants:
  - {name: base, config: ablation/baseline, settings: [], seeds: [0, 1, 2]}
  - {name: v3, config: ablation/v3, settings: [data.drop_cameras=0.25], seeds: [0, 1]}
"""


def write(folder, text=PLAN):
    path = folder / "plan.yml"
    path.write_text(text)
    return path


def test_the_shipped_plan_can_be_read():
    plan = read_plan(REPOSITORY / "configs" / "ablation" / "plan.yml")
    assert plan.reference == "baseline" and len(plan.jobs) == 28
    assert [variant.name for variant, seed in plan.jobs[:8]] == [variant.name for variant in plan.variants]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("reference: base", "reference: bas", "no variant has the name 'bas'; there are base, v3"),
        ("name: v3", "name: base", "two variants have the name 'base'"),
        ("name: v3", "name: a/b", "the name 'a/b' is that of a folder"),
        ("seeds: [0, 1]}", "seeds: [1, 1]}", "v3 has a seed twice"),
        ("training.epochs=2", "training.epoch=2", "training.epoch"),
        ("ablation/v3", "ablation/v4", "v4"),
        ("failures: [mome]", "failure: [mome]", "failure"),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path, old, new, message):
    path = write(tmp_path, PLAN.replace(old, new))
    with pytest.raises(UserError, match=message):
        read_plan(path)
    assert issubclass(ConfigError, UserError)


def test_commands_of_a_run(tmp_path):
    plan = read_plan(write(tmp_path))
    train, test = commands(plan, tmp_path, plan.variants[1], 1)
    assert train[1:3] == ["train.py", "ablation/v3"] and "--resume" in train
    assert train[-3:] == ["training.epochs=2", "data.drop_cameras=0.25", "seed=1"]
    assert test[1:3] == ["test.py", "ablation/v3"] and test[test.index("--failures") + 1] == "mome"
    assert "data.drop_cameras=0.25" not in test  # test.py refuses keys of training
    assert test[test.index("--checkpoint") + 1] == train[train.index("--work-dir") + 1] + "/latest.pt"


def stand_in(plan, what):
    """Command lines that do ``what[variant name]`` instead of training, and write a result instead of testing."""

    def make(_, out, variant, seed):
        path = result_file(plan, run_folder(out, variant, seed))
        score = {"NDS": 0.5 + 0.01 * seed, "mAP": 0.4}
        content = json.dumps({"clean": score, "failures": []})
        write_result = f"import pathlib; p = pathlib.Path({str(path)!r}); p.parent.mkdir(exist_ok=True); "
        write_result += f"p.write_text({content!r})"
        return [[sys.executable, "-c", what[variant.name]], [sys.executable, "-c", write_result]]

    return make


def test_runs_that_fail_and_runs_that_are_stopped(tmp_path, monkeypatch, capsys):
    plan = read_plan(write(tmp_path))
    endless = "import time, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(130)); time.sleep(60)"
    broken = "import sys; print('error: a sentence'); sys.exit(2)"
    monkeypatch.setattr(experiment_runner, "commands", stand_in(plan, {"base": broken, "v3": endless}))
    start = time.monotonic()
    assert run_plan(plan, tmp_path, [None, None], limit=6) == 2
    assert time.monotonic() - start < 40
    output = capsys.readouterr().out
    assert "failed: base, seed 0: status 2, error: a sentence" in output
    assert "v3, seed 0: stopped" in output and re.search(r"[2-4] runs are left; the same command resumes", output)
    monkeypatch.setattr(experiment_runner, "commands", stand_in(plan, {"base": "", "v3": ""}))
    assert run_plan(plan, tmp_path, [0, None], limit=None) == 0
    assert "5 of 5 runs to do, 2 at a time" in capsys.readouterr().out
    assert run_plan(plan, tmp_path, [0], limit=None) == 0
    assert "0 of 5 runs to do" in capsys.readouterr().out


def test_each_slot_sees_its_gpu_alone(tmp_path, monkeypatch):
    plan = read_plan(write(tmp_path))
    show = "import os, time; print('GPU', os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.5)"
    monkeypatch.setattr(experiment_runner, "commands", stand_in(plan, {"base": show, "v3": show}))
    assert run_plan(plan, tmp_path, [0, 3], limit=None) == 0
    seen = {path.read_text().strip() for path in tmp_path.glob("*/*/output.txt")}
    assert seen == {"GPU 0", "GPU 3"}


def put(plan, out, variant, seed, clean, failing):
    path = result_file(plan, run_folder(out, variant, seed))
    path.parent.mkdir(parents=True)
    rows = [{"name": "beams:4", "NDS": failing, "mAP": 0.1}]
    path.write_text(json.dumps({"clean": {"NDS": clean, "mAP": 0.2}, "failures": rows}))


def test_the_table_has_paired_differences(tmp_path, capsys):
    path = write(tmp_path)
    plan = read_plan(path)
    base, v3 = plan.variants
    with pytest.raises(UserError, match="no run of the plan is finished"):
        comparison_table(plan, tmp_path, "NDS")
    for seed, (clean, failing) in enumerate([(0.5, 0.3), (0.6, 0.2), (0.9, 0.9)]):
        put(plan, tmp_path, base, seed, clean, failing)
    put(plan, tmp_path, v3, 0, 0.52, 0.3)
    assert "Not all seeds are finished of v3." in comparison_table(plan, tmp_path, "NDS")
    put(plan, tmp_path, v3, 1, 0.66, 0.4)
    # Differences 0.02 and 0.06: mean 0.04, deviation 0.02828, t(1) = 12.706: half of the interval is 0.2541.
    assert experiments.main(["report", str(path), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| clean | `base` | 3 | 0.6667 | - | - |",
        "| clean | `v3` | 2 | 0.5900 | +0.0400 | +-0.2541 (2 seeds) |",
        "| beams:4 | `base` | 3 | 0.4667 | - | - |",
        "| beams:4 | `v3` | 2 | 0.3500 | +0.1000 | +-1.2706 (2 seeds) |",
    ]
    result_file(plan, run_folder(tmp_path, v3, 1)).write_text("{}")
    assert experiments.main(["report", str(path), "--out", str(tmp_path)]) == 2
    assert "no result of test.py" in capsys.readouterr().err


def test_a_plan_without_failures_reads_the_metrics(tmp_path):
    plan = read_plan(write(tmp_path, PLAN.replace("[mome]", "[]")))
    path = result_file(plan, run_folder(tmp_path, plan.variants[0], 0))
    path.parent.mkdir(parents=True)
    metrics = Metrics("val", 4, 0.25, 0.75, 0.2, {"mATE": 0.5}, {"car": 0.3}, {"car": {1.0: 0.3}}, {}, {}, {})
    path.write_text(metrics.to_json())
    assert "| clean | `base` | 1 | 0.7500 | - | - |" in comparison_table(plan, tmp_path, "NDS")
    assert "| clean | `base` | 1 | 0.2500 | - | - |" in comparison_table(plan, tmp_path, "mAP")


def test_half_width():
    assert half_width([1.0, 2.0, 3.0, 4.0]) == pytest.approx(3.182446 * 1.290994 / 2, rel=1e-5)
    assert half_width([1.0]) != half_width([1.0])
