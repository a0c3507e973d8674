"""The randomness of a step is a function of (seed, step, process) and of a frame's place in the global batch."""

import numpy as np
import torch

from cmt_aqr.training.seeding import denoising_noise, seed_process, seed_step


def drawn(seed: int, step: int, rank: int) -> tuple[list[float], list[float]]:
    """What torch and the shared generator draw in a step."""
    shared = seed_step(seed, step, rank)
    return torch.rand(4).tolist(), shared.random(4).tolist()


def test_a_step_repeats_whatever_was_drawn_before():
    first = drawn(0, 5, 1)
    torch.rand(1000)
    np.random.rand(10)
    drawn(0, 4, 1)
    assert drawn(0, 5, 1) == first


def test_torch_differs_between_processes_and_the_shared_draws_do_not():
    steps = {(seed, step, rank): drawn(seed, step, rank) for seed in (0, 1) for step in (0, 1, 7) for rank in (0, 1, 2)}
    assert len({tuple(own) for own, _ in steps.values()}) == len(steps)
    shared = {key[:2]: tuple(both) for key, (_, both) in steps.items()}
    assert all(tuple(both) == shared[key[:2]] for key, (_, both) in steps.items())
    assert len(set(shared.values())) == len(shared)


def test_every_process_starts_from_the_same_weights():
    seed_process(3, deterministic=False)
    first = torch.nn.Linear(8, 8).weight
    torch.rand(7)
    seed_process(3, deterministic=False)
    assert torch.equal(torch.nn.Linear(8, 8).weight, first)
    seed_process(4, deterministic=False)
    assert not torch.equal(torch.nn.Linear(8, 8).weight, first)


def test_deterministic_algorithms_are_asked_for(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        seed_process(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_noise_of_a_frame_does_not_depend_on_who_shares_the_batch():
    whole = denoising_noise(0, 9, range(6), 20)
    assert whole.shape == (6, 20, 3) and whole.dtype == torch.float32
    for world_size in (2, 3):
        for rank in range(world_size):
            part = denoising_noise(0, 9, range(rank, 6, world_size), 20)
            assert torch.equal(part, whole[rank::world_size])


def test_noise_is_uniform_and_never_repeats():
    noise = denoising_noise(0, 9, range(8), 500)
    assert noise.min() >= 0 and noise.max() < 1
    # Mean and variance of a uniform distribution; five standard errors of 12000 draws.
    assert abs(noise.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / 12000**0.5
    assert abs(noise.var() - 1 / 12) < 0.005
    others = [denoising_noise(0, 10, range(8), 500), denoising_noise(1, 9, range(8), 500)]
    values = torch.cat([noise, *others]).flatten(1)
    assert len({tuple(row[:5].tolist()) for row in values}) == 24
