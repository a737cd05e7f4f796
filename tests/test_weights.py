"""Weights on disk: the same logits from a run, a checkpoint, a converted folder and timm; damaged files are told."""

import itertools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import changed, tiny_config
from torch import nn
from weights_on_disk import in_memory, one_line, randomised, save_run, tiny_model

import pretrain.models.weights
from pretrain.config import DataConfig, ModelConfig
from pretrain.errors import UserError
from pretrain.models import load_model
from pretrain.models.build import build_model
from pretrain.models.equivalent import kernels_for_timm, kernels_from_timm, mapped, own_tensors
from pretrain.models.timm_folder import write_own_folder, write_timm_folder
from pretrain.models.weights import check_same_function, load_tensors, read_weights, results_folder, weights_sha256

torch.set_num_threads(1)
NAMES = ["ash", "birch, silver", "cedar"]
VARIANTS: dict[str, dict[str, Any]] = {
    "token": {},
    "token_no_row": {"class_position": False},
    "gap_exact": {"pooling": "gap", "gelu": "exact"},
    "gap_sincos2d": {"pooling": "gap", "positions": "sincos2d"},
    "token_sincos2d": {"positions": "sincos2d", "width": 44, "mlp_dim": 49},  # int(44 * (49 / 44)) is 48
    "token_learned2d": {"positions": "learned2d"},
    "gap_none": {"pooling": "gap", "positions": "none"},
    "map": {"pooling": "map"},
    "R+Ti": {"name": "R+Ti", "patch_size": 32, "image_size": 64},
    "R26+S": {"name": "R26+S", "patch_size": 32, "image_size": 64},
    "R50+B": {"name": "R50+B", "patch_size": 16, "image_size": 32},
    "deit3": {"layer_scale": 1e-4, "class_position": False, "gelu": "exact"},
    "headless": {},
    "timm": {"name": "timm:test_vit", "image_size": 32},
}
# What no other library has, and a folder of ours therefore keeps.
OWN_VARIANTS: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "rep": {"representation_size": 24},
    "every_layer": {"positions_at": "every_layer"},
    "shared": {"positions": "learned2d", "positions_at": "shared"},
    "relative": {"positions": "relative"},
    "trunk": {"trunk": [1, 2], "trunk_width": 32, "image_size": 32},
}


def model_config(variant: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**variant) if variant.get("name", "").startswith("timm:") else tiny_model(**variant)


def random_model(variant: str) -> tuple[nn.Module, ModelConfig]:
    config = model_config(OWN_VARIANTS[variant])
    return randomised(build_model(config, 0 if variant == "headless" else 3)), config


def images(size: int) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def fresh_process(program: str, folder: Path, outputs: Path) -> dict[str, Any]:
    """Runs a program of another library on all folders in `folder`; returns the facts that it prints."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning:timm", "-c", program, str(folder), str(outputs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


_TIMM = """
import json, sys, timm, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
outputs, facts = {}, {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    size = model.pretrained_cfg["input_size"][1]
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    given = folder.parent.parent / f"{folder.name}.images"
    if given.exists():
        images = load_file(given)["images"]
    with torch.no_grad():
        if folder.name.startswith("R"):
            model, images = model.double(), images.double()
        outputs[folder.name] = model(images).float().contiguous()
    keys = ("label_names", "crop_pct", "interpolation", "mean", "std")
    facts[folder.name] = {key: model.pretrained_cfg.get(key) for key in keys}
assert not any(name.startswith("pretrain") for name in sys.modules)
save_file(outputs, sys.argv[2])
print(json.dumps(facts))
"""


def test_timm_folders_load_in_a_fresh_process_with_the_same_logits(tmp_path: Path) -> None:
    """For every pooling, position table, GELU and hybrid, and a model of timm's own: 1e-5 of the largest logit; class
    names and preprocessing come along; this package is not imported.

    Hybrids are compared in float64: 50 normalised convolutions turn float32's rounding into 2e-5, in both alike.
    """
    expected = {}
    for name in VARIANTS:
        model, config = random_model(name)
        names = () if name in ("gap_exact", "headless") else tuple(NAMES)
        weights = in_memory(model, config, names, eval_crop=0.9, interpolation="bilinear")
        weights = replace(weights, num_classes=0 if name == "headless" else 3)
        write_timm_folder(weights, tmp_path / "all" / name)
        x = images(config.image_size)
        expected[name] = (model.double()(x.double()).float() if name.startswith("R") else model(x)).detach()
    facts = fresh_process(_TIMM, tmp_path / "all", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    for name, logits in expected.items():
        assert (found[name] - logits).abs().max() <= 1e-5 * logits.abs().max(), name
        assert facts[name].pop("label_names") == (NAMES if name not in ("gap_exact", "headless") else None)
        half = [0.5, 0.5, 0.5]
        assert facts[name] == {"crop_pct": 0.9, "interpolation": "bilinear", "mean": half, "std": half}


@pytest.mark.parametrize(
    ("transform", "crop_mode", "crop_pct", "interpolation"),
    [
        ("timm", "center", 0.9, "bicubic"),
        ("timm_squash", "squash", 0.9, "bicubic"),
        ("timm_border", "border", 0.9, "bicubic"),
        ("vit", "squash", 1.0, "bilinear"),
        ("fewshot", "squash", 0.9, "bilinear"),
        ("transformers", "squash", 0.9, "bicubic"),
        ("transformers_shortest", "center", 0.9, "bicubic"),
        ("big_vision", "center", 0.9, "box"),
    ],
)
def test_timm_is_told_the_nearest_transform(
    transform: str,
    crop_mode: str,
    crop_pct: float,
    interpolation: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A squash stays a squash: without the key timm crops, and names another class. Its own three without a word."""
    model, config = random_model("token")
    mean = (0.4, 0.5, 0.6)
    write_timm_folder(in_memory(model, config, eval_transform=transform, eval_crop=0.9, mean=mean), tmp_path / "t")
    cfg = json.loads((tmp_path / "t" / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["crop_mode"], cfg["crop_pct"], cfg["interpolation"]) == (crop_mode, crop_pct, interpolation)
    assert (cfg["mean"], cfg["std"]) == ([0.4, 0.5, 0.6], [0.5, 0.5, 0.5])
    told = capsys.readouterr().err
    assert (f"do not have eval_transform={transform}" in told) == (not transform.startswith("timm"))
    weights = read_weights(tmp_path / "t")
    assert (weights.eval_transform, weights.eval_crop, weights.mean) == (transform, 0.9, mean)


def test_a_plain_copy_of_hybrid_kernels_would_not_do(tmp_path: Path) -> None:
    """timm standardises kernels by another rule: copied as they are, its features differ by more than rounding."""
    model, config = random_model("R26+S")
    weights = in_memory(model, config)
    name = "patch_embed.backbone.stages.0.blocks.0.conv2.weight"
    small = mapped(weights.tensors[name], weights.tensors[name].shape, lambda t: t * 0.01)
    weights = replace(weights, tensors={**weights.tensors, name: small})
    scaled = kernels_for_timm(weights).tensors[name].read()
    kernel, wide = small.read().double().flatten(1), scaled.double().flatten(1)

    def standard(w: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
        return (w - w.mean(1, keepdim=True)) / deviation

    ours = standard(kernel, kernel.std(1, correction=0, keepdim=True) + 1e-5)
    copied = standard(kernel, (kernel.var(1, correction=0, keepdim=True) + 1e-8).sqrt())
    assert (standard(wide, (wide.var(1, correction=0, keepdim=True) + 1e-8).sqrt()) - ours).abs().max() < 1e-6
    assert (copied - ours).abs().max() > 1e-3
    back = kernels_from_timm(kernels_for_timm(weights)).tensors[name].read().double().flatten(1)
    assert (standard(back, back.std(1, correction=0, keepdim=True) + 1e-5) - ours).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["vt_token", "bv_gap_learn", "bv_gap_sincos2d", "bv_map_learn", "bv_tok_learn"])
def test_googles_weights_give_googles_logits_in_timm(name: str, test_fixtures: Path, tmp_path: Path) -> None:
    """npz -> here -> timm's own code in a fresh process: the logits of Google's code, to the fixture's 1e-5."""
    folder = test_fixtures / name
    size = json.loads((folder / "config.json").read_text())["image_size"]
    write_timm_folder(read_weights(folder / "checkpoint.npz", size), tmp_path / "all" / name)
    x = torch.from_numpy(np.load(folder / "images.npy")).permute(0, 3, 1, 2).contiguous()
    save_file({"images": x}, tmp_path / f"{name}.images")
    fresh_process(_TIMM, tmp_path / "all", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")[name].numpy()
    assert np.abs(found - np.load(folder / "logits.npy")).max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rep", "no representation layer"),
        ("every_layer", "every layer of positions"),
        ("relative", "relative positions"),
    ]
    + [("shared", "shared of positions"), ("trunk", "no hybrid Ti/8 with trunk")],
)
def test_what_timm_has_not_is_refused_with_the_reason(name: str, reason: str, tmp_path: Path) -> None:
    """Never dropped, never approximated; nothing is written."""
    model, config = random_model(name)
    with pytest.raises(UserError, match=reason) as caught:
        write_timm_folder(in_memory(model, config), tmp_path / "out")
    one_line(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", OWN_VARIANTS)
def test_a_folder_of_ours_keeps_everything(name: str, tmp_path: Path) -> None:
    """Config, class names, every bit of every tensor, the logits."""
    model, config = random_model(name)
    names = () if name == "headless" else tuple(NAMES)
    given = in_memory(model, config, names, loss="sigmoid", eval_transform="vit")
    given = replace(given, num_classes=len(names))  # timm's model has its own name for the head
    write_own_folder(given, tmp_path / "own")
    weights = read_weights(tmp_path / "own")
    found = (weights.model, weights.class_names, weights.loss, weights.eval_transform)
    assert found == (config, names, "sigmoid", "vit")
    for tensor, parameter in own_tensors(model).items():
        assert torch.equal(weights.tensors[tensor].read(), parameter), tensor
    x = images(config.image_size)
    assert torch.equal(load_model(tmp_path / "own")(x), model(x))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_timm_folder_of_ours_reads_back(name: str, tmp_path: Path) -> None:
    """The same logits; and, but for tables that were written out and hybrids' scaled kernels, the same bits."""
    model, config = random_model(name)
    write_timm_folder(in_memory(model, config), tmp_path / "timm")
    loaded, x = load_model(tmp_path / "timm"), images(config.image_size)
    difference = (loaded(x) - model(x)).abs().max()
    # 50 convolutions amplify the rounding of the scaled kernels
    assert difference <= (1e-4 if "R" in name else 1e-7) * model(x).abs().max()
    if "R" not in name and name not in ("token_learned2d", "gap_none"):
        assert torch.equal(loaded(x), model(x)) and read_weights(tmp_path / "timm").model == config


TIMM_MODELS: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224": {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "vit_base_patch8_224": {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "act_layer": "gelu_tanh"},
    "vit_base_patch16_siglip_224": {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3},  # MAP head
    "vit_tiny_r_s16_p8_224": {"img_size": 64, "embed_dim": 48, "depth": 2},
    "deit3_small_patch16_224": {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "test_vit": {},
    "test_vit3": {},  # layer scale, registers: timm's own code
    "resnetv2_50x1_bit": {},
}


@pytest.mark.parametrize("name", TIMM_MODELS)
@torch.no_grad()
def test_weights_saved_by_timm_give_timms_logits(name: str, tmp_path: Path) -> None:
    """A folder as timm itself writes it: our ViT where it is the same function, timm's model elsewhere; and what
    expects other means and deviations than 0.5 gets images in [-1, 1] all the same.
    """
    import timm
    from timm.models import save_for_hf

    theirs: Any = randomised(timm.create_model(name, num_classes=5, **TIMM_MODELS[name]))
    save_for_hf(theirs, tmp_path / name, model_args=TIMM_MODELS[name], safe_serialization=True)
    size, cfg = theirs.pretrained_cfg["input_size"][1], theirs.pretrained_cfg
    size = TIMM_MODELS[name].get("img_size", size)
    x = images(size)
    mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    expected = theirs((x / 2 + 0.5 - mean) / std)
    weights = read_weights(tmp_path / name)
    ours = load_model(tmp_path / name)
    assert (ours(x) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (weights.model.timm_name is None) == name.startswith(("vit_", "deit3", "test_vit")) or name == "test_vit3"
    assert weights.model.layer_scale == (1e-6 if name.startswith("deit3") else None)
    assert weights.interpolation == cfg["interpolation"] and weights.eval_crop == cfg["crop_pct"]


@pytest.mark.parametrize("variant", ["token", "gap_sincos2d", "map", "timm"])
def test_run_checkpoint_and_converted_folder_give_the_same_model(variant: str, tmp_path: Path) -> None:
    """Bit for bit the logits of the model that was saved, in evaluation mode; the same classes and preprocessing."""
    config = tiny_config(tmp_path, tmp_path, model=vars(model_config(VARIANTS[variant])), data__eval_crop=0.9)
    config = changed(config, loss="sigmoid")
    model = save_run(config, NAMES)
    run = tmp_path / "tiny"
    write_timm_folder(read_weights(run), tmp_path / "converted")
    x = images(config.model.image_size)
    for path in (run, run / "checkpoints" / "step-0000000020", tmp_path / "converted"):
        loaded, weights = load_model(path), read_weights(path)
        assert not loaded.training and torch.equal(loaded(x), model(x))
        assert (weights.model, weights.num_classes, list(weights.class_names)) == (config.model, 3, NAMES)
        assert (weights.eval_crop, weights.interpolation, weights.loss) == (0.9, "bicubic", "sigmoid")


def test_either_of_a_run_that_keeps_an_average_is_read(tmp_path: Path) -> None:
    """Bit for bit, from the run and from its checkpoint; the average unless asked; each under a digest of its own."""
    config, plain = tiny_config(tmp_path, tmp_path), tiny_config(tmp_path, tmp_path, name="plain")
    average = randomised(build_model(config.model, 3), seed=1)
    kept = {"trained": save_run(config, ["a", "b", "c"], average=average), "average": average}
    run = tmp_path / "tiny"
    checkpoint = run / "checkpoints" / "step-0000000020"
    for path, asked in itertools.product((run, checkpoint), (None, "trained", "average")):
        weights = read_weights(path, of_run=asked)
        assert weights.of_run == (asked or "average") and weights.source == checkpoint
        for name, tensor in own_tensors(kept[weights.of_run]).items():
            assert torch.equal(weights.tensors[name].read(), tensor), (asked, name)
    digests = {of_run: weights_sha256(checkpoint, of_run) for of_run in (None, *kept)}
    assert digests[None] == digests["average"] != digests["trained"]
    model = save_run(plain, ["a", "b", "c"])
    weights = read_weights(tmp_path / "plain", of_run="trained")  # the only ones: nothing is to be told
    assert weights.of_run is None and torch.equal(weights.tensors["head.bias"].read(), model.get_parameter("head.bias"))
    write_own_folder(read_weights(run), tmp_path / "folder")
    assert read_weights(tmp_path / "folder").of_run == "average"
    refused = {
        ("plain", "average"): "step-0000000020: keeps no average .*: leave out --weights average",
        ("folder", "trained"): "folder: is no run or checkpoint, of which --weights trained could choose; leave it out",
        ("timm:vit_tiny_patch16_224", "average"): "timm:vit_.*: is no run or checkpoint",
    }
    for (name, asked), message in refused.items():
        with pytest.raises(UserError, match=message) as caught:
            read_weights(Path(name) if ":" in name else tmp_path / name, of_run=asked)
        assert one_line(caught.value)


def test_a_converted_folder_is_readable_by_others(tmp_path: Path) -> None:
    """safetensors makes files of mode 600: a shared folder would be of no use to colleagues."""
    model, config = random_model("token")
    write_timm_folder(in_memory(model, config), tmp_path / "converted")
    assert (tmp_path / "converted" / "model.safetensors").stat().st_mode & 0o444 == 0o444
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]


# --- damaged and foreign files ---------------------------------------------------------------------------------------


class _Payload:
    """Unpickling this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch '{self.target}'",)


def _edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def _with_pickle(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(pickle.dumps(_Payload(folder / "executed")))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (
        lambda f: _edit_tensors(f / "model.safetensors", lambda t: t.pop("norm.bias")),
        "converted: tensors missing: norm.bias",
    ),
    "extra tensor": (
        lambda f: _edit_tensors(f / "model.safetensors", lambda t: t.update(extra=torch.zeros(1))),
        "converted: tensors unknown: extra",
    ),
    "wrong shape": (
        lambda f: _edit_tensors(f / "model.safetensors", lambda t: t.update({"norm.bias": torch.zeros(31)})),
        r"converted: norm.bias has shape \(31,\), expected \(32,\)",
    ),
    "truncated": (
        lambda f: os.truncate(f / "model.safetensors", (f / "model.safetensors").stat().st_size - 100),
        "converted/model.safetensors: damaged",
    ),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), "converted/model.safetensors: damaged"),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), "converted: has no model.safetensors"),
    "pickle": (_with_pickle("model.safetensors"), "converted/model.safetensors: damaged"),
    "pickle as config": (_with_pickle("config.json"), "converted/config.json: is not JSON"),
    "NaN": (
        lambda f: _edit_tensors(f / "model.safetensors", lambda t: t["norm.bias"].__setitem__(3, float("nan"))),
        "converted/model.safetensors: norm.bias holds values that are not finite",
    ),
    "config cut": (lambda f: os.truncate(f / "config.json", 50), "converted/config.json: is not JSON"),
    "config a list": (
        lambda f: (f / "config.json").write_text("[1]"),
        r"converted/config.json: is \[1\], expected an object",
    ),
    "foreign": (
        lambda f: _edit_json(f / "config.json", lambda v: [v.pop(k) for k in ("pretrain", "architecture")]),
        "config.json: is neither timm's nor of tools/convert.py",
    ),
    "unknown model": (
        lambda f: _edit_json(f / "config.json", lambda v: v["pretrain"]["model"].update(name="XXL")),
        "converted/config.json: model.name is 'XXL', expected one of",
    ),
    "text for a number": (
        lambda f: _edit_json(f / "config.json", lambda v: v["pretrain"]["model"].update(width="wide")),
        "converted/config.json: model.width is 'wide', expected a whole number",
    ),
    "another spelling": (
        lambda f: _edit_json(f / "config.json", lambda v: v["pretrain"]["model"].update(gelu="Tanh")),
        "converted/config.json: model.gelu: Invalid value 'Tanh', expected one of",
    ),
    "unknown setting": (
        lambda f: _edit_json(f / "config.json", lambda v: v["pretrain"]["model"].update(registers=4)),
        "converted/config.json: model.registers: no such key in model",
    ),
    "no setting": (
        lambda f: _edit_json(f / "config.json", lambda v: v["pretrain"]["model"].pop("name")),
        "converted/config.json: no value for model.name",
    ),
    "a secret": (
        lambda f: _edit_json(f / "config.json", lambda v: v["pretrain"]["model"].update(name="${oc.env:HOME}")),
        "converted/config.json: .* resolvers are not allowed",
    ),
    "too deep": (
        lambda f: _edit_json(f / "config.json", lambda v: v["pretrain"]["model"].update(depth=100_000)),
        "converted/config.json: model.depth is 100000, expected at most 65536",
    ),
    "transform": (
        lambda f: _edit_json(f / "config.json", lambda v: v["pretrain"].update(eval_transform="squash")),
        "converted: eval_transform is 'squash', expected one of timm, timm_squash",
    ),
    "interpolation": (
        lambda f: _edit_json(f / "config.json", lambda v: v["pretrain"].update(interpolation="cubic")),
        "converted: interpolation is 'cubic', expected one of nearest",
    ),
    "loss": (
        lambda f: _edit_json(f / "config.json", lambda v: v["pretrain"].update(loss="focal")),
        "converted: loss is 'focal', expected one of softmax, sigmoid, None",
    ),
    "crop": (
        lambda f: _edit_json(f / "config.json", lambda v: v["pretrain"].update(eval_crop=7)),
        "converted: eval_crop is 7.0, expected 0.1 to 1",
    ),
    "unknown use": (
        lambda f: _edit_json(f / "config.json", lambda v: v["pretrain"].update(evalcrop=0.5)),
        "converted/config.json: pretrain.evalcrop: no such key",
    ),
    "layout": (
        lambda f: _edit_json(f / "config.json", lambda v: v["pretrain"].update(layout="Timm")),
        "converted/config.json: pretrain.layout is 'Timm', expected one of timm, pretrain",
    ),
    "class names": (
        lambda f: _edit_json(f / "config.json", lambda v: v.update(label_names=["ash", "birch"])),
        "converted: has 2 class names for 3 classes",
    ),
    "timm: class names": (
        lambda f: _edit_json(f / "config.json", lambda v: v.update(label_names=["ash"]) or v.pop("pretrain")),
        "converted: has 1 class names for 3 classes",
    ),
    "timm: heads": (
        lambda f: _edit_json(f / "config.json", lambda v: v["model_args"].update(num_heads=5) or v.pop("pretrain")),
        "converted/config.json: cannot be read .AssertionError",
    ),
    "timm: too deep": (
        lambda f: _edit_json(f / "config.json", lambda v: v["model_args"].update(depth=100_000) or v.pop("pretrain")),
        "converted/config.json: model_args.depth is 100000, expected at most 65536",
    ),
    "timm: pooling": (
        lambda f: _edit_json(f / "config.json", lambda v: v["model_args"].update(global_pool="x") or v.pop("pretrain")),
        "converted/config.json: cannot be read .AssertionError",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_converted_folder_is_one_line_that_names_the_file(damage: str, tmp_path: Path) -> None:
    """A UserError of one line, and nothing in the file is executed."""
    model, config = random_model("token")
    folder = tmp_path / "converted"
    write_timm_folder(in_memory(model, config, tuple(NAMES)), folder)
    break_it, message = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    one_line(caught.value)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("checksums_fit", [False, True])
def test_a_pickle_in_a_checkpoint_is_not_executed(
    checksums_fit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when the checksum tells, nor when someone made it fit."""
    save_run(tiny_config(tmp_path, tmp_path), NAMES)
    folder = tmp_path / "tiny" / "checkpoints" / "step-0000000020"
    path = folder / "weights-00000-of-00001.safetensors"
    path.write_bytes(pickle.dumps(_Payload(folder / "executed")))
    if checksums_fit:
        monkeypatch.setattr(pretrain.models.weights, "validate", lambda path: None)
    with pytest.raises(UserError, match="step-0000000020: damaged" if checksums_fit else path.name) as caught:
        load_model(folder)
    one_line(caught.value)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "not found"),
        (lambda path: path.mkdir(), "is none of what can be read"),
        (lambda path: (path / "checkpoints").mkdir(parents=True), "has no checkpoint yet"),
        (lambda path: path.mkdir() or (path / "starts.jsonl").touch(), "is a run without checkpoints"),
        (lambda path: (path / "final" / "checkpoints").mkdir(parents=True), "holds runs; .*, as .*/some/final$"),
        (lambda path: path.mkdir() or (path / "latest").write_text("global_step3"), "is DeepSpeed's own checkpoint"),
    ],
)
def test_a_path_without_weights_says_what_is_expected(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    """Nothing there, an empty folder, a run that has not saved yet."""
    make(tmp_path / "some")
    with pytest.raises(UserError, match=f"some: {message}"):
        load_model(tmp_path / "some")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"gelu": "exact"}, "model.gelu is exact, was tanh"),
        ({"heads": 4}, "model.heads is 4, was 2"),
        ({"positions_at": "shared"}, "model.positions_at is shared, was stem"),
    ],
)
def test_weights_of_another_function_are_refused(other: dict[str, Any], said: str, tmp_path: Path) -> None:
    """What no name and no shape shows: the same tensors would compute something else, without a word."""
    model, config = random_model("token")
    weights = in_memory(model, config)
    load_tensors(build_model(tiny_model(**other), 3), weights)  # it would fit
    with pytest.raises(UserError, match=said):
        check_same_function(weights, tiny_model(**other), DataConfig())
    check_same_function(weights, tiny_model(dropout=0.1, drop_path=0.1, head_bias=-10.0), DataConfig())


@pytest.mark.parametrize(("other", "said"), [({"width": 48}, "width is 48, was 32"), ({"patch_size": 4}, "patch_size")])
def test_weights_of_another_size_are_refused_by_the_setting(other: dict[str, Any], said: str) -> None:
    """The first tensor that does not fit has a name that no setting has."""
    model, config = random_model("token")
    with pytest.raises(UserError, match=f"was trained as another model: model.{said}.*; set it as it was"):
        check_same_function(in_memory(model, config), tiny_model(**other), DataConfig())


def test_layer_scale_is_a_part_of_the_function_and_its_first_value_is_not() -> None:
    """Weights without it are refused by the setting's name, before a tensor is missing; another number is fine."""
    model, config = random_model("deit3")
    weights, deit3 = in_memory(model, config), OWN_VARIANTS["deit3"]
    for given, other in ((weights, {**deit3, "layer_scale": None}), (in_memory(*random_model("gap_exact")), deit3)):
        with pytest.raises(UserError, match="model.layer_scale is (None, was 0.0001|0.0001, was None)"):
            check_same_function(given, tiny_model(**other), DataConfig())
    check_same_function(weights, tiny_model(**{**deit3, "layer_scale": 0.1}), DataConfig())


def test_rates_of_training_do_not_stand_in_the_way(tmp_path: Path) -> None:
    """timm's arguments of a training with stochastic depth: they act in training alone. Others are named."""
    import timm
    from timm.models import save_for_hf

    theirs: Any = randomised(timm.create_model("test_vit3", num_classes=3))
    rates = {"drop_path_rate": 0.1, "drop_rate": 0.2, "proj_drop_rate": 0.1}
    save_for_hf(theirs, tmp_path / "timm", model_args=rates, safe_serialization=True)
    assert read_weights(tmp_path / "timm").model.timm_name == "test_vit3"
    _edit_json(tmp_path / "timm" / "config.json", lambda v: v["model_args"].update(init_values=0.5))
    with pytest.raises(UserError, match="model_args has .'init_values': 0.5.; a model of timm's"):
        read_weights(tmp_path / "timm")


def test_blocks_of_another_kind_are_not_ours(tmp_path: Path) -> None:
    """Norms behind attention and MLP have the same tensors as those before them, and are another function."""
    import timm
    from timm.models import save_for_hf

    options: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "qkv_bias": True}
    options |= {"class_token": True, "global_pool": "token", "fc_norm": False}
    name = "vit_base_patch16_rpn_224"
    theirs: Any = randomised(timm.create_model(name, num_classes=3, **options))
    save_for_hf(theirs, tmp_path / "timm", model_args=options, safe_serialization=True)
    with pytest.raises(UserError, match="model_args has .*; a model of timm's that is not a plain ViT"):
        read_weights(tmp_path / "timm")


def test_a_folder_cannot_choose_files_for_timm_to_read(tmp_path: Path) -> None:
    """model_args of somebody's config.json reach timm.create_model, which would open a checkpoint_path."""
    model, config = random_model("token")
    write_timm_folder(in_memory(model, config), tmp_path / "out")
    _edit_json(tmp_path / "out" / "config.json", lambda v: v.pop("pretrain"))
    _edit_json(tmp_path / "out" / "config.json", lambda v: v["model_args"].update(checkpoint_path="/etc/hostname"))
    with pytest.raises(UserError, match="model_args has .'checkpoint_path'.*remove it"):
        read_weights(tmp_path / "out")


def test_results_lie_where_reports_look(tmp_path: Path) -> None:
    """In a run or folder itself; never inside a checkpoint, which retention deletes; beside an .npz."""
    (tmp_path / "w.npz").touch()
    assert results_folder(tmp_path / "w.npz", "evaluation") == tmp_path / "w" / "evaluation"
    assert results_folder(tmp_path / "run", "pictures") == tmp_path / "run" / "pictures"
    assert results_folder(tmp_path / "run" / "checkpoints" / "step-1", "x") == tmp_path / "run" / "x"
