"""Values that no run can use are refused by the configuration, with their key, before anything is prepared."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from cmt_aqr import config as schema
from cmt_aqr.classes import CLASSES
from cmt_aqr.config import ConfigError, config_from_tree, load_config, naming_source
from cmt_aqr.config_checks import encoder_cells
from cmt_aqr.config_data_checks import SYNTHETIC_SPLITS, SYNTHETIC_VERSION
from cmt_aqr.models.lidar import encoder_output_shape
from cmt_aqr.strict_yaml import apply_overrides
from cmt_aqr.synthetic.recording import WorldSettings
from cmt_aqr.synthetic.tables import VERSION
from cmt_aqr.synthetic.writer import check_arguments
from cmt_aqr.yaml_reader import show

FOLDER = Path(__file__).parents[2] / "configs"
R50, TINY = FOLDER / "cmt_aqr_r50_800x320.yaml", FOLDER / "synthetic_tiny.yaml"


def problems_of(*overrides: str, path: Path = R50) -> list[str]:
    """What is wrong with a shipped file in which some keys have other values."""
    tree = yaml.safe_load(path.read_text())
    apply_overrides(tree, overrides)
    with pytest.raises(ConfigError) as caught:
        config_from_tree(tree, "file")
    return [problem.removeprefix("file: ") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (f"{key}=[{high}, {low}]", f"{key}: {high} is above {low}: give the smaller value first")
        for key, low, high in (
            ("data.image_augmentation.resize", 0.4, 0.6),
            ("data.image_augmentation.crop_bottom", 0.1, 0.2),
            ("data.image_augmentation.rotation_deg", -5, 5),
            ("data.scene_augmentation.rotation", -0.7, 0.7),
            ("data.scene_augmentation.scale", 0.9, 1.1),
        )
    ]
    + [
        ("model.denoising.num_dn=80000000", "model.denoising.num_dn: must be at most 10000, got 80000000"),
        ("name=../runs", "name: expected a name that is not empty, has no '..' and does not begin with '/', "
         "got '../runs'"),
        ("data.val_split=a/b", "data.val_split: expected a name that is not empty, has no '..' and does not contain "
         "'/', got 'a/b'"),
        ('data.root="a\\0b"', "data.root: expected text without control characters, got 'a\\x00b'"),
        ("data.root=", "data.root: expected text, got null"),
        ('data.index_dir=""', "data.index_dir: is empty, expected a path"),
        ("data.root=" + "a" * 300, "data.root: 300 bytes, its longest part 300: a path has at most 2000 bytes and each "
         "of its parts 200"),
        ("training.lr=" + "9" * 40, "training.lr: expected a finite number, got " + "9" * 40),
        ("model.head_kernel=true", "model.head_kernel: expected one of 1, 3, got bool True"),
        ("model.lidar.encoder_channels=[[16, 16, 32], [16, 32], [32, 128], [128]]",
         "model.lidar.encoder_channels[1]: residual blocks keep their width, so all entries but the last must be 32, "
         "the channels that enter the stage, got [16, 32]"),
        ("model.lidar.sparse_shape=[8, 1024, 1024]",
         "model.lidar.sparse_shape: [8, 1024, 1024] (z, y, x) is too small for the 3 stride-2 convolutions of "
         "model.lidar.encoder_channels and the final one along z, which would leave [0, 128, 128] cells; use more "
         "cells or fewer stages"),
        ("model.lidar.sparse_shape=[41, 1016, 1016]",
         "model.lidar.neck_strides: [1, 2] does not bring the maps of model.lidar.second_strides [1, 2] to one size, "
         "but to 127 x 127, 128 x 128 cells"),
        ("model.lidar.second_channels=[]", "model.lidar.second_channels: expected 1 to 8 entries, got 0"),
        ("model.camera.input_size=[32, 810]", "model.camera.input_size: height and width must be multiples of 32, got "
         "32 x 810"),
        ("model.camera.input_size=[16, 800]", "model.camera.input_size[0]: must be at least 32, got 16"),
    ],
)  # fmt: skip
def test_one_value(override, expected):
    assert problems_of(override) == [expected]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(schema.SyntheticConfig)])
def test_the_generator_takes_what_the_configuration_allows_and_nothing_more(field):
    config = load_config(TINY)
    bounds = next(f for f in dataclasses.fields(schema.SyntheticConfig) if f.name == field).metadata

    def check(value: int) -> None:
        world = dataclasses.replace(
            config.data.synthetic, **{field: (value, value) if field == "image_size" else value}
        )
        check_arguments(
            WorldSettings(
                world.train_scenes, world.val_scenes, world.seed, world.samples_per_scene, world.image_size,
                world.sweeps_per_keyframe, world.lidar_columns,
            ),
            world.workers,
        )  # fmt: skip

    check(bounds["low"])
    check(bounds["high"])
    with pytest.raises(ValueError, match="must be a whole number from"):
        check(bounds["high"] + 1)
    value = bounds["high"] + 1
    (problem, *_) = problems_of(
        f"data.synthetic.{field}={[value, value] if field == 'image_size' else value}", path=TINY
    )
    assert problem.startswith(f"data.synthetic.{field}") and f"must be at most {bounds['high']}, got {value}" in problem


def test_the_synthetic_world_has_one_version_and_two_splits():
    assert SYNTHETIC_VERSION == VERSION
    assert problems_of("data.val_split=val", "data.version=v1.0-mini", path=TINY) == [
        "data.version: the synthetic world has the version 'v1.0-synthetic', got 'v1.0-mini'",
        "data.val_split: the synthetic world has the splits synthetic_train and synthetic_val, got 'val'",
    ]
    world = WorldSettings(1, 1, 0, 1, (16, 16), 0, 16)
    assert tuple(world.scene_indices()) == SYNTHETIC_SPLITS


@pytest.mark.parametrize("cells", [[41, 1024, 1024], [40, 999, 1023], [17, 64, 3], [3, 1, 1]])
@pytest.mark.parametrize("paddings", [((1, 1, 1),) * 2, ((1, 1, 1), (1, 1, 1), (0, 1, 1)), ()])
def test_cells_of_the_encoder_are_those_of_the_model(cells, paddings):
    found = encoder_cells(tuple(cells), paddings)
    if min(found) < 1:
        with pytest.raises(ValueError, match="is too small"):
            encoder_output_shape(sparse_shape=cells, downsample_paddings=paddings, out_channels=1)
    else:
        assert encoder_output_shape(sparse_shape=cells, downsample_paddings=paddings, out_channels=1) == found


def blocks(kind: type, prefix: str = ""):
    """Dotted key and metadata of every key that holds no block."""
    for field in dataclasses.fields(kind):
        inner = next(
            (t for t in (field.type, *getattr(field.type, "__args__", ())) if dataclasses.is_dataclass(t)), None
        )
        if inner is None:
            yield prefix + field.name, field
        else:
            yield from blocks(inner, f"{prefix}{field.name}.")


def test_every_number_has_an_upper_limit():
    unlimited = [
        key
        for key, field in blocks(schema.Config)
        if ("int" in str(field.type) or "float" in str(field.type)) and field.metadata.get("high") is None
    ]
    assert unlimited == ["model.cls_prior"]  # which a check of its own keeps between 0 and 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.lr=fast"], ["--set training.lr=fast: training.lr: expected a number, got str 'fast'"]),
        (
            ["model.aqr.num_layer=2"],
            ["--set model.aqr.num_layer=2: model.aqr.num_layer: unknown key; did you mean 'num_layers'?"],
        ),
        (["model.lidar={}"], None),
        (
            ["model.num_heads=6"],
            [f"{R50} with --set model.num_heads=6: model.hidden_dim: 256 is not a multiple of model.num_heads 6"],
        ),
        (
            [f"training.lr_mult={{{'x' * 300}: -1}}"],
            [f"--set training.lr_mult={{{'x' * 39}...: training.lr_mult.{'x' * 57}...: must be at least 0, got -1.0"],
        ),
        (
            [f"training.{'x' * 300}=-1"],
            [f"--set training.{'x' * 48}...: training.{'x' * 57}...: unknown key"],
        ),
        (["training.lr=[1"], ["--set training.lr=[1: '[1' is not a YAML value: not valid YAML at line 1: expected ',' "
                             "or ']', but got '<stream end>'"]),
    ],
)  # fmt: skip
def test_a_problem_of_an_override_names_the_override(overrides, expected):
    with pytest.raises(ConfigError) as caught:
        load_config(R50, overrides)
    if expected is None:
        assert all(line.startswith("--set model.lidar={}: model.lidar.") for line in caught.value.problems)
    else:
        assert list(caught.value.problems) == expected


WITHOUT_AQR = ("model.aqr=null", "training.decay_mult={}")
LIDAR_ONLY = (*WITHOUT_AQR, "model.camera=null", "data.drop_lidar=0", "data.drop_cameras=0")


@pytest.mark.parametrize(("shape", "cells"), [([41, 8, 8], "1 x 1"), ([41, 8, 16], "1 x 2"), ([41, 16, 16], "2 x 2")])
def test_a_map_of_one_cell_is_refused_because_batch_norm_cannot_train_on_it(shape, cells):
    assert problems_of(f"model.lidar.sparse_shape={shape}", *WITHOUT_AQR) == [
        f"model.lidar.second_strides: [1, 2] leave a map of one cell out of {cells}; use more cells in "
        "model.lidar.sparse_shape or smaller strides"
    ]
    load_config(R50, ["model.lidar.sparse_shape=[41, 16, 32]", *WITHOUT_AQR])  # 2 x 4, then 1 x 2


def test_the_range_ends_behind_the_first_depth_of_a_camera_ray():
    assert problems_of("model.point_range=[-107, -54, -5, 1, 54, 3]") == [
        "model.point_range: x_max must be above 1 m, where a camera's rays begin, got 1"
    ]
    load_config(R50, ["model.point_range=[-106.8, -54, -5, 1.2, 54, 3]"])
    load_config(R50, ["model.point_range=[-107, -54, -5, 1, 54, 3]", *LIDAR_ONLY])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.num_heads=1"], "model.num_heads: model.init 'local' needs 2 or more, one a sensor, got 1"),
        (["model.num_heads=128", "model.attention.backend=dense"],
         "model.init: 'local' needs heads of 4 channels or more, got 2"),
        (["model.depth_bins=1"], "model.depth_bins: model.init 'local' needs 2 or more, got 1"),
    ],
)  # fmt: skip
def test_what_local_attention_at_the_start_needs(overrides, expected):
    assert problems_of("model.init=local", *overrides) == [expected]
    load_config(R50, ["model.init=official", *overrides])


def test_local_attention_at_the_start_at_its_limits():
    load_config(R50, ["model.init=local", "model.num_heads=64", "model.attention.backend=dense", "model.depth_bins=2"])
    load_config(R50, ["model.init=local", "model.num_heads=1", "model.depth_bins=1", *LIDAR_ONLY])


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("x" * 5000, "x" * 57 + "..."), ("x" * 240, "x" * 240), (1, "1"), (1.5, "1.5"), (None, "None"), (True, "True"),
        ("", "''"), ("a\nb", "'a\\nb'"), ("a\0b", "'a\\x00b'"), (("a",), "('a',)"),
    ],
)  # fmt: skip
def test_keys_of_every_length_and_kind_are_shown_in_one_line(key, shown):
    tree = yaml.safe_load(R50.read_text())
    tree["model"][key] = 0
    tree["training"]["lr_mult"][key] = -1.0
    tree["data"]["gt_sampling"]["per_class"][key] = 1
    with pytest.raises(ConfigError) as caught:
        config_from_tree(tree, "file")
    if isinstance(key, str):
        lr, sampling = "must be at least 0, got -1.0", f"no such class; the classes are {', '.join(CLASSES)}"
    else:
        lr = sampling = f"expected text as a key, got {show(key)}"
    assert sorted(caught.value.problems) == sorted(
        [
            f"file: model.{shown}: unknown key",
            f"file: training.lr_mult.{shown}: {lr}",
            f"file: data.gt_sampling.per_class.{shown}: {sampling}",
        ]
    )


def test_problems_that_are_found_from_the_model_name_the_file_or_the_override():
    overrides = ["model.num_layers=2", "training.freeze=[nothing]"]
    with pytest.raises(ConfigError) as caught, naming_source("file.yaml", overrides):
        raise ConfigError(
            [
                "training.freeze: no such",
                "training.lr_mult: no such",
                "model: too large",
                "model.lidar.out_of_range: no",
            ]
        )
    assert caught.value.problems == (
        "--set training.freeze=[nothing]: training.freeze: no such",
        "file.yaml: training.lr_mult: no such",
        "--set model.num_layers=2: model: too large",
        "file.yaml: model.lidar.out_of_range: no",
    )
