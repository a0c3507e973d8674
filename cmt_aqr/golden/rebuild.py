"""Parts of a detector rebuilt in float64 from the weights and constants of a bundle."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cmt_aqr.aqr.weights import WeightGenerator
from cmt_aqr.attention import AttentionBias, Grid, QueryWindows, TokenLayout, WindowSettings, bias_values
from cmt_aqr.golden.bundle import Source
from cmt_aqr.models.decoder import DecoderLayer


def rebuild_layout(bundle: Source) -> TokenLayout:
    """The token grids."""
    grids = []
    for grid in bundle.manifest["constants"]["grids"]:
        places = {key: None if grid[key] is None else tuple(grid[key]) for key in ("origin", "cell_size")}
        grids.append(Grid(grid["name"], grid["views"], grid["rows"], grid["cols"], **places))
    return TokenLayout(tuple(grids))


def rebuild_windows(bundle: Source, rows: slice, radii: Mapping[str, int] | None = None) -> QueryWindows:
    """The windows of some of the queries that have any, (B, rows).

    Args:
        radii: name of a grid -> cells that its windows reach to every side; None: as in the bundle.
    """
    layout = rebuild_layout(bundle)
    sizes = bundle.manifest["constants"]["windows"]
    if radii is not None:
        sizes = {name: 2 * radius + 1 for name, radius in radii.items()}
    settings = WindowSettings(sizes, is_local=bundle.manifest["config"]["model"]["aqr"]["local"])
    return QueryWindows(layout, settings, tuple(bundle[f"windows/{grid.name}"][:, rows] for grid in layout.grids))


def rebuild_bias(bundle: Source, rows: slice) -> AttentionBias | None:
    """The bias of some queries; None for a model without one, or where the bundle lacks the stages that make it."""
    constants = bundle.manifest["constants"]
    needed = ["aqr/weights", *(f"windows/{grid['name']}" for grid in constants["grids"])]
    if constants.get("scale") is None or any(name not in bundle for name in needed):
        return None
    values = bias_values(bundle["aqr/weights"][:, rows].double(), constants["scale"], constants["max_bias"])
    return AttentionBias(rebuild_windows(bundle, rows), values)


def rebuild_generator(bundle: Source) -> WeightGenerator:
    """The weight generator of AQR."""
    constants = bundle.manifest["constants"]
    module = WeightGenerator(
        dim=constants["hidden_dim"],
        num_heads=constants["num_heads"],
        ffn_dim=_width(bundle, "aqr.generator.layers.0.ffn.0"),
        num_layers=bundle.manifest["config"]["model"]["aqr"]["num_layers"],
        num_grids=len(constants["grids"]),
        activation=constants["activation"],
        neutral=0.0,
    )
    return _load(module, bundle, "aqr.generator")


def rebuild_layer(bundle: Source, number: int) -> DecoderLayer:
    """A layer of the decoder."""
    constants, name = bundle.manifest["constants"], f"decoder.layers.{number}"
    width = _width(bundle, f"{name}.ffn.0")
    module = DecoderLayer(dim=constants["hidden_dim"], num_heads=constants["num_heads"], ffn_dim=width, dropout=0.0)
    return _load(module, bundle, name)


def set_eps(module: nn.Module, eps: float) -> None:
    """Give all layer norms below a module another eps."""
    for norm in module.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.eps = eps


def _width(bundle: Source, name: str) -> int:
    return bundle[f"weights/{name}.weight"].shape[0]


def _load(module: nn.Module, bundle: Source, name: str) -> nn.Module:
    state: dict[str, Tensor] = {key: bundle[f"weights/{name}.{key}"] for key in module.state_dict()}
    module.load_state_dict(state)
    return module.to(torch.float64).eval().requires_grad_(False)
