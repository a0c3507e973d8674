"""Failing sensors: what MultiCorrupt and nuScenes-R (with MoME's six cases) define, at test time and in training.

`cases` is the table of all failures; `lidar`, `cameras`, `weather`, `calibration` and `timing` implement them; `names`
parses the names that a user writes; `panels` tells pictures which sensors failed; `apply` gives every file its random
generator; `dataset` and `training` make samples. docs/failures.md shows each failure.
"""

from cmt_aqr.data.failures.cases import CASES, OUTSIDE_MRA, SUITES
from cmt_aqr.data.failures.dataset import FailureDataset, FailureSampler
from cmt_aqr.data.failures.names import (
    Failure,
    affects_nothing,
    keep_applicable,
    name_problems,
    parse_failure,
    parse_failures,
)
from cmt_aqr.data.failures.panels import SensorData, failed_panels
from cmt_aqr.data.failures.training import TrainingFailures, training_failures

__all__ = [
    "CASES",
    "OUTSIDE_MRA",
    "SUITES",
    "Failure",
    "FailureDataset",
    "FailureSampler",
    "SensorData",
    "TrainingFailures",
    "affects_nothing",
    "failed_panels",
    "keep_applicable",
    "name_problems",
    "parse_failure",
    "parse_failures",
    "training_failures",
]
