"""Models of timm beyond the plain ViT: predicted, scored and fine-tuned on the pixels that timm itself gives them."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from ranks import run_ranks
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models import save_for_hf
from tiny import make_shards, tiny_config
from torch import nn
from weights_on_disk import in_memory, one_line, run_tool, save_run

from pretrain.config import Config, DataConfig, ModelConfig
from pretrain.data.images import decode, eval_image, to_float
from pretrain.data.loader import eval_batches
from pretrain.data.manifest import load_manifest
from pretrain.data.order import Order
from pretrain.errors import ConfigError, UserError
from pretrain.evaluation.features import pre_logits
from pretrain.models.build import build_model
from pretrain.models.equivalent import classifier_names
from pretrain.models.google import for_google
from pretrain.models.weights import check_same_function, model_of, read_weights
from pretrain.shards.build import build
from pretrain.shards.sources import Item
from pretrain.train.building import _load
from pretrain.train.run import train

torch.set_num_threads(1)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def random_timm(name: str, **options: Any) -> nn.Module:
    """A model whose every parameter and statistic is its own: a tensor that is not read, or read late, is seen."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif key.endswith(("running_mean", "bias", "gamma")):
                tensor.add_(torch.randn_like(tensor) * 0.1)
            elif key.startswith(("head.fc.weight", "head.weight", "fc.weight", "classifier.weight")):
                tensor.normal_(std=0.1)
    return model.eval()


def timm_folder(model: nn.Module, folder: Path, **cfg: Any) -> Path:
    """The folder that timm writes of a model, with other entries of its pretrained_cfg."""
    cast(Any, model).pretrained_cfg.update(cfg)
    save_for_hf(model, folder, safe_serialization=True)
    return folder


def edit(folder: Path, cfg: dict[str, Any], **values: Any) -> None:
    found = json.loads((folder / "config.json").read_text())
    found["pretrained_cfg"] |= cfg
    (folder / "config.json").write_text(json.dumps({**found, **values}))


@pytest.fixture(scope="session")
def photos(test_data: Path) -> list[bytes]:
    """Whole ImageNet photos: lying, standing, gray."""
    with tarfile.open(test_data / "imagenet_val_fullsize_dev-000000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")]
        return [cast(Any, tar.extractfile(member)).read() for member in members[:7:2]]


def noise(seed: int, height: int = 90, width: int = 131) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(file, "png")
    return file.getvalue()


@torch.no_grad()
def by_timm(model: nn.Module, images: list[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's input and the logits [images, classes] of timm's own transform and model."""
    transform = cast(Any, create_transform(**resolve_model_data_config(model), is_training=False))
    x = torch.stack([transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in images])
    parts = cast(Any, model)
    return parts.forward_head(parts.forward_features(x), pre_logits=True), model(x)


@torch.no_grad()
def by_us(folder: Path, images: list[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    weights = read_weights(folder)
    names = ("eval_transform", "eval_crop", "interpolation", "mean", "std")
    config = DataConfig(**{name: getattr(weights, name) for name in names})
    x = torch.stack([eval_image(decode(data), weights.model.image_size, config) for data in images])
    model = model_of(weights)
    return pre_logits(model, weights.normalisation)(x), model(to_float(x, torch.float32, weights.normalisation))


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


# Plain ViTs are ours, and take the normalisation into their first convolution; the others keep it.
SMALL = ["test_vit", "test_vit2", "test_vit4", "test_convnext3", "test_resnet", "test_mambaout", "test_efficientnet"]


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("name", SMALL)
def test_a_small_model_sees_what_timm_shows_it(name: str, crop_mode: str, tmp_path: Path) -> None:
    """Logits and the head's input, whatever the mean, the crop mode, the interpolation and the name of the head; batch
    norm by its statistics.
    """
    model = random_timm(name, num_classes=11)
    interpolation = {"center": "bicubic", "squash": "bilinear", "border": "bicubic"}[crop_mode]
    timm_folder(model, tmp_path / "t", **IMAGENET, crop_mode=crop_mode, interpolation=interpolation, crop_pct=0.8)
    images = [noise(0), noise(1, 200, 120), noise(2, 20, 20)]
    for found, expected in zip(by_us(tmp_path / "t", images), by_timm(model, images)):
        assert_alike(found, expected)
    folded = name == "test_vit" and crop_mode != "border"  # whose colour is the mean
    assert (read_weights(tmp_path / "t").mean == (0.5, 0.5, 0.5)) == folded


def test_what_timm_fills_in_is_filled_in(tmp_path: Path) -> None:
    """A config.json without mean, crop or interpolation: timm's defaults, which are ImageNet's mean and bicubic."""
    model = random_timm("test_convnext3", num_classes=3)
    cfg = cast(Any, model).pretrained_cfg
    for key in ("mean", "std", "crop_pct", "interpolation"):
        cfg.pop(key)
    timm_folder(model, tmp_path / "t")
    for found, expected in zip(by_us(tmp_path / "t", [noise(0)]), by_timm(model, [noise(0)])):
        assert_alike(found, expected)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"crop_mode": "corner"}, "crop_mode is 'corner', expected one of center, squash, border"),
        ({"input_size": (3, 160, 96)}, r"input_size is \[160, 96\], which is not square"),
        ({"input_size": (1, 160, 160)}, r"input_size is \[1, 160, 160\]: images here have 3 channels"),
        ({"std": (0.2, 0.0, 0.2)}, r"std is \(0.2, 0.0, 0.2\), expected three numbers"),
        ({"mean": (0.2, 0.3)}, r"mean is \[0.2, 0.3\], expected three numbers"),
    ],
)
def test_pixels_that_are_not_made_here_are_refused(cfg: dict[str, Any], message: str, tmp_path: Path) -> None:
    """One line that names the key, instead of another picture."""
    timm_folder(random_timm("test_resnet", num_classes=3), tmp_path / "t")
    edit(tmp_path / "t", cfg)
    with pytest.raises(UserError, match=message) as caught:
        read_weights(tmp_path / "t")
    one_line(caught.value)


def test_another_size_of_timms_tests_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By which timm's published score was measured; what is the same is not told."""
    cfg = {"input_size": (3, 160, 160), "crop_pct": 0.95, "test_input_size": (3, 192, 192), "test_crop_pct": 1.0}
    folder = timm_folder(random_timm("test_vit"), tmp_path / "t", **cfg)
    assert read_weights(folder).model.image_size == 160
    told = "timm's validate.py evaluates by {'crop_pct': 1.0, 'input_size': [3, 192, 192]}; here it is as in training: "
    assert told in capsys.readouterr().err
    edit(folder, {"test_input_size": [3, 160, 160], "test_crop_pct": None})
    read_weights(folder)
    assert not capsys.readouterr().err


def test_a_key_that_is_not_known_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may change the pixels or the function; timm's own keys are known, all of them."""
    timm_folder(random_timm("test_resnet", num_classes=3), tmp_path / "t")
    read_weights(tmp_path / "t")
    assert not "".join(capsys.readouterr())
    edit(tmp_path / "t", {"crop_border_pixels": 4}, quantised=True)
    read_weights(tmp_path / "t")
    assert "config.json: crop_border_pixels, quantised: not known here" in capsys.readouterr().err


# --- another resolution ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_small_patch14_dinov2", 56),
        ("swin_tiny_patch4_window7_224", 112),
        ("eva02_tiny_patch14_336", 70),
    ],
)
@torch.no_grad()
def test_positions_are_resized_as_timm_does_it(name: str, size: int, tmp_path: Path) -> None:
    """read_weights(path, size) gives the model that timm builds with img_size=size from the same folder."""
    model = random_timm(name, num_classes=3, img_size=112)
    cast(Any, model).pretrained_cfg.update(input_size=(3, 112, 112))
    save_for_hf(model, tmp_path / "t", model_args={"img_size": 112}, safe_serialization=True)
    x = torch.randn(2, 3, size, size)
    theirs = timm.create_model(f"local-dir:{tmp_path / 't'}", pretrained=True, img_size=size).eval()
    assert_alike(model_of(read_weights(tmp_path / "t", size))(x), theirs(x))


# --- training --------------------------------------------------------------------------------------------------------


def run_config(folder: Path, **changes: Any) -> Config:
    shards = folder / "shards"
    if not shards.exists():
        make_shards(shards, num_samples=40)
    values = {
        "model": {"name": "timm:test_convnext3", "image_size": 64},
        "init_from": folder / "t",
        "total_steps": 1,
        "data__held_out": 12,
        "optim__warmup_steps": 1,  # rate 0 at the first step: the weights stay
        "evaluation__every_steps": 1,
        "data__mean": list(IMAGENET["mean"]),
        "data__std": list(IMAGENET["std"]),
        "data__eval_crop": 0.95,
    }
    return tiny_config(shards, folder, **values | changes)


def test_a_run_sees_the_pixels_of_its_weights(tmp_path: Path) -> None:
    """The loss on held-out images after no change is that of timm's model on timm's pixels; the checkpoint keeps the
    normalisation, and a run with another one is refused, new or resumed.
    """
    model = random_timm("test_convnext3", num_classes=7)
    timm_folder(model, tmp_path / "t", **IMAGENET, input_size=(3, 64, 64))
    config = run_config(tmp_path)
    run_ranks(train, 1, config)
    found = read_weights(tmp_path / "tiny")
    assert found.normalisation == (IMAGENET["mean"], IMAGENET["std"])
    metrics = json.loads((tmp_path / "tiny" / "DONE").read_text())
    manifest = load_manifest(tmp_path / "shards")
    held_out = Order(manifest.num_samples, 12, 12, 0).held_out_indices()
    (batch,) = eval_batches(manifest, held_out, batch_size=12, image_size=64, config=config.data)
    mean, std = (torch.tensor(IMAGENET[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        logits = model((batch.images / 255 - mean) / std)
    expected = nn.functional.cross_entropy(logits, batch.labels[:, 0])
    assert metrics["val/loss"] == pytest.approx(expected.item(), rel=1e-4)
    with pytest.raises(AssertionError, match="data.mean: was .*0.485"):
        run_ranks(train, 1, run_config(tmp_path, data__mean=[0.5, 0.5, 0.5]))


def test_weights_of_another_normalisation_are_refused(tmp_path: Path) -> None:
    """init_from: the tensors fit, the pixels would not."""
    timm_folder(random_timm("test_convnext3", num_classes=7), tmp_path / "t", **IMAGENET)
    weights = read_weights(tmp_path / "t")
    with pytest.raises(UserError, match=r"data.mean=\[0.485,0.456,0.406\] data.std=.*, not of data.mean=\[0.5,") as e:
        check_same_function(weights, weights.model, DataConfig())
    one_line(e.value)
    check_same_function(weights, weights.model, DataConfig(**cast(Any, IMAGENET)))


@pytest.mark.parametrize("std", [[0.2, 0.2], [0.2, 0.0, 0.2], [0.2, float("nan"), 0.2]])
def test_a_normalisation_that_is_none_is_refused(std: list[float], tmp_path: Path) -> None:
    """By the configuration, whose schema knows the length."""
    with pytest.raises(ConfigError, match="data.std" if len(std) == 3 else "data.std is .*, expected three numbers"):
        tiny_config(tmp_path, tmp_path, data__std=std)


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [
        "pretrain",
        pytest.param("timm", marks=pytest.mark.long),
        "transformers",
        "npz",
        pytest.param("onnx", marks=pytest.mark.long),
    ],
)
def test_a_run_of_another_mean_is_converted(target: str, tmp_path: Path) -> None:
    """The command with its proof: both sides see the same pixels. What is read back is the same function of them,
    whether the mean went along, into the first convolution or into the graph.
    """
    if target in ("transformers", "onnx"):
        pytest.importorskip({"onnx": "onnxruntime"}.get(target, target))
    config = tiny_config(tmp_path, tmp_path, **{f"data__{key}": list(value) for key, value in IMAGENET.items()})
    save_run(config, list("abc"))
    out = tmp_path / ("out.npz" if target == "npz" else "out")
    done = run_tool("convert", tmp_path / "tiny", out, "--to", target)
    assert done.returncode == 0, done.stdout + done.stderr
    card = (out.with_suffix(".md") if target == "npz" else out / "README.md").read_text()
    assert ("RGB in [-1, 1]" in card) == (target in ("npz", "onnx"))
    if target == "onnx":
        return
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    before, after = read_weights(tmp_path / "tiny"), read_weights(out)
    assert (after.mean == IMAGENET["mean"]) == (target != "npz")
    with torch.no_grad():
        logits = [model_of(w)(to_float(pixels, torch.float32, w.normalisation)) for w in (before, after)]
    assert_alike(logits[1], logits[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "name", "head"),
    [
        pytest.param("pretrain", "test_convnext3", "head.fc", marks=pytest.mark.long),
        ("timm", "test_resnet", "fc"),
        pytest.param("timm", "test_convnext3", "head.fc", marks=pytest.mark.long),
        pytest.param("pretrain", "test_resnet", "fc", marks=pytest.mark.long),
    ],
)
def test_timms_models_are_converted_with_and_without_their_heads(
    target: str, name: str, head: str, tmp_path: Path
) -> None:
    """The head by timm's name for it, and no more of the model: a norm before it stays."""
    model = random_timm(name, num_classes=7)
    timm_folder(model, tmp_path / "t", **IMAGENET)
    for number, options in enumerate(([], ["--without", "head"])):
        done = run_tool("convert", tmp_path / "t", tmp_path / f"out{number}", "--to", target, *options)
        assert done.returncode == 0, done.stdout + done.stderr
    for found, expected in zip(by_us(tmp_path / "out0", [noise(0)]), by_timm(model, [noise(0)])):
        assert_alike(found, expected)
    assert_alike(by_us(tmp_path / "out1", [noise(0)])[0], by_timm(model, [noise(0)])[0])
    whole, without = (read_weights(tmp_path / f"out{number}") for number in (0, 1))
    assert whole.tensors.keys() - without.tensors.keys() == {f"{head}.weight", f"{head}.bias"}


def test_google_has_no_place_for_the_mean_of_a_hybrid(tmp_path: Path) -> None:
    """Its first convolution is standardised: refused with the reason."""
    config = ModelConfig(name="R+Ti", patch_size=32, image_size=64)
    weights = in_memory(build_model(config, 3), config, **cast(Any, IMAGENET))
    with pytest.raises(UserError, match="the target has them in .-1, 1., and only a patch convolution") as caught:
        for_google(weights, "released")
    one_line(caught.value)


# --- whole models, real photos, the tools ----------------------------------------------------------------------------

LARGE = [
    "vit_small_patch14_dinov2",
    "deit3_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "eva02_tiny_patch14_224",
    "resnet50",
]
# Tokens and batch norm always, the others in `make test-long`.
ALWAYS = ("eva02_tiny_patch14_224", "resnet50")
SOME_AND_ALL = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.long) for name in LARGE]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME_AND_ALL)
def test_the_tools_say_of_real_photos_what_timm_says(name: str, photos: list[bytes], tmp_path: Path) -> None:
    """A folder as timm writes it, in its own resolution (518 pixels of DINOv2): features and logits; the probabilities
    of predict.py and, example by example, of evaluate.py are those of timm's transform and model.
    """
    model = random_timm(name, num_classes=10)
    timm_folder(model, tmp_path / "t")
    features, logits = by_timm(model, photos)
    for found, expected in zip(by_us(tmp_path / "t", photos), (features, logits)):
        assert_alike(found, expected)
    for number, data in enumerate(photos):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    build(
        [Item(lambda data=data: data, "jpg", n, str(n)) for n, data in enumerate(photos)],
        list("abcdefghij"),
        tmp_path / "shards",
        samples_per_shard=40,
        seed=0,
    )
    values, classes = logits.softmax(1).topk(5)

    done = run_tool("predict", tmp_path / "t", "--json", *(tmp_path / f"{n}.jpg" for n in range(len(photos))))
    assert done.returncode == 0, done.stderr
    for line, expected, numbers in zip(done.stdout.splitlines(), values, classes, strict=True):
        rows = json.loads(line)["predictions"]
        assert [row["class"] for row in rows] == numbers.tolist()
        assert [row["probability"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)

    options = ("--val", tmp_path / "shards", "--predictions", tmp_path / "lines", "--workers", 0, "--batch-size", 2)
    done = run_tool("evaluate", tmp_path / "t", *options)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert len(lines) == len(photos)
    for line in lines:
        number = line["label"]
        assert line["top5"] == classes[number].tolist()
        assert line["probabilities"] == pytest.approx(values[number].tolist(), abs=1e-5)


@pytest.mark.parametrize("name", ["test_convnext3", "test_efficientnet"])
def test_a_new_head_is_of_zeros(name: str, tmp_path: Path) -> None:
    """As ours is: timm draws its own, from which each seed would begin with other logits."""
    theirs = random_timm(name, num_classes=5)
    weights = read_weights(timm_folder(theirs, tmp_path / "t"))
    seen = {"data__mean": list(weights.mean), "data__std": list(weights.std)}
    config = tiny_config(tmp_path, tmp_path, init_from=str(tmp_path / "t"), init_new_head=True, **seen)
    config = replace(config, model=weights.model)
    model = build_model(config.model, 7, seed=1)
    _load(model, config, cast(Any, None))
    head = classifier_names(model)
    found, before = dict(model.named_parameters()), dict(theirs.named_parameters())
    assert len(head) == 2 and not any(found[key].any() for key in head)
    assert all(torch.equal(found[key], before[key]) for key in found.keys() - head)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [ALWAYS[0], *(pytest.param(n, marks=pytest.mark.long) for n in LARGE if n != ALWAYS[0])]
)
def test_timms_backbones_are_fine_tuned(name: str, tmp_path: Path) -> None:
    """A backbone without a head, at another resolution than its own: the run carries the weights' normalisation, and
    batch norm's statistics.
    """
    timm_folder(random_timm(name, num_classes=0), tmp_path / "t")
    for split in ("train", "test"):
        make_shards(tmp_path / "data" / "pets" / split, num_samples=16)
    options = ["--task", "pets", "--data", tmp_path / "data", "--out", tmp_path / "out", "--lr", 0.001, "--steps", 1]
    options += ["--seeds", 1, "--image-size", 112, "--num-gpus", 1]
    small = ["engine.precision=fp32", "engine.max_micro_batch_size=8", "data.global_batch=8", "data.workers=0"]
    done = run_tool("finetune", tmp_path / "t", *options, *small)
    assert done.returncode == 0, done.stdout + done.stderr
    weights = read_weights(tmp_path / "out" / "pets" / "final-lr0.001-seed0")
    assert weights.normalisation == read_weights(tmp_path / "t").normalisation
    assert (weights.mean == (0.5, 0.5, 0.5)) == (weights.model.timm_name is None)  # in our ViT's patch convolution
    assert weights.num_classes == 37 and weights.model.image_size == 112
