"""The README's Python example runs as it stands there, and does what its comments say."""

import re
from pathlib import Path

from cmt_aqr.tools.config_doc import explain

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


def test_pictures_are_there_and_small():
    names = re.findall(r"!\[.+?\]\((.+?)\)", README)
    assert len(names) == 2
    for name in names:
        assert 10_000 < (Path(__file__).parents[2] / name).stat().st_size <= 200_000, name


def test_keys_and_pictures_of_the_guide_exist():
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    keys = set(re.findall(r"`((?:training|model|data)\.[a-z_.]+)`", guide))
    assert len(keys) >= 5
    for key in (*keys, *re.findall(r"--help-config ([a-z_.]+)", guide)):
        assert explain(key)
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", guide):
        assert (Path(__file__).parents[2] / "docs" / name).exists(), name
