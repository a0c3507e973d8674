"""What both scripts do: the precision of an evaluation."""

from pathlib import Path

import pytest
import torch

from cmt_aqr import jobs
from cmt_aqr.config import ConfigError, load_config
from cmt_aqr.training.distributed import RankInfo
from cmt_aqr.training.logs import RunLog

CONFIG = Path(__file__).parents[2] / "configs" / "synthetic_tiny.yaml"


class Index:
    """As much of a FrameIndex as is asked for before the prediction."""

    tokens = ("a", "b")

    def frame_labels(self, choice):
        return [[], [0]]

    def __len__(self):
        return len(self.tokens)


@pytest.mark.parametrize(
    ("training", "evaluation", "expected"), (("bf16", "fp32", torch.float32), ("fp32", "bf16", torch.bfloat16))
)
def test_an_evaluation_has_a_precision_of_its_own(monkeypatch, tmp_path, training, evaluation, expected):
    config = load_config(CONFIG, (f"training.precision={training}", f"evaluation.precision={evaluation}"))
    asked = []

    def predict(detect, *_, **__):
        asked.append(detect.keywords["precision"])
        return []

    for name in ("open_split", "evaluation_dataset", "make_loader"):
        monkeypatch.setattr(jobs, name, lambda *_, **__: Index())
    monkeypatch.setattr(jobs, "predict", predict)
    second = RankInfo(rank=1, world_size=2, device=torch.device("cpu"))  # the first one then scores
    with RunLog(tmp_path, second.is_main, tensorboard=False) as log:
        assert jobs.evaluate_split(None, config, "val", second, tmp_path, log, tables=None) is None
    assert asked == [expected]


@pytest.mark.parametrize(
    ("changes", "cpu", "cuda"),
    [
        ([], False, False),
        (["evaluation.compile=auto"], False, True),
        (["evaluation.compile=true"], True, True),
        (["evaluation.compile=false"], False, False),
        (["evaluation.compile=auto", "model.lidar.sparse_backend=spconv"], False, False),
        (["evaluation.compile=auto", "model.attention.backend=lowrank"], False, False),
    ],
)
def test_what_evaluation_compile_means(monkeypatch, tmp_path, changes, cpu, cuda):
    config = load_config(CONFIG, changes)
    monkeypatch.setattr(jobs, "InferencePipeline", lambda model, **settings: settings)
    model = torch.nn.Identity()
    monkeypatch.setattr(model, "to", lambda device: model)
    with RunLog(tmp_path, True, tensorboard=False) as log:
        for device, is_compiled in (("cpu", cpu), ("cuda", cuda)):
            found = jobs.model_for_test(model, config, torch.device(device), log)
            assert (found is not model) == is_compiled
            if is_compiled:
                assert (found["batch_size"], found["precision"]) == (4, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.lidar.sparse_backend=spconv"], "model.lidar.sparse_backend is 'spconv'"),
        (["model.lidar.out_of_range=alias"], "model.lidar.out_of_range is 'alias'"),
        (["model.attention.backend=lowrank"], "model.attention.backend 'lowrank'"),
    ],
)
def test_what_cannot_be_compiled(changes, message):
    with pytest.raises(ConfigError, match=f"evaluation.compile: true .*{message}"):
        load_config(CONFIG, ["evaluation.compile=true", *changes])
