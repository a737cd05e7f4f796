"""Pictures of a trained model: files that show its own numbers, whatever its positions, pooling and trunk."""

import json
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config
from weights_on_disk import load_tool, one_line_error, run_tool, save_run

import pretrain.models.weights
from pretrain.config import DataConfig
from pretrain.data.images import decode, eval_image, to_float
from pretrain.models.inspection import filter_components, look_at, position_similarity
from pretrain.models.positions import Grid
from pretrain.models.vit import VisionTransformer
from pretrain.report.pictures import _mosaic, read_photo, shown_places

torch.set_num_threads(1)
tool = load_tool("visualize")


def save_photo(path: Path, seed: int = 0) -> Path:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    Image.fromarray(coarse).resize((50, 40)).save(path)
    return path


def visualize(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """The command in this process."""
    monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, arguments)])
    tool.main()


def is_drawn(path: Path) -> bool:
    """A picture that opens, is at least 1000 pixels wide and holds many colours."""
    with Image.open(path) as picture:
        colors = picture.convert("RGB").getcolors(1 << 24)
        return picture.format == "PNG" and picture.width >= 1000 and colors is not None and len(colors) > 100


def test_pictures_and_numbers_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both pictures, numbers equal to those of the model that was saved, and the pictures' pixels in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(tmp_path, tmp_path)
    model = cast(VisionTransformer, save_run(config, ["a", "b"]))
    paths = [save_photo(tmp_path / "first.png", 1), save_photo(tmp_path / "second.jpg", 2)]
    out = tmp_path / "pictures"
    visualize(monkeypatch, tmp_path / "tiny", "--image", *paths, "--out", out, "--tensorboard")
    assert is_drawn(out / "internals.png") and is_drawn(out / "rollout.png")
    numbers = json.loads((out / "numbers.json").read_text())
    assert [photo["name"] for photo in numbers["photos"]] == ["first.png", "second.jpg"]
    distances = []
    for path, photo in zip(paths, numbers["photos"]):
        image = eval_image(decode(path.read_bytes()), 16, DataConfig(eval_crop=1.0))
        look = look_at(model, config.model, to_float(image, torch.float32))
        assert np.allclose(photo["rollout"], look.rollout, atol=1e-6)
        assert np.allclose(photo["attention_distance_px"], look.distance_px, atol=1e-3)
        assert "class token" in photo["rollout_of"]
        distances.append(look.distance_px.numpy())
    assert np.allclose(numbers["attention_distance_px"], np.mean(distances, axis=0), atol=1e-3)
    similarity = position_similarity(model, config.model).similarity
    assert similarity is not None and np.allclose(numbers["positions"]["cosine"], similarity, atol=1e-4)
    variance = filter_components(model).variance
    assert np.allclose(numbers["filters"]["share_of_variance"], variance, atol=1e-5)
    board = EventAccumulator(str(out))
    board.Reload()
    assert board.Tags()["images"] == ["internals", "rollout"]
    with Image.open(out / "rollout.png") as picture:
        shown = board.Images("rollout")[0]
        assert (shown.width, shown.height) == picture.size


@pytest.mark.parametrize(
    "changes",
    [
        {"pooling": "gap", "positions": "sincos2d"},
        {"pooling": "map", "positions": "none"},
        {"positions": "relative"},
        {"positions": "learned2d", "positions_at": "every_layer"},
        {"trunk": [1], "trunk_width": 32, "image_size": 32},
    ],
)
def test_every_kind_of_model_is_drawn(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other positions, poolings and a hybrid: all panels, one of which may say that there is nothing to show."""
    config = tiny_config(tmp_path, tmp_path, **{f"model__{key}": value for key, value in changes.items()})
    save_run(config, ["a", "b"])
    visualize(monkeypatch, tmp_path / "tiny", "--image", save_photo(tmp_path / "photo.png"))
    folder = tmp_path / "tiny" / "pictures"
    assert is_drawn(folder / "internals.png") and is_drawn(folder / "rollout.png")
    numbers = json.loads((folder / "numbers.json").read_text())
    assert (numbers["positions"]["cosine"] is None) == (changes.get("positions") in ("none", "relative"))


def test_without_photos_there_is_no_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters and positions alone; the third panel says what it needs."""
    save_run(tiny_config(tmp_path, tmp_path), ["a", "b"])
    read, times = pretrain.models.weights.read_weights, []
    monkeypatch.setattr(pretrain.models.weights, "read_weights", lambda *words: times.append(1) or read(*words))
    visualize(monkeypatch, tmp_path / "tiny")
    assert len(times) == 1  # a checkpoint's checksums are those of all its bytes
    folder = tmp_path / "tiny" / "pictures"
    assert sorted(path.name for path in folder.iterdir()) == ["internals.png", "numbers.json"]
    assert json.loads((folder / "numbers.json").read_text())["attention_distance_px"] is None


def test_pictures_of_other_weights_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two weights share a folder, in any order: the newest has the plain names, each picture is its own weights'."""
    out, drawn = tmp_path / "pictures", {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        save_run(tiny_config(tmp_path, tmp_path, name=name), ["a", "b"])
    for name in ("one", "two", "one"):
        visualize(monkeypatch, tmp_path / name, "--out", out)
        drawn[name] = (out / "internals.png").read_bytes(), (out / "numbers.json").read_bytes()
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    (other,) = (name.removeprefix("numbers-") for name in kept if name.startswith("numbers-"))
    other = other.removesuffix(".json")
    assert drawn["one"] == (kept["internals.png"], kept["numbers.json"])
    assert drawn["two"] == (kept[f"internals-{other}.png"], kept[f"numbers-{other}.json"]) and len(kept) == 4
    assert json.loads(kept[f"numbers-{other}.json"])["weights_sha256"].startswith(other)


def test_wrong_photos_are_one_line(tmp_path: Path) -> None:
    """A file that is no picture, and one that is not there: exit 2, its name, nothing written."""
    save_run(tiny_config(tmp_path, tmp_path), ["a", "b"])
    (tmp_path / "text.jpg").write_text("no picture")
    line = one_line_error(run_tool("visualize", tmp_path / "tiny", "--image", tmp_path / "text.jpg"))
    assert "text.jpg: cannot be decoded" in line
    with pytest.raises(ValueError, match="missing.jpg: cannot be read"):
        read_photo(tmp_path / "missing.jpg", 16)
    assert not (tmp_path / "tiny" / "pictures").exists()


def test_tiles_stand_in_reading_order_with_gaps() -> None:
    """The second tile is to the right of the first, the third below it."""
    tiles = np.stack([np.full((2, 2, 1), value) for value in (1.0, 2.0, 3.0)])
    assert _mosaic(tiles, 2, 0.0)[..., 0].tolist() == [
        [1, 1, 0, 2, 2],
        [1, 1, 0, 2, 2],
        [0, 0, 0, 0, 0],
        [3, 3, 0, 0, 0],
        [3, 3, 0, 0, 0],
    ]


def test_of_many_places_evenly_spread_ones_are_shown() -> None:
    """All of a 14x14 grid; 16 of 24 rows, the first and the last among them."""
    assert shown_places(Grid(14, 14)) == (list(range(14)), list(range(14)))
    rows, columns = shown_places(Grid(24, 3))
    assert len(rows) == 16 and rows[0] == 0 and rows[-1] == 23 and columns == [0, 1, 2]
