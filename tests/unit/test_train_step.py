"""A step that is not finite is never applied, never saved, and reported so that it can be repeated."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cmt_aqr.losses.criterion import Criterion
from cmt_aqr.losses.matcher import NonFiniteError
from cmt_aqr.replay import TrainingStopped, describe_reasons, replay, replay_batch
from cmt_aqr.run import write_config
from cmt_aqr.training.checkpoint_checks import CheckpointError
from cmt_aqr.training.logs import RunLog, read_log
from tests.unit.losses.cases import ONE_TASK, make_predictions
from tests.unit.tiny_run import harmless, make_batch, make_run
from train import log_step, save_run, train_epoch, train_step


def zero_with_infinite_slope(output):
    """sqrt at 0: the loss is 0, its gradient 0 * inf."""
    return torch.sqrt(output * 0)


def state_of(run):
    """Copies of weights and optimizer state, which is zeros before the first step."""
    weights = [parameter.detach().clone() for parameter in run.model.parameters()]
    states = [run.optimizer.state.get(parameter, {}) for parameter in run.model.parameters()]
    return weights + [
        torch.as_tensor(state.get(name, 0.0)) + torch.zeros_like(weight)
        for weight, state in zip(weights, states, strict=True)
        for name in ("exp_avg", "exp_avg_sq", "step")
    ]


def unchanged(run, before) -> bool:
    return all(map(torch.equal, state_of(run), before))


def infinite_with_finite_slope(output):
    return output + math.inf


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
    assert torch.equal(kept["model"]["linear.weight"], before[0])


def test_a_loss_that_is_not_finite_is_not_applied_even_if_its_gradient_is(tmp_path):
    run = make_run(tmp_path, infinite_with_finite_slope)
    before = state_of(run)
    with pytest.raises(TrainingStopped, match=r"^step 7: the loss is inf; samples a1; loss_cls 2.5, loss_bbox inf; "):
        train_step(run, make_batch())
    assert unchanged(run, before)


def make_late_run(tmp_path, *box_losses, scaler=None):
    """A run that checks a step in the next one, with a box loss for each step; and what goes into a step."""
    outcomes = iter(box_losses)
    run = make_run(tmp_path, lambda output: next(outcomes)(output), scaler=scaler)
    run.checks_late = True

    def step():
        return train_step(run, replace(make_batch(), tokens=[f"sample {run.step}"]))

    return run, step


@pytest.mark.parametrize(
    ("box_loss", "reason", "term"),
    [(zero_with_infinite_slope, "gradient norm is nan", "0"), (infinite_with_finite_slope, "loss is inf", "inf")],
)
@pytest.mark.parametrize("in_next", [harmless, zero_with_infinite_slope, NonFiniteError])
def test_a_step_that_is_checked_late_is_reported_as_itself(tmp_path, box_loss, reason, term, in_next):
    def next_loss(output):
        if in_next is NonFiniteError:
            raise NonFiniteError("a matching cost of the next step")
        return in_next(output)

    run, step = make_late_run(tmp_path, harmless, box_loss, next_loss)
    step()
    before = state_of(run)
    assert step()["grad_norm"].isnan() and run.step == 9  # nobody has looked yet
    assert unchanged(run, before)
    with pytest.raises(TrainingStopped) as stop:
        step()
    assert unchanged(run, before) and run.step == 8
    assert str(stop.value).startswith(f"step 8: the {reason}; samples sample 8; loss_cls ")
    assert f", loss_bbox {term}; the step was not applied; " in str(stop.value)
    kept = torch.load(tmp_path / "failed_step_8.pt", weights_only=True)
    assert kept["step"] == 8 and kept["batches"][0]["tokens"] == ["sample 8"]
    assert torch.equal(kept["model"]["linear.weight"], before[0])


def test_steps_that_are_checked_late_are_those_that_are_checked_at_once(tmp_path):
    run, step = make_late_run(tmp_path, *[harmless] * 4)
    other = make_run(tmp_path)
    late, early = [], []
    for _ in range(4):
        step()
        late.append(run.loss)
        train_step(other, make_batch())
        early.append(other.loss)
    assert late == [None, *early[:-1]] and early[0] == 3.75
    assert unchanged(run, state_of(other))


@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_last_step_is_checked_before_the_epoch_ends(tmp_path, is_stopped):
    """Or a failed step would be counted and saved as one that was applied."""
    run, _ = make_late_run(tmp_path, harmless, zero_with_infinite_slope)
    run.step, run.last_step = 8, 10
    run.loader = FixedLoader([make_batch(), make_batch()])
    stop = SimpleNamespace(is_set=is_stopped and run.step == 10)
    with (
        RunLog(tmp_path, True, tensorboard=False) as log,
        log.progress("train", 10, 8) as progress,
        pytest.raises(TrainingStopped, match=r"^step 9: the gradient norm is nan; "),
    ):
        train_epoch(run, log, progress, stop)


class FixedLoader(list):
    """Batches of an epoch."""

    def set_epoch(self, epoch, first_step):
        """The same in every epoch."""


def test_half_precision_skips_steps_that_are_checked_late(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-9)
    run, step = make_late_run(tmp_path, *[zero_with_infinite_slope] * 3, harmless, scaler=scaler)
    before = state_of(run)
    for _ in range(3):  # to 2 ** -12
        step()
    assert unchanged(run, before) and run.skipped_steps == 2
    with pytest.raises(TrainingStopped, match=r"^step 9: the gradient norm is nan"):
        step()
    assert unchanged(run, before)


def test_matching_that_fails_ends_in_the_same_report(tmp_path):
    def fail(output):
        raise NonFiniteError("the matching cost of decoder layer 0, sample 0, task 0 is not finite")

    run = make_run(tmp_path, fail)
    before = state_of(run)
    with pytest.raises(TrainingStopped, match=r"^step 7: the matching cost .* is not finite; samples a1; .* --replay "):
        train_step(run, make_batch())
    assert unchanged(run, before) and (tmp_path / "failed_step_7.pt").exists()


def test_output_that_is_not_finite_is_found_before_matching(tmp_path, monkeypatch):
    monkeypatch.setattr("cmt_aqr.losses.matcher.linear_sum_assignment", None)
    run = make_run(tmp_path)
    run.criterion = Criterion(classes=ONE_TASK)
    run.ddp_model = lambda *_, **__: not_finite
    not_finite = make_predictions(batch=1, queries=4)
    not_finite.tasks[0]["center"].data[0, 0, 1] = math.inf
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
