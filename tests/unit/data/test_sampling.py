import numpy as np
import pytest

from cmt_aqr.data.sampling import EvaluationSampler, SampleKey, TrainingSampler, class_balanced_indices

# 90 frames with cars only, 9 with cars and buses, 1 with all three.
FRAME_LABELS = [[0]] * 90 + [[0, 3]] * 9 + [[0, 3, 8]]


def test_class_balance_gives_equal_shares():
    indices = class_balanced_indices(FRAME_LABELS, np.random.default_rng(0))
    pairs = sum(map(len, FRAME_LABELS))
    assert len(indices) == pairs // 3 * 3
    share = len(indices) // 3
    assert all(3 in FRAME_LABELS[i] for i in indices[share : 2 * share])
    assert (indices[2 * share :] == 99).all()
    assert len(set(indices[:share])) > 20  # cars come from many frames
    assert sorted(class_balanced_indices([[], []], np.random.default_rng(0))) == [0, 1]


@pytest.mark.parametrize("class_balanced", [False, True])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_training_shards_are_equal_and_together_the_whole_order(class_balanced, world_size):
    def keys(rank, size, epoch):
        options = {"frame_labels": FRAME_LABELS, "class_balanced": class_balanced, "seed": 5}
        sampler = TrainingSampler(**options, rank=rank, world_size=size)
        sampler.set_epoch(epoch)
        result = list(sampler)
        assert len(result) == len(sampler)
        return result

    whole = keys(0, 1, 2)
    shards = [keys(rank, world_size, 2) for rank in range(world_size)]
    assert len({len(shard) for shard in shards}) == 1
    merged = sorted((key for shard in shards for key in shard), key=lambda key: key.position)
    assert merged[: len(whole)] == whole  # the same keys, seeds and all, for every number of processes
    assert len(merged) - len(whole) < world_size
    assert [key.index for key in merged[len(whole) :]] == [key.index for key in whole[: len(merged) - len(whole)]]
    assert all(key.epoch == 2 for key in merged)
    assert keys(0, 1, 2) == whole and [k.index for k in keys(0, 1, 3)] != [k.index for k in whole]
    if not class_balanced:
        assert sorted(key.index for key in whole) == list(range(100))


@pytest.mark.parametrize("num_frames", [1, 7, 16])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_shards_lose_and_repeat_nothing(num_frames, world_size):
    shards = [EvaluationSampler(num_frames=num_frames, rank=r, world_size=world_size) for r in range(world_size)]
    assert sorted(key.index for shard in shards for key in shard) == list(range(num_frames))
    lengths = [len(shard) for shard in shards]
    assert lengths == [len(list(shard)) for shard in shards] and max(lengths) - min(lengths) <= 1
    assert list(EvaluationSampler(num_frames=2)) == [SampleKey(0, 0, 0), SampleKey(1, 0, 1)]


def test_more_processes_than_frames():
    samplers = [
        TrainingSampler(frame_labels=[[0]], class_balanced=False, seed=0, rank=r, world_size=4) for r in range(4)
    ]
    assert [[key.index for key in sampler] for sampler in samplers] == [[0]] * 4


def test_rank_is_checked():
    with pytest.raises(ValueError, match="rank is 2, expected 0 <= rank < world_size = 2"):
        EvaluationSampler(num_frames=3, rank=2, world_size=2)
