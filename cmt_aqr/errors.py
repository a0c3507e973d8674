"""Errors that a user can mend: one sentence on stderr, exit status 2, no traceback."""

import os
import sys
from collections.abc import Callable

from cmt_aqr.data.sample import DataError
from cmt_aqr.evaluation.pictures import PictureError
from cmt_aqr.evaluation.submission import EvaluationError
from cmt_aqr.losses.matcher import NonFiniteError
from cmt_aqr.strict_yaml import ConfigError
from cmt_aqr.training.checkpoint import CheckpointError
from cmt_aqr.training.logs import LogError

# OSError: a full disk or a missing permission that no room met with a sentence of its own.
USER_ERRORS = (
    CheckpointError, ConfigError, DataError, EvaluationError, LogError, NonFiniteError, PictureError, OSError,
)  # fmt: skip


def report_user_error(error: BaseException) -> int:
    """Print the sentence; returns the exit status 2. With several processes the process is named."""
    rank = os.environ.get("RANK")
    who = f" (process {rank})" if rank not in (None, "0") else ""
    sys.stderr.write(f"error{who}: {error}\n")  # one write: lines of several processes must not run together
    sys.stderr.flush()
    return 2


def report_errors(run: Callable[[], int], *others: type[Exception]) -> int:
    """Run a script; what its user can mend becomes one sentence and exit status 2, Ctrl-C one line and 130.

    Args:
        run: returns the exit status.
        others: error classes of this script besides the package's.
    """
    try:
        return run()
    except (*USER_ERRORS, *others) as error:
        return report_user_error(error)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr, flush=True)
        return 130
