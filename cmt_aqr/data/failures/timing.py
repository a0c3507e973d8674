"""Sensors that deliver data of earlier frames: how many key frames back the data of a frame are from.

The functions take the frame's history and a coin. ``history``: the sample tokens of the scene up to this frame, this
one first; ``coin``: sample token -> random number in [0, 1) that depends on the token alone, so that all frames of the
scene agree on when a failure began.
"""

from collections.abc import Callable, Sequence

# Number of key frames that a freeze lasts, as in the program.
RUN_LENGTH = 4
Coin = Callable[[str], float]


def previous(history: Sequence[str], probability: float, coin: Coin) -> int:
    """1 with this probability: the data of the previous key frame; else, and at a scene's start, 0.

    *Source*: MultiCorrupt, temporal misalignment (0.2, 0.4, 0.6); nuScenes-R, stuck frames, single (0.1 to 0.9). They
    shuffle and take a share of all frames, here each frame has a coin of its own.
    """
    return int(len(history) > 1 and coin(history[0]) < probability)


def stuck_run(history: Sequence[str], share: float, coin: Coin) -> int:
    """Key frames since the sensor froze; freezes last 4 key frames and may overlap.

    A freeze begins at a key frame with probability 1 - (1 - share)^(1/4). The sensor delivers the newest frame outside
    all freezes, or the first one of the scene.

    Args:
        history: of the frame.
        share: of all frames that lie in a freeze, 0.1 to 0.9.

    *Source*: nuScenes-R, stuck frames, consecutive.
    """
    start = 1 - (1 - share) ** (1 / RUN_LENGTH)
    begins = [coin(token) < start for token in history]
    is_stuck = [any(begins[i : i + RUN_LENGTH]) for i in range(len(history))]
    return next((i for i, stuck in enumerate(is_stuck) if not stuck), len(history) - 1)
