"""PyTorch's files of tensors: what training scripts leave in them and in names; nothing of them is executed."""

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn
from weights_on_disk import in_memory, one_line, randomised, tiny_model

from pretrain.errors import UserError
from pretrain.finetune.sweep import read_start
from pretrain.models import load_model, torch_files
from pretrain.models.build import build_model
from pretrain.models.timm_folder import write_own_folder
from pretrain.models.weights import model_of, read_weights, weights_sha256

torch.set_num_threads(1)
Tensors = dict[str, torch.Tensor]


class _Payload:
    """Unpickling this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch '{self.target}'",)


def model(seed: int = 0) -> nn.Module:
    return randomised(timm.create_model("test_vit", num_classes=3), seed)


def prefixed(state: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in state.items()}


def training_checkpoint(path: Path, **changes: Any) -> None:
    """What timm's train.py saves: the model, its average, the optimizer, the arguments in a Namespace."""
    weights = model(0)
    optimizer = torch.optim.AdamW(weights.parameters())
    arguments = {"model": "test_vit", "num_classes": 3, "img_size": None, "input_size": None, "mean": None, "std": None}
    arguments |= {"interpolation": "", "crop_pct": None, "crop_mode": None, "gp": None, "model_kwargs": {}}
    values = {"epoch": 3, "arch": "test_vit", "state_dict": weights.state_dict(), "optimizer": optimizer.state_dict()}
    values |= {"state_dict_ema": model(1).state_dict(), "metric": 71.5, "version": 2}
    torch.save(values | {"args": argparse.Namespace(**arguments | changes)}, path)


@torch.no_grad()
def assert_is(path: Path, expected: nn.Module, size: int = 160) -> None:
    x = torch.randn(2, 3, size, size)
    assert (load_model(path)(x) - expected(x)).abs().max() <= 1e-5 * expected(x).abs().max()


@pytest.mark.parametrize("name", ["model_best.pth.tar", "last.pth"])
def test_a_training_checkpoint_of_timm_is_read(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its averages, which is told; its architecture and pixels from its arguments; optimizer and scores left aside."""
    mean = (0.4, 0.4, 0.4)
    training_checkpoint(
        tmp_path / name, mean=mean, std=[0.2], crop_pct=0.7, crop_mode="squash", interpolation="bilinear"
    )
    weights = read_weights(tmp_path / name)
    told = capsys.readouterr().err
    assert f"{name}: state_dict_ema is read; state_dict beside it is not" in told and told.count("\n") == 1
    assert (weights.num_classes, weights.model.image_size) == (3, 160)
    assert (weights.eval_transform, weights.eval_crop, weights.interpolation) == ("timm_squash", 0.7, "bilinear")
    x = torch.rand(2, 3, 160, 160)
    with torch.no_grad():  # a plain ViT's first convolution takes the mean and deviation
        expected = model(1)((x - 0.4) / 0.2)
        assert (model_of(weights)(x * 2 - 1) - expected).abs().max() <= 1e-5 * expected.abs().max()
    before = weights_sha256(weights.source)
    training_checkpoint(tmp_path / name)
    assert weights_sha256(weights.source) != before


def test_arguments_may_name_size_and_pooling(tmp_path: Path) -> None:
    """--img-size, --gp and --model-kwargs of timm's script change the model."""
    options = {"class_token": False, "fc_norm": False}
    other = randomised(timm.create_model("test_vit", num_classes=3, img_size=96, global_pool="avg", **options))
    arguments = {"model": "test_vit.r160_in1k", "img_size": 96, "gp": "avg", "model_kwargs": options}
    arguments |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    torch.save({"state_dict": other.state_dict(), "args": arguments}, tmp_path / "last.pth")
    weights = read_weights(tmp_path / "last.pth")
    assert weights.model.image_size == 96
    assert_is(tmp_path / "last.pth", other, 96)


@pytest.mark.parametrize("size", [96, (3, 96, 96)])
def test_the_size_of_the_images_stands_in_for_the_models(size: Any, tmp_path: Path) -> None:
    """DeiT's --input-size is one number and builds the model; timm's has three."""
    other = randomised(timm.create_model("test_vit", num_classes=3, img_size=96))
    arguments = {"model": "test_vit", "input_size": size, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    torch.save({"model": other.state_dict(), "args": argparse.Namespace(**arguments)}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").model.image_size == 96
    assert_is(tmp_path / "w.pth", other, 96)


def test_arguments_of_another_script_say_nothing_of_the_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchvision's calls a model resnet18, too, but has no mean and no crop: timm's are taken, which is told."""
    values = {"model": model().state_dict(), "args": argparse.Namespace(model="test_vit", lr=0.1)}
    torch.save(values, tmp_path / "w.pth")
    assert_is(tmp_path / "w.pth", model())
    assert "w.pth: does not tell how its images were seen" in capsys.readouterr().err


def test_a_convolutional_network_has_no_size_of_its_own(tmp_path: Path) -> None:
    """--img-size is then of its images alone."""
    other = randomised(timm.create_model("test_convnext3", num_classes=3))
    arguments = {"model": "test_convnext3", "img_size": 96, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    torch.save({"state_dict": other.state_dict(), "args": arguments}, tmp_path / "last.pth")
    assert read_weights(tmp_path / "last.pth").model.image_size == 96
    assert_is(tmp_path / "last.pth", other, 96)


def test_an_arch_alone_is_enough_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PyTorch's example script writes no more; how its images were seen is timm's default for the name."""
    torch.save({"arch": "test_vit", "state_dict": model().state_dict(), "best_acc1": 0.5}, tmp_path / "w.pth")
    assert_is(tmp_path / "w.pth", model())
    assert "w.pth: does not tell how its images were seen" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arch", "told"), [({}, "does not tell its arch"), ({"arch": "vitx"}, "its arch, 'vitx', is no")]
)
def test_a_file_without_architecture_says_the_way_out(arch: dict[str, str], told: str, tmp_path: Path) -> None:
    """And with what it asks for beside it, it is read: timm's config.json, or transformers'."""
    torch.save({"state_dict": model().state_dict(), **arch}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"w.pth: {told}.*put a config.json beside it") as caught:
        read_weights(tmp_path / "w.pth")
    one_line(caught.value)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "num_classes": 3}))
    weights = read_weights(tmp_path / "w.pth")  # a plain ViT: its first convolution took timm's default mean
    assert torch.equal(weights.tensors["head.weight"].read(), model().get_parameter("head.weight"))


def test_files_beside_one_config_are_told_apart(tmp_path: Path) -> None:
    """Fine-tuning starts from the file that was named, whatever else lies there; each has a digest of its own."""
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "num_classes": 3}))
    names = ("model.pth", "best.pt", "last.ckpt")
    for seed, name in enumerate(names):
        torch.save(model(seed).state_dict(), tmp_path / name)
    starts = [read_start(tmp_path / name, from_scratch=False) for name in names]
    for seed, start in enumerate(starts):
        assert start.weights and start.weights.name == names[seed]
        head = read_weights(start.weights).tensors["head.weight"].read()
        assert torch.equal(head, model(seed).get_parameter("head.weight"))
    digests = {start.sha256 for start in starts}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "num_classes": 3, "labels": None}))
    assert len(digests | {weights_sha256(tmp_path / name) for name in names}) == 6


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "model.pth.tar"])
def test_a_folder_may_hold_a_file_of_pytorchs(name: str, tmp_path: Path) -> None:
    """Beside the config.json of timm; its bytes tell weights apart."""
    save_for_hf(model(), tmp_path / "t", safe_serialization=True)
    (tmp_path / "t" / "model.safetensors").unlink()
    (tmp_path / "t" / "pytorch_model.bin").unlink(missing_ok=True)
    torch.save(model().state_dict(), tmp_path / "t" / name)
    assert_is(tmp_path / "t", model())
    before = weights_sha256(tmp_path / "t")
    torch.save(model(1).state_dict(), tmp_path / "t" / name)
    assert weights_sha256(tmp_path / "t") != before


def test_transformers_own_old_file_is_read(tmp_path: Path) -> None:
    """pytorch_model.bin, as before safetensors."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=2, image_size=16, patch_size=8
    )
    config.layer_norm_eps = 1e-6
    theirs = randomised(transformers.ViTForImageClassification(config))
    cast(Any, theirs).save_pretrained(tmp_path / "new")
    found = read_weights(tmp_path / "new")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "new" / "config.json").read_bytes())
    torch.save(tensors, tmp_path / "old" / "pytorch_model.bin")
    again = read_weights(tmp_path / "old")
    assert found.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(found.tensors[name].read(), again.tensors[name].read()) for name in found.tensors)


PREFIXED: dict[str, tuple[Callable[[Tensors, Tensors], Tensors], int, str]] = {
    "DDP": (lambda s, _: prefixed(s, "module."), 0, "module. is taken off the names of its"),
    "compiled DDP": (lambda s, _: prefixed(s, "module._orig_mod."), 0, "module._orig_mod. is taken off"),
    "Lightning": (lambda s, _: prefixed(s, "model."), 0, "model. is taken off"),
    "averages alone": (lambda s, _: prefixed(s, "ema.module."), 0, "ema.module. is taken off"),
    "averages beside": (lambda s, other: s | prefixed(other, "ema."), 1, "tensors of ema. are read, not those beside"),
    "both": (lambda s, o: prefixed(s, "model.") | prefixed(o, "ema.model."), 1, "tensors of ema. are read"),
}


@pytest.mark.parametrize("form", ["safetensors", "pth"])
@pytest.mark.parametrize("kind", PREFIXED)
def test_prefixes_of_tools_are_taken_off_and_told(
    kind: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """When all tensors have one; of averages beside the weights the averages are read."""
    rename, seed, told = PREFIXED[kind]
    state = rename(*(dict(model(s).state_dict()) for s in (0, 1)))
    save_for_hf(model(), tmp_path / "t", safe_serialization=True)
    (tmp_path / "t" / "model.safetensors").unlink()
    (tmp_path / "t" / "pytorch_model.bin").unlink(missing_ok=True)
    if form == "pth":
        torch.save(state, tmp_path / "t" / "model.pth")
    else:
        save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "t" / "model.safetensors")
    assert_is(tmp_path / "t", model(seed))
    assert told in capsys.readouterr().err


def test_a_prefix_of_some_tensors_stays(tmp_path: Path) -> None:
    """Then it is a part of the model, or damage: the missing and unknown tensors are named."""
    save_for_hf(model(), tmp_path / "t", safe_serialization=True)
    state = {name: tensor.clone() for name, tensor in model().state_dict().items()}
    state["module.norm.bias"] = state.pop("norm.bias")
    save_file(state, tmp_path / "t" / "model.safetensors")
    with pytest.raises(UserError, match="tensors missing: norm.bias; unknown: module.norm.bias"):
        read_weights(tmp_path / "t")


def test_our_own_folder_loses_a_prefix_too(tmp_path: Path) -> None:
    """A model of ours that was trained on elsewhere, in DDP."""
    config = tiny_model()
    ours = randomised(build_model(config, 3))
    write_own_folder(in_memory(ours, config), tmp_path / "t")
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    save_file(prefixed(state, "module."), tmp_path / "t" / "model.safetensors")
    assert_is(tmp_path / "t", ours, 16)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".pth", ".pth.tar", ".pt", ".ckpt", ".bin"])
@pytest.mark.parametrize("protocol", ["plain pickle", "torch.save"])
def test_nothing_is_executed(ending: str, protocol: str, tmp_path: Path) -> None:
    """One line that names the file, and for torch's own format what it needed; the payload has not run."""
    path, payload = tmp_path / f"w{ending}", _Payload(tmp_path / "executed")
    if protocol == "torch.save":
        torch.save({"arch": "test_vit", "state_dict": model().state_dict(), "args": payload}, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    with pytest.raises(UserError, match="which may execute code: save its tensors alone") as caught:
        read_weights(path)
    assert f"w{ending}: " in one_line(caught.value)
    assert ("needs posix.system" in str(caught.value)) == (protocol == "torch.save")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([1, 2], "holds a list, expected the tensors of a model by name"),
        ({"epoch": 3}, "holds no tensors of a model; its keys are epoch"),
        ({"state_dict": {}}, "holds no tensors of a model; its keys are state_dict"),
        ({"arch": "test_vit", "state_dict": {"head.bias": torch.zeros(3)}}, "tensors missing: blocks.0"),
    ],
)
def test_a_file_that_is_no_model_is_one_line(values: Any, told: str, tmp_path: Path) -> None:
    """Named with what it holds."""
    torch.save(values, tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"w.pth: {told}") as caught:
        load_model(tmp_path / "w.pth")
    one_line(caught.value)


@pytest.mark.parametrize("cut", [0, 100, 100_000])
def test_a_truncated_file_is_one_line(cut: int, tmp_path: Path) -> None:
    """Empty, cut in the header or in the tensors."""
    torch.save({"arch": "test_vit", "state_dict": model().state_dict()}, tmp_path / "w.pth")
    os.truncate(tmp_path / "w.pth", cut)
    with pytest.raises(UserError, match="w.pth: ") as caught:
        load_model(tmp_path / "w.pth")
    one_line(caught.value)


def test_a_value_that_is_not_finite_is_told(tmp_path: Path) -> None:
    """With the tensor's name, when it is read."""
    state = model().state_dict()
    state["norm.bias"][3] = float("nan")
    torch.save({"arch": "test_vit", "state_dict": state}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="w.pth: norm.bias holds values that are not finite"):
        load_model(tmp_path / "w.pth")


class _Calls:
    """Unpickling this calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.called


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("made", [bytearray, torch.FloatTensor])
def test_a_small_file_takes_no_memory_of_its_choosing(made: Any, zipped: bool, tmp_path: Path) -> None:
    """weights_only calls these with any number: 392 bytes made a bytearray of 100 GB."""
    values = {"arch": "test_vit", "state_dict": model().state_dict(), "args": _Calls(made, 1000)}
    torch.save(values, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="w.pth: its pickle makes a .*which can take any memory") as caught:
        read_weights(tmp_path / "w.pth")
    one_line(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_save_writes_of_tensors_is_read(zipped: bool, tmp_path: Path) -> None:
    """Types that stand in such files without being called: of tensors with an attribute, and of unsigned ones, which
    torch itself does not read from the older format.
    """
    tagged = torch.zeros(2)
    tagged.tag = 1  # type: ignore[attr-defined]
    more = [tagged, torch.zeros(2, dtype=torch.uint16)][: 1 + zipped]
    values = {"arch": "test_vit", "state_dict": model().state_dict(), "more": more}
    torch.save(values, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert_is(tmp_path / "w.pth", model())


def test_a_length_that_is_none_is_one_line(tmp_path: Path) -> None:
    """A pickle that says of itself to be of 2^62 bytes."""
    (tmp_path / "w.pth").write_bytes(b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little") + b"a.")
    with pytest.raises(UserError, match="w.pth: is damaged, or a pickle") as caught:
        read_weights(tmp_path / "w.pth")
    one_line(caught.value)


def test_a_pickle_of_too_many_opcodes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a byte makes a set of 216."""
    monkeypatch.setattr(torch_files, "MAX_OPCODES", 1000)
    torch.save({"arch": "test_vit", "state_dict": model().state_dict(), "more": [[]] * 1000}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="w.pth: its pickle has more than 1,000 opcodes"):
        read_weights(tmp_path / "w.pth")


def test_a_file_from_before_zip_is_read(tmp_path: Path) -> None:
    """PyTorch's format up to 1.5, in which DeiT's and others' files of 2020 are."""
    values = {"arch": "test_vit", "state_dict": model().state_dict()}
    torch.save(values, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert_is(tmp_path / "w.pth", model())
