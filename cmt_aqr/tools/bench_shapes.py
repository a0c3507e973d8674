"""Sizes and variants that are measured; plain numbers and words, so that --help shows them without loading PyTorch."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class AttentionShape:
    """One problem: the grids of a preset, the batch, the queries, and where these are.

    Attributes:
        bev: rows, columns of the BEV grid.
        cameras: views, rows, columns.
        cell_size: metres along x, y of a BEV cell.
        clusters: the learned queries lie around this many places in the scene; 0: anywhere.
        windows: sizes in cells of the windows in the BEV grid and in the cameras.
    """

    bev: tuple[int, int]
    cameras: tuple[int, int, int]
    cell_size: tuple[float, float]
    batch_size: int
    num_queries: int
    clusters: int = 0
    windows: tuple[int, int] = (5, 8)

    def __str__(self) -> str:
        places = f" in {self.clusters} clusters" if self.clusters else ""
        return f"B{self.batch_size} Q{self.num_queries} K{self.num_tokens}{places}"

    @property
    def num_tokens(self) -> int:
        """K."""
        return self.bev[0] * self.bev[1] + self.cameras[0] * self.cameras[1] * self.cameras[2]


R50 = AttentionShape((128, 128), (6, 20, 50), (0.8, 0.8), 1, 900)
VOV = AttentionShape((180, 180), (6, 40, 100), (0.6, 0.6), 1, 900)
ATTENTION_SHAPES = (
    R50,
    replace(R50, batch_size=2, num_queries=1490),
    VOV,
    replace(VOV, batch_size=2, num_queries=1800),
    replace(R50, clusters=12),
    replace(R50, batch_size=4, num_queries=1800),
    replace(R50, batch_size=4, num_queries=1800, clusters=12),
    replace(VOV, clusters=12),
)


def _grown(factor: float) -> AttentionShape:
    """R50 with this many times its tokens, by finer cells."""
    side = factor**0.5
    rows, cols = round(128 * side), round(128 * side)
    return replace(
        R50, bev=(rows, cols), cameras=(6, round(20 * side), round(50 * side)), cell_size=(102.4 / rows,) * 2
    )


# What grows, and the shapes with its values: each is the r50 preset with one size changed.
SCALING: dict[str, dict[int, AttentionShape]] = {
    "queries": {count: replace(R50, num_queries=count) for count in (300, 600, 900, 1800, 3600)},
    "tokens": {shape.num_tokens: shape for shape in map(_grown, (1, 2.5, 5, 10))},
    "batch": {size: replace(R50, batch_size=size) for size in (1, 2, 4, 8, 16)},
    "cameras": {views: replace(R50, cameras=(views, 20, 50)) for views in (1, 2, 4, 6, 12)},
    "window": {size: replace(R50, windows=(size, size)) for size in (3, 5, 9, 15, 31)},
}

# Choices of --ways, and the names of their lines.
INFERENCE_WAYS = {
    "ours": "ours, AQR",
    "ours-off": "ours, AQR off",
    "eager": "ours, eager, AQR",
    "original": "original's manner, AQR",
    "original-off": "original's manner, AQR off",
}
TRAINING_WAYS = {"compiled": "ours, compiled", "eager": "ours, eager", "original": "original's manner"}
