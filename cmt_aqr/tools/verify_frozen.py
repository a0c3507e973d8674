"""Show which modules a configuration trains and which it freezes, and verify it by one optimizer step.

    python -m cmt_aqr.tools.verify_frozen cmt_aqr_r50_800x320
    python -m cmt_aqr.tools.verify_frozen CONFIG --set training.freeze='[image_branch]' --device cuda

The step is one of train.py's on a made-up frame, with random weights. The SHA-256 of every parameter and buffer is
computed before and after it. Modules that training.freeze names must keep every bit, statistics of batch norms
included; batch norms of training.norm_eval must keep their statistics; every other parameter must change, with the
learning rate and weight decay that training.lr_mult and decay_mult give it. Exit status 1 where this does not hold.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence

from cmt_aqr.command_line import whole_number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cmt_aqr.tools.verify_frozen",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, or the name of one in configs/")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change keys")
    parser.add_argument("--points", type=whole_number(1), default=30_000, help="of the made-up frame (default: 30000)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when there is a GPU")
    return parser


if __name__ == "__main__":
    _parser().parse_args()  # answers --help and mistakes before the imports below, which take seconds

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from cmt_aqr.config import Config, TrainingConfig, load_config, naming_source
from cmt_aqr.data.sample import Batch
from cmt_aqr.errors import report_errors
from cmt_aqr.golden.case import random_frame
from cmt_aqr.losses.criterion import total_loss
from cmt_aqr.memory import explain_out_of_memory, training_advice
from cmt_aqr.run import Run, build_run, check_settings, compute_losses, set_rates, split_batch
from cmt_aqr.training.distributed import RankInfo, process_group
from cmt_aqr.training.optim import longest_prefix, set_training_mode

NUM_BOXES = 20
# One frame is enough: batch norm sees thousands of cells.
SINGLE_FRAME = ("training.batch_size=1", "training.accumulation=1", "training.precision=fp32", "training.compile=false")


@dataclass(frozen=True)
class Fact:
    """What was found about one parameter, or about the running statistics of one batch norm.

    Attributes:
        name: dotted.
        group: trainable, learning rate, weight decay.
        norm: mode of the batch norm that it belongs to, or -.
        count: trainable numbers; 0 for statistics.
        before: digest of its values.
        after: the same after the step.
        broken: how it differs from the configuration, in words; empty where it does not.
    """

    name: str
    group: tuple[str, str, str]
    norm: str
    count: int
    before: str
    after: str
    broken: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)

    def run() -> int:
        config = load_config(options.config, [*options.set, *SINGLE_FRAME])
        with process_group(options.device) as rank_info:
            with naming_source(options.config, options.set):
                check_settings(config, rank_info)
            with explain_out_of_memory(partial(training_advice, config, 1, Path("runs") / config.name)):
                return verify(config, rank_info, num_points=options.points)

    return report_errors(run)


def verify(config: Config, rank_info: RankInfo, *, num_points: int) -> int:
    """Take one step, print the table and what differs from the configuration; returns the exit status."""
    torch.manual_seed(config.seed)
    run = build_run(config, rank_info, Path("runs") / config.name)
    run.steps_per_epoch = 100  # some schedules have no single step
    before = digests(run.model)
    step(run, made_up_batch(config, num_points))
    facts = compare(run, before, digests(run.model))
    print(format_table(facts))
    broken = [fact for fact in facts if fact.broken]
    for fact in broken:
        print(f"{fact.name}: {fact.broken}")
    if broken:
        print(f"{config.name}: the step broke {len(broken)} promises of the configuration")
        return 1
    frozen = sum(fact.count for fact in facts if fact.group[0] == "no")
    trained = sum(fact.count for fact in facts if fact.group[0] == "yes")
    print(f"{config.name}: {trained:,} parameters have changed, {frozen:,} are frozen and kept every bit")
    return 0


def made_up_batch(config: Config, num_points: int) -> Batch:
    """A batch of one made-up frame with boxes."""
    frame = random_frame(config, num_points=num_points, num_boxes=NUM_BOXES)
    eye = torch.eye(4, dtype=torch.float64)[None]
    lidar2img = eye[:, None] if frame.lidar2img is None else frame.lidar2img
    return Batch(["made-up"], frame.images, frame.points, lidar2img, frame.targets, eye, eye, eye, eye)


def step(run: Run, batch: Batch) -> None:
    """A training step as train.py takes it, without the gradient scaler and without logging."""
    training = run.config.training
    set_training_mode(run.model, (*training.freeze, *training.norm_eval))
    set_rates(run)
    run.optimizer.zero_grad(set_to_none=True)
    (part,) = split_batch(run, batch)
    terms, _ = compute_losses(run, part)
    total_loss(terms).backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), training.grad_clip)
    run.optimizer.step()
    run.model.clamp_parameters()


def digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every parameter and buffer."""
    return {name: _digest(value) for name, value in model.state_dict().items()}


def _digest(value: Tensor) -> str:
    return hashlib.sha256(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def compare(run: Run, before: dict[str, str], after: dict[str, str]) -> list[Fact]:
    """One fact for every parameter and for the statistics of every batch norm, in the model's order."""
    training = run.config.training
    groups = {id(parameter): group for group in run.optimizer.param_groups for parameter in group["params"]}
    owners = {id(parameter): module for module in run.model.modules() for parameter in module.parameters(recurse=False)}
    facts = []
    for name, parameter in run.model.named_parameters():
        group, same = groups.get(id(parameter)), before[name] == after[name]
        row = ("no", "-", "-") if group is None else ("yes", f"{group['lr']:.3g}", f"{group['weight_decay']:.3g}")
        mode = _mode(owners[id(parameter)])
        broken = _broken_parameter(name, group, same, training)
        facts.append(Fact(name, row, mode, parameter.numel(), before[name], after[name], broken))
    for name, module in run.model.named_modules():
        if _mode(module) == "-" or module.running_mean is None:
            continue
        keys = [f"{name}.{key}" for key in ("running_mean", "running_var")]
        old, new = ("".join(digest[key] for key in keys) for digest in (before, after))
        is_kept = name.startswith((*training.freeze, *training.norm_eval))
        broken = "its statistics changed, training.freeze or norm_eval names it" if is_kept and old != new else ""
        group = next(fact.group for fact in facts if fact.name.startswith(f"{name}."))
        facts.append(Fact(f"{name}.running", group, _mode(module), 0, old, new, broken))
    return facts


def _broken_parameter(name: str, group: dict | None, same: bool, training: TrainingConfig) -> str:
    """How a parameter differs from the configuration; the factors are computed again, not read from the optimizer."""
    if name.startswith(tuple(training.freeze)) and training.freeze:
        if group is not None:
            return "training.freeze names it, and the optimizer holds it"
        return "" if same else "training.freeze names it, and the step changed it"
    if group is None:
        return "nothing freezes it, and the optimizer does not hold it"
    factor, decay = longest_prefix(name, training.lr_mult), longest_prefix(name, training.decay_mult)
    if group["lr_scale"] != factor or group["weight_decay"] != training.weight_decay * decay:
        return (
            f"expected learning rate x {factor} and weight decay {training.weight_decay * decay}, the optimizer has "
            f"x {group['lr_scale']} and {group['weight_decay']}"
        )
    return "nothing freezes it, and the step left it as it was" if same and factor > 0 else ""


def _mode(module: nn.Module) -> str:
    """Of a batch norm, train or eval; - of anything else."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "-"
    return "train" if module.training else "eval"


def format_table(facts: Sequence[Fact]) -> str:
    """A row for each module whose parameters are all treated in the same way; other modules are split into parts."""
    rows = [("module", "parameters", "trainable", "lr", "decay", "batch norm", "before", "after")]
    rows += list(_rows("", list(facts)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = {1, 3, 4}
    return "\n".join(
        "  ".join(
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _rows(prefix: str, facts: list[Fact]) -> Iterator[tuple[str, ...]]:
    """Rows of the parts of a module, in their order."""
    depth = len(prefix)
    parts: dict[str, list[Fact]] = {}
    for fact in facts:
        parts.setdefault(prefix + fact.name[depth:].split(".")[0], []).append(fact)
    for name, own in parts.items():
        norms = {fact.norm for fact in own} - {"-"}
        is_leaf = all(fact.name == name for fact in own)
        if is_leaf or (len({fact.group for fact in own}) == 1 and len(norms) <= 1):
            trainable, rate, decay = own[0].group
            count = f"{sum(fact.count for fact in own):,}"
            old, new = (_joined(getattr(fact, when) for fact in own) for when in ("before", "after"))
            after = "the same" if old == new else new
            yield name, count, trainable, rate, decay, norms.pop() if norms else "-", old, after
        else:
            yield from _rows(f"{name}.", own)


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:8]


if __name__ == "__main__":
    sys.exit(main())
