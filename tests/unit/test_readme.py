"""The README's Python example runs as it stands there, and does what its comments say."""

import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_example_runs():
    examples = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (example,) = (text for text in examples if "AttentionBias" in text)  # test_predictor.py runs the other one
    names = {}
    exec(example, names)
    assert names["out"].shape == (1, 8, 300, 32) and names["lse"].shape == (1, 8, 300)
    grad = names["weights"].grad
    assert grad.shape == (1, 300, 2) and (grad[..., 0] != 0).all()


def test_every_configuration_is_in_the_table():
    folder = Path(__file__).parents[2] / "configs"
    for path in folder.glob("*.yaml"):
        assert f"`{path.stem}`" in README, path.name
