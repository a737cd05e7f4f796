"""Labels of VTAB's structured tasks at the exact edges of their bins."""

import io

import numpy as np
import pytest
from PIL import Image

from pretrain.data.images import decode
from pretrain.tasks.vtab_labels import (
    clevr_count,
    clevr_distance,
    dsprites_orientation,
    dsprites_x_position,
    kitti_vehicle_distance,
    smallnorb_azimuth,
    smallnorb_elevation,
    stored_label,
    visible_sprite,
)

CAR, VAN, TRUCK, PEDESTRIAN, MISC = 0, 1, 2, 3, 7


def after(value: float) -> float:
    """The next float32 above."""
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def before(value: float) -> float:
    """The next float32 below."""
    return float(np.nextafter(np.float32(value), np.float32(-np.inf)))


def clevr(*depths: float) -> dict:
    """Features of a scene with objects at these depths."""
    coordinates = [value for depth in depths for value in (1.0, 500.0, depth)]
    return {"objects/pixel_coords": coordinates, "objects/size": [0] * len(depths)}


def kitti(*objects: tuple[int, float]) -> dict:
    """Features of a street with objects of these types and distances."""
    return {
        "objects/type": [kind for kind, _ in objects],
        "objects/location": [value for _, z in objects for value in (-3.0, 1.5, z)],
    }


def test_clevr_count_begins_at_three_objects() -> None:
    """3 to 10 objects are classes 0 to 7."""
    assert [clevr_count(clevr(*[9.0] * count)) for count in range(3, 11)] == list(range(8))


@pytest.mark.parametrize(
    "depth, label",
    [
        *((after(0.0), 0), (8.0, 0), (after(8.0), 1), (8.5, 1), (after(8.5), 2), (9.0, 2), (after(9.0), 3)),
        *((9.5, 3), (after(9.5), 4), (10.0, 4), (after(10.0), 5), (99.0, 5), (100.0, 5)),
    ],
)
def test_clevr_distance_at_its_edges(depth: float, label: int) -> None:
    """A depth on an edge belongs to the bin before it; the nearest object decides, wherever it stands in the list."""
    assert clevr_distance(clevr(depth)) == label
    assert clevr_distance(clevr(100.0, depth, 100.0)) == label


def test_clevr_distance_without_a_class_is_an_error() -> None:
    """Depth 0 lies below all bins, a scene without objects has no depth."""
    with pytest.raises(ValueError, match="not above 0.0"):
        clevr_distance(clevr(0.0))
    with pytest.raises(ValueError):
        clevr_distance(clevr())


@pytest.mark.parametrize(
    "z, label", [(-99.0, 0), (0.0, 0), (8.0, 0), (after(8.0), 1), (20.0, 1), (after(20.0), 2), (998.0, 2), (999.0, 2)]
)
def test_kitti_distance_at_its_edges(z: float, label: int) -> None:
    """The nearest of cars, vans and trucks, on an edge in the bin before it."""
    for kind in (CAR, VAN, TRUCK):
        assert kitti_vehicle_distance(kitti((kind, z))) == label
    assert kitti_vehicle_distance(kitti((CAR, 999.0), (PEDESTRIAN, -99.0), (VAN, z), (MISC, 1.0))) == label


def test_kitti_without_a_vehicle_is_a_class() -> None:
    """Nothing on the street, or nobody but walkers: class 3."""
    assert kitti_vehicle_distance(kitti()) == 3
    assert kitti_vehicle_distance(kitti((PEDESTRIAN, 2.0), (MISC, 2.0))) == 3


def test_dsprites_has_sixteen_classes() -> None:
    """Floor of the stored class over 32/16 and 40/16, as float32 division gives it, and every class occurs."""
    for rule, name, count in (
        (dsprites_x_position, "label_x_position", 32),
        (dsprites_orientation, "label_orientation", 40),
    ):
        found = [rule({name: [value]}) for value in range(count)]
        assert found == [int(np.floor(np.float32(value) / np.float32(count / 16))) for value in range(count)]
        assert sorted(set(found)) == list(range(16))
    assert [dsprites_orientation({"label_orientation": [value]}) for value in (2, 3, 4, 5, 37, 38)] == [
        0,
        1,
        1,
        2,
        14,
        15,
    ]


def test_other_labels_are_the_stored_ones() -> None:
    """Each from its own feature."""
    features = {"label": [4], "label_azimuth": [17], "label_elevation": [8]}
    assert (stored_label(features), smallnorb_azimuth(features), smallnorb_elevation(features)) == (4, 17, 8)


def test_a_sprite_becomes_visible() -> None:
    """0 and 1 become 0 and 255 in three channels; an image of other values is refused."""
    pixels = np.random.default_rng(0).integers(0, 2, (64, 64)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    seen = decode(visible_sprite(file.getvalue())).numpy()
    assert seen.shape == (3, 64, 64) and (seen == pixels * 255).all()
    file = io.BytesIO()
    Image.fromarray(pixels * np.uint8(255)).save(file, "png")
    with pytest.raises(ValueError, match="pixels up to 255"):
        visible_sprite(file.getvalue())
