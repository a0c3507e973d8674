"""Processes meet in a store that torchrun keeps when it starts them again."""

from datetime import timedelta

import pytest
import torch.distributed as dist

from cmt_aqr.training import distributed
from cmt_aqr.training.distributed import DistributedError, process_group


def test_a_restarted_process_does_not_take_the_keys_of_the_dead_for_those_of_the_living(monkeypatch):
    shared = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(shared, 0, 2)]))
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", timedelta(seconds=0.2))
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(DistributedError) as error:
        distributed._join(1, 2)
    assert str(error.value) == (
        "process 1 could not join the 2 processes expected at MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 within 0 s, "
        "process 0 did not join; start all of them with the same address, port and number of processes"
    )
    store = distributed._join(0, 2)  # process 1 is there
    store.set("address of process 1", "127.0.0.1:5000")
    assert store.check(["address of process 1"])

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(DistributedError, match="process 1 did not join"):
        distributed._join(0, 2)
    with pytest.raises(DistributedError, match="process 1 did not join"):
        distributed._join(0, 2)
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", timedelta(seconds=5))
    restarted = distributed._join(1, 2)
    assert not restarted.check(["address of process 1"])


@pytest.mark.parametrize(
    ("advice", "end"), [({}, "start again"), ({"advice": "resume with --resume"}, "resume with --resume")]
)
def test_a_lost_process_is_one_sentence_with_advice_that_fits_the_program(monkeypatch, advice, end):
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *_, **__: None)
    monkeypatch.setattr(distributed, "_join", lambda *_: dist.HashStore())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DistributedError) as lost, process_group("cpu", **advice):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    assert str(lost.value) == (
        "process 1 of 2 lost the connection to another process, which was killed or failed; its own message, if it "
        f"left one, is above; {end}"
    )
    with pytest.raises(RuntimeError, match="a bug"), process_group("cpu"):
        raise RuntimeError("a bug")
