"""Labels of the VTAB tasks whose sets store something else than a class, from the features of a TFDS record.

Source of all rules: google-research/task_adaptation, `data/{clevr,dsprites,kitti,smallnorb}.py`, read at d7630d3c.
"""

import io
from bisect import bisect_left

import numpy as np
from PIL import Image

from pretrain.shards.pictures import png_of
from pretrain.shards.tfrecord import Features

CLEVR_EDGES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_EDGES = (-100.0, 8.0, 20.0, 999.0)
KITTI_NO_VEHICLE = 1000.0  # metres: a class of its own, beyond the last edge
KITTI_VEHICLES = 3  # object types 0, 1, 2: Car, Van, Truck


def stored_label(features: Features) -> int:
    """The class as the set stores it."""
    return features["label"][0]


def clevr_count(features: Features) -> int:
    """The number of objects, 3 to 10, as 0 to 7."""
    return len(features["objects/size"]) - 3


def clevr_distance(features: Features) -> int:
    """The bin of the nearest object's depth, the third of its pixel coordinates; 6 classes."""
    return _bin(min(features["objects/pixel_coords"][2::3]), CLEVR_EDGES)


def kitti_vehicle_distance(features: Features) -> int:
    """The bin of the nearest vehicle's distance ahead, the third of its location in metres; 3: there is no vehicle."""
    distances = features["objects/location"][2::3]
    vehicles = [z for z, kind in zip(distances, features["objects/type"], strict=True) if kind < KITTI_VEHICLES]
    return _bin(min([*vehicles, KITTI_NO_VEHICLE]), KITTI_EDGES)


def dsprites_x_position(features: Features) -> int:
    """The 32 horizontal positions, two to a class; 16 classes."""
    return features["label_x_position"][0] * 16 // 32


def dsprites_orientation(features: Features) -> int:
    """The 40 orientations, 2.5 to a class (3, 2, 3, 2 ...); 16 classes."""
    return features["label_orientation"][0] * 16 // 40


def smallnorb_azimuth(features: Features) -> int:
    """The direction the toy is seen from, 18 classes of 20 degrees."""
    return features["label_azimuth"][0]


def smallnorb_elevation(features: Features) -> int:
    """The height the toy is seen from, 9 classes of 5 degrees."""
    return features["label_elevation"][0]


def _bin(value: float, edges: tuple[float, ...]) -> int:
    """The number of the last edge below `value`: a value on an edge belongs to the bin before it."""
    if value <= edges[0]:
        raise ValueError(f"{value} is not above {edges[0]}, where the first class begins")
    return bisect_left(edges, value) - 1


def visible_sprite(data: bytes) -> bytes:
    """Returns a dSprites image, stored as 0 and 1, as a gray PNG of 0 and 255."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        pixels = np.asarray(image)
    if pixels.max() > 1:
        raise ValueError(f"pixels up to {pixels.max()} in an image of 0 and 1")
    return png_of(pixels * np.uint8(255))
