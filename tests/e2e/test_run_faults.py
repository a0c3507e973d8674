"""Stops, lost processes and full disks during a training, as a user meets them."""

import errno
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train as train_script
from cmt_aqr import jobs
from cmt_aqr.training import distributed
from cmt_aqr.viz.pictures import PictureError
from tests.e2e.conftest import REPOSITORY, one_thread, read_lines
from tests.e2e.faults import failing_rank

pytestmark = pytest.mark.e2e


def start(world, *arguments, settings=(), **options):
    """train.py in a process of its own, with its output in pipes."""
    command = world.command("train.py", *map(str, arguments), settings=settings, **options)
    return subprocess.Popen(command, text=True, env=one_thread(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)
        time.sleep(0.02)


def test_a_second_run_in_one_work_dir_is_refused(world, tmp_path, call):
    run = tmp_path / "run"
    with start(world, "--work-dir", run, settings=("training.epochs=50",)) as first:
        wait_for(lambda: (run / "config.yaml").exists(), first)
        before = (run / "config.yaml").read_bytes()
        second = call("train", *world.arguments("--work-dir", run, "--overwrite", settings=("seed=3",)))
        first.kill()
        first.communicate(timeout=60)
    assert second.status == 2
    assert re.fullmatch(
        rf"error: --work-dir {run}: process {first.pid} on \S+ has been training here since [-0-9]+ [:0-9]+; stop it "
        r"or name another folder with --work-dir\n",
        second.err,
    )
    assert (run / "config.yaml").read_bytes() == before
    # The lock dies with its holder.
    third = call("train", *world.arguments("--work-dir", run, "--overwrite", "--max-steps", "1"))
    assert third.status == 0, third.err


def test_sigterm_in_an_evaluation_loses_nothing(world, tmp_path):
    run = tmp_path / "run"
    settings = ("training.save_every=2", "training.eval_every=1", "evaluation.batch_size=1")
    with start(world, "--work-dir", run, settings=settings) as process:
        wait_for(lambda: (run / "epoch_1.pt").exists() and (run / "latest.pt").exists(), process)
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - begin < 10
    assert torch.load(run / "latest.pt", weights_only=True)["step"] >= 3  # saved although only every second epoch is
    assert f"resume with --resume --work-dir {run}" in out
    assert err in ("", "interrupted\n")


def test_what_a_stop_in_an_evaluation_says(world, tmp_path, call, monkeypatch):
    def stop_signal(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was deferred")

    monkeypatch.setattr(train_script, "evaluate_split", stop_signal)
    run = tmp_path / "run"
    result = call("train", *world.arguments("--work-dir", run, settings=("training.eval_every=1",)))
    sentence = f"stopped in the evaluation after step 3, which is saved; resume with --resume --work-dir {run}"
    assert (result.status, result.err) == (130, "interrupted\n")
    assert result.out.splitlines()[-1] == sentence
    assert torch.load(run / "latest.pt", weights_only=True)["step"] == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_the_data_are_prepared(world, tmp_path, number):
    root = tmp_path / "world"
    settings = (f"data.root={root}", f"data.index_dir={tmp_path / 'index'}", "data.synthetic.train_scenes=500")
    with start(world, "--work-dir", tmp_path / "run", settings=settings) as process:
        wait_for(lambda: any(tmp_path.glob(".world.part/samples/*/*")), process)
        process.send_signal(number)
        begin = time.monotonic()
        out, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 10
    assert (process.returncode, err) == (130, "interrupted\n")
    sentence = "stopped before the first step; nothing is lost, start again with the same command"
    assert out.splitlines()[-1] == sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]


def test_trouble_in_an_evaluation_never_ends_the_training(world, tmp_path, call, monkeypatch):
    calls = []

    def fail(*arguments, **options):
        calls.append(arguments)
        raise [PictureError("a picture"), OSError(errno.ENOSPC, "No space left on device"), IndexError("a bug")][
            len(calls) - 1
        ]

    monkeypatch.setattr(train_script, "evaluate_split", fail)
    run = tmp_path / "run"
    settings = ("training.epochs=3", "training.eval_every=1")
    result = call("train", *world.arguments("--work-dir", run, settings=settings))
    assert (result.status, result.err) == (0, "")
    lines = read_lines(run / "log.jsonl", "eval")
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    for line, part in zip(lines, ("a picture", "No space left on device", "a bug"), strict=True):
        assert part in line["error"]
        assert re.search(rf"epoch {line['epoch']} could not be evaluated: .*{part}; the training continues", result.out)
    assert "IndexError" in result.out  # a bug keeps its traceback
    assert torch.load(run / "latest.pt", weights_only=True)["step"] == 9


def test_an_evaluation_without_its_pictures(world, tmp_path, call, monkeypatch):
    def fail(*_):
        raise PictureError(f"{tmp_path / 'a.jpg'}: cannot be written")

    monkeypatch.setattr(jobs.PictureWriter, "__call__", fail)
    result = call("train", *world.arguments("--work-dir", tmp_path / "run", settings=("training.epochs=1",)))
    assert (result.status, result.err) == (0, "")
    assert result.out.count(f"no more pictures of this evaluation: {tmp_path / 'a.jpg'}: cannot be written\n") == 1
    (line,) = read_lines(tmp_path / "run" / "log.jsonl", "eval")
    assert line["mAP"] >= 0


def test_a_killed_data_worker_is_one_sentence(world, tmp_path):
    run = tmp_path / "run"
    with start(world, "--work-dir", run, settings=("data.workers=1", "training.epochs=50")) as process:
        wait_for(lambda: (run / "log.jsonl").exists() and '"train"' in (run / "log.jsonl").read_text(), process)
        workers = [child for child in children_of(process.pid) if b"train.py" in command_line(child)]
        os.kill(workers[0], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    # spconv prints its settings when the news reaches the main process inside one of its functions.
    ours = [line for line in err.splitlines() if not line.startswith("[Exception|")]
    assert ours == [
        f"error: a data worker (pid {workers[0]}) was killed, most likely by lack of memory; lower data.workers or "
        f"training.batch_size; resume with --resume --work-dir {run}"
    ]


def children_of(parent: int) -> list[int]:
    """Processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def command_line(process: int) -> bytes:
    """Command line of a process; a data worker has that of its parent."""
    return Path(f"/proc/{process}/cmdline").read_bytes()


def test_a_failed_step_is_replayed_by_the_command_of_its_message(world, tmp_path, call, monkeypatch):
    run, compute = tmp_path / "run", train_script.compute_losses

    def break_gradient(run_record, batch):
        terms, metrics = compute(run_record, batch)
        if run_record.step == 4:
            terms["loss_bbox"] = terms["loss_bbox"] + torch.sqrt(terms["loss_bbox"] * 0)
        return terms, metrics

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "compute_losses", break_gradient)
        result = call("train", *world.arguments("--work-dir", run))
    assert result.status == 2
    assert re.match(r"error: step 4: the gradient norm is nan; samples \w+, \w+; .*loss_cls [0-9.]+", result.err)
    assert f"{run / 'latest.pt'} (step 3) is whole" in result.err
    kept = torch.load(run / "latest.pt", weights_only=True)
    assert kept["step"] == 3 and all(bool(value.isfinite().all()) for value in kept["model"].values())
    command = shlex.split(result.err.split("replay it with python ")[1])
    done = subprocess.run(
        [sys.executable, *command, "--device", "cpu"], cwd=REPOSITORY, env=one_thread(), capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith("failed_step_4.pt: step 4 was replayed: everything is finite this time\n")
    (norm,) = re.findall(r"gradient norm ([0-9.]+)", done.stdout)
    assert math.isfinite(float(norm)) and "gradients that are not finite: none" in done.stdout


def test_a_killed_process_of_two(world, tmp_path):
    run = tmp_path / "run"
    settings = ("training.epochs=50", "training.eval_every=50")
    with start(world, "--work-dir", run, settings=settings, processes=2) as launcher:
        wait_for(lambda: (run / "latest.pt").exists(), launcher, seconds=240)
        ranks = [child for child in children_of(launcher.pid) if b"train.py" in command_line(child)]
        os.kill(max(ranks), signal.SIGKILL)
        begin = time.monotonic()
        _, err = launcher.communicate(timeout=60)
    assert time.monotonic() - begin < 20
    sentence = (
        "process 0 of 2 lost the connection to another process, which was killed or failed; its own message, if it "
        f"left one, is above; resume with --resume --work-dir {run}"
    )
    before, report = err.split("Traceback (most recent call last):\n")
    # One sentence is ours, the rest is torchrun's: two notes, its own traceback, a summary with our sentence.
    ours = [line for line in before.splitlines() if "torch/distributed/elastic/" not in line]
    assert ours == [f"error: {sentence}"]
    assert f"traceback : {sentence}\n" in report and "Signal 9 (SIGKILL)" in report
    assert len(err.splitlines()) < 60


def test_what_is_not_finite_in_one_process_stops_both(world, tmp_path):
    command = [sys.executable, "-m", "tests.e2e.faults.failing_rank", str(tmp_path), *world.arguments()]
    done = subprocess.run(command, cwd=REPOSITORY, env=one_thread(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    reasons = {
        "gradient": "the gradient norm is nan",
        "loss": "the loss is inf in process 1",
        "matching": f"{failing_rank.MATCHING_ERROR} in process 1",
    }
    for case in failing_rank.CASES:
        result = json.loads((tmp_path / f"{case}.json").read_text())
        assert result["statuses"] == [2, 2] and result["untouched"] == [True, True], case
        assert result["seconds"] < 10, case
        messages = [(tmp_path / f"{case}.{rank}.err").read_text() for rank in range(2)]
        path = tmp_path / case / "failed_step_4.pt"
        assert re.fullmatch(
            rf"error: step 4: {re.escape(reasons[case])}; samples \w+, \w+; .*the step was not applied; \S+/latest\.pt "
            rf"\(step 3\) is whole; replay it with python train.py \S+ --work-dir \S+ --replay {path}\n",
            messages[0],
        ), messages[0]
        assert messages[1] == "", case
        assert torch.load(tmp_path / case / "latest.pt", weights_only=True)["step"] == 3
        kept = torch.load(path, weights_only=True)
        assert [len(batch["tokens"]) for batch in kept["batches"]] == [1, 1]


def test_a_process_that_never_comes(world, tmp_path, call, monkeypatch):
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", distributed.timedelta(seconds=3))
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}.items():
        monkeypatch.setenv(key, value)
    result = call("train", *world.arguments("--work-dir", tmp_path / "run"))
    assert result.status == 2
    assert re.fullmatch(
        r"error: process 0 could not join the 2 processes expected at MASTER_ADDR=127\.0\.0\.1 MASTER_PORT=29871 "
        r"within 3 s: Timed out after \d seconds waiting for clients\. 1/2 clients joined; start all of them with "
        r"the same address, port and number of processes\n",
        result.err,
    )
    assert not (tmp_path / "run").exists()
