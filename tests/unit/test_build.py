"""From shipped configurations to models, data sets and the loss."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cmt_aqr.aqr.router import BiasRouter
from cmt_aqr.build import (
    build_criterion,
    build_detector,
    check_training,
    count_parameters,
    open_split,
    training_dataset,
)
from cmt_aqr.classes import CLASSES
from cmt_aqr.config import Config, ConfigError, load_config
from cmt_aqr.data.sample import DataError
from cmt_aqr.errors import UserError
from cmt_aqr.models.heads import CLASS_BRANCH
from cmt_aqr.run import build_optimizer, check_settings, initialise
from cmt_aqr.training.distributed import RankInfo
from cmt_aqr.training.optim import freeze, prefix_problems
from tests.unit.data.world import write_world

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))
# Counted in the original program's models, built from its own configurations.
OFFICIAL = {
    "cmt_r50_800x320": 40_919_572,
    "cmt_vov_1600x640": 86_607_380,
    "cmt_lidar_0075": 16_769_492,
    "cmt_camera_vov_1600x640": 78_156_100,
}


def name_of(path: Path) -> str:
    return path.relative_to(FOLDER).with_suffix("").as_posix()


def shipped(name: str, *overrides: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml", overrides)


def on_meta(config: Config) -> torch.nn.Module:
    """The model of a configuration without memory for its weights."""
    with torch.device("meta"):
        return build_detector(config.model)


def test_the_official_settings_are_shipped():
    assert OFFICIAL.keys() <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_shipped_model_builds(path):
    config = load_config(path)
    model = on_meta(config)
    assert (model.lidar_branch is None) == (config.model.lidar is None)
    assert (model.image_branch is None) == (config.model.camera is None)
    assert model.reference_points.num_queries == config.model.num_queries
    assert len(model.decoder.layers) == config.model.num_layers
    assert (model.aqr is None) == (config.model.aqr is None)
    if path.stem in OFFICIAL:
        assert count_parameters(model) == OFFICIAL[path.stem]


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_evaluation_is_in_float32_as_shipped(path):
    config = load_config(path)
    assert config.evaluation.precision == "fp32" and not config.model.activation_checkpointing
    assert config.model.lidar is None or config.model.lidar.sparse_precision == "fp32"


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_the_precision_of_the_sparse_encoder_is_its_own_key(name, dtype):
    config = shipped("synthetic_tiny", f"model.lidar.sparse_precision={name}")
    assert on_meta(config).lidar_branch.encoder.precision == dtype


def test_spconv_has_no_bf16():
    with pytest.raises(ConfigError, match="sparse_precision: spconv has no bf16 kernels; use fp16 or fp32, or"):
        shipped("synthetic_tiny", "model.lidar.sparse_precision=bf16", "model.lidar.sparse_backend=spconv")


def test_activation_checkpointing_reaches_the_decoder():
    for is_on in (False, True):
        config = shipped("synthetic_tiny", f"model.activation_checkpointing={str(is_on).lower()}")
        assert on_meta(config).decoder.checkpoint_layers is is_on


def test_the_class_prior_reaches_the_heads():
    config = shipped("synthetic_tiny", "model.cls_prior=0.02", "model.init=official")
    model = build_detector(config.model)
    (task,) = model.head.tasks
    bias = task.branches[CLASS_BRANCH].out.bias
    assert bias.numel() == config.model.num_layers * len(CLASSES)
    torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 0.02))


def test_the_criterion_has_the_weights_of_the_configuration():
    config = shipped(
        "synthetic_tiny", "loss.cls_weight=3.5", "loss.box_cost=0.75", "model.denoising.positive_threshold=0.5"
    )
    criterion = build_criterion(config, reduce_mean=None, num_processes=4)
    assert criterion.cls_weight == 3.5 and criterion.box_weight == config.loss.box_weight
    assert criterion.box_cost == 0.75 and criterion.cls_cost == config.loss.cls_cost
    assert criterion.positive_threshold == 0.5 and criterion.num_processes == 4
    assert criterion.code_weights == config.loss.code_weights
    assert [CLASSES[i] for task in criterion.classes for i in task] == [n for task in config.model.tasks for n in task]


class Index:
    """As much of a FrameIndex as a data set asks for when it is made."""

    max_sweeps = 10

    def __len__(self) -> int:
        return 1


@pytest.fixture
def augmentation_of(monkeypatch):
    """Configuration -> the augmentation that its training frames get; no object database is written."""
    asked = {}

    def open_database(index, **settings):
        asked.update(settings)
        return {name: [] for name in CLASSES}

    monkeypatch.setattr("cmt_aqr.build.open_gt_database", open_database)
    monkeypatch.setattr("cmt_aqr.build.GtSampler", lambda database, **settings: settings)

    def make(config: Config):
        dataset = training_dataset(config, Index())
        return dataset._augmentation, dataset, asked

    return make


def test_the_official_fusion_augmentation(augmentation_of):
    config = shipped("cmt_r50_800x320")
    augmentation, dataset, asked = augmentation_of(config)
    image, scene = config.data.image_augmentation, config.data.scene_augmentation
    assert augmentation.image.resize_range == image.resize
    assert augmentation.image.bottom_crop_range == image.crop_bottom
    assert augmentation.image.rotate_range == image.rotation_deg
    assert augmentation.image.flip is image.flip
    assert augmentation.scene.rotation_range == scene.rotation
    assert augmentation.scene.scale_range == scene.scale
    assert augmentation.scene.translation_std == scene.translation_std
    assert augmentation.scene.flip_x_probability == augmentation.scene.flip_y_probability == 0.5
    assert augmentation.point_range == config.model.point_range
    assert augmentation.gt_sampler["counts"] == config.data.gt_sampling.per_class
    assert augmentation.gt_sampling_epochs == config.training.epochs - config.data.gt_sampling.stop_before_end
    assert asked["num_sweeps"] == 10 and asked["with_patches"] is True
    assert dataset._final_size == config.model.camera.input_size and dataset._num_sweeps == 10
    assert dataset._boxes == "lidar" and dataset._skip_empty_frames is True


def test_a_lidar_model_pastes_no_patches_and_reads_no_image(augmentation_of):
    augmentation, dataset, asked = augmentation_of(shipped("cmt_lidar_0075"))
    assert asked["with_patches"] is False
    assert dataset._final_size is None and dataset._num_sweeps == 10
    assert augmentation.image is None


def test_a_camera_model_reads_no_points(augmentation_of):
    _, dataset, _ = augmentation_of(shipped("cmt_camera_vov_1600x640"))
    assert dataset._num_sweeps is None and dataset._final_size == (640, 1600)


def test_what_is_null_is_off(augmentation_of):
    settings = ("image_augmentation", "scene_augmentation", "gt_sampling")
    config = shipped("synthetic_tiny", *(f"data.{key}=null" for key in settings), "data.drop_lidar=0.0")
    augmentation, _, asked = augmentation_of(config)
    assert (augmentation.image, augmentation.scene, augmentation.gt_sampler, augmentation.dropout) == (None,) * 4
    assert asked == {}
    config = shipped("synthetic_tiny", "data.drop_lidar=0.1", "data.drop_cameras=0.2")
    dropout = augmentation_of(config)[0].dropout
    assert dataclasses.asdict(dropout) == {"image_probability": 0.2, "point_probability": 0.1}


def test_a_missing_data_set_is_named_by_its_key(tmp_path):
    config = shipped("cmt_r50_800x320", f"data.root={tmp_path / 'nowhere'}")
    sentence = (
        r"^data\.root .*nowhere does not exist or is no folder; name the folder of the data set with --set "
        r"data\.root=FOLDER$"
    )
    with pytest.raises(DataError, match=sentence):
        open_split(config.data, "val")
    assert list(tmp_path.iterdir()) == []


def test_the_index_lies_with_the_data_it_was_made_from(tmp_path, monkeypatch):
    world = write_world(tmp_path / "world", scenes={"scene-a": 1})
    monkeypatch.chdir(tmp_path)
    place = (f"data.root={world.root}", "data.version=v1.0-tiny")
    index = open_split(shipped("cmt_r50_800x320", *place).data, "all")
    assert index.path.parent == world.root / "cmt_aqr"
    # data.root is data/nuscenes when it is forgotten; no folder of that name may have been made.
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
    index = open_split(shipped("cmt_r50_800x320", *place, "data.index_dir=elsewhere").data, "all")
    assert index.path.resolve().parent == tmp_path / "elsewhere"


AQR_CONFIGS = [name_of(path) for path in CONFIGS if load_config(path).model.aqr is not None]


def rates(config: Config) -> dict[str, tuple[float, float] | None]:
    """Factors of learning rate and weight decay of every parameter of a configuration's model; None: frozen."""
    model = on_meta(config)
    freeze(model, config.training.freeze)
    found = {}
    for group in build_optimizer(model, config).param_groups:
        factors = group["lr_scale"], group["weight_decay"] / config.training.weight_decay
        found |= {id(parameter): factors for parameter in group["params"]}
    return {name: found.get(id(parameter)) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_prefix_of_a_shipped_file_names_a_parameter(path):
    config = load_config(path)
    assert prefix_problems(on_meta(config), config.training) == []


def test_a_run_that_cannot_work_is_refused_with_all_that_is_wrong():
    config = shipped("synthetic_tiny", "training.freeze=[decoder.layer.0]", "training.lr_mult={neck: 0.1}")
    with pytest.raises(ConfigError) as caught:
        check_training(config, torch.device("cpu"))
    lr, freeze_ = caught.value.problems
    assert lr.startswith("training.lr_mult: no parameter name begins with 'neck'; they begin with aqr, bev_embedding, ")
    assert lr.endswith("did you mean 'image_branch.neck'?")
    assert freeze_.startswith("training.freeze: ") and freeze_.endswith("; did you mean 'decoder.layers.0'?")


def test_a_model_beyond_the_memory_is_refused_with_the_figures():
    settings = ("model.hidden_dim=4096", "model.ffn_dim=32768", "model.num_layers=64", "model.aqr=null",
                "training.decay_mult={}", "training.lr_mult={}")  # fmt: skip
    config = shipped("synthetic_tiny", *settings)
    parameters = count_parameters(on_meta(config))
    assert parameters > 20e9
    with pytest.raises(ConfigError, match=rf"^model: {parameters / 1e6:,.0f} million parameters of 16 bytes need "):
        check_training(config, torch.device("cpu"))


def test_a_value_error_of_the_model_is_a_bug_and_no_users_error(monkeypatch):
    def broken(**settings):
        raise ValueError("a mistake of the program")

    monkeypatch.setattr("cmt_aqr.build.Heads", broken)
    with pytest.raises(ValueError, match=r"^a mistake of the program$") as caught:
        on_meta(shipped("synthetic_tiny"))
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize("name", ("cmt_aqr_r50_800x320", "cmt_aqr_vov_1600x640"))
def test_the_recipe_of_aqr_by_parameter(name):
    expected = {
        "image_branch.backbone": None,
        "lidar_branch.encoder": None,
        "lidar_branch.backbone": None,
        "image_branch.neck": (0.05, 1.0),
        "lidar_branch.neck": (0.05, 1.0),
        "shared_conv": (0.5, 1.0),
        "bev_embedding": (0.5, 1.0),
        "ray_embedding": (0.5, 1.0),
        "decoder": (0.5, 1.0),
        "reference_points": (0.3, 1.0),
        "head": (0.8, 1.0),
        "aqr.generator": (1.0, 1.0),
        "aqr.scale": (0.5, 0.0),
    }
    met = set()
    for parameter, factors in rates(shipped(name)).items():
        (prefix,) = (prefix for prefix in expected if parameter.startswith(prefix + "."))
        met.add(prefix)
        assert factors == expected[prefix], parameter
    assert met == expected.keys()


@pytest.mark.parametrize("name", AQR_CONFIGS)
def test_a_learned_scale_has_no_weight_decay(name):
    config = shipped(name)
    found = {parameter: factors for parameter, factors in rates(config).items() if parameter.startswith("aqr.scale")}
    is_learned = config.model.aqr.design == "bias" and config.model.aqr.learn_scale
    assert found == ({"aqr.scale.value": (0.5, 0.0)} if is_learned else {})


def test_aqr_adds_its_own_names_and_changes_no_other():
    plain, with_aqr = (on_meta(shipped(name)).state_dict() for name in ("cmt_r50_800x320", "cmt_aqr_r50_800x320"))
    own = {name for name in with_aqr if name.startswith("aqr.")}
    assert {name: x.shape for name, x in with_aqr.items() if name not in own} == {n: x.shape for n, x in plain.items()}
    assert "aqr.scale.value" in own and "aqr.generator.layers.0.attention.in_proj_weight" in own


def test_aqr_as_configured():
    config = shipped(
        "synthetic_tiny", "model.aqr.bev_window=3", "model.aqr.camera_window=7", "model.aqr.camera_assignment=all",
        "model.aqr.unseen=corner", "model.aqr.local=false", "model.aqr.scale=3.0", "model.aqr.learn_scale=false",
        "model.aqr.scale_range=[1.0, 4.0]", "model.aqr.max_bias=null", "model.aqr.num_layers=2",
        "model.aqr.activation=sigmoid", "model.attention.backend=lowrank",
        "model.attention.lowrank_energy=0.75",
    )  # fmt: skip
    detector = build_detector(config.model)
    aqr = detector.aqr
    assert detector.bev_origin == config.model.point_range[:2]
    assert detector.bev_cell_size == pytest.approx((1.6, 1.6))
    assert dataclasses.asdict(aqr.settings) == {
        "sizes": {"lidar": 3, "camera": 7}, "camera_assignment": "all", "unseen": "corner", "is_local": False,
    }  # fmt: skip
    assert aqr.scale().item() == 3.0 and aqr.scale.limits == (1.0, 4.0) and not list(aqr.scale.parameters())
    assert aqr.max_bias is None and isinstance(aqr, BiasRouter)
    assert (aqr.backend, aqr.lowrank_energy) == ("lowrank", 0.75)
    assert len(aqr.generator.layers) == 2 and aqr.generator.activation == "sigmoid"
    assert aqr.point_range == config.model.point_range
    layer = aqr.generator.layers[0]
    assert layer.attention.num_heads == config.model.num_heads and layer.ffn[0].out_features == config.model.ffn_dim


def test_all_but_aqr_starts_from_the_same_numbers():
    models = []
    for overrides in ((), ("model.aqr=null", "training.decay_mult={}")):
        torch.manual_seed(0)
        models.append(build_detector(shipped("synthetic_tiny", *overrides).model).state_dict())
    for name, tensor in models[1].items():
        assert torch.equal(models[0][name], tensor), name


@pytest.fixture
def plain_weights(tmp_path):
    """A file of the weights of synthetic_tiny without AQR, and what is in it."""
    torch.manual_seed(1)
    config = shipped("synthetic_tiny", "model.aqr=null", "training.decay_mult={}")
    weights = build_detector(config.model).state_dict()
    path = tmp_path / "plain.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return path, weights


def test_weights_without_aqr_start_a_model_with_it(plain_weights):
    path, weights = plain_weights
    model = build_detector(shipped("synthetic_tiny").model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert f"{len(weights)} of {len(before)} tensors" in initialise(model, str(path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("aqr.") else weights[name]), name


@pytest.mark.parametrize(
    ("backend", "why"),
    (
        ("score_mod", "'score_mod' cannot train on a CPU, only evaluate; use 'dense'"),
        ("lowrank", "'lowrank' gives AQR no gradient; it is for test.py only"),
    ),
)
def test_attention_that_cannot_train_is_refused(backend, why):
    config = shipped("synthetic_tiny", f"model.attention.backend={backend}")
    with pytest.raises(ConfigError, match=f"model.attention.backend: {why}"):
        check_settings(config, RankInfo(0, 1, torch.device("cpu")))
