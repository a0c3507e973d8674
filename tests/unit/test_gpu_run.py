"""The program that runs the GPU tests."""

from tests.gpu.run_all import slowest_first


def test_new_tests_and_slow_ones_begin_first():
    outcomes = {"a": {"seconds": 1.0}, "b": {"seconds": 80.0}, "c": {"seconds": 5.0}}
    assert slowest_first(["a", "b", "new", "c"], outcomes) == ["new", "b", "c", "a"]
