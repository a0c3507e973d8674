"""The configuration: shipped files load, and a wrong one says everything that is wrong, at once."""

from pathlib import Path

import pytest
import yaml

from cmt_aqr.config import ConfigError, config_from_tree, load_config, to_tree
from cmt_aqr.strict_yaml import apply_overrides, differences, to_yaml

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
R50 = CONFIGS[0].parent / "cmt_r50_800x320.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_file_loads_and_is_named_after_itself(path):
    config = load_config(path)
    assert config.name == path.stem
    assert config_from_tree(yaml.safe_load(to_yaml(config)), "round trip") == config
    assert config_from_tree(to_tree(config), "tree") == config


def problems_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(R50, overrides)
    return [problem.removeprefix(f"{R50}: ") for problem in caught.value.problems]


def test_every_kind_of_problem_is_reported_at_once():
    found = problems_of(
        "data.num_swep=3",
        "training.precision=bf17",
        "training.lr=-1",
        "training.epochs=2.5",
        "evaluation.post_range=[1, 2]",
        "model.hidden_dim=255",
        "model.tasks=[[car]]",
    )
    assert found[0] == "data.num_swep: unknown key; did you mean 'num_sweeps'?"
    assert "training.epochs: expected a whole number, got float 2.5" in found
    assert any(line.startswith("training.precision: expected one of 'fp32'") and "'bf16'?" in line for line in found)
    assert "training.lr: must be above 0, got -1.0" in found
    assert "evaluation.post_range: expected a list of 6 values, got 2: list [1, 2]" in found
    assert "model.hidden_dim: 255 is not a multiple of model.num_heads 8" in found  # across keys, beside the others
    assert any(line.startswith("model.tasks: must name each of the ten classes once") for line in found)
    assert len(found) == 8  # 255 is also no multiple of 4


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("model.lidar.sparse_shape=[41, 1100, 1080]", "model.lidar.sparse_shape: 1100 cells along y"),
        ("model.lidar.voxel_size=[0.11, 0.1, 0.2]", "model.lidar.voxel_size: 108 m along x is 981.818 voxels"),
        ("model.lidar.second_layers=[5]", "model.lidar: these lists must have the same length"),
        ("model.lidar.downsample_paddings=[[1, 1, 1]]", "model.lidar.downsample_paddings: expected 3 entries"),
        ("model.camera.input_size=[320, 810]", "model.camera.input_size: height and width must be multiples of 32"),
        ("loss.code_weights=[1, 1]", "loss.code_weights: expected 10 values"),
        ("data.drop_lidar=0.9", "data.drop_lidar: 0.9 and data.drop_cameras 0.25 add up"),
        ("data.gt_sampling.per_class={cat: 1}", "data.gt_sampling.per_class.cat: no such class"),
        ("model.point_range=[54, -54, -5, -54, 54, 3]", "model.point_range: x_min 54 is not below x_max -54"),
        ("training.up_fraction=1.0", "training.up_fraction: must be below 1"),
        ("training.freeze=backbone", "training.freeze: expected a list, got str 'backbone'"),
        ("data.class_balanced=1", "data.class_balanced: expected true or false, got int 1"),
        ("model.camera=3", "model.camera: expected a block of keys, got int 3"),
        ("training.lr=.nan", "training.lr: expected a finite number, got nan"),
    ],
)
def test_one_problem(override, start):
    assert any(line.startswith(start) for line in problems_of(override)), problems_of(override)


def test_missing_key(tmp_path):
    tree = yaml.safe_load(R50.read_text())
    del tree["training"]["lr"]
    path = tmp_path / "partial.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"training\.lr: missing key"):
        load_config(path)


def test_both_sensors_null():
    assert "model: lidar and camera are both null: a detector needs at least one sensor" in problems_of(
        "model.lidar=null", "model.camera=null"
    )


def test_overrides_apply_in_order_and_read_exponents():
    config = load_config(R50, ["training.lr=3e-4", "training.epochs=2", "training.epochs=3", "model.camera=null"])
    assert (config.training.lr, config.training.epochs, config.model.camera) == (3e-4, 3, None)


@pytest.mark.parametrize("entry", ["training.lr", "=3", "a..b=1"])
def test_override_without_key_or_value(entry):
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        apply_overrides({}, [entry])


def test_override_through_a_value():
    with pytest.raises(ConfigError, match="name is str 'x', not a block of keys"):
        apply_overrides({"name": "x"}, ["name.inner=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "key 'a' appears more than once"),
        ("a: [1\n", "not valid YAML at line"),
        ("- 1\n", "expected a mapping of keys, got list"),
        ("", "expected a mapping of keys, got nothing"),
    ],
)
def test_broken_file(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_missing_file_suggests_a_neighbour():
    with pytest.raises(ConfigError, match=r"no such file; did you mean 'cmt_r50_800x320.yaml'"):
        load_config(R50.with_name("cmt_r50_800x32.yaml"))


def test_differences_name_keys_and_values():
    left, right = to_tree(load_config(R50)), to_tree(load_config(R50, ["model.ffn_dim=512", "model.lidar=null"]))
    found = differences(left["model"], right["model"])
    assert found[0] == "ffn_dim: int 1024 against int 512"
    assert found[1].startswith("lidar: dict") and found[1].endswith("against null")
    assert len(found) == 2
