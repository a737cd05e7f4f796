"""tools/predict.py: names and probabilities of images, with the weights' own transform; bad images do not stop it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from weights_on_disk import ROOT, load_tool, one_line_error, randomised, run_tool

from pretrain.config import DataConfig, ModelConfig
from pretrain.data.images import decode, eval_image, to_float
from pretrain.errors import DeviceMemoryError, UserError
from pretrain.models.build import build_model
from pretrain.models.equivalent import own_tensors
from pretrain.models.tensors import LazyTensor, Weights
from pretrain.models.timm_folder import write_own_folder

torch.set_num_threads(1)
NAMES = ("ash", "birch, silver", "cedar")
CONFIG = ModelConfig(name="Ti", width=32, depth=2, mlp_dim=64, heads=2, image_size=16, patch_size=8)


@pytest.fixture
def predict(monkeypatch: pytest.MonkeyPatch) -> Any:
    """tools/predict.py's main, called with arguments."""
    module = load_tool("predict")

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["tools/predict.py", *map(str, arguments)])
        return module.main()

    return call


def make_weights(folder: Path, num_classes: int = 3, **use: Any) -> torch.nn.Module:
    model = randomised(build_model(CONFIG, num_classes))
    held = {name: tensor.detach() for name, tensor in own_tensors(model).items()}
    tensors = {name: LazyTensor(tuple(t.shape), lambda t=t: t) for name, t in held.items()}
    write_own_folder(Weights(folder, CONFIG, tensors, num_classes, **use), folder)
    return model


def make_image(path: Path, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 9, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize((45, 30), Image.Resampling.BICUBIC).save(path)
    return path


def test_classes_without_names_are_told_once(tmp_path: Path, predict: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """By their numbers, and a word on it, however many the images are."""
    make_weights(tmp_path / "w", loss="softmax")
    assert predict(tmp_path / "w", *(make_image(tmp_path / f"{seed}.png", seed) for seed in range(2))) == 0
    told = capsys.readouterr()
    assert told.err.count("has no class names, so classes are told by their numbers") == 1
    assert {line.split()[-1] for line in told.out.splitlines() if "%" in line} == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("name", "num_classes", "first"),
    [("timm:x", 1000, "tench"), ("google:B_16", 21_843, "organism"), ("timm:x", 3, "0"), ("hf-hub:a/b", 1000, "0")],
)
def test_published_weights_without_names_are_of_imagenet(
    name: str, num_classes: int, first: str, tmp_path: Path, predict: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Where they have as many classes as it has, which is said to be assumed."""
    make_weights(tmp_path / "w", num_classes, loss="softmax")
    monkeypatch.setattr("pretrain.models.by_name.fetched", lambda _: tmp_path / "w")
    assert predict(name, make_image(tmp_path / "a.png", 0), "--json", "--top", num_classes) == 0
    told = capsys.readouterr()
    found = {row["class"]: row["name"] for row in json.loads(told.out)["predictions"]}
    assert found[0].startswith(first) and (f"{num_classes:,} classes are taken for ImageNet's" in told.err) == (
        first != "0"
    )


def test_a_gpu_without_room_is_told(tmp_path: Path, predict: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training beside it may have taken all: one line with the way out."""

    def no_room(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    make_weights(tmp_path / "w")
    monkeypatch.setattr("pretrain.evaluation.predictions.likeliest", no_room)
    with pytest.raises(DeviceMemoryError, match="CUDA_VISIBLE_DEVICES= takes the CPU"):
        predict(tmp_path / "w", make_image(tmp_path / "a.png", 0))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid", None])
def test_probabilities_are_the_models_own(
    loss: str | None, tmp_path: Path, predict: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Best first, with names; the crop and the interpolation that the weights carry, not the defaults; a word where the
    weights do not tell their loss.
    """
    model = make_weights(tmp_path / "w", class_names=NAMES, loss=loss, eval_crop=0.5, interpolation="bilinear")
    pictures = [make_image(tmp_path / f"{seed}.png", seed) for seed in range(2)]
    assert predict(tmp_path / "w", *pictures, "--json") == 0
    told = capsys.readouterr()
    assert ("softmax; the loss that it was trained with is not known" in told.err) == (loss is None)
    lines = [json.loads(line) for line in told.out.splitlines()]
    assert [line["image"] for line in lines] == [str(path) for path in pictures]
    for path, line in zip(pictures, lines):
        config = DataConfig(eval_crop=0.5, interpolation="bilinear")
        pixels = to_float(eval_image(decode(path.read_bytes()), 16, config)[None], torch.float32)
        logits = model(pixels)[0]
        expected = logits.sigmoid() if loss == "sigmoid" else logits.softmax(0)
        found = line["predictions"]
        assert [p["class"] for p in found] == expected.argsort(descending=True).tolist()
        for prediction in found:
            assert prediction["name"] == NAMES[prediction["class"]]
            assert prediction["probability"] == pytest.approx(expected[prediction["class"]].item(), rel=1e-5)


def test_a_bad_image_is_named_and_the_others_go_on(
    tmp_path: Path, predict: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not there, no image, a folder: exit code 2 in the end, and the good ones are told."""
    make_weights(tmp_path / "w")
    good, text = make_image(tmp_path / "good.png", 0), tmp_path / "text.jpg"
    text.write_text("no image")
    assert predict(tmp_path / "w", tmp_path / "nowhere.png", text, tmp_path, good, "--top", 2) == 2
    told = capsys.readouterr()
    first, *rest = told.out.splitlines()
    assert first == str(good) and len(rest) == 2 and all("%" in line for line in rest)
    for name in (
        "nowhere.png: cannot be used",
        "text.jpg: cannot be used (decode",
        "is a folder; give its images",
        "3 of 4 images",
    ):
        assert name in told.err


@pytest.mark.parametrize(
    ("num_classes", "arguments", "message"),
    [(0, [], "has no head"), (3, ["--top", "0"], "--top is 0"), (3, ["--image-size", "17"], "not a multiple")],
)
def test_what_cannot_be_asked_is_told(
    num_classes: int, arguments: list[str], message: str, tmp_path: Path, predict: Any
) -> None:
    """Before any image is read."""
    make_weights(tmp_path / "w", num_classes)
    (tmp_path / "empty.png").touch()
    with pytest.raises(UserError, match=message):
        predict(tmp_path / "w", tmp_path / "empty.png", *arguments)


def test_the_command_itself(tmp_path: Path) -> None:
    """Another size of the input, numbers where there are no names; a wrong path is one line and exit code 2."""
    make_weights(tmp_path / "w")
    command = [sys.executable, str(ROOT / "tools" / "predict.py")]
    picture = make_image(tmp_path / "good.png", 0)
    done = subprocess.run(
        [*command, str(tmp_path / "w"), str(picture), "--image-size", "32"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert sorted(line.split()[-1] for line in done.stdout.splitlines()[1:]) == ["0", "1", "2"]
    done = subprocess.run([*command, str(tmp_path / "no"), str(picture)], capture_output=True, text=True, timeout=240)
    assert "no: not found" in one_line_error(done)


def test_a_phones_photo_is_seen_upright(tmp_path: Path, predict: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A photo that its EXIF says to turn has the probabilities of the photo that was turned."""
    make_weights(tmp_path / "w", class_names=NAMES, loss="softmax")
    upright = make_image(tmp_path / "upright.png", 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: to be turned by 90 degrees clockwise
    with Image.open(upright) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "plain.png")
    assert predict(tmp_path / "w", upright, tmp_path / "lying.png", tmp_path / "plain.png", "--json") == 0
    first, second, plain = (json.loads(line)["predictions"] for line in capsys.readouterr().out.splitlines())
    assert first == second and first != plain


def test_formats_that_shards_do_not_hold_are_read_too(
    tmp_path: Path, predict: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever fine-tunes on TIFFs has TIFFs to predict: as make_shards converts them, without loss."""
    make_weights(tmp_path / "w", class_names=NAMES, loss="softmax")
    pictures = [make_image(tmp_path / "0.png", 0)]
    with Image.open(pictures[0]) as image:
        for ending in ("tiff", "bmp"):
            pictures.append(tmp_path / f"0.{ending}")
            image.save(pictures[-1])
    assert predict(tmp_path / "w", *pictures, "--json") == 0
    first, *others = (json.loads(line)["predictions"] for line in capsys.readouterr().out.splitlines())
    assert others == [first, first]


def test_names_that_are_not_utf8_do_not_stop_it(tmp_path: Path) -> None:
    """Such a photo is predicted, its name escaped; the others go on."""
    make_weights(tmp_path / "w", class_names=NAMES, loss="softmax")
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    make_image(Path(odd), 0)
    done = run_tool("predict", tmp_path / "w", odd, make_image(tmp_path / "b.png", 1))
    assert done.returncode == 0, done.stderr
    assert "caf\\udce9.png" in done.stdout and "b.png" in done.stdout


def test_class_names_of_strangers_do_nothing_to_a_terminal(
    tmp_path: Path, predict: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names that clear the screen, forge a line or turn the direction of writing are shown escaped, a line each."""
    names = ("\x1b]0;owned\x07\x1b[2J", "cat\nerror: 0 of 0", "photo\u202egnp.exe")
    make_weights(tmp_path / "w", class_names=names, loss="softmax")
    picture = make_image(tmp_path / "a.png", 0)
    for options in ([], ["--json"]):
        assert predict(tmp_path / "w", picture, *options) == 0
        told = capsys.readouterr()
        lines = (told.out + told.err).splitlines()
        assert len(lines) == (1 if options else 4) and all(line.isprintable() for line in lines)
