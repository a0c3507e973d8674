"""Errors that a user can mend: one sentence on stderr, exit status 2, no traceback."""

import os
import sys

from cmt_aqr.data.sample import DataError
from cmt_aqr.evaluation.submission import EvaluationError
from cmt_aqr.losses.matcher import NonFiniteError
from cmt_aqr.strict_yaml import ConfigError
from cmt_aqr.training.checkpoint import CheckpointError

USER_ERRORS = (CheckpointError, ConfigError, DataError, EvaluationError, NonFiniteError, FileExistsError)


def report_user_error(error: BaseException) -> int:
    """Print the sentence; returns the exit status 2. With several processes the process is named."""
    rank = os.environ.get("RANK")
    who = f" (process {rank})" if rank not in (None, "0") else ""
    print(f"error{who}: {error}", file=sys.stderr, flush=True)
    return 2
