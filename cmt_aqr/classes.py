"""The ten nuScenes detection classes, in the order that labels count them."""

# Order of the original CMT's configs; the index is the label everywhere in this package.
CLASSES = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)

# Order of the views in every tensor. It is part of the numerics: the first camera that sees a point wins (Quirk Q11).
CAMERAS = (
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_FRONT_LEFT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_BACK_RIGHT",
)
