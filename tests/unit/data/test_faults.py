"""A small part of the random damages of tests/e2e/faults: none may end in a traceback, a hang or a bad sentence."""

from tests.e2e.faults import sensor_files, tables
from tests.e2e.faults.outcomes import IDENTICAL, REFUSED, failures


def test_damaged_tables(tmp_path):
    base = tables.make_base(tmp_path / "base")
    outcomes = tables.run(base, tmp_path, count=30, seed=1)
    assert not failures(outcomes)
    results = [outcome.result for outcome in outcomes]
    assert results.count(REFUSED) > 15 and results.count(IDENTICAL) > 2


def test_damaged_sensor_files(tmp_path):
    base = sensor_files.make_base(tmp_path)
    outcomes = sensor_files.run(base, count=60, seed=1)
    assert not failures(outcomes)
    assert sum(outcome.result == REFUSED for outcome in outcomes) > 40
