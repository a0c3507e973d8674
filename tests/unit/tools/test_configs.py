"""The ablation's files follow from their patches, and a new key reaches every file or none."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from cmt_aqr.config import ConfigError
from cmt_aqr.tools import configs
from cmt_aqr.tools.configs import ablation_texts, changed_ablation, check_ablation, read_texts, with_new_key

FOLDER = Path(__file__).parents[3] / "configs"


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "configs"))


def run(monkeypatch, *arguments) -> int:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["configs", *map(str, arguments)])
    return configs.main()


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.y*ml")}


def test_the_shipped_ablation_is_what_its_patches_give():
    check_ablation(FOLDER)
    assert len(list((FOLDER / "ablation").glob("*.yaml"))) == 6


def test_a_changed_base_or_file_drifts_and_is_made_anew(folder, monkeypatch, capsys):
    base = folder / "synthetic_small.yaml"
    base.write_text(base.read_text().replace("  num_queries: 300\n", "  num_queries: 200   # fewer\n"))
    assert run(monkeypatch, "ablation", "--check", "--configs", folder) == 2
    assert capsys.readouterr().err.count("is not what ablation/patches.yml gives; run python -m") == 6
    assert run(monkeypatch, "ablation", "--configs", folder) == 0
    check_ablation(folder)
    assert "  num_queries: 200   # fewer\n" in (folder / "ablation" / "v3_no_windows.yaml").read_text()
    edited = folder / "ablation" / "v2.yaml"
    edited.write_text(edited.read_text().replace("bev_window: 5", "bev_window: 7"))
    assert list(changed_ablation(folder)) == ["ablation/v2.yaml"]


def test_a_new_ablation_is_one_entry(folder, monkeypatch):
    with open(folder / configs.PATCHES, "a") as file:
        file.write("\nv3_wide:\n  from: v3\n  about: wide.\n  set:\n    model:\n      aqr:\n        bev_window: 9\n")
    before = contents(folder)
    assert run(monkeypatch, "ablation", "--configs", folder) == 0
    after = contents(folder)
    new = after.pop("ablation/v3_wide.yaml")
    assert after == before and yaml.safe_load(new)["model"]["aqr"]["bev_window"] == 9
    v3 = after["ablation/v3.yaml"].replace("v3: the attention bias", "v3_wide: wide").replace("from v1", "from v3")
    assert new == v3.replace("name: ablation/v3", "name: ablation/v3_wide").replace("bev_window: 5", "bev_window: 9")


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("{from: v3, about: x, sets: {}}", r"new\.sets: unknown key; did you mean 'set'\?"),
        ("{from: v33, about: x}", r"new\.from: 'v33' is no entry above and no configuration; did you mean 'v3'\?"),
        ("{from: v3}", r"new\.about: expected text, got None"),
        ("3", r"new: expected a block with from, about and set"),
        ("{from: v3, about: x, set: 3}", r"new\.set: expected a block of keys, got 3"),
    ],
)
def test_a_wrong_entry(entry, sentence):
    texts, patches = read_texts(FOLDER)
    with pytest.raises(ConfigError, match=rf"patches\.yml: {sentence}"):
        ablation_texts(f"{patches}\nnew: {entry}\n", texts)


def test_an_entry_that_makes_no_configuration(folder):
    patches = folder / configs.PATCHES
    patches.write_text(patches.read_text().replace("bev_window: 5", "bev_window: -5"))
    with pytest.raises(ConfigError, match=r"patches\.yml: v1: model\.aqr\.bev_window: must be at least 1, got -5"):
        check_ablation(folder)


def test_a_file_without_an_entry(folder):
    shutil.copy(folder / "ablation" / "v3.yaml", folder / "ablation" / "v4.yaml")
    with pytest.raises(ConfigError, match=r"v4\.yaml: has no entry in "):
        check_ablation(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "7"),
        ("model.aqr.num_layers", "2   # why"),
        ("data.synthetic.workers", "3"),
        ("evaluation.picture_score", "0.5"),
    ],
)
def test_a_new_key_comes_where_the_schema_has_it_and_all_else_stays(folder, key, value):
    """A key is taken from every file and added again."""
    name, depth, expected = key.rpartition(".")[2], key.count("."), {}
    for file, text in contents(folder).items():
        line = rf"(?m)^ {{{2 * (depth + 2 * (file == configs.PATCHES))}}}{name}: .*\n"
        (folder / file).write_text(re.sub(line, "", text))
        expected[file] = re.sub(line, lambda found: re.sub(": .*", f": {value}", found[0]), text)
    files, skipped = with_new_key(folder, key, value.partition(" ")[0], comment=value.partition("# ")[2])
    assert contents(folder) | files == expected
    assert sorted(skipped) == sorted({file for file in expected if file.endswith(".yaml")} - set(files))
    assert len(skipped) == {"model.aqr": 8, "data.synthetic": 8}.get(key.rpartition(".")[0], 0)


def test_a_key_is_put_behind_another_one(folder, monkeypatch, capsys):
    for path in folder.rglob("*.yaml"):
        path.write_text(re.sub(r"(?m)^  dropout: .*\n", "", path.read_text()))
    command = ["add", "model.dropout", "0.1", "--after", "model.init", "--comment", "why", "--configs", folder]
    assert run(monkeypatch, *command) == 0
    assert capsys.readouterr().out.count("wrote ") == 16
    for path in folder.rglob("*.yaml"):
        assert re.search(r"\n  init: \w+\n  dropout: 0.1   # why\n  activation_checkpointing: ", path.read_text()), path
    check_ablation(folder)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("model.dropuot", "0.1"), "model.dropuot: no field of ModelConfig in cmt_aqr/config.py: add the field first; "
         "did you mean 'dropout'?"),
        (("training.lr_mult.head", "0.1"), "training.lr_mult.head: no field of the schema, which ends above it: add "
         "the field first"),
        (("model.ffn_dim", "8"), "{folder}/cmt_aqr_r50_800x320.yaml: model.ffn_dim: is there already"),
        (("model.dropout", "2"), "{folder}/cmt_aqr_r50_800x320.yaml: model.dropout: must be at most 1, got 2.0"),
        (("model.dropout", "[1"), "not valid YAML at line 1: expected ',' or ']', but got '<stream end>'"),
        (("model.dropout", "0.1", "--after", "data.root"), "--after data.root: expected a key of the same block as "
         "model.dropout"),
        (("model.dropout", "0.1", "--comment", "a\nb"), "--comment: expected one line of text, got 'a\\nb'"),
    ],
)  # fmt: skip
def test_a_key_that_cannot_be_added_changes_no_file(folder, monkeypatch, capsys, arguments, sentence):
    for path in folder.rglob("*.yaml"):
        path.write_text(re.sub(r"(?m)^  dropout: .*\n", "", path.read_text()))
    before = contents(folder)
    assert run(monkeypatch, "add", *arguments, "--configs", folder) == 2
    assert capsys.readouterr().err == f"error: {sentence.format(folder=folder)}\n"
    assert contents(folder) == before


def test_a_drifted_ablation_takes_no_key(folder, monkeypatch, capsys):
    edited = folder / "ablation" / "v2.yaml"
    edited.write_text(edited.read_text().replace("bev_window: 5", "bev_window: 7"))
    assert run(monkeypatch, "add", "model.dropout", "0.1", "--configs", folder) == 2
    assert capsys.readouterr().err.startswith(f"error: {edited}: is not what ablation/patches.yml gives; run ")
