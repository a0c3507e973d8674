"""Build the detector of a golden head file: sizes and settings from its meta, weights from its state dict."""

import torch

from cmt_aqr.boxes import Targets
from cmt_aqr.models.decoder import Decoder
from cmt_aqr.models.detector import Detector, SharedConv
from cmt_aqr.models.heads import Heads
from cmt_aqr.models.position import BevEmbedding, RayEmbedding
from cmt_aqr.models.queries import ReferencePoints
from cmt_aqr.predictions import task_classes
from cmt_aqr.tools.official_names import rename_state_dict
from tests.parity.make_small import ROWS

OFFICIAL_PREFIX = "pts_bbox_head."


def build_detector(meta, state, dtype, *, dropout=0.0):
    """Detector without branches for one golden case; `state` has official names without the head's prefix."""
    dim, kind = meta["hidden_dim"], meta["kind"]
    has_lidar, has_cameras = kind != "image", kind != "lidar"
    detector = Detector(
        reference_points=ReferencePoints(num_queries=meta["num_query"]),
        bev_embedding=BevEmbedding(dim=dim),
        decoder=Decoder(
            dim=dim,
            num_heads=meta["num_heads"],
            ffn_dim=meta["ffn"],
            num_layers=meta["num_layers"],
            dropout=dropout,
        ),
        head=Heads(
            classes=task_classes(meta["tasks"]),
            num_layers=meta["num_layers"],
            dim=dim,
            point_range=meta["pc_range"],
            hidden=meta["head_conv"],
            kernel=meta["final_kernel"],
        ),
        shared_conv=SharedConv(in_channels=meta["in_channels"], dim=dim) if has_lidar else None,
        ray_embedding=RayEmbedding(dim=dim, num_depths=meta["depth_num"], point_range=meta["pc_range"])
        if has_cameras
        else None,
    )
    official = {OFFICIAL_PREFIX + name: tensor for name, tensor in state.items()}
    detector.load_state_dict(rename_state_dict(official), strict=True)
    return detector.to(dtype)


class HeadCase:
    """Inputs and the loaded detector of one golden case in one dtype; `prefix` selects a part of the file."""

    def __init__(self, golden, dtype, *, prefix="", meta=None, device="cpu"):
        self.golden, self.dtype, self.prefix, self.device = golden, dtype, prefix, torch.device(device)
        self.meta = golden.meta if meta is None else meta
        self.detector = build_detector(self.meta, golden.state_dict(prefix + "sd/"), dtype).to(device)
        self.lidar2img = golden.tensor(prefix + "in/lidar2img").to(device)
        self.image_size = tuple(golden[prefix + "in/pad_hw"].tolist())
        self.bev_map = self.pv_maps = None
        if prefix + "in/x" in golden:
            self.bev_map = golden.tensor(prefix + "in/x", dtype).to(device)
        if prefix + "in/x_img" in golden:
            flat = golden.tensor(prefix + "in/x_img", dtype).to(device)
            self.pv_maps = flat.unflatten(0, self.lidar2img.shape[:2])

    def reference(self, name):
        """float64 output of the original, or the rows of it that the file has."""
        return self.golden.tensor(self.stored(name))

    def stored(self, name):
        """Name in the file of an output of the original, whole or some rows."""
        whole = f"{self.prefix}out64/{name}"
        return whole if whole in self.golden else f"{self.prefix}rows/{name}"

    def compared(self, actual, name):
        """What :meth:`reference` is compared with."""
        return actual if self.stored(name).startswith(f"{self.prefix}out64/") else actual[ROWS[name]]

    def check(self, stage, actual, name, tolerance=None):
        """Compare with the float64 output `name` of the original, or the rows of it that the file has."""
        tolerance = FORWARD_TOLERANCE[self.dtype] if tolerance is None else tolerance
        self.golden.check(self.prefix + stage, self.compared(actual, name), self.stored(name), tolerance)

    def predict(self, denoising=None):
        """All the model's rows after the branches."""
        return self.detector.forward_features(self.bev_map, self.pv_maps, self.lidar2img, self.image_size, denoising)

    def targets(self):
        """Ground truth with gravity centres; the files hold bottom centres."""
        records = []
        for sample in range(self.meta["bs"]):
            boxes = self.golden.tensor(f"in/gt{sample}_bottom", self.dtype).to(self.device)
            boxes[:, 2] += boxes[:, 5] / 2
            records.append(Targets(boxes, self.golden.tensor(f"in/gt{sample}_labels").to(self.device)))
        return records


FORWARD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}
