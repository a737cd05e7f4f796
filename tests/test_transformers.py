"""transformers' ViT: its own logits from what is written here, ours from what it writes, and what it cannot hold."""

import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from weights_on_disk import in_memory, one_line, randomised, tiny_model

from pretrain.config import DataConfig
from pretrain.data.images import decode, eval_image, to_float
from pretrain.errors import UserError
from pretrain.models import load_model
from pretrain.models.build import build_model
from pretrain.models.equivalent import own_tensors, without
from pretrain.models.transformers_folder import write_transformers_folder
from pretrain.models.weights import read_weights

pytest.importorskip("transformers", reason="transformers is not installed (pip install -e '.[convert]')")
torch.set_num_threads(1)
NAMES = ("ash", "birch, silver", "cedar")
POOLER = "pooler.dense.weight"
SQUASHED: dict[str, Any] = {"eval_transform": "transformers", "eval_crop": 1.0}  # what ViTImageProcessor does
VARIANTS: dict[str, dict[str, Any]] = {
    "token": {},
    "token_exact": {"gelu": "exact"},
    "token_no_row": {"class_position": False},
    "sincos2d": {"positions": "sincos2d"},
    "learned2d": {"positions": "learned2d"},
    "none": {"positions": "none"},
    "deit3": {"layer_scale": 1e-4, "class_position": False, "gelu": "exact"},
    "model": {},
    "model_rep": {"representation_size": 24},
}

_TRANSFORMERS = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
outputs, facts = {}, {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    values = json.loads((folder / "config.json").read_text())
    name = values["architectures"][0]
    pooled = {} if name != "ViTModel" else {"add_pooling_layer": folder.name.endswith("rep")}
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **pooled)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    images = load_file(sys.argv[2])["images"]
    with torch.no_grad():
        output = model.eval()(images)
    if name != "ViTModel":
        outputs[folder.name] = output.logits
    elif pooled["add_pooling_layer"]:
        outputs[folder.name] = output.pooler_output
    else:
        outputs[folder.name] = output.last_hidden_state[:, 0].contiguous()
    processor = transformers.ViTImageProcessor.from_pretrained(folder)
    facts[folder.name] = [model.config.id2label, processor.image_mean, processor.size["height"]]
assert not any(name.startswith("pretrain") for name in sys.modules)
save_file(outputs, sys.argv[3])
print(json.dumps(facts))
"""


def in_transformers(folders: Path, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Outputs and facts of all folders, from transformers in a process of its own."""
    given, out = folders.parent / "images.safetensors", folders.parent / "out.safetensors"
    save_file({"images": images.contiguous()}, given)
    command = [sys.executable, "-c", _TRANSFORMERS, str(folders), str(given), str(out)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folders.parent, env=environment)
    assert done.returncode == 0, done.stderr
    return load_file(out), json.loads(done.stdout)


def pixels(size: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_folders_load_in_a_fresh_process_with_the_same_outputs(tmp_path: Path) -> None:
    """Logits of ViTForImageClassification, the class token or the pooled output of ViTModel: 1e-5 of the largest;
    no missing, unexpected or mismatched key; class names and preprocessing come along.
    """
    expected, x = {}, pixels()
    for name, variant in VARIANTS.items():
        config, headless = tiny_model(**variant), name.startswith("model")
        model = randomised(build_model(config, 0 if headless else 3))
        weights = in_memory(model, config, () if headless else NAMES, **SQUASHED)
        write_transformers_folder(weights, tmp_path / "all" / name)
        expected[name] = model(x).detach()
    found, facts = in_transformers(tmp_path / "all", x)
    for name, outputs in expected.items():
        assert (found[name] - outputs).abs().max() <= 1e-5 * outputs.abs().max(), name
        if not name.startswith("model"):
            assert facts[name] == [{str(i): label for i, label in enumerate(NAMES)}, [0.5, 0.5, 0.5], 16]


@pytest.mark.parametrize("name", ["vt_token", pytest.param("bv_tok_learn", marks=pytest.mark.long)])
def test_googles_weights_give_googles_logits(name: str, test_fixtures: Path, tmp_path: Path) -> None:
    """npz -> here -> transformers' own code in a fresh process, to the fixture's 1e-5; and with a representation layer,
    as ViTModel, the head's input.
    """
    folder = test_fixtures / name
    write_transformers_folder(read_weights(folder / "checkpoint.npz"), tmp_path / "all" / name)
    rep = without(read_weights(test_fixtures / "vt_token_rep" / "checkpoint.npz"), "head")
    write_transformers_folder(rep, tmp_path / "rep" / "vt_token_rep")
    for folders, fixture, what in (("all", name, "logits"), ("rep", "vt_token_rep", "pre_logits")):
        x = torch.from_numpy(np.load(test_fixtures / fixture / "images.npy")).permute(0, 3, 1, 2)
        found, _ = in_transformers(tmp_path / folders, x)
        assert np.abs(found[fixture].numpy() - np.load(test_fixtures / fixture / f"{what}.npy")).max() <= 1e-5


@pytest.mark.parametrize("name", ["token", "token_exact", "model_rep"])
def test_what_was_written_reads_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Key biases included, which no logit shows; the same architecture and class names."""
    config, headless = tiny_model(**VARIANTS[name]), name.startswith("model")
    model = randomised(build_model(config, 0 if headless else 3))
    write_transformers_folder(in_memory(model, config, () if headless else NAMES), tmp_path / "out")
    weights = read_weights(tmp_path / "out")
    assert (weights.model, weights.class_names) == (config, () if headless else NAMES)
    for tensor, parameter in own_tensors(model).items():
        assert torch.equal(weights.tensors[tensor].read(), parameter), tensor


@pytest.mark.parametrize(("hidden_act", "qkv_bias"), [("gelu", True), ("gelu_new", True), ("gelu", False)])
@torch.no_grad()
def test_weights_saved_by_transformers_give_its_logits(hidden_act: str, qkv_bias: bool, tmp_path: Path) -> None:
    """A folder as save_pretrained writes it, in one file and in several, with ImageNet's mean and deviation."""
    import transformers

    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    shape |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8, "qkv_bias": qkv_bias}
    config = transformers.ViTConfig(**shape, num_labels=4, hidden_act=hidden_act)
    config.layer_norm_eps = 1e-6
    theirs = randomised(transformers.ViTForImageClassification(config))
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    theirs.save_pretrained(tmp_path / "one")  # type: ignore[operator]
    theirs.save_pretrained(tmp_path / "several", max_shard_size="20KB")  # type: ignore[operator]
    assert (tmp_path / "several" / "model.safetensors.index.json").exists()
    x = pixels()
    scaled = (x / 2 + 0.5 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    for folder in (tmp_path / "one", tmp_path / "several"):
        assert (load_model(folder)(x) - theirs(x).logits).abs().max() <= 1e-5 * theirs(x).logits.abs().max()
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
        expected = theirs(scaled).logits
        assert (load_model(folder)(x) - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ({"pooling": "gap"}, "pools by the class token only"),
        ({"pooling": "map"}, "pools by the class token only"),
        ({"representation_size": 24}, "has no representation layer"),
        ({"trunk": [1], "trunk_width": 32}, "has no ResNet trunk"),
        ({"positions_at": "every_layer"}, "every layer of positions"),
        ({"positions": "relative"}, "relative positions"),
    ],
)
def test_what_transformers_has_not_is_refused_with_the_reason(
    variant: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """Never dropped, never approximated; nothing is written."""
    config = tiny_model(**variant)
    with pytest.raises(UserError, match=reason) as caught:
        write_transformers_folder(in_memory(build_model(config, 3), config), tmp_path / "out")
    one_line(caught.value)
    assert not (tmp_path / "out").exists()


def _edited(file: str = "config.json", **changes: Any) -> Any:
    def edit(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, **changes}))

    return edit


def _processor(**changes: Any) -> Any:
    return _edited("preprocessor_config.json", **changes)


def _tensors(change: Any) -> Any:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_edited(hidden_act="relu"), "hidden_act is 'relu', expected GELU"),
        (_edited(qkv_bias=False), "tensors unknown: vit.encoder.layer.0.attention"),
        (_edited(patch_size=5), "is not a multiple of model.patch_size"),
        (_edited(hidden_size="wide"), "config.json: hidden_size is 'wide', expected an integer"),
        (_edited(num_hidden_layers=4000), "num_hidden_layers is 4000, expected an integer from 1 to 1024"),
        (_edited(pretrain={"loss": "focal"}), "loss is 'focal'"),
        (_edited(pretrain=3), "config.json: pretrain: is 3, expected an object"),
        (_tensors(lambda t: t.update({f"vit.{POOLER}": torch.zeros(32, 32)})), f"tensors unknown: vit.{POOLER}"),
        (_processor(resample=1), r"preprocessor_config.json: resample is 1, expected one of 2 .bilinear., 3 .bicubic."),
        (_processor(image_mean=[0.5, 0.5]), "expected three numbers"),
        (_processor(image_std=[0.5, 0, 0.5]), "expected three numbers"),
        (_processor(rescale_factor="1"), "preprocessor_config.json: rescale_factor is '1', expected a number"),
        (_tensors(lambda t: t.pop("classifier.bias")), "tensors missing: classifier.bias"),
        (_tensors(lambda t: t.update(spare=torch.zeros(1))), "tensors unknown: spare"),
        (_tensors(lambda t: t.update({"classifier.bias": torch.zeros(4)})), r"classifier.bias has shape \(4,\)"),
        (_tensors(lambda t: t["classifier.bias"].fill_(float("inf"))), "classifier.bias holds values"),
        (lambda f: os.truncate(f / "model.safetensors", 4000), "model.safetensors: damaged"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "model.bin: .*pickle of more",
        ),
    ],
)
def test_a_damaged_folder_is_one_line(damage: Any, message: str, tmp_path: Path) -> None:
    """Each names the file, and the key or the tensor."""
    config = tiny_model()
    write_transformers_folder(in_memory(randomised(build_model(config, 3)), config, NAMES), tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path / "out")
    assert "out" in one_line(caught.value)


def test_another_epsilon_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers' default of 1e-12 is not what Google's weights were trained with: taken as 1e-6, with a warning."""
    config = tiny_model()
    weights = replace(in_memory(build_model(config, 3), config), class_names=())
    write_transformers_folder(weights, tmp_path / "out")
    _edited(layer_norm_eps=1e-12)(tmp_path / "out")
    assert read_weights(tmp_path / "out").class_names == ()
    assert "layer_norm_eps 1e-12 becomes 1e-06" in "".join(capsys.readouterr())


def test_a_pooler_without_axes_is_one_line(tmp_path: Path) -> None:
    """Its first axis tells the representation layer's size."""
    config = tiny_model(representation_size=24)
    write_transformers_folder(in_memory(build_model(config, 0), config), tmp_path / "out")
    _tensors(lambda t: t.update({POOLER: torch.tensor(1.0)}))(tmp_path / "out")
    with pytest.raises(UserError, match=rf"out: {POOLER} has shape \(\), expected 2 axes"):
        load_model(tmp_path / "out")


def test_resizing_that_transformers_would_do_otherwise_is_refused(tmp_path: Path) -> None:
    """timm's folders may name filters that the processor has not for its tensors."""
    config = tiny_model()
    weights = in_memory(build_model(config, 3), config, NAMES, interpolation="lanczos")
    with pytest.raises(UserError, match="its images are resized by lanczos, known are bilinear and bicubic"):
        write_transformers_folder(weights, tmp_path / "out")


# --- what the processor does to images --------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("kind", ["ViTImageProcessor", "DeiTImageProcessor"])
def test_real_photos_are_evaluated_as_by_its_processor(
    kind: str, resample: int, test_data: Path, tmp_path: Path
) -> None:
    """Whole ImageNet photos, from the file on: every pixel equals the processor's, also that of DeiT, which crops the
    centre of a larger square; and the folder that is written again says the same.
    """
    import transformers

    config = tiny_model(image_size=96)
    write_transformers_folder(in_memory(build_model(config, 3), config, NAMES), tmp_path / "first")
    _edited(pretrain={})(tmp_path / "first")
    crop = {"do_center_crop": True, "crop_size": {"height": 96, "width": 96}} if kind.startswith("DeiT") else {}
    side = 112 if crop else 96
    _processor(image_processor_type=kind, resample=resample, size={"height": side, "width": side}, **crop)(
        tmp_path / "first"
    )
    weights = read_weights(tmp_path / "first")
    write_transformers_folder(weights, tmp_path / "second")
    written = json.loads((tmp_path / "second" / "preprocessor_config.json").read_text())
    assert (written["image_processor_type"], written["size"]["height"], written["resample"]) == (kind, side, resample)
    assert weights.eval_transform == "transformers" and weights.eval_crop == 96 / side
    assert (weights.interpolation, weights.loss) == ({2: "bilinear", 3: "bicubic"}[resample], None)
    settings = DataConfig(
        eval_transform="transformers", eval_crop=weights.eval_crop, interpolation=cast(Any, weights.interpolation)
    )
    processors = [getattr(transformers, kind).from_pretrained(tmp_path / name) for name in ("first", "second")]
    with tarfile.open(test_data / "imagenet_val_fullsize_dev-000000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")][::2]
        photos = [cast(Any, tar.extractfile(member)).read() for member in members]
    assert len(photos) >= 5
    for data in photos:
        found = to_float(eval_image(decode(data), 96, settings), torch.float32)
        with Image.open(io.BytesIO(data)) as image:
            for processor in processors:
                expected = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
                assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
        {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    ],
)
@torch.no_grad()
def test_every_scaling_of_the_processor_is_taken_over(changes: dict[str, Any], tmp_path: Path) -> None:
    """What its own model makes of its own processor's pixels is what ours makes of images in [-1, 1]."""
    import transformers

    config = tiny_model()
    model = randomised(build_model(config, 3))
    write_transformers_folder(in_memory(model, config, NAMES, **SQUASHED), tmp_path / "out")
    _processor(**changes)(tmp_path / "out")
    pixels = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    processor = transformers.ViTImageProcessor.from_pretrained(tmp_path / "out")
    theirs: Any = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    expected = theirs(processor(pixels, return_tensors="pt")["pixel_values"].float()).logits
    found = load_model(tmp_path / "out")(to_float(pixels[None], torch.float32))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"size": {"height": 24, "width": 24}}, "size {'height': 24, 'width': 24}: not known here"),
        ({"size": {"height": 24, "width": 16}}, "size is {'height': 24, 'width': 16}, which is not square"),
        ({"size": {"shortest_edge": 16, "longest_edge": 20}}, "size is {'longest_edge': 20, 'shortest_edge': 16}, exp"),
        ({"do_resize": False}, "do_resize False"),
    ],
)
def test_a_processor_that_is_not_known_is_told(
    changes: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are of use all the same; how images are evaluated is said."""
    config = tiny_model()
    write_transformers_folder(in_memory(build_model(config, 3), config, NAMES, **SQUASHED), tmp_path / "out")
    _edited(pretrain={})(tmp_path / "out")
    _processor(**changes)(tmp_path / "out")
    capsys.readouterr()
    assert read_weights(tmp_path / "out").eval_crop == 1.0
    message = capsys.readouterr().err
    assert told in message and "evaluation squashes images to the model's 16 pixels" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"shortest_edge": 112}, "do_center_crop": True, "crop_size": {"height": 96, "width": 96}},
        {"size": 112, "default_to_square": False, "do_center_crop": True, "crop_size": 96},
        {"size": [112, 112], "do_center_crop": True, "crop_size": [96, 96]},
        {"size": 96},
    ],
)
def test_sizes_are_those_of_its_processor(changes: dict[str, Any], test_data: Path, tmp_path: Path) -> None:
    """The shorter side resized instead of a squash, and every form of a size: every pixel, of whole ImageNet photos;
    and so does the folder that is written again.
    """
    import transformers

    config = tiny_model(image_size=96)
    write_transformers_folder(in_memory(build_model(config, 3), config, NAMES, **SQUASHED), tmp_path / "first")
    _edited(pretrain={})(tmp_path / "first")
    (tmp_path / "first" / "preprocessor_config.json").write_text(json.dumps({"resample": 3, **changes}))
    weights = read_weights(tmp_path / "first")
    write_transformers_folder(weights, tmp_path / "second")
    found = read_weights(tmp_path / "second")
    assert (found.eval_transform, found.eval_crop) == (weights.eval_transform, weights.eval_crop)
    names = ("eval_transform", "eval_crop", "interpolation")
    settings = DataConfig(**{name: getattr(weights, name) for name in names})
    theirs = transformers.ViTImageProcessor.from_pretrained(tmp_path / "first")
    written = transformers.AutoImageProcessor.from_pretrained(tmp_path / "second")
    with tarfile.open(test_data / "imagenet_val_fullsize_dev-000000.tar") as tar:
        photos = [cast(Any, tar.extractfile(m)).read() for m in tar if m.name.endswith(".jpg")][:6:2]
    for data in photos:
        found = to_float(eval_image(decode(data), 96, settings), torch.float32)
        with Image.open(io.BytesIO(data)) as image:
            for processor in (theirs, written):
                expected = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
                assert (found - expected).abs().max() < 1e-6


def test_keys_that_are_not_known_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They may change the pixels or the function; those that transformers itself writes are known."""
    import transformers

    theirs: Any = transformers.ViTForImageClassification(
        transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, intermediate_size=48, num_attention_heads=2)
    )
    theirs.save_pretrained(tmp_path / "out")
    transformers.ViTImageProcessor().save_pretrained(tmp_path / "out")
    read_weights(tmp_path / "out")
    assert "not known" not in capsys.readouterr().err
    _edited(num_register_tokens=4)(tmp_path / "out")
    _processor(do_pad=True)(tmp_path / "out")
    read_weights(tmp_path / "out")
    told = capsys.readouterr().err
    assert "config.json: num_register_tokens: not known here" in told
    assert "preprocessor_config.json: do_pad: not known here" in told


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": [16, 16], "patch_size": [8, 8]},
        {"architectures": None},
        {"architectures": []},
        {"id2label": None, "label2id": None, "num_labels": 3},
    ],
)
@torch.no_grad()
def test_other_legal_json_is_read(changes: dict[str, Any], tmp_path: Path) -> None:
    """What transformers loads, with the same logits."""
    import transformers

    config = tiny_model()
    write_transformers_folder(in_memory(randomised(build_model(config, 3)), config, **SQUASHED), tmp_path / "out")
    _edited(**changes)(tmp_path / "out")
    theirs: Any = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    expected = theirs(pixels()).logits
    assert expected.shape == (2, 3)
    assert (load_model(tmp_path / "out")(pixels()) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_one_mean_for_all_channels_is_read(tmp_path: Path) -> None:
    """image_mean and image_std as numbers, not lists."""
    config = tiny_model()
    write_transformers_folder(in_memory(randomised(build_model(config, 3)), config, **SQUASHED), tmp_path / "out")
    logits = []
    for mean, std in (([0.4, 0.4, 0.4], [0.2, 0.2, 0.2]), (0.4, 0.2), ([0.4], [0.2])):
        _processor(image_mean=mean, image_std=std)(tmp_path / "out")
        logits.append(load_model(tmp_path / "out")(pixels()))
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(("key", "size"), [("image_size", [16, 24]), ("patch_size", [8, 4])])
def test_what_is_not_square_says_so(key: str, size: list[int], tmp_path: Path) -> None:
    """And not that patches do not fit, or that a list is no number."""
    config = tiny_model()
    write_transformers_folder(in_memory(build_model(config, 3), config, NAMES), tmp_path / "out")
    _edited(**{key: size})(tmp_path / "out")
    with pytest.raises(UserError, match=rf"config.json: {key} is .*, which is not square") as caught:
        read_weights(tmp_path / "out")
    one_line(caught.value)


@pytest.mark.parametrize(
    ("loss", "problem_type"),
    [("sigmoid", "multi_label_classification"), ("softmax", "single_label_classification"), (None, None)],
)
def test_the_loss_is_its_problem_type(loss: str | None, problem_type: str | None, tmp_path: Path) -> None:
    """By which its pipeline makes probabilities; read from the folders of others too, and instead of what a folder of
    ours kept, which a later training may have made stale.
    """
    import transformers

    config = tiny_model()
    write_transformers_folder(
        in_memory(randomised(build_model(config, 3)), config, NAMES, loss=loss, **SQUASHED), tmp_path / "out"
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("problem_type") == problem_type
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8))
    classify: Any = transformers.pipeline("image-classification", str(tmp_path / "out"))
    total = sum(row["score"] for row in classify(image))
    assert (abs(total - 1) < 1e-5) == (loss != "sigmoid")
    assert read_weights(tmp_path / "out").loss == loss
    _edited(pretrain={"loss": "softmax"}, problem_type="multi_label_classification")(tmp_path / "out")
    assert read_weights(tmp_path / "out").loss == "sigmoid"
    _edited(problem_type="regression")(tmp_path / "out")
    with pytest.raises(UserError, match="config.json: problem_type is 'regression'"):
        read_weights(tmp_path / "out")


def test_a_mean_that_is_not_google_s_is_written(tmp_path: Path) -> None:
    """A run with data.mean: its processor says so, and the folder comes back with every bit as it was."""
    import transformers

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config = tiny_model()
    model = randomised(build_model(config, 3))
    write_transformers_folder(in_memory(model, config, NAMES, mean=mean, std=std), tmp_path / "out")
    processor: Any = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (mean, std)
    weights = read_weights(tmp_path / "out")
    assert weights.normalisation == (mean, std)
    for tensor, parameter in own_tensors(model).items():
        assert torch.equal(weights.tensors[tensor].read(), parameter), tensor


@pytest.mark.parametrize(
    ("use", "side", "crops", "resample"),
    [
        ({"eval_transform": "vit"}, 16, False, 2),  # bilinear always; data.interpolation is that of crops
        ({"eval_transform": "fewshot", "eval_crop": 0.8}, 20, True, 2),
        ({"eval_transform": "timm_squash", "eval_crop": 0.8}, 20, True, 3),
        ({"eval_transform": "timm_squash", "eval_crop": 1.0}, 16, False, 3),
    ],
)
def test_a_squash_is_written_as_one(use: dict[str, Any], side: int, crops: bool, resample: int, tmp_path: Path) -> None:
    """To a square of these pixels, of which the centre may be kept; not as a crop of the shorter side."""
    config = tiny_model()
    weights = in_memory(build_model(config, 3), config, NAMES, interpolation="bicubic", **use)
    write_transformers_folder(weights, tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written["size"] == {"height": side, "width": side} and written["resample"] == resample
    assert written.get("do_center_crop", False) == crops
    assert written["image_processor_type"] == ("DeiTImageProcessor" if crops else "ViTImageProcessor")


def test_a_runs_own_transform_and_loss_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The processor cannot say timm's transform: a word of it when written; kept beside, also when transformers saves
    the model anew.
    """
    import transformers

    use = {"eval_transform": "timm", "eval_crop": 0.9, "interpolation": "bicubic", "loss": "sigmoid"}
    config = tiny_model()
    write_transformers_folder(in_memory(build_model(config, 3), config, NAMES, **use), tmp_path / "out")
    assert "do not have eval_transform=timm, by which these weights were evaluated" in capsys.readouterr().err
    theirs: Any = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
    theirs.save_pretrained(tmp_path / "anew")
    for name in ("out", "anew"):
        weights = read_weights(tmp_path / name)
        assert {key: getattr(weights, key) for key in use} == use
