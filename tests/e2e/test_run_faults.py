"""Stops, lost processes and full disks during a training, as a user meets them."""

import errno
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
    assert err == (
        f"error: a data worker (pid {workers[0]}) was killed, most likely by lack of memory; lower data.workers or "
        f"training.batch_size; resume with --resume --work-dir {run}\n"
    )


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


def test_a_process_that_never_comes(world, tmp_path, call, monkeypatch):
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", distributed.timedelta(seconds=3))
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}.items():
        monkeypatch.setenv(key, value)
    result = call("train", *world.arguments("--work-dir", tmp_path / "run"))
    assert result.status == 2
    assert result.err.startswith(
        "error: process 0 could not join the 2 processes expected at MASTER_ADDR=127.0.0.1 MASTER_PORT=29871 within 3 s"
    )
    assert not (tmp_path / "run").exists()
