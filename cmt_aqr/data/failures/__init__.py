"""Failing sensors: what MultiCorrupt and nuScenes-R (with MoME's six cases) define, at test time and in training.

`cases` is the table of all failures; `lidar`, `cameras`, `weather`, `calibration` and `timing` are what they do;
`names` reads what a user writes; `apply` gives every file its random generator; `dataset` and `training` make samples.
docs/failures.md shows each of them.
"""

from cmt_aqr.data.failures.cases import CASES, OUTSIDE_MRA, SUITES
from cmt_aqr.data.failures.dataset import FailureDataset, FailureSampler
from cmt_aqr.data.failures.names import (
    Failure,
    keep_possible,
    name_problems,
    parse_failure,
    parse_failures,
    touches_nothing,
)
from cmt_aqr.data.failures.training import TrainingFailures, training_failures

__all__ = [
    "CASES",
    "OUTSIDE_MRA",
    "SUITES",
    "Failure",
    "FailureDataset",
    "FailureSampler",
    "TrainingFailures",
    "keep_possible",
    "name_problems",
    "parse_failure",
    "parse_failures",
    "touches_nothing",
    "training_failures",
]
