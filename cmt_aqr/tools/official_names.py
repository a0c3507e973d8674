"""Names of the official CMT checkpoints -> names of this package; one explicit table."""

import re
from collections.abc import Mapping

from torch import Tensor

# (official name as a regular expression that must match the whole name, our name). The first match counts; a name
# that no row matches is an error. Names that are the same on both sides have a row, too.
RENAMES = (
    # LiDAR branch
    (r"pts_middle_encoder\.(.+)", r"lidar_branch.encoder.\1"),
    (r"pts_backbone\.(.+)", r"lidar_branch.backbone.\1"),
    (r"pts_neck\.(.+)", r"lidar_branch.neck.\1"),
    # image branch: VoVNet repeats the stage and block in every name, ResNet is torchvision's
    (r"img_backbone\.stem\.stem_1/(.+)", r"image_branch.backbone.stem.0.\1"),
    (r"img_backbone\.stem\.stem_2/(.+)", r"image_branch.backbone.stem.1.\1"),
    (r"img_backbone\.stem\.stem_3/(.+)", r"image_branch.backbone.stem.2.\1"),
    *(
        row
        for block in range(1, 10)
        for row in (
            (
                rf"img_backbone\.stage(\d)\.OSA\d_{block}\.layers\.(\d)\.OSA\d_{block}_\d/(.+)",
                rf"image_branch.backbone.stage\1.{block - 1}.layers.\2.\3",
            ),
            (
                rf"img_backbone\.stage(\d)\.OSA\d_{block}\.concat\.OSA\d_{block}_concat/(.+)",
                rf"image_branch.backbone.stage\1.{block - 1}.concat.\2",
            ),
            (
                rf"img_backbone\.stage(\d)\.OSA\d_{block}\.ese\.(.+)",
                rf"image_branch.backbone.stage\1.{block - 1}.ese.\2",
            ),
        )
    ),
    (r"img_backbone\.((?:conv1|bn1|layer\d)\..+)", r"image_branch.backbone.\1"),
    (r"img_neck\.(lateral_convs|fpn_convs)\.(\d)\.conv\.(.+)", r"image_branch.neck.\1.\2.\3"),
    # head
    (r"pts_bbox_head\.shared_conv\.conv\.(.+)", r"shared_conv.0.\1"),
    (r"pts_bbox_head\.shared_conv\.bn\.(.+)", r"shared_conv.1.\1"),
    (r"pts_bbox_head\.reference_points\.weight", r"reference_points.weight"),
    (r"pts_bbox_head\.bev_embedding\.(.+)", r"bev_embedding.mlp.\1"),
    (r"pts_bbox_head\.rv_embedding\.(.+)", r"ray_embedding.mlp.\1"),
    (
        r"pts_bbox_head\.transformer\.decoder\.layers\.(\d+)\.attentions\.0\.attn\.(.+)",
        r"decoder.layers.\1.self_attention.\2",
    ),
    (
        r"pts_bbox_head\.transformer\.decoder\.layers\.(\d+)\.attentions\.1\.attn\.(.+)",
        r"decoder.layers.\1.cross_attention.\2",
    ),
    (r"pts_bbox_head\.transformer\.decoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.(.+)", r"decoder.layers.\1.ffn.0.\2"),
    (r"pts_bbox_head\.transformer\.decoder\.layers\.(\d+)\.ffns\.0\.layers\.1\.(.+)", r"decoder.layers.\1.ffn.2.\2"),
    (r"pts_bbox_head\.transformer\.decoder\.layers\.(\d+)\.norms\.(.+)", r"decoder.layers.\1.norms.\2"),
    (r"pts_bbox_head\.transformer\.decoder\.post_norm\.(.+)", r"decoder.post_norm.\1"),
    (r"pts_bbox_head\.task_heads\.(\d+)\.(\w+)\.0\.(.+)", r"head.tasks.\1.branches.\2.conv.\3"),
    (r"pts_bbox_head\.task_heads\.(\d+)\.(\w+)\.1\.(.+)", r"head.tasks.\1.branches.\2.norm.\3"),
    (r"pts_bbox_head\.task_heads\.(\d+)\.(\w+)\.3\.(.+)", r"head.tasks.\1.branches.\2.out.\3"),
)
_COMPILED = tuple((re.compile(pattern), replacement) for pattern, replacement in RENAMES)


def rename_official(name: str) -> str:
    """Official parameter or buffer name -> ours.

    Raises:
        ValueError: no row of ``RENAMES`` matches.
    """
    for pattern, replacement in _COMPILED:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(replacement)
    raise ValueError(f"'{name}' is not a name of an official CMT checkpoint")


def rename_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict with official names -> the same tensors under our names.

    Raises:
        ValueError: a name is unknown, or two names become one.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = rename_official(name)
        if ours in renamed:
            raise ValueError(f"'{name}' and another name of the checkpoint both become '{ours}'")
        renamed[ours] = tensor
    return renamed
