"""The command lines of train.py and test.py, and types of options for every program.

Apart from the scripts and without PyTorch, whose import takes seconds: ``--help`` and mistakes are answered at once.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parse_train_arguments(description: str) -> argparse.Namespace:
    """The command line of train.py; ``description`` stands in front of the list of options."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="YAML file, or the name of one in configs/, such as synthetic_tiny")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change keys, e.g. training.epochs=3"
    )
    parser.add_argument("--work-dir", type=Path, help="where results go (default: runs/<name>)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue from the work dir's latest checkpoint")
    start.add_argument("--overwrite", action="store_true", help="remove the run that the work dir holds; start anew")
    start.add_argument(
        "--replay", type=Path, metavar="FILE", help="repeat the step of a failed_step_N.pt and print what is not finite"
    )
    parser.add_argument("--seed", type=int, help="replaces the configuration's seed")
    parser.add_argument("--deterministic", action="store_true", help="repeat a run bit for bit; slower")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when there is a GPU")
    parser.add_argument(
        "--help-config", action=HelpConfig, metavar="KEY", help="what a key, such as training.lr, means"
    )
    parser.add_argument(
        "--profile", action="store_true", help="record a few steps with torch.profiler: a trace and a table of times"
    )
    parser.add_argument(
        "--max-steps", type=whole_number(1), help="stop (resumable) after this many steps in all; for trials"
    )
    arguments = parser.parse_args()
    if arguments.seed is not None:
        arguments.set.append(f"seed={arguments.seed}")
    return arguments


def parse_test_arguments(description: str) -> argparse.Namespace:
    """The command line of test.py; ``description`` stands in front of the list of options."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="YAML file that the checkpoint was trained with, or its name in configs/")
    parser.add_argument("--checkpoint", required=True, help="checkpoint of train.py, or .safetensors weights")
    parser.add_argument("--split", help="default: data.val_split")
    parser.add_argument("--no-metrics", action="store_true", help="write the submission, without scoring it")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change keys, e.g. data.root=/data"
    )
    parser.add_argument("--out", type=Path, help="output folder (default: runs/<name>/test_<split>)")
    parser.add_argument(
        "--failure", action="append", default=[], metavar="NAME[:LEVEL]", help="also test with this sensor failure"
    )
    parser.add_argument("--failures", metavar="SUITE", help="also test with all of multicorrupt, mome or all")
    parser.add_argument("--failure-seed", type=int, default=0, help="of the failures' random numbers (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when there is a GPU")
    return parser.parse_args()


def whole_number(low: int) -> Callable[[str], int]:
    """The type of an option: a whole number of at least ``low``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"expected at least {low}, got {value}")
        return value

    return parse


def number_above_0(text: str) -> float:
    """The type of an option: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


class HelpConfig(argparse.Action):
    """``--help-config KEY`` of a script: print what a key means, and end."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Print and exit; an unknown key is one sentence and status 2."""
        from cmt_aqr.errors import UserError
        from cmt_aqr.tools.config_doc import explain

        try:
            print(explain(values))
        except UserError as error:
            parser.exit(2, f"error: {error}\n")
        parser.exit()
