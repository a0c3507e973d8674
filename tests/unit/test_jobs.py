"""What both scripts do: the precision of an evaluation."""

from pathlib import Path

import pytest
import torch

from cmt_aqr import jobs
from cmt_aqr.config import load_config
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

    def predict(*_, precision, **__):
        asked.append(precision)
        return []

    for name in ("open_split", "evaluation_dataset", "make_loader"):
        monkeypatch.setattr(jobs, name, lambda *_, **__: Index())
    monkeypatch.setattr(jobs, "predict", predict)
    second = RankInfo(rank=1, world_size=2, device=torch.device("cpu"))  # the first one goes on to score
    with RunLog(tmp_path, second.is_main, tensorboard=False) as log:
        assert jobs.evaluate_split(None, config, "val", second, tmp_path, log, tables=None) is None
    assert asked == [expected]
