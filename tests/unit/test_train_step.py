"""A step that is not finite is never applied, never saved, and reported so that it can be repeated."""

import math

import pytest
import torch

from cmt_aqr.losses.matcher import NonFiniteError
from cmt_aqr.replay import TrainingStopped, describe_reasons, replay, replay_batch
from cmt_aqr.run import write_config
from cmt_aqr.training.checkpoint_checks import CheckpointError
from cmt_aqr.training.logs import RunLog, read_log
from tests.unit.tiny_run import harmless, make_batch, make_run
from train import log_step, save_run, train_step


def zero_with_infinite_slope(output):
    """sqrt at 0: the loss is 0, its gradient 0 * inf."""
    return torch.sqrt(output * 0)


def state_of(run):
    """Copies of weights and optimizer state."""
    optimizer = run.optimizer.state_dict()["state"]
    return [p.detach().clone() for p in run.model.parameters()], repr(optimizer)


def unchanged(run, before) -> bool:
    weights, optimizer = state_of(run)
    return optimizer == before[1] and all(map(torch.equal, weights, before[0]))


def test_a_finite_step_is_applied(tmp_path):
    run = make_run(tmp_path)
    metrics = train_step(run, make_batch())
    assert run.step == 8 and run.skipped_steps == 0
    assert metrics["loss"] == 3.75 and metrics["loss_cls"] == 2.5 and metrics["loss_bbox"] == 1.25
    assert metrics["grad_norm"] == pytest.approx(3 * math.sqrt(3))
    assert run.model.linear.weight[0, 0] < 0.5
    assert list(tmp_path.iterdir()) == []


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path):
    run = make_run(tmp_path, zero_with_infinite_slope)
    run.saved_step = 5
    before = state_of(run)
    with pytest.raises(TrainingStopped) as stop:
        train_step(run, make_batch())
    assert unchanged(run, before)
    file = tmp_path / "failed_step_7.pt"
    assert str(stop.value) == (
        "step 7: the gradient norm is nan; samples a1; loss_cls 2.5, loss_bbox 0; the step was not applied; "
        f"{tmp_path / 'latest.pt'} (step 5) is whole; replay it with python train.py "
        f"{tmp_path / 'config.yaml'} --work-dir {tmp_path} --replay {file}"
    )
    kept = torch.load(file, weights_only=True)
    assert kept["step"] == 7 and kept["batches"][0]["tokens"] == ["a1"]
    assert torch.equal(kept["batches"][0]["points"][0], make_batch().points[0])
    assert torch.equal(kept["model"]["linear.weight"], before[0][0])


def test_matching_that_fails_ends_in_the_same_report(tmp_path):
    def fail(output):
        raise NonFiniteError("the matching cost of decoder layer 0, sample 0, task 0 is not finite")

    run = make_run(tmp_path, fail)
    before = state_of(run)
    with pytest.raises(TrainingStopped, match=r"^step 7: the matching cost .* is not finite; samples a1; .* --replay "):
        train_step(run, make_batch())
    assert unchanged(run, before) and (tmp_path / "failed_step_7.pt").exists()


def test_output_that_is_not_finite_is_found_before_matching(tmp_path):
    def never(output):
        raise AssertionError("the criterion was reached")

    run = make_run(tmp_path, never)
    torch.nn.init.constant_(run.model.linear.bias, math.inf)
    with pytest.raises(TrainingStopped, match=r"^step 7: the output of the network is not finite; samples a1; "):
        train_step(run, make_batch())


def test_half_precision_skips_the_step_and_counts_it(tmp_path):
    losses = [zero_with_infinite_slope, lambda output: output]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run = make_run(tmp_path, lambda output: losses.pop(0)(output), scaler=scaler)
    before = state_of(run)
    train_step(run, make_batch())
    assert unchanged(run, before)
    assert (run.step, run.skipped_steps, scaler.get_scale()) == (8, 1, 512.0)
    train_step(run, make_batch())
    assert not unchanged(run, before)
    assert (run.step, run.skipped_steps) == (9, 1)


def test_the_log_counts_the_skipped_steps_since_its_last_line(tmp_path):
    outcomes = iter((zero_with_infinite_slope, zero_with_infinite_slope, harmless, zero_with_infinite_slope, harmless))
    run = make_run(tmp_path, lambda output: next(outcomes)(output), scaler=torch.amp.GradScaler("cpu"))
    with RunLog(tmp_path, True, tensorboard=False) as log:
        for number_of_steps in (3, 1, 1):
            for _ in range(number_of_steps):
                metrics = train_step(run, make_batch())
            log_step(run, log, metrics)
    lines = read_log(tmp_path / "log.jsonl")
    assert [(line["step"], line["skipped_steps"]) for line in lines] == [(10, 2), (11, 1), (12, 0)]
    run = make_run(tmp_path)
    with RunLog(tmp_path, True, tensorboard=False) as log:
        log_step(run, log, train_step(run, make_batch()))
    assert "skipped_steps" not in read_log(tmp_path / "log.jsonl")[0]  # only fp16 skips


@pytest.mark.parametrize(
    ("reasons", "text"),
    [
        (["the loss is nan"], "the loss is nan"),
        (["the gradient norm is inf"] * 2, "the gradient norm is inf"),
        ([None, "the loss is nan"], "the loss is nan in process 1"),
        (["the loss is nan", None, "the loss is inf"], "the loss is nan in process 0, the loss is inf in process 2"),
    ],
)
def test_the_report_says_which_process_failed(reasons, text):
    assert describe_reasons(reasons) == text


def test_half_precision_does_not_skip_for_ever(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-9)
    run = make_run(tmp_path, zero_with_infinite_slope, scaler=scaler)
    train_step(run, make_batch())  # to 2 ** -10
    train_step(run, make_batch())  # to 2 ** -11
    with pytest.raises(TrainingStopped, match=r"^step 9: the gradient norm is nan"):
        train_step(run, make_batch())


@pytest.mark.parametrize("where", ["weight", "optimizer"])
def test_what_is_not_finite_is_not_saved(tmp_path, where):
    run = make_run(tmp_path)
    train_step(run, make_batch())
    save_run(run)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}
    assert set(before) == {"latest.pt"} and run.saved_step == 8
    train_step(run, make_batch())
    with torch.no_grad():
        if where == "weight":
            run.model.linear.weight[0, 1] = math.nan
        else:
            run.optimizer.state[run.model.linear.weight]["exp_avg_sq"][0, 1] = math.inf
    name = {"weight": "model.linear.weight", "optimizer": "optimizer.state.0.exp_avg_sq"}[where]
    with pytest.raises(CheckpointError, match=rf"not saved: .* the first is {name}; the previous checkpoint"):
        save_run(run)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")} == before


def test_a_replay_names_the_gradients(tmp_path, capsys):
    run = make_run(tmp_path, zero_with_infinite_slope)
    assert not replay_batch(run, make_batch())
    assert capsys.readouterr().out.splitlines() == [
        "  weights that are not finite: none",
        "  loss_cls 2.5",
        "  loss_bbox 0",
        "  gradient norm nan",
        "  gradients that are not finite: linear.weight, linear.bias",
    ]
    assert replay_batch(make_run(tmp_path), make_batch())


def test_a_replay_that_fails_again_says_so(tmp_path, capsys):
    with pytest.raises(TrainingStopped):
        train_step(make_run(tmp_path, zero_with_infinite_slope), make_batch())
    file = tmp_path / "failed_step_7.pt"
    for box_loss, outcome in (
        (zero_with_infinite_slope, "it fails again, see above"),
        (harmless, "everything is finite this time"),
    ):
        with pytest.raises(TrainingStopped) as stop:
            replay(make_run(tmp_path, box_loss, step=0), file)
        assert str(stop.value) == f"{file}: step 7 was replayed: {outcome}"
    assert capsys.readouterr().out.count("step 7, process 0 of 1, samples a1\n") == 2


def test_a_full_disk_keeps_the_old_configuration(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    write_config(tmp_path, run.config)
    before = (tmp_path / "config.yaml").read_bytes()
    assert b"num_dn: 0" in before

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(CheckpointError) as error:
        write_config(tmp_path, run.config)
    assert str(error.value) == (
        f"{tmp_path / 'config.yaml'}: could not be written: No space left on device; "
        "the checkpoints of this work dir are untouched"
    )
    assert (tmp_path / "config.yaml").read_bytes() == before
