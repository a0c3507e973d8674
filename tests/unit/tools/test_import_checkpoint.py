"""Import of official files: every tensor finds its place, and nothing is written where one does not."""

import random
import re
from collections import OrderedDict

import pytest
import torch
from safetensors import safe_open

from cmt_aqr.build import build_detector
from cmt_aqr.config import load_config
from cmt_aqr.tools.import_checkpoint import find_sparse_layout, import_backbone, import_detector, main
from cmt_aqr.tools.official_names import RENAMES, rename_official, rename_state_dict
from cmt_aqr.training.checkpoint import CheckpointError, load_into, load_weights
from test import load_model
from tests.unit.tools.official_files import (
    FUSION,
    MODELS,
    SMALL,
    config_file,
    is_sparse,
    official_lists,
    official_shapes,
    own_state,
    save_official,
    small_official,
    to_spconv1,
)

# A few tensors of every part, by hand.
LANDMARKS = {
    "pts_middle_encoder.conv_input.0.weight": "lidar_branch.encoder.conv_input.0.weight",
    "pts_middle_encoder.encoder_layers.encoder_layer2.1.conv2.weight": (
        "lidar_branch.encoder.encoder_layers.encoder_layer2.1.conv2.weight"
    ),
    "pts_backbone.blocks.1.3.weight": "lidar_branch.backbone.blocks.1.3.weight",
    "img_backbone.layer3.5.bn2.running_var": "image_branch.backbone.layer3.5.bn2.running_var",
    "img_backbone.stage4.OSA4_3.layers.2.OSA4_3_2/conv.weight": "image_branch.backbone.stage4.2.layers.2.conv.weight",
    "img_backbone.stage5.OSA5_1.concat.OSA5_1_concat/norm.bias": "image_branch.backbone.stage5.0.concat.norm.bias",
    "img_backbone.stage2.OSA2_1.ese.fc.bias": "image_branch.backbone.stage2.0.ese.fc.bias",
    "img_neck.fpn_convs.0.conv.bias": "image_branch.neck.fpn_convs.0.bias",
    "pts_bbox_head.shared_conv.bn.running_mean": "shared_conv.1.running_mean",
    "pts_bbox_head.rv_embedding.2.weight": "ray_embedding.mlp.2.weight",
    "pts_bbox_head.transformer.decoder.layers.4.attentions.1.attn.out_proj.bias": (
        "decoder.layers.4.cross_attention.out_proj.bias"
    ),
    "pts_bbox_head.transformer.decoder.layers.0.ffns.0.layers.1.weight": "decoder.layers.0.ffn.2.weight",
    "pts_bbox_head.task_heads.0.height.3.bias": "head.tasks.0.branches.height.out.bias",
}


def small_arguments(source, out, *extra):
    return [str(source), str(out), "--config", config_file(FUSION), "--set", *SMALL, *extra]


@pytest.mark.parametrize("layout", ("spconv1", "spconv2"))
@pytest.mark.parametrize("model", MODELS)
def test_all_tensors_of_an_official_model_find_their_place(model, layout):
    state, number = {}, {}
    for count, (name, shape) in enumerate(official_shapes(model).items()):
        number[name] = count
        dtype = torch.int64 if name.endswith("num_batches_tracked") else torch.float32
        tensor = torch.tensor(count, dtype=dtype).expand(shape)  # one number, no memory
        state[name] = to_spconv1(tensor) if layout == "spconv1" and is_sparse(name, tensor) else tensor
    own = own_state(model)
    result = import_detector(state, own)
    assert result.misfits() == {"missing": [], "unexpected": [], "of another shape": []}
    assert result.weights.keys() == own.keys()
    for name, tensor in result.weights.items():
        assert (tensor.shape, tensor.dtype) == (own[name].shape, own[name].dtype)
    values = {name: tensor.flatten()[0].item() for name, tensor in result.weights.items()}
    assert sorted(values.values()) == list(range(len(own)))
    landmarks = {name: ours for name, ours in LANDMARKS.items() if name in state}
    assert len(landmarks) >= 6
    assert {name: values[ours] for name, ours in landmarks.items()} == {name: number[name] for name in landmarks}


@pytest.mark.parametrize("layout", ("spconv1", "spconv2"))
def test_file_to_file_and_into_the_model(tmp_path, capsys, layout):
    source = save_official(tmp_path / "official.pth", small_official(layout=layout))
    out = tmp_path / "new folder" / "weights.safetensors"
    assert main(small_arguments(source, out)) == 0
    printed = capsys.readouterr().out
    for sentence in (f"in the layout of {layout}", "0 missing", "0 unexpected", "0 of another shape", "written: "):
        assert sentence in printed
    assert [entry.name for entry in out.parent.iterdir()] == ["weights.safetensors"]
    with safe_open(out, "pt") as file:
        assert file.metadata()["source"] == "official.pth"
        assert file.metadata()["config"] == MODELS[FUSION]

    weights = load_weights(out)
    for name, tensor in small_official(layout="spconv2").items():
        assert torch.equal(weights[rename_official(name)], tensor), name
    config = load_config(config_file(FUSION), SMALL)
    detector = build_detector(config.model)
    load_model(detector, config, str(out))  # as test.py does
    name = "encoder_layers.encoder_layer3.0.conv1.weight"
    expected = small_official(layout="spconv2")["pts_middle_encoder." + name]
    assert torch.equal(detector.lidar_branch.encoder.state_dict()[name], expected)


def test_sparse_layout_by_hand(tmp_path, capsys):
    """A file that says spconv 2 but holds the other layout, and an option that is wrong."""
    state = small_official(layout="spconv1")
    state._metadata = small_official(layout="spconv2")._metadata
    source, out = save_official(tmp_path / "official.pth", state), tmp_path / "w.safetensors"
    assert main(small_arguments(source, out, "--sparse-layout", "spconv2")) == 2
    assert " of another shape (listed above)" in capsys.readouterr().err
    assert not out.exists()
    assert main(small_arguments(source, out, "--sparse-layout", "spconv1")) == 0


def test_sparse_layout_where_the_shapes_fit_both_ways():
    name = "pts_middle_encoder.conv_input.0.weight"
    state = OrderedDict({name: torch.arange(243.0).view(3, 3, 3, 3, 3)})
    expected = {name: state[name].shape}
    with pytest.raises(CheckpointError, match="fit in two layouts and the file names none"):
        find_sparse_layout(state, expected)
    for version, layout in ((2, "spconv2"), (1, "spconv1"), (None, "spconv1")):
        state._metadata = {name.removesuffix(".weight"): {"version": version}}
        assert find_sparse_layout(state, expected) == layout
    state["other"] = torch.zeros(3, 3, 3, 2, 5)
    assert find_sparse_layout(state, {**expected, "other": (5, 3, 3, 3, 2)}) == "spconv1"
    with pytest.raises(CheckpointError, match="spconv 1 and 'third' that of spconv 2"):
        state["third"] = torch.zeros(5, 3, 3, 3, 2)
        find_sparse_layout(state, {**expected, "other": (5, 3, 3, 3, 2), "third": (5, 3, 3, 3, 2)})


def test_misfits_are_listed_and_nothing_is_written(tmp_path, capsys):
    state = small_official()
    del state["pts_backbone.blocks.0.0.weight"], state["img_neck.fpn_convs.0.conv.bias"]
    state["pts_bbox_head.foo"] = torch.zeros(1)
    state["img_backbone.layer9.0.conv1.weight"] = torch.zeros(1)
    state["pts_bbox_head.rv_embedding.0.bias"] = torch.zeros(7)
    source, out = save_official(tmp_path / "official.pth", state), tmp_path / "w.safetensors"
    out.write_bytes(b"older")
    assert main(small_arguments(source, out)) == 2
    printed = capsys.readouterr()
    assert printed.err == (
        f"error: {source}: does not fit cmt_r50_800x320: 2 missing, 2 unexpected, 1 of another shape (listed above); "
        "nothing written\n"
    )
    lines = [line.strip() for line in printed.out.splitlines()]
    for line in (
        "lidar_branch.backbone.blocks.0.0.weight",
        "image_branch.neck.fpn_convs.0.bias",
        "pts_bbox_head.foo",
        "img_backbone.layer9.0.conv1.weight",
        "ray_embedding.mlp.0.bias: (7,) in the file, (64,) in the model",
    ):
        assert line in lines
    assert out.read_bytes() == b"older"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["official.pth", "w.safetensors"]


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_sentences(tmp_path, capsys):
    source, out = tmp_path / "official.pth", tmp_path / "w.safetensors"
    no_camera = [
        "--set",
        "model.camera=null",
        "data.image_augmentation=null",
        "data.drop_cameras=0",
        "data.drop_lidar=0",
    ]
    for content, target, extra, sentence in (
        (None, out, [], "no such file"),
        (b"no file of torch", out, [], "neither a checkpoint nor weights"),
        (
            {"meta": Harmful(), "state_dict": {}},
            out,
            [],
            "needs code to be run: it holds an object of print",
        ),
        ({"meta": {"epoch": 3}}, out, [], "holds no named tensors"),
        ({"a": torch.zeros(1)}, tmp_path / "w.pth", [], "w.pth: the name of the result must end in .safetensors"),
        ({"a": torch.zeros(1)}, out, ["--set", "model.nothing=1"], "model.nothing"),
        ({"a": torch.zeros(1)}, out, ["--backbone", *no_camera], "official.pth: model.camera is null"),
    ):
        if isinstance(content, dict):
            torch.save(content, source)
        elif content is not None:
            source.write_bytes(content)
        assert main([str(source), str(target), "--config", config_file(FUSION), *extra]) == 2
        printed = capsys.readouterr()
        assert sentence in printed.err
        assert printed.err.startswith("error: ") and "this must not run" not in printed.out
        assert not target.exists()


def test_full_disk_leaves_the_older_file(tmp_path, capsys, monkeypatch):
    source, out = save_official(tmp_path / "official.pth", small_official()), tmp_path / "w.safetensors"
    out.write_bytes(b"older")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(small_arguments(source, out)) == 2
    assert capsys.readouterr().err == f"error: {out}: could not be saved: no space left on device\n"
    assert out.read_bytes() == b"older"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, capsys, value):
    state = small_official()
    name = "img_neck.fpn_convs.0.conv.bias"
    state[name] = torch.full_like(state[name], value)
    source, out = save_official(tmp_path / "official.pth", state), tmp_path / "w.safetensors"
    assert main(small_arguments(source, out)) == 2
    assert capsys.readouterr().err == (
        f"error: {source}: 1 of {len(state)} tensors hold values that are not finite, the first is "
        "image_branch.neck.fpn_convs.0.bias\n"
    )
    assert not out.exists()


def test_one_changed_bit_of_the_result_is_found(tmp_path):
    source, out = save_official(tmp_path / "official.pth", small_official()), tmp_path / "w.safetensors"
    assert main(small_arguments(source, out)) == 0
    good = out.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    places = [*range(0, 8), *range(8, 700), *range(700, header, 501), *range(header, len(good), len(good) // 20)]
    assert good.index(b'"sha256":"') + 80 < 700  # all of the checksum
    rng = random.Random(0)
    for place in places:
        changed = bytearray(good)
        changed[place] ^= 1 << rng.randrange(8)
        out.write_bytes(changed)
        with pytest.raises(CheckpointError) as caught:
            load_weights(out)
        assert str(caught.value).startswith(f"{out}: damaged safetensors file: "), place
        assert "\n" not in str(caught.value)


def backbone_tensors(config, overrides=()):
    """{our name without the branch's prefix: tensor} of the image backbone."""
    prefix = "image_branch.backbone."
    state = own_state(config, overrides)
    return {
        name.removeprefix(prefix): torch.rand(like.shape).to(like.dtype)
        for name, like in state.items()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize("prefix", ("", "backbone.", "img_backbone."))
def test_backbone_of_torchvision_and_mmdet(tmp_path, capsys, prefix):
    tensors = backbone_tensors(FUSION, SMALL)
    others = {"fc.weight": torch.zeros(3, 4), "neck.lateral_convs.0.conv.weight": torch.zeros(1)}
    if prefix:
        others = {prefix + "fc.weight": torch.zeros(1), "roi_head.a": torch.zeros(1), "roi_head.b": torch.zeros(1)}
    source, out = tmp_path / "resnet.pth", tmp_path / "start.safetensors"
    torch.save({**{prefix + name: tensor for name, tensor in tensors.items()}, **others}, source)
    assert main(small_arguments(source, out, "--backbone")) == 0
    printed = capsys.readouterr().out
    assert f"{len(others)} skipped: " in printed and "training.init_from" in printed
    assert not prefix or "roi_head.* (2)" in printed
    weights = load_weights(out)
    assert weights.keys() == {"image_branch.backbone." + name for name in tensors}
    assert all(torch.equal(weights["image_branch.backbone." + name], tensor) for name, tensor in tensors.items())


def test_backbone_starts_a_training(tmp_path):
    from cmt_aqr.run import initialise

    tensors = backbone_tensors(FUSION, SMALL)
    counters = [name for name in tensors if name.endswith("num_batches_tracked")]
    source, out = tmp_path / "old.pth", tmp_path / "start.safetensors"
    torch.save({name: tensor for name, tensor in tensors.items() if name not in counters}, source)
    assert main(small_arguments(source, out, "--backbone")) == 0
    detector = build_detector(load_config(config_file(FUSION), SMALL).model)
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    said = initialise(detector, str(out))
    assert said == f"init_from {out}: {len(tensors) - len(counters)} of {len(before)} tensors of the model taken"
    for name, tensor in detector.state_dict().items():
        part = name.removeprefix("image_branch.backbone.")
        assert torch.equal(tensor, before[name] if part == name or part in counters else tensors[part]), name


def test_backbone_of_fcos3d_has_the_official_vovnet_names():
    model = "camera_vov_1600x640"
    shapes = {n: s for n, s in official_shapes(model).items() if n.startswith("img_backbone.")}
    own = own_state(model)
    counters = {name for name in shapes if name.endswith("num_batches_tracked")}
    state = {name: torch.zeros((), dtype=torch.int64 if name in counters else None) for name in shapes}
    state = {name: tensor.expand(shapes[name]) for name, tensor in state.items()}
    result = import_backbone({**state, "pts_bbox_head.a": torch.zeros(1), "img_neck.b": torch.zeros(1)}, own)
    assert not any(result.misfits().values())
    assert result.weights.keys() == {name for name in own if name.startswith("image_branch.backbone.")}
    assert result.skipped == ["pts_bbox_head.a", "img_neck.b"]


def test_another_backbone_is_refused(tmp_path, capsys):
    source, out = tmp_path / "resnet.pth", tmp_path / "start.safetensors"
    tensors = backbone_tensors(FUSION, SMALL)
    del tensors["conv1.weight"]
    tensors["bn1.weight"] = torch.zeros(3)
    torch.save(tensors, source)
    assert main(small_arguments(source, out, "--backbone")) == 2
    assert ": 1 missing, 1 of another shape (listed above); nothing written" in capsys.readouterr().err
    assert not out.exists()


def test_every_row_of_the_table_is_needed():
    lists = official_lists()
    if set(lists) != set(MODELS):
        pytest.skip("names_full.json does not hold the four official models")
    names = [name for shapes in lists.values() for name in shapes]
    for pattern, _ in RENAMES:
        assert any(re.fullmatch(pattern, name) for name in names), pattern


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'pts_bbox_head\.foo' is not a name of an official CMT checkpoint"):
        rename_official("pts_bbox_head.foo")


def test_state_dicts_keep_their_tensors():
    tensor = torch.ones(3)
    renamed = rename_state_dict({"pts_bbox_head.rv_embedding.0.bias": tensor})
    assert renamed == {"ray_embedding.mlp.0.bias": tensor}


def test_the_result_fits_only_its_own_model(tmp_path):
    source, out = save_official(tmp_path / "official.pth", small_official()), tmp_path / "w.safetensors"
    assert main(small_arguments(source, out)) == 0
    other = build_detector(load_config(config_file(FUSION), (*SMALL, "model.num_queries=11")).model)
    with pytest.raises(CheckpointError, match=r"reference_points\.weight \(10, 3\) against \(11, 3\)"):
        load_into(other, load_weights(out), out)
