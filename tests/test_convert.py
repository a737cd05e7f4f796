"""tools/convert.py: the same function in every format, proven; bad input and full disks end in one line and no OUT."""

import errno
import json
import os
import pickle
import resource
import subprocess
import sys
import zlib
from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import make_shards, tiny_config
from torch import nn
from weights_on_disk import ROOT, load_tool, one_line_error, randomised, run_tool, save_checkpoint, save_run

import pretrain.models.onnx_file
from pretrain.checkpoint.layout import Slice
from pretrain.cluster import ranks
from pretrain.config import Config, ModelConfig, config_to_dict, config_to_yaml
from pretrain.errors import StorageError, UserError
from pretrain.models import load_model
from pretrain.models.build import build_model
from pretrain.models.card import changed_settings
from pretrain.models.convert import TARGETS
from pretrain.models.equivalent import own_tensors, tensor_shapes
from pretrain.models.google import write_google
from pretrain.models.publish import publish_folder
from pretrain.models.tensors import LazyTensor, Weights
from pretrain.models.timm_folder import write_own_folder, write_timm_folder
from pretrain.models.transformers_folder import write_transformers_folder
from pretrain.models.verify import Source, _computed, _started, our_outputs
from pretrain.models.weights import read_weights, weights_sha256
from pretrain.train.building import build_engine
from pretrain.train.datasets import open_data

pytestmark = pytest.mark.slow  # most start two processes that import torch and a library
torch.set_num_threads(1)
NAMES = ["ash", "birch, silver", "cedar"]
TINY: dict[str, Any] = {"name": "Ti", "width": 32, "depth": 2, "mlp_dim": 64, "heads": 2}


def model_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**TINY, "image_size": 16, "patch_size": 8, **changes})


def weights_of(model: nn.Module, config: ModelConfig, names: list[str], **use: Any) -> Weights:
    tensors = {name: t.detach() for name, t in own_tensors(model).items()}
    lazy = {name: LazyTensor(tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}
    return Weights(Path("memory"), config, lazy, len(names), tuple(names), **use)


def random_weights(names: list[str] = NAMES, **changes: Any) -> Weights:
    config = model_config(**changes)
    return weights_of(randomised(build_model(config, len(names))), config, names)


def images(size: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Any:
    """tools/convert.py as a module, with `call(*arguments)`: its main without a process of its own."""
    module = load_tool("convert")

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["tools/convert.py", *map(str, arguments)])
        return module.main()

    module.call = call
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of ours with random weights and three class names; of no transform of which a word would be said."""
    weights = replace(random_weights(), eval_transform="transformers")
    write_own_folder(weights, tmp_path / "source")
    return tmp_path / "source"


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what goes where, and its proof ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "pretrain",
        "npz",
        "timm",
        pytest.param("transformers", marks=pytest.mark.slow),
        pytest.param("onnx", marks=pytest.mark.long),
    ],
)
def test_a_run_becomes_each_format_and_its_own_code_gives_the_same_logits(target: str, tmp_path: Path) -> None:
    """The command as users run it, verification included: figures, class names, card, the line that loads it; and no
    other file is left beside it.
    """
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    config = tiny_config(tmp_path, tmp_path)
    average = randomised(build_model(config.model, 3), seed=1) if target == "onnx" else None
    trained = save_run(config, NAMES, average=average)
    model, which = (average, ", the average of the trained weights") if average else (trained, "")
    out = tmp_path / "deep" / ("converted.npz" if target == "npz" else "converted")
    done = run_tool("convert", tmp_path / "tiny", out, "--to", target)
    assert done.returncode == 0, done.stderr
    assert "largest logit difference:" in done.stdout and "of the head's input:" in done.stdout
    assert f"3 class names{which}. To load it:" in done.stdout and done.stdout.rstrip().endswith(")") or target == "npz"
    beside = {"converted.npz", "converted.md", "converted.classes.json"} if target == "npz" else {"converted"}
    assert {path.name for path in out.parent.iterdir()} == beside
    card = (out.with_suffix(".md") if target == "npz" else out / "README.md").read_text()
    assert f"--to {target}" in card and "Verified in fresh processes" in card and "`optim.lr=0.002`" in card
    if target == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
        for batch in (1, 2):
            logits = torch.from_numpy(session.run(["logits"], {"images": images()[:batch].numpy()})[0])
            assert torch.allclose(logits, model(images()[:batch]), rtol=0, atol=1e-5)
        metadata = session.get_modelmeta().custom_metadata_map
        assert json.loads(metadata["class_names"]) == NAMES and metadata["of_run"] == "average"
        transform = {"eval_transform": "timm", "eval_crop": 0.875, "interpolation": "bicubic"}
        assert json.loads(metadata["transform"]) == transform
        return
    assert read_weights(out).class_names == tuple(NAMES)
    assert torch.equal(load_model(out)(images()), model(images()))


@pytest.mark.parametrize("target", ["pretrain", "npz", "timm", "transformers"])
def test_without_and_image_size_reach_the_result(target: str, tmp_path: Path, convert: Any) -> None:
    """A representation layer and head left out, positions resized: the features of the source at that size."""
    write_own_folder(random_weights(representation_size=48), tmp_path / "source")
    out = tmp_path / ("out.npz" if target == "npz" else "out")
    parts = ["--without", "head", "pre_logits", "--image-size", 32]
    assert convert.call(tmp_path / "source", out, "--to", target, "--no-verify", *parts) == 0
    expected = load_model(tmp_path / "source", 32)
    features = expected.forward_features(images(32))[:, 0]  # type: ignore[operator]
    found = load_model(out)
    assert torch.equal(found(images(32)), features)
    assert "Not verified" in (out.with_suffix(".md") if target == "npz" else out / "README.md").read_text()


REFUSED = {
    "timm: representation": ("timm", {"representation_size": 48}, "timm has no representation layer"),
    "transformers: representation": ("transformers", {"representation_size": 48}, "no representation layer"),
    "transformers: gap": ("transformers", {"pooling": "gap"}, "pools by the class token only"),
    "only pre_logits left out": ("timm", {"representation_size": 32}, "head was trained on the representation layer"),
    "only pre_logits, twice": ("timm", {"representation_size": 32}, "head was trained on the representation layer"),
    "npz: exact": ("npz", {"gelu": "exact"}, "tanh approximation of GELU"),
    "npz: map": ("npz", {"pooling": "map"}, "vision_transformer has no MAP head"),
    "timm: every layer": ("timm", {"positions_at": "every_layer"}, "positions, for which the target has no place"),
    "npz: relative": ("npz", {"positions": "relative"}, "relative positions"),
    "npz: 22B": (
        "npz",
        {"parallel_blocks": True},
        "blocks of Google's public code .* not those of parallel_blocks=true",
    ),
    "timm: 22B": ("timm", {"qk_norm": True}, "timm: its ViT has the plain ViT's blocks, not those of qk_norm=true"),
    "transformers: 22B": (
        "transformers",
        {"rms_norm": True, "qkv_bias": False},
        "those of qkv_bias=false rms_norm=true",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_target_cannot_hold_is_refused(case: str, tmp_path: Path, convert: Any) -> None:
    """One line with the reason, exit code 2, nothing written."""
    target, changes, message = REFUSED[case]
    write_own_folder(random_weights(**changes), tmp_path / "source")
    out = tmp_path / ("out.npz" if target == "npz" else "out")
    with pytest.raises(UserError, match=message) as caught:
        parts = ["--without", *["pre_logits"] * (2 if case.endswith("twice") else 1)] if case.startswith("only") else []
        convert.call(tmp_path / "source", out, "--to", target, *parts)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


FIXTURES = {
    "vt_token/checkpoint_released_names.npz": "released",
    "vt_token_rep/checkpoint.npz": "vit_jax",
    "vt_hybrid_22/checkpoint_released_names.npz": "released",
    "bv_gap_learn/checkpoint.npz": "big_vision",
    "bv_map_learn/checkpoint.npz": "big_vision",
    "bv_tok_learn/checkpoint.npz": "big_vision",
    "bv_gap_sincos2d/checkpoint.npz": "big_vision",
}


@pytest.mark.parametrize("name", FIXTURES)
def test_a_file_of_googles_comes_back_bit_for_bit(name: str, tmp_path: Path, test_fixtures: Path, convert: Any) -> None:
    """.npz -> ours -> .npz under the same names: the same arrays, of the same shapes."""
    config = json.loads((test_fixtures / name).parent.joinpath("config.json").read_text())
    size = ["--image-size", config["image_size"]] if "sincos" in name else []
    path = test_fixtures / name
    assert convert.call(path, tmp_path / "ours", "--to", "pretrain", "--no-verify", *size) == 0
    back = tmp_path / "back.npz"
    assert convert.call(tmp_path / "ours", back, "--to", "npz", "--naming", FIXTURES[name], "--no-verify") == 0
    before, after = np.load(path), np.load(back)
    given = {key.removeprefix("params/").removeprefix("opt/target/"): before[key] for key in before.files}
    assert set(given) == set(after.files)
    for key, array in given.items():
        assert after[key].shape == array.shape and np.array_equal(after[key], array.astype(np.float32)), key


@pytest.mark.parametrize("wrong", ["head.weight", pytest.param("norm.weight", marks=pytest.mark.long)])
def test_what_the_target_computes_differently_is_not_published(
    wrong: str, tmp_path: Path, convert: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One tensor 0.01 % off ends with exit code 1 and no folder; also where a zero head makes all logits zero."""
    model = randomised(build_model(model_config(), 3))
    if wrong == "norm.weight":
        nn.init.zeros_(model.head.weight)  # type: ignore[union-attr,arg-type]
        nn.init.zeros_(model.head.bias)  # type: ignore[union-attr,arg-type]
    write_own_folder(weights_of(model, model_config(), NAMES), tmp_path / "source")

    def write_wrongly(weights: Weights, out: Path, naming: str) -> None:
        write_timm_folder(weights, out)
        _edit(out / "model.safetensors", lambda tensors: tensors[wrong].mul_(1.0001))

    monkeypatch.setitem(TARGETS, "timm", TARGETS["timm"]._replace(write=write_wrongly))
    assert convert.call(tmp_path / "source", tmp_path / "out", "--to", "timm") == 1
    assert "out: not written: more than 1e-05 of the largest" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_caches_beside_the_current_folder_are_found_by_the_verification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes run in another folder, where a relative PRETRAIN_CACHE or HF_HOME named nothing."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRETRAIN_CACHE", "cache")
    monkeypatch.setenv("HF_HOME", "../hub")
    monkeypatch.setenv("HF_HUB_CACHE", "~/hub")
    program = """
import json, os, torch
imports, outputs = imported(), {"nothing": torch.zeros(1)}
json.dump(dict(os.environ), open("seen.json", "w"))
"""
    with _started(program, "", tmp_path / "work" / "theirs") as process:
        _computed(process, "theirs")
    seen = json.loads((tmp_path / "work" / "seen.json").read_text())
    assert seen["PRETRAIN_CACHE"] == str(tmp_path / "cache") and seen["HF_HOME"] == str(tmp_path.parent / "hub")
    assert seen["HF_HUB_CACHE"] == "~/hub"  # the hub's library expands it


def test_a_bias_that_no_logit_shows_is_compared_bit_for_bit(
    source: Path, tmp_path: Path, convert: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key's bias cancels in the softmax: only reading back finds a wrong one."""

    def write_wrongly(weights: Weights, out: Path, naming: str) -> None:
        write_own_folder(weights, out)
        _edit(out / "model.safetensors", lambda tensors: tensors["blocks.0.attn.qkv.bias"][32:64].add_(0.5))

    monkeypatch.setitem(TARGETS, "pretrain", TARGETS["pretrain"]._replace(write=write_wrongly))
    assert convert.call(source, tmp_path / "out", "--to", "pretrain") == 1
    assert "blocks.0.attn.qkv.bias differs" in capsys.readouterr().err and not (tmp_path / "out").exists()


def _edit(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("target", ["timm", pytest.param("onnx", marks=pytest.mark.long)])  # a minute
def test_a_hybrid_is_the_same_function_elsewhere(target: str, tmp_path: Path) -> None:
    """timm standardises kernels by another rule; they are scaled for it, and the bound for hybrids is kept.

    Weights near their initial values, each changed by a tenth: those of `randomised` amplify rounding tenfold.
    """
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    config, generator = ModelConfig(name="R26+S", patch_size=32, image_size=64), torch.Generator().manual_seed(0)
    model = build_model(config, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(1.0 if name.endswith("norm3.weight") else 0.0)
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    write_own_folder(weights_of(model, config, NAMES), tmp_path / "source")
    done = run_tool("convert", tmp_path / "source", tmp_path / "out", "--to", target)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("timm", {"pooling": "map", "gelu": "exact"}),
        pytest.param("timm", {"pooling": "gap", "positions": "sincos2d"}, marks=pytest.mark.long),
        ("timm", {"positions": "learned2d", "class_position": False, "layer_scale": 0.1}),
        pytest.param("transformers", {"positions": "learned2d", "gelu": "exact"}, marks=pytest.mark.long),
        ("onnx", {"pooling": "map", "positions": "relative", "layer_scale": 0.1}),
        pytest.param("onnx", {"representation_size": 48, "positions_at": "every_layer"}, marks=pytest.mark.long),
    ],
)
def test_variants_pass_their_own_verification(target: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Poolings, positions and GELUs of docs/conversion.md's table, by the command with its proof."""
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    write_own_folder(random_weights(**changes), tmp_path / "source")
    done = run_tool("convert", tmp_path / "source", tmp_path / "out", "--to", target)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
def test_a_large_onnx_model_keeps_its_tensors_beside_it(
    source: Path, tmp_path: Path, convert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the limit of a protobuf, here lowered: verified, published and pushed with model.onnx.data."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(pretrain.models.onnx_file, "_MAX_BYTES", 1000)
    out = tmp_path / "out"
    for overwrite in ([], ["--overwrite"]):
        assert convert.call(source, out, "--to", "onnx", *overwrite) == 0
        assert {path.name for path in out.iterdir()} == {"model.onnx", "model.onnx.data", "README.md"}
    assert (out / "model.onnx.data").stat().st_size > 4 * 20_000


# --- memory ----------------------------------------------------------------------------------------------------------

_MEASURED = """
import sys
sys.path.insert(0, "tools")
import timm, convert, torch
from pretrain.models.verify import PEAK_MEMORY
exec(PEAK_MEMORY)
torch.nn.Linear(2, 2, device="meta")
imports = peak()
code = convert.main()
print("peak", peak() - imports)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("checkpoint", "timm"),
        pytest.param("folder", "timm", marks=pytest.mark.long),
        pytest.param("folder", "transformers", marks=pytest.mark.long),
        pytest.param("folder", "npz", marks=pytest.mark.long),
    ],
)
def test_memory_does_not_grow_with_the_model(kind: str, target: str, tmp_path: Path) -> None:
    """105M parameters (410 MB): converting takes less than half of it beyond the imports, each verifying process at
    most 2.2 times the model and what its first calls load. With PRETRAIN_TEST_H14=1: ViT-H/14, less than 0.5 GB.
    """
    config = model_config(width=1024, depth=8, mlp_dim=4096, heads=16, image_size=64, patch_size=16)
    if large := bool(os.environ.get("PRETRAIN_TEST_H14")):
        config = ModelConfig(name="H", patch_size=14)
    shapes = tensor_shapes(config, 1000)
    size = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    if kind == "folder":
        tensors = {name: LazyTensor(shape, partial(_drawn, name, shape)) for name, shape in shapes.items()}
        write_own_folder(Weights(tmp_path, config, tensors, 1000), tmp_path / "source")
    else:
        recipe = tiny_config(tmp_path, tmp_path, model=vars(config))
        slices = [Slice(name, shape, 0, _drawn(name, shape).flatten()) for name, shape in shapes.items()]
        state = {"step": 1, "metrics": {}, "config": config_to_dict(recipe), "num_classes": 1000, "class_names": []}
        (tmp_path / "source").mkdir()
        assert save_checkpoint(tmp_path / "source" / "checkpoints", 1, slices, [], {}, state)
    out = tmp_path / ("out.npz" if target == "npz" else "out")
    command = [sys.executable, "-c", _MEASURED, str(tmp_path / "source"), str(out), "--to", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800 if large else 280)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    lines = done.stdout.splitlines()
    assert int(lines[-1].split()[1]) < (0.5e9 if large else size / 2), done.stdout
    taken = next(line for line in lines if line.startswith("memory of the verifying")).partition(": ")[2]
    for side in taken.split(", "):
        assert float(side.split()[1]) * 1e9 < 2.2 * size + 250e6, taken


def _drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * 0.02
    return values + 1 if "norm" in name and name.endswith("weight") else values


# --- OUT appears complete or not at all ------------------------------------------------------------------------------


def test_nothing_is_overwritten_unless_asked(source: Path, tmp_path: Path, convert: Any) -> None:
    """A folder with anything in it is refused and left alone; --overwrite replaces weights, keeps other files."""
    out = tmp_path / "out"
    (out / "mine").mkdir(parents=True)
    (out / "mine" / "notes.txt").write_text("mine")
    (out / "preprocessor_config.json").write_text("of another format")
    before = everything_in(out)
    for arguments in ((out, "--to", "pretrain"), (out / "mine" / "notes.txt", "--to", "pretrain", "--overwrite")):
        with pytest.raises(UserError, match="out: is not empty|notes.txt: is a file"):
            convert.call(source, *arguments, "--no-verify")
        assert everything_in(out) == before
    assert convert.call(source, out, "--to", "pretrain", "--no-verify", "--overwrite") == 0
    assert {path.name for path in out.iterdir()} == {"mine", "README.md", "config.json", "model.safetensors"}
    assert (out / "mine" / "notes.txt").read_text() == "mine"
    assert torch.equal(load_model(out)(images()), load_model(source)(images()))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    assert (out / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_files_of_an_npz_are_replaced_together(source: Path, tmp_path: Path, convert: Any) -> None:
    """Old class names do not stay beside weights without a head."""
    out = tmp_path / "new" / "out.npz"
    assert convert.call(source, out, "--to", "npz", "--no-verify") == 0
    with pytest.raises(UserError, match="out.npz: exists; give another name, or --overwrite"):
        convert.call(source, out, "--to", "npz", "--no-verify")
    assert convert.call(source, out, "--to", "npz", "--no-verify", "--overwrite", "--without", "head") == 0
    assert {path.name for path in out.parent.iterdir()} == {"out.npz", "out.md"}
    assert read_weights(out).num_classes == 0


@pytest.mark.parametrize("target", ["pretrain", "npz"])
def test_a_failure_leaves_the_old_files(
    target: str, source: Path, tmp_path: Path, convert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up, in the midst of writing and between the renames: what was at OUT is still there, whole."""
    folder = tmp_path / "place"
    out = folder / ("out.npz" if target == "npz" else "out")
    assert convert.call(source, out, "--to", target, "--no-verify") == 0
    before = everything_in(folder)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write = TARGETS[target].write
    monkeypatch.setitem(TARGETS, target, TARGETS[target]._replace(write=lambda *a: (write(*a), full())))
    with pytest.raises(StorageError, match="cannot be written .*No space left.* unchanged"):
        convert.call(source, out, "--to", target, "--no-verify", "--overwrite")
    assert everything_in(folder) == before


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of the two renames fails: the first is undone."""
    for name in ("new", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    replace = os.replace

    def failing(start: Path, end: Path) -> None:
        if Path(start).name == "new":
            raise OSError(errno.EIO, "Input/output error")
        replace(start, end)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="Input/output"):
        publish_folder(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "out"


@pytest.mark.parametrize("target", ["pretrain", "npz", "transformers"])
def test_a_full_disk_is_one_line(target: str, source: Path, tmp_path: Path) -> None:
    """A real limit on the size of files, of 20 kB: exit code 75, nothing at OUT, nothing left beside it."""
    out = tmp_path / "place" / ("out.npz" if target == "npz" else "out")
    command = [sys.executable, str(ROOT / "tools" / "convert.py"), str(source), str(out), "--to", target, "--no-verify"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=240)
    told = done.stderr.splitlines(keepends=True)
    done.stderr = "".join(line for line in told if not line.startswith("warning: "))  # what an .npz has no place for
    assert "cannot be written" in one_line_error(done, 75)
    assert list(out.parent.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line(source: Path, convert: Any) -> None:
    """Another try would not help: exit code 2, not 75. Nobody, root included, makes a folder in /sys."""
    if not Path("/sys").is_dir():
        pytest.skip("no /sys")
    with pytest.raises(UserError, match="/sys/out: cannot be written .*; choose another place"):
        convert.call(source, "/sys/out", "--to", "pretrain", "--no-verify")


# --- bad input -------------------------------------------------------------------------------------------------------


class _Payload:
    """Unpickling this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch '{self.target}'",)


def _write_checkpoint(weights: Weights, path: Path) -> None:
    save_run(tiny_config(path.parent, path.parent, name=path.name, model=vars(weights.model)), NAMES)


# How each is written, the file that is damaged, and three tensors by its names.
FORMATS: dict[str, tuple[Callable[[Weights, Path], None], str]] = {
    "checkpoint": (_write_checkpoint, "checkpoints/step-0000000020/weights-00000-of-00001.safetensors"),
    "pretrain": (write_own_folder, "model.safetensors"),
    "timm": (write_timm_folder, "model.safetensors"),
    "foreign timm": (write_timm_folder, "model.safetensors"),
    "transformers": (write_transformers_folder, "model.safetensors"),
    "npz": (lambda weights, path: write_google(weights, path, "released"), ""),
}
NORM = {"transformers": "vit.layernorm.bias", "npz": "Transformer/encoder_norm/bias"}
DAMAGES = {
    "missing": "{source}.*: tensors missing: {norm}",
    "extra": "{source}.*: tensors unknown: surplus",
    "shape": "{source}.*: {norm} has shape \\(31,\\), expected \\(32,\\)",
    "nan": "{source}.*: {norm} holds values that are not finite",
    "truncated": "{source}.*(cannot be read|damaged|bytes)",
    "pickle": "{source}.*(cannot be read|damaged|Python objects|bytes)",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("form", FORMATS)
def test_bad_input_is_one_line_that_names_file_and_tensor(form: str, damage: str, tmp_path: Path, convert: Any) -> None:
    """For every readable format: exit code 2, nothing executed, nothing written."""
    write, inside = FORMATS[form]
    place = tmp_path / ("source.npz" if form == "npz" else "source")
    write(random_weights(), place)
    if form == "foreign timm":
        values = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k != "pretrain"}))
    for path in tmp_path.glob("*.classes.json"):
        path.unlink()
    norm = NORM.get(form, "norm.bias")
    _damage(place / inside if inside else place, norm, damage, tmp_path / "executed")
    out = tmp_path / "place" / "out"
    name = "MANIFEST.json|source" if form == "checkpoint" else "source"
    # A checkpoint's checksums find every damage first, and there is none before it.
    expected = "source/checkpoints: none of the 1 checkpoints is valid" if form == "checkpoint" else None
    with pytest.raises(UserError, match=expected or DAMAGES[damage].format(source=name, norm=norm)) as caught:
        convert.call(place, out, "--to", "pretrain", "--no-verify")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert not (tmp_path / "executed").exists()
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def _damage(path: Path, norm: str, damage: str, executed: Path) -> None:
    is_npz = path.suffix == ".npz"
    if damage == "truncated":
        return os.truncate(path, path.stat().st_size - 100)
    if damage == "pickle":
        payload = np.array([_Payload(executed)], dtype=object)
        if is_npz:
            np.savez(path, **{**np.load(path), norm: payload})
        else:
            path.write_bytes(pickle.dumps(payload))
        return None
    tensors: dict[str, Any] = dict(np.load(path)) if is_npz else {k: v.numpy() for k, v in load_file(path).items()}
    if damage == "missing":
        del tensors[norm]
    elif damage == "extra":
        tensors["surplus"] = np.zeros(2, np.float32)
    elif damage == "shape":
        tensors[norm] = tensors[norm][:31].copy()
    elif damage == "nan":
        tensors[norm] = np.full_like(tensors[norm], np.nan)
    if is_npz:
        np.savez(path, **tensors)
    else:
        save_file({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}, path)
    return None


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "extra"])
def test_a_checkpoint_that_is_wrong_though_its_checksums_fit_is_told(damage: str, tmp_path: Path, convert: Any) -> None:
    """As from another program: the tensor is named."""
    config = tiny_config(tmp_path, tmp_path)
    tensors = {name: t.detach() for name, t in build_model(config.model, 3).named_parameters()}
    if damage == "missing":
        del tensors["norm.bias"]
    elif damage == "extra":
        tensors["surplus"] = torch.zeros(2)
    elif damage == "shape":
        tensors["norm.bias"] = torch.zeros(31)
    else:
        tensors["norm.bias"] = torch.full((32,), float("nan"))
    slices = [Slice(name, tuple(t.shape), 0, t.flatten()) for name, t in tensors.items()]
    state = {"step": 1, "metrics": {}, "config": config_to_dict(config), "num_classes": 3, "class_names": NAMES}
    assert save_checkpoint(tmp_path / "run", 1, slices, [], {}, state)
    message = DAMAGES[damage].format(source="step-0000000001", norm="norm.bias")
    with pytest.raises(UserError, match=message):
        convert.call(tmp_path / "run" / "step-0000000001", tmp_path / "out", "--to", "pretrain", "--no-verify")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_pickle_is_not_executed(suffix: str, tmp_path: Path) -> None:
    """The command itself: one line, exit code 2, and the file that the pickle would write is not there."""
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(pickle.dumps(_Payload(tmp_path / "executed")))
    pickle.loads(path.read_bytes())  # the payload works
    (tmp_path / "executed").unlink()
    line = one_line_error(run_tool("convert", path, tmp_path / "out", "--to", "timm"))
    assert f"{path.name}: is damaged, or a pickle of more than tensors and plain values, which may execute code" in line
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


ARGUMENTS = {
    "npz needs a file": (["out", "--to", "npz"], "give a name that ends in .npz"),
    "naming is npz's": (["out", "--to", "timm", "--naming", "released"], "--naming released is of --to npz"),
    "trust needs a config": (["out", "--to", "timm", "--trust-pickle"], "--trust-pickle and --config .* go together"),
    "image size": (["out", "--to", "timm", "--image-size", "0"], "--image-size is 0"),
    "image size no multiple": (["out", "--to", "timm", "--image-size", "17"], "is not a multiple of model.patch_size"),
    "nothing to leave out": (["out", "--to", "timm", "--without", "head", "pre_logits"], "has no pre_logits to leave"),
    "weights of no run": (["out", "--to", "timm", "--weights", "trained"], "is no run or checkpoint"),
    "weights and trust": (
        ["out", "--to", "timm", "--weights", "average", "--trust-pickle", "--config", "recipe.yaml"],
        "--weights average is of our runs, not of --trust-pickle",
    ),
    "push": (["out", "--to", "timm", "--push", "nobody"], "--push nobody: expected OWNER/NAME"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_do_not_fit_are_told(case: str, source: Path, tmp_path: Path, convert: Any) -> None:
    """Before anything is written."""
    (name, *others), message = ARGUMENTS[case]
    with pytest.raises(UserError, match=message):
        convert.call(source, tmp_path / name, *others)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- checkpoints that DeepSpeed wrote --------------------------------------------------------------------------------


def _save_both(config: Config, folder: Path) -> None:
    """Saves one engine's weights in DeepSpeed's own way and in ours."""
    device = ranks.start(60)
    data = open_data(config)
    engine = build_engine(config, data, device, from_scratch=True)
    engine._engine.save_checkpoint(str(folder / "theirs"), tag="global_step0")
    state = {"step": 0, "metrics": {}, "config": config_to_dict(config), "num_classes": 7, "class_names": []}
    assert save_checkpoint(folder / "ours", 0, engine.weights(), [], {}, state)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_of_deepspeeds_is_converted_when_trusted(stage: int, tmp_path: Path, convert: Any) -> None:
    """Two ranks, ZeRO 1 and 3: the same tensors as our own checkpoint of the same engine; not without the flag."""
    config = tiny_config(make_shards(tmp_path / "shards"), tmp_path, engine__zero_stage=stage)
    run_ranks(_save_both, 2, config, tmp_path)
    (tmp_path / "recipe.yaml").write_text(config_to_yaml(config))
    theirs = tmp_path / "theirs"
    for path in (theirs, theirs / "global_step0"):
        with pytest.raises(UserError, match="DeepSpeed's own checkpoint.*--trust-pickle"):
            convert.call(path, tmp_path / "new", "--to", "pretrain")
        trusted = ["--trust-pickle", "--config", tmp_path / "recipe.yaml"]
        assert convert.call(path, tmp_path / "out", "--to", "pretrain", "--no-verify", "--overwrite", *trusted) == 0
        found, expected = read_weights(tmp_path / "out"), read_weights(tmp_path / "ours" / "step-0000000000")
        assert found.num_classes == 7 and found.tensors.keys() == expected.tensors.keys()
        for name, tensor in expected.tensors.items():
            assert torch.equal(found.tensors[name].read(), tensor.read()), name
    logits = our_outputs(Source(str(theirs), config=str(tmp_path / "recipe.yaml")), images())["logits"]
    assert torch.equal(logits, load_model(tmp_path / "out")(images()))  # what the verifying process computes
    (next(theirs.glob("global_step0/*optim_states.pt"))).write_bytes(b"damaged")
    with pytest.raises(UserError, match="theirs.*: cannot be read") as caught:
        convert.call(theirs, tmp_path / "new", "--to", "pretrain", *trusted)
    assert "\n" not in str(caught.value)


def test_a_pickle_of_deepspeeds_is_not_executed_without_the_flag(tmp_path: Path, convert: Any) -> None:
    """Neither of the two kinds of folder, nor anything else in them, is opened."""
    folder = tmp_path / "theirs" / "global_step5"
    folder.mkdir(parents=True)
    (tmp_path / "theirs" / "latest").write_text("global_step5")
    (folder / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(_Payload(tmp_path / "executed")))
    for path in (folder, folder.parent):
        with pytest.raises(UserError, match="--trust-pickle"):
            convert.call(path, tmp_path / "out", "--to", "timm")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


# --- the card --------------------------------------------------------------------------------------------------------


def test_the_card_tells_recipe_data_and_scores(tmp_path: Path, convert: Any) -> None:
    """Only settings that differ from the defaults; the manifest by its checksum; validation and evaluation results."""
    shards = make_shards(tmp_path / "squares")
    config = tiny_config(shards, tmp_path)
    assert dict(changed_settings(config))["optim.warmup_steps"] == 3
    assert not {"optim.eps", "seed", "data.train", "output"} & dict(changed_settings(config)).keys()
    digest = sha256((shards / "manifest.json").read_bytes()).hexdigest()
    model = build_model(config.model, 3)
    slices = [Slice(n, tuple(p.shape), 0, p.detach().flatten()) for n, p in model.named_parameters()]
    state = {
        "step": 15,
        "metrics": {"val/top1": 0.625},
        "data": {"order": {"manifest_sha256": digest}},
        "config": config_to_dict(config),
        "num_classes": 3,
        "class_names": NAMES,
    }
    (tmp_path / "tiny").mkdir()
    assert save_checkpoint(tmp_path / "tiny" / "checkpoints", 15, slices, [], {}, state)
    row = {"model": "trained", "metric": "10-shot", "value": 0.25, "n": 1234}
    rows = [row, {**row, "metric": "10-shot-std"}, {**row, "model": "random weights"}, {**row, "metric": "pets/top1"}]
    rows += [{**row, "metric": "loss", "value": value} for value in (float("nan"), 2e9)]  # diverged: not on the card
    data = {"fewshot_test": {"sha256": "ab"}, "pets/test": {"sha256": "cd"}, "val": {"sha256": "ef"}}
    record = {"weights_sha256": weights_sha256(tmp_path / "tiny" / "checkpoints" / "step-0000000015"), "image_size": 16}
    other = {"weights": "other", "weights_sha256": "0", "image_size": 16, "rows": [{**row, "value": 0.75}]}
    results = {**other, "others": [{"weights": "tiny", **record, "rows": rows, "data": data}]}
    (tmp_path / "tiny" / "evaluation").mkdir()
    (tmp_path / "tiny" / "evaluation" / "results.json").write_text(json.dumps(results))
    words = ["--to", "timm", "--no-verify", "--push", "a/b", "--license", "cc-by-4.0"]
    assert convert.call(tmp_path / "tiny", tmp_path / "out", *words) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for told in (
        "library_name: timm",
        "pipeline_tag: image-classification",
        "Step 15 of 20",
        "- `optim.warmup_steps=3`",
        f"`squares`, manifest SHA-256 `{digest}`, 101 samples",
        "- val/top1 0.625",
        "- 10-shot 0.25 on 1,234 images (trained), measured on `tiny`",
        'timm.create_model("hf-hub:a/b", pretrained=True)',
        "probabilities by softmax.",
        "python tools/convert.py",
        "torch ",
    ):
        assert told in card, told
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["model-index"][0]["name"]) == ("cc-by-4.0", "out")
    first, second = front["model-index"][0]["results"]  # as the hub lists them; no deviations, no baselines
    metric = {"type": "accuracy", "value": 0.25, "name": "10-shot"}
    assert first["metrics"] == [metric] and second["metrics"] == [{**metric, "name": "top1"}]
    assert first["dataset"]["args"] == {"fewshot_test_manifest_sha256": "ab"}
    assert second["dataset"] == {"name": "pets", "type": "pets", "args": {"pets/test_manifest_sha256": "cd"}}
    told = _told_scores(tmp_path, ["--without", "head"], convert)
    assert "- 10-shot 0.25" in told and "pets/top1" not in told and "val/top1" not in told
    assert not _told_scores(tmp_path, ["--image-size", "32"], convert)
    (tmp_path / "tiny" / "evaluation" / "results.json").write_text(json.dumps(other))
    assert "0.75" not in (told := _told_scores(tmp_path, [], convert)) and "- val/top1 0.625" in told


def test_either_of_a_run_that_keeps_an_average_is_converted(tmp_path: Path, convert: Any) -> None:
    """The trained weights with the proof, which must read the same; card and config tell which, and its own scores."""
    config = tiny_config(tmp_path, tmp_path, optim__average_decay=0.9)
    average = randomised(build_model(config.model, 3), seed=1)
    trained = save_run(config, NAMES, average=average, metrics={"val/top1": 0.625})
    run, checkpoint = tmp_path / "tiny", tmp_path / "tiny" / "checkpoints" / "step-0000000020"
    row, records = {"model": "trained", "metric": "top1", "n": 1234}, []
    for of_run, value in (("trained", 0.25), ("average", 0.75)):
        about = {"weights": str(checkpoint), "weights_sha256": weights_sha256(checkpoint, of_run), "image_size": 16}
        records.append({**about, "rows": [{**row, "value": value}], "data": {}})
    (run / "evaluation").mkdir()
    (run / "evaluation" / "results.json").write_text(json.dumps({**records[0], "others": [records[1]]}))
    told = {
        "trained": (trained, "These are the trained weights, not their average.", {"- top1 0.25"}),
        "average": (average, "These are the average of the trained weights.", {"- val/top1 0.625", "- top1 0.75"}),
    }
    for of_run, (model, line, scores) in told.items():
        for target in ("pretrain", "timm", "transformers"):
            proof = [] if (of_run, target) == ("trained", "pretrain") else ["--no-verify"]
            words = ["--weights", "trained"] if of_run == "trained" else []
            out = tmp_path / f"{of_run}-{target}"
            assert convert.call(run, out, "--to", target, *words, *proof) == 0
            found = read_weights(out)
            assert json.loads((out / "config.json").read_text())["pretrain"]["of_run"] == found.of_run == of_run
            for name, tensor in own_tensors(model).items():
                assert torch.equal(found.tensors[name].read(), tensor), (of_run, target, name)
            card = (out / "README.md").read_text()
            all_scores = {s for _, _, each in told.values() for s in each if s in card}
            assert line in card and all_scores == scores, card


def _told_scores(folder: Path, words: list[str], convert: Any) -> str:
    """The scores of the card when the run `tiny` is converted in another way, "" without any."""
    words = ["--to", "timm", "--no-verify", "--overwrite", *words]
    assert convert.call(folder / "tiny", folder / "out", *words) == 0
    card = (folder / "out" / "README.md").read_text()
    assert "## Scores" in card or "model-index" not in card
    return card.partition("## Scores")[2].partition("##")[0]


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """No test reaches the hub: what would be uploaded is noted."""
    import huggingface_hub

    calls: list[tuple[str, Any]] = []

    def create_commit(self: Any, repository: str, operations: list[Any], **options: Any) -> None:
        calls.append((repository, {added.path_in_repo: Path(added.path_or_fileobj) for added in operations}))

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **k: calls.append((repo_id, k)))
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    return calls


@pytest.mark.parametrize("target", ["pretrain", "npz"])
def test_push_uploads_what_was_written_and_nothing_else(
    target: str, source: Path, tmp_path: Path, convert: Any, hub: list[tuple[str, Any]]
) -> None:
    """Of a folder the files that a conversion writes, of the one that holds an .npz its three, the card under the name
    that the hub shows: nothing else.
    """
    out = tmp_path / ("out.npz" if target == "npz" else "out")
    assert convert.call(source, out, "--to", target, "--no-verify", "--push", "owner/name") == 0
    (created, _), (uploaded, how) = hub
    assert created == uploaded == "owner/name"
    files = {"out.npz": "out.npz", "out.classes.json": "out.classes.json", "README.md": "out.md"}
    if target == "pretrain":
        files = {name: f"out/{name}" for name in ("config.json", "model.safetensors", "README.md")}
    assert how == {name: tmp_path / place for name, place in files.items()}


HUB_LINES = {
    "pretrain": 'model = load_model(snapshot_download("owner/OUT"))',
    "timm": 'model = timm.create_model("hf-hub:owner/OUT", pretrained=True)',
    "transformers": 'model = ViTForImageClassification.from_pretrained("owner/OUT")',
    "npz": 'arrays = numpy.load(hf_hub_download("owner/OUT", "out.npz"))',
    "onnx": 'session = onnxruntime.InferenceSession(snapshot_download("owner/OUT") + "/model.onnx")',
}


@pytest.mark.parametrize("target", HUB_LINES)
@pytest.mark.parametrize("pushed", [True, False])
def test_the_cards_lines_load_the_model(
    pushed: bool, target: str, source: Path, tmp_path: Path, convert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Executed as they stand on the card, with the hub's downloads replaced by the uploaded folder."""
    import huggingface_hub

    pytest.importorskip({"onnx": "onnxruntime", "transformers": "transformers"}.get(target, "timm"))
    out = tmp_path / ("out.npz" if target == "npz" else "out")
    push = ["--push", "owner/OUT"] if pushed else []
    assert convert.call(source, out, "--to", target, "--no-verify", *push) == 0
    card = (out.with_suffix(".md") if target == "npz" else out / "README.md").read_text()
    lines = card.partition("```python\n")[2].partition("\n```")[0]
    if pushed:
        assert HUB_LINES[target] in lines
        if target in ("timm", "transformers"):  # they would ask the hub themselves
            return
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository: str(out))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name: str(out.parent / name))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(lines, names)
    assert {"model", "arrays", "session"} & names.keys()


def test_a_headless_vit_of_transformers_is_loaded_without_a_pooler(source: Path, tmp_path: Path, convert: Any) -> None:
    """Its class would otherwise draw a random one; a representation layer is one, and loaded."""
    write_own_folder(random_weights(representation_size=48), tmp_path / "rep")
    for name, options in [("source", ", add_pooling_layer=False"), ("rep", "")]:
        out = tmp_path / f"{name}-out"
        call = [tmp_path / name, out, "--to", "transformers", "--without", "head", "--no-verify"]
        assert convert.call(*call) == 0
        assert f'model = ViTModel.from_pretrained("{out.name}"{options})' in (out / "README.md").read_text()


def test_a_card_says_when_the_loss_is_not_known(source: Path, tmp_path: Path, convert: Any) -> None:
    """An .npz does not tell it: softmax is then a choice, not a fact."""
    assert convert.call(source, tmp_path / "w.npz", "--to", "npz", "--no-verify") == 0
    assert convert.call(tmp_path / "w.npz", tmp_path / "out", "--to", "pretrain", "--no-verify") == 0
    assert (
        "probabilities by softmax; the loss of its training is not known." in (tmp_path / "out/README.md").read_text()
    )
    assert read_weights(tmp_path / "out").loss is None


def test_push_tells_in_one_line_why_not(
    source: Path, tmp_path: Path, convert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not logged in, offline: before the conversion. No connection: after it, exit code 75, and OUT is complete."""
    import huggingface_hub

    def unreachable(self: Any, *arguments: Any, **options: Any) -> None:
        raise ConnectionError("Name or service not known")

    push = ["--to", "pretrain", "--no-verify", "--push", "owner/name"]
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="not logged in; run `hf auth login`"):
        convert.call(source, tmp_path / "out", *push)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        convert.call(source, tmp_path / "out", *push)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", unreachable)
    with pytest.raises(StorageError, match="the hub cannot be reached .*; the folder itself is complete"):
        convert.call(source, tmp_path / "out", *push)
    assert torch.equal(load_model(tmp_path / "out")(images()), load_model(source)(images()))


class _Hub(BaseHTTPRequestHandler):
    """The three addresses of the hub that an upload of small files needs; every other one is not found."""

    commits: list[list[dict[str, Any]]] = []
    status = 200

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        place = f"http://127.0.0.1:{self.server.server_port}/owner/name"  # type: ignore[attr-defined]
        answer: dict[str, Any] = {"error": "not for you"}
        if self.status == 200 and self.path == "/api/repos/create":
            answer = {"url": place}
        elif self.status == 200 and self.path == "/api/models/owner/name/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}
        elif self.status == 200 and self.path == "/api/models/owner/name/commit/main":
            self.commits.append([json.loads(line) for line in body.splitlines()])
            answer = {"commitUrl": f"{place}/commit/{'1' * 40}", "commitOid": "1" * 40}
        text = json.dumps(answer).encode()
        self.send_response(self.status if "error" not in answer or self.status != 200 else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.mark.parametrize("case", ["accepted", "refused", "unreachable"])
def test_push_speaks_the_hubs_language(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub's own client, in another process, against a server of three addresses: the named file arrives;
    a refusal and a port where nobody listens are one line each.
    """
    monkeypatch.setattr(_Hub, "commits", [])
    monkeypatch.setattr(_Hub, "status", 403 if case == "refused" else 200)
    (tmp_path / "out.npz").write_bytes(b"weights")
    (tmp_path / "mine.txt").write_text("not to be uploaded")
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{1 if case == 'unreachable' else server.server_port}"
    program = (
        "import sys; from pathlib import Path; from pretrain import cli; from pretrain.models.hub import push; "
        "cli.run(lambda: print(push({'new.npz': Path(sys.argv[1]) / 'out.npz'}, 'owner/name')))"
    )
    environment = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0", "no_proxy": "*"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    server.shutdown()
    server.server_close()
    if case == "refused":
        assert "owner/name: the hub refused" in one_line_error(done, 2)
    elif case == "unreachable":
        assert "owner/name: the hub cannot be reached" in one_line_error(done, 75)
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{address}/owner/name"
        files = [line["value"] for line in _Hub.commits[0] if line["key"] == "file"]
        assert [(file["path"], b64decode(file["content"])) for file in files] == [("new.npz", b"weights")]
