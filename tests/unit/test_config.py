"""The configuration: shipped files load, and a wrong one says everything that is wrong, at once."""

import copy
from pathlib import Path

import pytest
import yaml

from cmt_aqr.config import ConfigError, config_from_tree, current_names, load_config, to_tree
from cmt_aqr.strict_yaml import apply_overrides, differences, to_yaml

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))
R50 = FOLDER / "cmt_r50_800x320.yaml"
AQR = FOLDER / "cmt_aqr_r50_800x320.yaml"
NO_DROP = ("data.drop_lidar=0", "data.drop_cameras=0")
WITHOUT_CAMERA = ("model.camera=null", *NO_DROP)
NO_DECAY = "training.decay_mult: must hold aqr.scale: 0.0, a learned scale takes no weight decay"


def name_of(path: Path) -> str:
    """What a shipped file calls itself: its place below configs/."""
    return path.relative_to(FOLDER).with_suffix("").as_posix()


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_shipped_file_loads_and_is_named_after_itself(path):
    config = load_config(path)
    assert config.name == name_of(path)
    assert config_from_tree(yaml.safe_load(to_yaml(config)), "round trip") == config
    assert config_from_tree(to_tree(config), "tree") == config


def problems_of(*overrides: str, path: Path = R50) -> list[str]:
    """What is wrong with a shipped file in which some keys have other values."""
    tree = yaml.safe_load(path.read_text())
    apply_overrides(tree, overrides)
    with pytest.raises(ConfigError) as caught:
        config_from_tree(tree, "file")
    assert all(problem.startswith("file: ") for problem in caught.value.problems)
    return [problem.removeprefix("file: ") for problem in caught.value.problems]


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
        ("training.pct_start=1.0", "training.pct_start: must be below 1"),
        ("training.freeze=backbone", "training.freeze: expected a list, got str 'backbone'"),
        ("data.class_balanced=1", "data.class_balanced: expected true or false, got int 1"),
        ("model.camera=3", "model.camera: expected a block of keys, got int 3"),
        ("training.lr=.nan", "training.lr: expected a finite number, got nan"),
    ],
)
def test_one_problem(override, start):
    assert any(line.startswith(start) for line in problems_of(override)), problems_of(override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.aqr.scale=6.0", "model.aqr.scale: 6 lies outside model.aqr.scale_range 0.5 to 5"),
        ("model.aqr.scale=0.4", "model.aqr.scale: 0.4 lies outside model.aqr.scale_range 0.5 to 5"),
        ("model.aqr.scale_range=[5.0, 5.0]", "model.aqr.scale_range: 5 is not below 5: give the smaller value first"),
        ("model.aqr.max_bias=0", "model.aqr.max_bias: must be above 0, got 0.0"),
        ("model.aqr.num_layers=5", "model.aqr.num_layers: must be at most 4, got 5"),
        ("model.aqr.design=b", "model.aqr.design: expected one of 'bias', 'v1', 'v2', got str 'b'"),
        ("model.aqr.design=v1", "model.aqr.activation: the design v1 needs 'sigmoid', got 'tanh'"),
        (
            "model.num_heads=32",
            "model.attention.backend: 'auto' needs heads of 16 channels or more on a GPU, but model.hidden_dim 256 / "
            "model.num_heads 32 gives 8; use 'dense'",
        ),
        (
            "model.aqr.camera_window=400",
            "model.aqr.camera_window: 400 is more than twice the 50 cells of its grid; for a bias on the "
            "whole modality set model.aqr.local to false",
        ),
        (
            "model.aqr.bev_window=257",
            "model.aqr.bev_window: 257 is more than twice the 128 cells of its grid; for a bias on the "
            "whole modality set model.aqr.local to false",
        ),
        (
            "model.lidar.neck_strides=[1, 1]",
            "model.lidar.neck_strides: [1, 1] does not bring the maps of model.lidar.second_strides [1, 2] to one "
            "size, but to 64 x 64, 128 x 128 cells",
        ),
        ("model.cls_prior=abc", "model.cls_prior: expected a number, got str 'abc'"),
        ("model.cls_prior=2.0", "model.cls_prior: must lie between 0 and 1, got 2"),
        ("model.attention.lowrank_energy=1.5", "model.attention.lowrank_energy: must be at most 1, got 1.5"),
        ("training.decay_mult={}", NO_DECAY),
        ("training.decay_mult={aqr.scale: 1.0}", NO_DECAY),
    ],
)
def test_one_problem_of_aqr(override, expected):
    assert problems_of(override, path=AQR) == [expected]


@pytest.mark.parametrize("sensor", ["lidar", "camera"])
def test_one_sensor_has_no_other_to_weigh_or_to_drop(sensor):
    assert problems_of(f"model.{sensor}=null", path=AQR) == [
        f"data.drop_lidar: must be 0 in a model with one sensor (model.{sensor} is null), got 0.25",
        f"data.drop_cameras: must be 0 in a model with one sensor (model.{sensor} is null), got 0.25",
        f"model.aqr: weighs LiDAR against cameras, but model.{sensor} is null",
    ]


def test_maps_are_drawn_in_windows():
    found = problems_of("model.aqr.design=v2", "model.aqr.activation=sigmoid", "model.aqr.local=false", path=AQR)
    assert found == ["model.aqr.local: the design v2 draws its maps in windows and needs true, got false"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.aqr.activation=sigmoid", "model.aqr.scale=5.0", "model.aqr.learn_scale=false", "model.aqr.max_bias=10"),
        ("model.aqr.scale=1.0", "model.aqr.max_bias=null"),
        ("model.aqr.local=false",),
        ("model.aqr.camera_window=15", "model.aqr.unseen=corner", "model.aqr.camera_assignment=all"),
        ("model.num_heads=32", "model.attention.backend=dense"),
        ("model.aqr=null", "model.num_heads=32", "training.decay_mult={}"),
    ],
)
def test_published_and_odd_settings_of_aqr(overrides):
    load_config(AQR, overrides)


@pytest.mark.parametrize(("name", "rate"), (("cmt_aqr_r50_800x320", 1.4e-4), ("cmt_aqr_vov_1600x640", 1e-4)))
def test_the_shipped_recipe(name, rate):
    config, plain = load_config(FOLDER / f"{name}.yaml"), load_config(FOLDER / f"{name.replace('_aqr', '')}.yaml")
    aqr = config.model.aqr
    assert (aqr.design, aqr.activation, aqr.num_layers, aqr.local) == ("bias", "tanh", 1, True)
    assert (aqr.camera_window, aqr.bev_window, aqr.camera_assignment, aqr.unseen) == (8, 5, "first", "none")
    assert (aqr.scale, aqr.scale_range, aqr.learn_scale, aqr.max_bias) == (2.5, (0.5, 5.0), True, 5.0)
    assert (config.training.lr, config.training.lr_peak, config.training.epochs) == (rate, 6.0, 20)
    changed = {line.partition(":")[0] for line in differences(to_tree(plain), to_tree(config))}
    assert {key for key in changed if not key.startswith("training.lr_mult")} == {
        "name", "model.aqr", "training.decay_mult.image_branch.backbone", "training.decay_mult.aqr.scale",
        "training.freeze", "training.norm_eval", "training.init_from",
    }  # fmt: skip


def test_the_ablation_is_one_experiment_with_few_differences():
    trees = {path.stem: to_tree(load_config(path)) for path in (FOLDER / "ablation").glob("*.yaml")}
    expected = {
        "baseline": {"model.aqr"},
        "v1": {"model.aqr.design", "model.aqr.activation"},
        "v2": {"model.aqr.design", "model.aqr.activation"},
        "v3": set(),
        "v3_fixed_scale": {"model.aqr.learn_scale"},
        "v3_no_windows": {"model.aqr.local"},
    }
    assert trees.keys() == expected.keys()
    for name, tree in trees.items():
        found = {line.partition(":")[0] for line in differences(trees["v3"], tree)} - {"name"}
        found = {key for key in found if not key.startswith(("training.lr_mult.aqr", "training.decay_mult.aqr"))}
        assert found == expected[name], name
    small = to_tree(load_config(FOLDER / "synthetic_small.yaml"))
    assert {line.partition(":")[0] for line in differences(small, trees["baseline"])} == {"name"}


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
    settings = ["training.lr=3e-4", "training.epochs=2", "training.epochs=3", *WITHOUT_CAMERA]
    config = load_config(R50, settings)
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
    with pytest.raises(ConfigError, match=rf"no such file; did you mean '{R50}'"):
        load_config(R50.with_name("cmt_r50_800x32.yaml"))


def test_differences_name_keys_and_values():
    left, right = (
        to_tree(load_config(R50)),
        to_tree(load_config(R50, ["model.ffn_dim=512", "model.lidar=null", *NO_DROP])),
    )
    found = differences(left["model"], right["model"])
    assert found[0] == "ffn_dim: 1024 against 512"
    assert found[1].startswith("lidar: {'voxel_size'") and found[1].endswith("against null")
    assert len(found) == 2


def test_the_configuration_of_an_earlier_checkpoint_has_todays_names_and_keys():
    tree = to_tree(load_config(R50))
    old = copy.deepcopy(tree)
    del old["data"]["failures"], old["model"]["lidar"]["sparse_precision"]
    old["model"]["start"] = old["model"].pop("init")
    assert differences(current_names(old), tree) == []
    kept = copy.deepcopy(tree) | {"data": tree["data"] | {"failures": [{"case": "fog", "probability": 0.5}]}}
    assert current_names(kept)["data"]["failures"] == [{"case": "fog", "probability": 0.5}]
    assert "failures" not in current_names({"model": {}})
