"""A small part of the random mutations of tests/e2e/faults: none may end in a traceback, a hang or a bad sentence."""

import copy

import pytest
import yaml

from cmt_aqr.config import Config, ConfigError, config_from_tree
from tests.e2e.faults import configs
from tests.e2e.faults.outcomes import REFUSED, VALID, failures


def test_random_mutations(tmp_path):
    outcomes = configs.run(tmp_path, count=48, seed=1)
    assert failures(outcomes) == []
    results = [outcome.result for outcome in outcomes]
    assert results.count(REFUSED) > 25 and results.count(VALID) > 1


@pytest.mark.parametrize("name", ["cmt_aqr_r50_800x320", "synthetic_tiny"])
def test_every_key_removed_and_replaced_by_one_kind_in_turn(name):
    """All files, keys and kinds: python -m tests.e2e.faults.configs --exhaustive."""
    original = yaml.safe_load((configs.FOLDER / f"{name}.yaml").read_text())
    keys = list(enumerate(configs.places(original)))
    for number, (at, _) in keys:
        if isinstance(at, dict):
            tree = copy.deepcopy(original)
            own, own_key = list(configs.places(tree))[number]
            del own[own_key]
            assert_settled(tree)
        tree = copy.deepcopy(original)
        own, own_key = list(configs.places(tree))[number]
        own[own_key] = configs.KINDS[number % len(configs.KINDS)]
        assert_settled(tree)


def assert_settled(tree: dict) -> None:
    """The tree is a configuration, or refused in one line for each problem."""
    try:
        assert isinstance(config_from_tree(tree, "file"), Config)
    except ConfigError as error:
        assert error.problems and all(line.startswith("file: ") and "\n" not in line for line in error.problems)
