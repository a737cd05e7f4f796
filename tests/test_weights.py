"""Weights on disk: the same logits from a run, a checkpoint, a converted folder and timm; damaged files are told."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import changed, tiny_config
from torch import nn
from weights_on_disk import load_tool, one_line_error, randomised, run_tool, save_run

import pretrain.models.weights
from pretrain.config import ModelConfig
from pretrain.errors import UserError
from pretrain.models import load_model
from pretrain.models.build import build_model
from pretrain.models.weights import Weights, read_weights, write_timm_folder

torch.set_num_threads(1)
NAMES = ["ash", "birch, silver", "cedar"]
VARIANTS = {
    "token": {},
    "gap_exact": {"pooling": "gap", "gelu": "exact"},
    "gap_sincos2d": {"pooling": "gap", "positions": "sincos2d"},
    "token_sincos2d": {"positions": "sincos2d", "width": 44, "mlp_dim": 49},  # int(44 * (49 / 44)) is 48
    "timm": {"name": "timm:test_vit", "image_size": 32},
}


def model_config(variant: dict[str, Any]) -> ModelConfig:
    shape = {"name": "Ti", "width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "image_size": 16, "patch_size": 8}
    return ModelConfig(**variant) if "name" in variant else ModelConfig(**{**shape, **variant})


def images(size: int) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def weights_of(model: nn.Module, config: ModelConfig, class_names: list[str]) -> Weights:
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Weights(Path("memory"), config, tensors, 3, tuple(class_names), 0.9, "bilinear")


_LOAD_ALL = """
import json, sys, timm, torch
from pathlib import Path
from safetensors.torch import save_file
outputs, facts = {}, {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    size = model.pretrained_cfg["input_size"][1]
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        outputs[folder.name] = model(images)
    keys = ("label_names", "crop_pct", "interpolation", "mean", "std")
    facts[folder.name] = {key: model.pretrained_cfg.get(key) for key in keys}
assert not any(name.startswith("pretrain") for name in sys.modules)
save_file(outputs, sys.argv[2])
print(json.dumps(facts))
"""


def test_converted_folders_load_in_timm_in_a_fresh_process_with_the_same_logits(tmp_path: Path) -> None:
    """For every pooling, position table and GELU, and a model of timm's own: 1e-5 of the largest logit; class names and
    preprocessing come along; this package is not imported.
    """
    expected = {}
    for name, variant in VARIANTS.items():
        config = model_config(variant)
        model = randomised(build_model(config, 3))
        write_timm_folder(weights_of(model, config, NAMES if name != "gap_exact" else []), tmp_path / "all" / name)
        expected[name] = model(images(config.image_size)).detach()
    command = [sys.executable, "-c", _LOAD_ALL, str(tmp_path / "all"), str(tmp_path / "out.safetensors")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    found, facts = load_file(tmp_path / "out.safetensors"), json.loads(done.stdout)
    for name, logits in expected.items():
        assert (found[name] - logits).abs().max() <= 1e-5 * logits.abs().max(), name
        assert facts[name].pop("label_names") == (NAMES if name != "gap_exact" else None)
        half = [0.5, 0.5, 0.5]
        assert facts[name] == {"crop_pct": 0.9, "interpolation": "bilinear", "mean": half, "std": half}


@pytest.mark.parametrize("variant", VARIANTS)
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


def test_a_converted_folder_is_readable_by_others(tmp_path: Path) -> None:
    """safetensors makes files of mode 600: a shared folder would be of no use to colleagues."""
    config = model_config({})
    write_timm_folder(weights_of(build_model(config, 3), config, []), tmp_path / "converted")
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
        r"converted: tensors missing: \['norm.bias'\], not in the model: none",
    ),
    "extra tensor": (
        lambda f: _edit_tensors(f / "model.safetensors", lambda t: t.update(extra=torch.zeros(1))),
        r"converted: tensors missing: none, not in the model: \['extra'\]",
    ),
    "wrong shape": (
        lambda f: _edit_tensors(f / "model.safetensors", lambda t: t.update({"norm.bias": torch.zeros(31)})),
        r"norm.bias: shape \(31,\) in .*converted, \(32,\) in the model",
    ),
    "truncated": (
        lambda f: os.truncate(f / "model.safetensors", (f / "model.safetensors").stat().st_size - 100),
        "converted/model.safetensors: cannot be read",
    ),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), "converted/model.safetensors: cannot be read"),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), "converted/model.safetensors: cannot be read"),
    "pickle": (_with_pickle("model.safetensors"), "converted/model.safetensors: cannot be read"),
    "pickle as config": (_with_pickle("config.json"), "converted/config.json: cannot be read"),
    "config cut": (lambda f: os.truncate(f / "config.json", 50), "converted/config.json: cannot be read"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), "converted/config.json: .*convert.py"),
    "foreign": (lambda f: _edit_json(f / "config.json", lambda v: v.pop("pretrain")), "config.json: .*convert.py"),
    "unknown model": (
        lambda f: _edit_json(f / "config.json", lambda v: v["pretrain"]["model"].update(name="XXL")),
        "converted/config.json: model.name is 'XXL', expected one of",
    ),
    "text for a number": (
        lambda f: _edit_json(f / "config.json", lambda v: v["pretrain"]["model"].update(width="wide")),
        "converted/config.json: cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_converted_folder_is_one_line_that_names_the_file(damage: str, tmp_path: Path) -> None:
    """A UserError of one line, and nothing in the file is executed."""
    config = model_config({})
    folder = tmp_path / "converted"
    write_timm_folder(weights_of(randomised(build_model(config, 3)), config, NAMES), folder)
    break_it, message = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
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
    with pytest.raises(UserError, match="step-0000000020: cannot be read" if checksums_fit else path.name) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "not found"),
        (lambda path: path.mkdir(), "is neither a run, nor a checkpoint, nor a converted folder"),
        (lambda path: (path / "checkpoints").mkdir(parents=True), "has no checkpoint yet"),
    ],
)
def test_a_path_without_weights_says_what_is_expected(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    """Nothing there, an empty folder, a run that has not saved yet."""
    make(tmp_path / "some")
    with pytest.raises(UserError, match=f"some: {message}"):
        load_model(tmp_path / "some")


# --- tools/convert.py ------------------------------------------------------------------------------------------------


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Any:
    """tools/convert.py as a module, with `call(*arguments)`: its main without a process of its own."""
    module = load_tool("convert")

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        return module.main()

    module.call = call
    return module


def test_convert_writes_a_folder_and_proves_it(tmp_path: Path) -> None:
    """The command ends with the line that loads the result, and leaves nothing else."""
    model = save_run(tiny_config(tmp_path, tmp_path), NAMES)
    out = tmp_path / "deep" / "converted"
    done = run_tool("convert", tmp_path / "tiny", out, "--to", "timm")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f'timm.create_model("local-dir:{out}", pretrained=True)'
    assert "largest logit difference:" in done.stdout and "3 class names" in done.stdout
    assert torch.equal(load_model(out)(images(16)), model(images(16)))
    assert [path.name for path in out.parent.iterdir()] == ["converted"]


def test_convert_does_not_overwrite_unless_forced(tmp_path: Path, convert: Any) -> None:
    """A folder with anything in it is refused and left alone; --force replaces its weights and no other file."""
    model = save_run(tiny_config(tmp_path, tmp_path), NAMES)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="out: is not empty"):
        convert.call(tmp_path / "tiny", out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="notes.txt: is a file"):
        convert.call(tmp_path / "tiny", out / "notes.txt", "--force")
    assert convert.call(tmp_path / "tiny", out, "--force") == 0
    assert torch.equal(load_model(out)(images(16)), model(images(16)))
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("wrong", ["head.weight", "norm.weight"])
def test_convert_does_not_publish_what_timm_computes_differently(
    wrong: str, tmp_path: Path, convert: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One tensor 0.01 % off ends with exit code 1 and no folder; also where a zero head makes all logits zero."""
    save_run(tiny_config(tmp_path, tmp_path), NAMES)
    weights = read_weights(tmp_path / "tiny")
    if wrong == "norm.weight":
        weights.tensors["head.weight"].zero_()
        weights.tensors["head.bias"].zero_()

    def write_wrongly(weights: Weights, out: Path) -> None:
        write_timm_folder(weights, out)
        _edit_tensors(out / "model.safetensors", lambda tensors: tensors[wrong].mul_(1.0001))

    monkeypatch.setattr(convert, "read_weights", lambda path: weights)
    monkeypatch.setattr(convert, "write_timm_folder", write_wrongly)
    assert convert.call(tmp_path / "tiny", tmp_path / "out") == 1
    assert "was not written" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_convert_tells_mistakes_in_one_line(tmp_path: Path) -> None:
    """A source that is not there: exit code 2, no traceback."""
    assert "nowhere: not found" in one_line_error(run_tool("convert", tmp_path / "nowhere", tmp_path / "out"))
