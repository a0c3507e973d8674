"""Running something on damaged input, and counting what came of it."""

import re
import signal
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cmt_aqr.errors import UserError

REFUSED, IDENTICAL, VALID, BAD_SENTENCE, CRASHED, HUNG = (
    "refused", "harmless: identical", "harmless: valid", "BAD SENTENCE", "TRACEBACK", "HANG",
)  # fmt: skip
FAILURES = (BAD_SENTENCE, CRASHED, HUNG)
WORST_FIRST = (CRASHED, HUNG, BAD_SENTENCE, REFUSED, VALID, IDENTICAL)


class _TimeIsUp(BaseException):
    """Not an Exception: nothing on the way may catch it."""


@dataclass(frozen=True)
class Outcome:
    """What one damage led to.

    Attributes:
        kind: of the damage.
        what: the damage, in words.
        result: one of the constants above.
        text: the sentence, or the traceback.
    """

    kind: str
    what: str
    result: str
    text: str = ""


def observe(run: Callable[[], bool], *, named: Iterable[str], limit: float) -> tuple[str, str]:
    """Run on damaged input.

    Args:
        run: returns whether the result is identical to that of undamaged input, and asserts that it is valid.
        named: the sentence of a refusal must contain one of these.
        limit: seconds after which it counts as a hang.

    Returns:
        result and text of an :class:`Outcome`.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _TimeIsUp

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        return (IDENTICAL if run() else VALID), ""
    except UserError as error:
        text = str(error)
        is_good = "\n" not in text and len(text) < 1000 and any(name in text for name in named)
        return (REFUSED if is_good else BAD_SENTENCE), text
    except _TimeIsUp:
        return HUNG, traceback.format_exc(limit=-3)
    except Exception:
        return CRASHED, traceback.format_exc(limit=-6)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def summary(outcomes: Iterable[Outcome], root: Path) -> str:
    """A table in Markdown: kinds of damage against results, each with the shortest sentence as an example."""
    counts: dict[str, Counter] = defaultdict(Counter)
    sentences: dict[str, str] = {}
    for outcome in outcomes:
        counts[outcome.kind][outcome.result] += 1
        text = re.sub(rf"{re.escape(str(root))}/\d*/?", "", outcome.text)
        if outcome.result == REFUSED and len(text) < len(sentences.get(outcome.kind, "x" * 1000)):
            sentences[outcome.kind] = text
    total = sum(counts.values(), Counter())
    results = [name for name in (REFUSED, IDENTICAL, VALID, *FAILURES) if total[name] or name in (CRASHED, HUNG)]
    lines = [
        f"| damage | {' | '.join(results)} | for example |",
        "|---|" + "---|" * (len(results) + 1),
    ]
    for kind in sorted(counts):
        figures = " | ".join(str(counts[kind][name]) for name in results)
        lines.append(f"| {kind} | {figures} | {sentences.get(kind, '')} |")
    lines.append(f"| **all {total.total()}** | {' | '.join(str(total[name]) for name in results)} | |")
    return "\n".join(lines)


def failures(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The outcomes that must not be."""
    return [outcome for outcome in outcomes if outcome.result in FAILURES]


def report(outcomes: list[Outcome], root: Path, *, first: int) -> int:
    """Print the summary, then every failure with its number, from ``first``; returns the exit status."""
    print(summary(outcomes, root))
    failed = failures(outcomes)
    for number, outcome in enumerate(outcomes, first):
        if outcome in failed:
            print(f"\nnumber {number}: {outcome.kind}: {outcome.what}: {outcome.result}\n{outcome.text}")
    return 1 if failed else 0
