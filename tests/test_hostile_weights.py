"""Weights of strangers: whatever a file claims is compared with limits before it costs time or memory, or is refused.

Each input is one line that names the file, within seconds and 300 MB.
"""

import json
import re
import struct
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from tiny import tiny_config
from weights_on_disk import in_memory, one_line, randomised, tiny_model

from pretrain.config import MAX_CLASSES, config_to_dict
from pretrain.errors import UserError
from pretrain.models import load_model, npz_file, tensors
from pretrain.models.build import build_model
from pretrain.models.card import model_card
from pretrain.models.google import write_google
from pretrain.models.timm_folder import write_own_folder, write_timm_folder
from pretrain.models.transformers_folder import write_transformers_folder
from pretrain.models.weights import read_weights, weights_sha256

torch.set_num_threads(1)
MAX_SECONDS, MAX_BYTES = 8, 300 << 20  # of a process that does other things too; what is refused takes 0.1 s
Edit = Callable[[Path], Any]


def model(**changes: Any) -> Any:
    config = tiny_model(**changes)
    return in_memory(randomised(build_model(config, 3)), config)


def assert_refused(path: Path, message: str) -> None:
    is_measured = forget_peak()
    before, memory = time.monotonic(), bytes_of("VmRSS")
    with pytest.raises(UserError, match=message) as caught:
        load_model(path)
    assert path.name in one_line(caught.value) and len(str(caught.value)) < 1500
    assert time.monotonic() - before < MAX_SECONDS
    assert not is_measured or bytes_of("VmHWM") - memory < MAX_BYTES


def forget_peak() -> bool:
    """Has VmHWM begin anew, or it would be the most that any test before has taken; returns whether that can be."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def bytes_of(name: str) -> int:
    """What this process holds in memory, VmRSS, or has held at most, VmHWM."""
    (kilobytes,) = re.findall(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    return int(kilobytes) << 10


def test_more_memory_than_is_allowed_would_be_seen() -> None:
    """Also when the tests before have taken more; where it cannot be measured, refusals are tested without."""
    before = bytes_of("VmRSS")
    np.ones(2 * MAX_BYTES, np.uint8)
    if not forget_peak():
        pytest.skip("/proc/self/clear_refs cannot be written: the memory of a refusal is not measured")
    assert bytes_of("VmHWM") - before < MAX_BYTES
    np.ones(MAX_BYTES + (16 << 20), np.uint8)  # the kernel counts in batches of pages
    assert bytes_of("VmHWM") - before >= MAX_BYTES


# --- .npz ------------------------------------------------------------------------------------------------------------


def array(header: str | bytes, content: bytes = b"", version: int = 1) -> bytes:
    """A .npy file with any header."""
    text = header.encode() if isinstance(header, str) else header
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + content


def plain(shape: str, descr: str = "<f4", content: bytes = b"") -> bytes:
    return array(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}", content)


def members(claimed_bytes: int | None = None, /, **files: Any) -> Edit:
    """Adds members to an archive; claimed_bytes: what its directory says of their sizes."""

    def edit(path: Path) -> None:
        with zipfile.ZipFile(path) as old:
            kept = {name: old.read(name) for name in old.namelist() if name.removesuffix(".npy") not in files}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in kept.items():
                archive.writestr(name, content)
            for name, content in files.items():
                archive.writestr(f"{name}.npy", content)
                archive.filelist[-1].file_size = claimed_bytes or len(content)

    return edit


def many(names: Callable[[int], str], count: int) -> Edit:
    return members(**{names(number): plain("(1,)", content=b"\0" * 4) for number in range(1, count + 1)})


NPZ: dict[str, tuple[Edit, str]] = {
    "header of a gigabyte": (
        members(10**9, cls=array(b" " * (20 << 20), version=2)),
        "unpacks .* bytes to 1,000,.*, expected at most 20 times as many",
    ),
    "header of 50 MB": (members(cls=array(b" " * (50 << 20), version=2)), "cls has a header of 52,428,800 bytes"),
    "header of 10,001 bytes": (members(cls=array(b" " * 10_001)), "has a header of 10,001 bytes, .* at most 10,000"),
    "20 million classes of zeros": (
        members(32 * 20_000_000 * 4, **{"head/kernel": plain("(32, 20000000)")}),
        "unpacks .* bytes to 2,560",
    ),
    "positions of zeros": (
        members(1 << 32, **{"Transformer/posembed_input/pos_embedding": plain("(1, 33554432, 32)")}),
        "unpacks",
    ),
    "stacked arrays of no bytes": (
        members(**{f"Transformer/encoderblock/x{n}": plain("(1024, 1000000)", "|V0") for n in range(300)}),
        "whose values have no bytes",
    ),
    "a head of no bytes": (members(**{"head/kernel": plain(f"(32, {10**12})", "|V0")}), "whose values have no bytes"),
    "a longer head of no bytes": (members(cls=plain(f"(1, {10**30})", "|V0")), "cls has 2 axes, the longest of 1000"),
    "text of no bytes": (members(cls=plain("(1, 32)", "<U0")), "cls has the header|whose values have no bytes"),
    "blocks by name": (many("Transformer/encoderblock_{}/x".format, 1100), "depth 110[012].* at most 1024 blocks"),
    "tensors": (many("x{}".format, 2001), "has 2,0.. members, expected at most 2,000"),
    "stages by name": (
        lambda path: [many("block{}/unit1/x".format, 1500)(path), members(**{"conv_root/kernel": plain("(0,)")})(path)],
        "its trunk has 1500 stages, expected at most 10",
    ),
    "negative sides": (members(cls=plain("(-16, -5)", content=b"\0" * 320)), "cls has the header .* of a plain array"),
    "one negative side": (members(cls=plain("(-1,)")), "cls has the header"),
    "no bracket": (members(cls=array("{'descr': (\n")), "cls has the header"),
    "no quote": (members(cls=array("{'descr': '<f4, 'fortran_order': False, 'shape': (1,), }")), "cls has the header"),
    "nested": (members(cls=array("(" * 9000)), "cls has the header"),
    "signs": (members(cls=array("-" * 9000 + "1")), "cls has the header"),
    "a list as key": (members(cls=array("{[]: 1}")), "cls has the header"),
    "twice the same key": (members(cls=array("{'shape': (1,), 'shape': (1,), 'descr': '<f4'}")), "cls has the header"),
    "a call": (members(cls=array("__import__('os').system('true')")), "cls has the header"),
    "structured": (members(cls=array("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': ()}")), "cls has the"),
    "no such type": (members(cls=plain("(1,)", "<f3")), "cls "),
    "long shape": (members(cls=plain(f"({'1' * 5000},)")), "cls "),
    "40 axes": (members(cls=plain(f"({'1,' * 40})", content=b"\0" * 4)), "cls has 40 axes"),
    "no header": (members(cls=b""), "cls is no array of numpy's"),
    "cut header": (members(cls=b"\x93NUMPY\1\0\x76\0{'descr"), "cls has the header"),
    "version 9": (members(cls=array("{}", version=9)), "cls is no array of numpy's"),
    "class names: a number": (lambda p: p.with_name("m.classes.json").write_text("3"), "names is 3, expected a list"),
    "class names: null": (lambda p: p.with_name("m.classes.json").write_text("[null, 1, 2]"), "a list of texts"),
    "class names: deep": (lambda p: p.with_name("m.classes.json").write_text("[" * 100_000), "m.classes.json: is "),
}


@pytest.mark.parametrize("name", NPZ)
def test_a_hostile_npz_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and headers, before an array is read."""
    monkeypatch.setattr(npz_file, "MAX_TENSORS", 2000)  # 20,000 take seconds to write
    write_google(model(), tmp_path / "m.npz", "released")
    edit, message = NPZ[name]
    edit(tmp_path / "m.npz")
    if "class names" in name:
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / "m.npz")
    else:
        assert_refused(tmp_path / "m.npz", message)


def test_other_writers_headers_and_compression_are_read(tmp_path: Path) -> None:
    """Keys in any order, no spaces, Python 2's long integers, columns first, versions 2 and 3; savez_compressed."""
    write_google(model(), tmp_path / "m.npz", "released")
    values = np.random.default_rng(0).normal(size=(32, 3)).astype("<f4")
    content, columns = values.tobytes(), values.tobytes("F")
    for head in (
        array("{'shape':(32,3),'descr':'<f4','fortran_order':False}", content),
        array('{"descr": "<f4", "fortran_order": False, "shape": (32L, 3L), }          \n', content),
        array("{'descr': '<f4', 'fortran_order': True, 'shape': (32, 3), }", columns, version=2),
        array("{'descr': '=f4', 'fortran_order': False, 'shape': (32, 3), }", content, version=3),
    ):
        members(**{"head/kernel": head})(tmp_path / "m.npz")
        assert torch.equal(read_weights(tmp_path / "m.npz").tensors["head.weight"].read(), torch.from_numpy(values).T)


# --- tensors of folders ----------------------------------------------------------------------------------------------


def edit_tensors(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        save_file({**load_file(folder / "model.safetensors"), **changes}, folder / "model.safetensors")

    return edit


def index(weight_map: Any) -> Edit:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)

    return edit


def torch_file(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    def change(folder: Path) -> None:
        values = load_file(folder / "model.safetensors")
        edit(values)
        (folder / "model.safetensors").unlink()
        torch.save(values, folder / "pytorch_model.bin")

    return change


def long_header(num_bytes: int) -> Edit:
    return lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", num_bytes) + b" " * 1000)


def compressed(folder: Path) -> None:
    """A file of PyTorch's whose pickle unpacks to a gigabyte, it says."""
    torch_file(lambda values: None)(folder)
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", b"\0" * (1 << 20))
        archive.filelist[-1].file_size = 10**9


BIAS = "norm.bias"
TYPES = {
    "BOOL": torch.zeros(32, dtype=torch.bool),
    "U8": torch.zeros(32, dtype=torch.uint8),
    "I32": torch.zeros(32, dtype=torch.int32),
    "I64": torch.zeros(32, dtype=torch.int64),
}
OTHERS = {"C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16}
TENSORS: dict[str, tuple[Edit, str]] = {
    **{name: (edit_tensors(**{BIAS: t}), f"{BIAS} holds whole numbers") for name, t in TYPES.items()},
    **{
        name: (edit_tensors(**{BIAS: torch.zeros(32, dtype=t)}), f"{BIAS} is of type {name}, expected one of F64")
        for name, t in OTHERS.items()
    },
    "header of a gigabyte": (long_header(10**9), "a header of 1,000,000,000 bytes, expected at most 16,777,216"),
    "header beyond every file": (long_header(2**64 - 1), "model.safetensors: damaged"),
    "tensors": (
        edit_tensors(**{f"x{number}": torch.zeros(0) for number in range(2001)}),
        "has 2,0.. tensors, expected at most 2,000",
    ),
    "names": (edit_tensors(**{"x" * 100_000: torch.zeros(0)}), "tensors unknown: xxx"),
    "weight_map: a list": (index([1]), r"weight_map: is \[1\], expected an object"),
    "weight_map: numbers": (index({"norm.bias": 1}), "weight_map: norm.bias is 1, expected a text"),
    "weight_map: deep": (index('{"weight_map":' * 100_000), "index.json: is (nested|not JSON)"),
    "weight_map: none": (index("{}"), "weight_map is missing"),
    "weight_map: above": (index({"norm.bias": ".."}), r"is a link to .*, outside of its folder"),
    "weight_map: NUL": (index({"norm.bias": "a\0b"}), "cannot be read"),
    "pth: whole numbers": (torch_file(lambda t: t.update({BIAS: TYPES["I64"]})), f"{BIAS} holds whole numbers"),
    "pth: complex": (
        torch_file(lambda t: t.update({BIAS: torch.zeros(32, dtype=torch.complex64)})),
        "type .*complex64",
    ),
    "pth: one value for all": (
        torch_file(lambda t: t.update({BIAS: torch.zeros(1).expand(10**12)})),
        r"is said to have shape \(1000000000000,\), for which it has no values",
    ),
    "pth: sparse": (torch_file(lambda t: t.update({BIAS: torch.zeros(32).to_sparse()})), "for which it has no values"),
    "pth: compressed": (compressed, "unpacks .* bytes to 1,000,000,000"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_no_weights_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other types than floats, in every kind of file; headers and lists of files beyond the limits."""
    monkeypatch.setattr(tensors, "MAX_TENSORS", 2000)
    write_own_folder(model(), tmp_path / "own")
    edit, message = TENSORS[name]
    edit(tmp_path / "own")
    assert_refused(tmp_path / "own", message)


@pytest.mark.parametrize("counts", [torch.int64, torch.int32, torch.float32])
def test_counters_of_batch_norm_are_read(counts: torch.dtype, tmp_path: Path) -> None:
    """Whole numbers, where the model has whole numbers."""
    theirs = randomised(timm.create_model("resnet10t", num_classes=3))
    save_for_hf(theirs, str(tmp_path / "t"), safe_serialization=True)
    state = {name: t.to(counts) if "num_batches" in name else t for name, t in theirs.state_dict().items()}
    save_file(state, tmp_path / "t" / "model.safetensors")
    loaded = load_model(tmp_path / "t")
    assert torch.equal(loaded.state_dict()["bn1.running_var"], theirs.state_dict()["bn1.running_var"])
    assert loaded.state_dict()["bn1.num_batches_tracked"].dtype == torch.int64


# --- config.json -----------------------------------------------------------------------------------------------------


def timm_asks(architecture: str, **model_args: Any) -> dict[str, Any]:
    return {"architecture": architecture, "num_classes": 3, "model_args": model_args}


MILLION = 1_000_000
SWIN = "swin_tiny_patch4_window7_224"
OWN = {"name": "Ti", "width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "image_size": 16, "patch_size": 8}
LARGER = "describes a far larger model than its .* tensors"
CLAIMS: dict[str, tuple[dict[str, Any] | str, str]] = {
    "swin": (
        timm_asks(SWIN, depths=[MILLION, 2, 2, 2]),
        r"model_args.depths is \[1000000, 2, 2, 2\], .* at most 65536",
    ),
    "resnet": (timm_asks("resnet50", layers=[MILLION] * 4), "model_args.layers is .*, expected at most 65536 in all"),
    "convnext": (timm_asks("convnext_tiny", depths=[100_000, 1, 1, 1]), "model_args.depths is"),
    "densenet": (timm_asks("densenet121", block_config=[5000, 5000]), LARGER),
    "swin within the limit": (timm_asks(SWIN, depths=[5000, 2, 2, 2]), LARGER),
    "resnet within the limit": (timm_asks("resnet50", layers=[1000] * 4), LARGER),
    "vit": (timm_asks("vit_tiny_patch16_224", depth=1024), LARGER),
    "a list of lists": (timm_asks("resnet50", layers=[[MILLION]]), "at most 65536"),
    "an object of numbers": (timm_asks("resnet50", layers={"a": 1e300}), "at most 65536"),
    "NaN": (timm_asks("resnet50", drop_rate=float("nan")), "model_args.drop_rate is nan"),
    "many values": (timm_asks("resnet50", layers=[0] * 300), "model_args: has more than 256 values"),
    "own: itself": ({"num_classes": 3, "pretrain": {"model": OWN | {"name": "${model.name}"}}}, "resolvers are not"),
    "own: all of it": ({"num_classes": 3, "pretrain": {"model": OWN | {"name": "${model}"}}}, "resolvers are not"),
    "a long text": (timm_asks("vit_tiny_patch16_224", act_layer="x" * 10_000), "has 10000 letters"),
    "own: depth": ({"num_classes": 3, "pretrain": {"model": OWN | {"depth": 1024}}}, LARGER),
    "own: a depth of 2.5": ({"num_classes": 3, "pretrain": {"model": OWN | {"depth": 2.5}}}, "model.depth.*2.5"),
    "own: heads of true": (
        {"num_classes": 3, "pretrain": {"model": OWN | {"heads": True}}},
        "model.heads.*(true|True)",
    ),
    "own: a depth of none": ({"num_classes": 3, "pretrain": {"model": OWN | {"depth": 0}}}, "depth"),
    "own: a key of two lines": ({"num_classes": 3, "pretrain": {"model": OWN, "\n": 1}}, r"pretrain.\\n: no such key"),
    "own: width": ({"num_classes": 3, "pretrain": {"model": OWN | {"width": 65_536}}}, "shape"),
    "own: classes": ({"num_classes": 1_000_000, "pretrain": {"model": OWN}}, "head.(weight|bias) has shape"),
    "own: trunk": (
        {"num_classes": 3, "pretrain": {"model": OWN | {"trunk": [1] * MILLION}}},
        r"model.trunk is \[1, .* at most 65536 in all",
    ),
    "own: units": ({"num_classes": 3, "pretrain": {"model": OWN | {"trunk": [MILLION]}}}, "model.trunk is"),
    "own: patches": (
        {"num_classes": 3, "pretrain": {"model": OWN | {"image_size": 4096, "patch_size": 1, "positions": "sincos2d"}}},
        "16777216 patches, expected at most 65536",
    ),
    "timm's own: depth": ({"num_classes": 3, "pretrain": {"model": {"name": "timm:vit_base_patch16_224"}}}, "tensors"),
    "depth of transformers": ({"model_type": "vit", "num_hidden_layers": 1024}, LARGER),
    "lists": ("[" * 200_000, "config.json: is (nested|not JSON)"),
    "objects": ('{"architecture":' * 200_000, "config.json: is (nested|not JSON)"),
    "size": (" " * (17 << 20), "config.json: has more than 16,777,216 bytes"),
}
TRANSFORMERS = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    **{"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2, "num_labels": 3},
    **{"image_size": 16, "patch_size": 8},
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_model_beyond_its_tensors_is_not_built(name: str, tmp_path: Path) -> None:
    """Depths, lists of depths, widths, tables: compared with limits and with the tensors beside them."""
    values, message = CLAIMS[name]
    is_transformers = isinstance(values, dict) and "model_type" in values
    (write_transformers_folder if is_transformers else write_own_folder)(model(), tmp_path / "f")
    if isinstance(values, dict):
        values = json.dumps(TRANSFORMERS | values if is_transformers else values)
    (tmp_path / "f" / "config.json").write_text(values)
    assert_refused(tmp_path / "f", message)


def test_tables_that_no_file_backs_are_bounded(tmp_path: Path) -> None:
    """Relative positions need a table of the square of the patches, computed, in each block."""
    config = tiny_model(positions="relative", image_size=1024, patch_size=8)
    with torch.device("meta"):
        outline = build_model(config, 0)
    values = {name: torch.zeros(tensor.shape) for name, tensor in outline.named_parameters()}
    weights = in_memory(torch.nn.Module(), config)
    write_own_folder(weights, tmp_path / "f")
    save_file(values, tmp_path / "f" / "model.safetensors")
    assert_refused(tmp_path / "f", "needs tables of 4,.* bytes beside its tensors, expected at most 268,435,456")


WRONG = [2.0, 16.5, True, -1, 10**30, float("nan"), float("inf"), "16", [], {}, [[16]], None]
NEVER = {  # keys, and the values that they may have
    "hidden_size": (),
    "num_hidden_layers": (),
    "intermediate_size": (),
    "num_attention_heads": (),
    "image_size": (),
    "patch_size": (),
    "num_labels": (None,),
    "hidden_act": (),
    "qkv_bias": (True, None),
    "layer_norm_eps": (None,),
    "architectures": ([], None),
    "id2label": ([], {}, None),
    "problem_type": (None,),
    "pretrain": ({},),
    "preprocessor_config.json: resample": (2.0, None),
    "preprocessor_config.json: image_mean": (2.0, 16.5, -1, None),
    "preprocessor_config.json: image_std": (2.0, 16.5, None),
    "preprocessor_config.json: rescale_factor": (2.0, 16.5, None),
    "preprocessor_config.json: do_normalize": (True, None),
}


@pytest.mark.parametrize("where", NEVER)
def test_settings_of_transformers_have_their_types(where: str, tmp_path: Path) -> None:
    """Neither 2.0 nor true is a number of blocks; each wrong value is one line that names the key."""
    write_transformers_folder(model(), tmp_path / "f")
    (tmp_path / "f" / "config.json").write_text(json.dumps(TRANSFORMERS))
    file, _, key = where.rpartition(": ")
    path = tmp_path / "f" / (file or "config.json")
    before = json.loads(path.read_text())
    read_weights(tmp_path / "f")
    for value in WRONG:
        path.write_text(json.dumps(before | {key: value}))
        if any(value == allowed and type(value) is type(allowed) for allowed in NEVER[where]) or (
            key == "resample" and value == 2.0
        ):
            continue
        with pytest.raises(UserError, match=f"{path.name}: .*{key}") as caught:
            read_weights(tmp_path / "f")
        one_line(caught.value)


@pytest.mark.parametrize(
    "key", ["num_classes", "label_names", "input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation"]
)
def test_settings_of_timm_have_their_types(key: str, tmp_path: Path) -> None:
    """What is not of the type is refused; empty values are timm's defaults."""
    write_timm_folder(model(), tmp_path / "f")
    values = json.loads((tmp_path / "f" / "config.json").read_text())
    del values["pretrain"]
    part = values if key in ("num_classes", "label_names") else values["pretrained_cfg"]
    for value in WRONG:
        is_default = not value and not (key == "num_classes" and value is not None)
        if is_default or (key in ("mean", "std") and value in (2.0, 16.5, -1) and value is not True):
            continue
        before = part.get(key)
        part[key] = value
        (tmp_path / "f" / "config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=f"f(/config.json)?: .*{key.replace('crop_pct', 'crop')}") as caught:
            read_weights(tmp_path / "f")
        one_line(caught.value)
        part[key] = before


@pytest.mark.parametrize("key", ["depth", "embed_dim", "num_heads", "patch_size", "mlp_ratio", "img_size", "act_layer"])
def test_arguments_of_timm_give_weights_or_one_line(key: str, tmp_path: Path) -> None:
    """timm's constructors raise what they like at them."""
    write_timm_folder(model(), tmp_path / "f")
    values = json.loads((tmp_path / "f" / "config.json").read_text())
    del values["pretrain"]
    for value in [*WRONG, 0]:
        (tmp_path / "f" / "config.json").write_text(
            json.dumps(values | {"model_args": values["model_args"] | {key: value}})
        )
        try:
            read_weights(tmp_path / "f")
        except UserError as error:
            one_line(error)


@pytest.mark.parametrize("count", [-1, MAX_CLASSES + 1, 10**30, True, 3.0, None, "3"])
def test_classes_are_counted_within_a_limit(count: Any, tmp_path: Path) -> None:
    """In a folder of ours."""
    write_own_folder(model(), tmp_path / "f")
    values = json.loads((tmp_path / "f" / "config.json").read_text())
    (tmp_path / "f" / "config.json").write_text(json.dumps(values | {"num_classes": count}))
    with pytest.raises(UserError, match="config.json: num_classes is "):
        read_weights(tmp_path / "f")


@pytest.mark.parametrize("names", [[None] * 3, [["a"]] * 3, "abc", {"a": 1, "b": 2, "c": 3}, ["\ud800"] * 3])
def test_class_names_are_texts(names: Any, tmp_path: Path) -> None:
    """Of a folder of ours, and by number of transformers."""
    write_own_folder(model(), tmp_path / "own")
    write_transformers_folder(model(), tmp_path / "theirs")
    labels = {str(number): name for number, name in enumerate(names)}
    for folder, change in (("own", {"label_names": names}), ("theirs", {"id2label": labels})):
        path = tmp_path / folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        if folder == "theirs" and isinstance(names, str | dict):
            continue
        with pytest.raises(
            UserError, match="config.json: (label_names|id2label).* is (null|.*, expected a (list of )?text)"
        ):
            read_weights(tmp_path / folder)


@pytest.mark.parametrize(
    "names, expected",
    [
        ([1, 2.5, True], ("1", "2.5", "True")),
        ({"0": "a", "1": "b", "2": "c"}, ("a", "b", "c")),
        ({"2": "c", "0": 7}, ("7", "1", "c")),
    ],
)
def test_class_names_may_be_numbers_or_stand_by_number(names: Any, expected: tuple[str, ...], tmp_path: Path) -> None:
    """As people's own scripts write them: digits that are called 0 to 9, timm's names by number."""
    write_timm_folder(model(), tmp_path / "timm")
    write_transformers_folder(model(), tmp_path / "theirs")
    labels = names if isinstance(names, dict) else {str(number): name for number, name in enumerate(names)}
    for folder, change in (("timm", {"label_names": names}), ("theirs", {"id2label": labels})):
        path = tmp_path / folder / "config.json"
        values = json.loads(path.read_text()) | change
        values.pop("pretrain", None)
        path.write_text(json.dumps(values))
        if folder == "timm" or len(labels) == 3:  # of transformers, they say how many classes there are
            assert read_weights(tmp_path / folder).class_names == expected


# --- links -----------------------------------------------------------------------------------------------------------


def linked(path: Path, target: Path) -> None:
    """Moves a file away and leaves a link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_links_out_of_a_folder_are_refused(name: str, tmp_path: Path) -> None:
    """Another's folder would show, or send on, any file of this machine. Inside the folder they may be."""
    folder = tmp_path / "f"
    write_transformers_folder(model(), folder)
    linked(folder / name, folder / "files" / name)
    read_weights(folder)
    weights_sha256(folder)
    (folder / "files" / name).rename(tmp_path / name)
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: is a link to {tmp_path / name}, outside of its folder") as caught:
        read_weights(folder)
    one_line(caught.value)
    if name != "preprocessor_config.json":
        with pytest.raises(UserError, match="outside of its folder"):
            weights_sha256(folder)


def test_links_out_by_other_names_are_refused(tmp_path: Path) -> None:
    """A file that an index names, class names beside an .npz, results that a card would repeat."""
    folder, secret = tmp_path / "f", tmp_path / "secret.json"
    weights = model()
    write_own_folder(weights, folder)
    index({"norm.bias": "part.safetensors"})(folder)
    (folder / "other.safetensors").rename(tmp_path / "part.safetensors")
    (folder / "part.safetensors").symlink_to(tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="part.safetensors: is a link to .*, outside of its folder"):
        read_weights(folder)
    secret.write_text('["a", "b", "c"]')
    write_google(weights, folder / "m.npz", "released")
    (folder / "m.classes.json").symlink_to(secret)
    with pytest.raises(UserError, match="m.classes.json: is a link to .*, outside of its folder"):
        read_weights(folder / "m.npz")
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "results.json").symlink_to(secret)
    of_folder = in_memory(build_model(weights.model, 3), weights.model)
    object.__setattr__(of_folder, "source", folder)
    with pytest.raises(UserError, match="results.json: is a link to .*, outside of its folder"):
        model_card(of_folder, "pretrain", title="f", command="", versions={}, loading="", proof="")


@torch.no_grad()
def test_hugging_faces_cache_is_read(tmp_path: Path) -> None:
    """There a snapshot's files are links to blobs beside it; links further out are not read there either."""
    cache = tmp_path / "models--someone--vit"
    snapshot = cache / "snapshots" / ("0" * 40)
    write_transformers_folder(model(), snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        linked(path, cache / "blobs" / f"{number:040}")
        path.unlink()
        path.symlink_to(Path("../../blobs") / f"{number:040}")
    x = torch.rand(1, 3, 16, 16)
    weights = model()
    write_own_folder(weights, tmp_path / "own")
    assert (load_model(snapshot)(x) - load_model(tmp_path / "own")(x)).abs().max() < 1e-4
    (snapshot / "onnx" / "vit").mkdir(parents=True)  # some keep several models in one repository
    for path in list(snapshot.glob("*.*")):
        (snapshot / "onnx" / "vit" / path.name).symlink_to(Path("../../../../blobs") / path.readlink().name)
    assert (load_model(snapshot / "onnx" / "vit")(x) - load_model(tmp_path / "own")(x)).abs().max() < 1e-4
    linked(snapshot / "config.json", tmp_path / "elsewhere.json")
    (tmp_path / "elsewhere.json").unlink()
    (tmp_path / "elsewhere.json").write_bytes((cache / "blobs" / f"{0:040}").read_bytes())
    with pytest.raises(UserError, match="config.json: is a link to .*elsewhere.json, outside of its folder"):
        load_model(snapshot)


_MARK = "<b>a|b\x1b[2J`c`"


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {_MARK: 0.5}},
        {"metrics": {"val/top1": 10**400}},
        {"metrics": 5},
        {"step": _MARK},
        {"data": []},
        {"data": {"order": _MARK}},
        {"data": {"order": {"manifest_sha256": _MARK}}},
        {"receipt": [1]},
        {"config": []},
    ],
    ids=str,
)
def test_what_others_wrote_of_a_run_does_nothing_to_a_card(change: dict[str, Any], tmp_path: Path) -> None:
    """Of a checkpoint's state.json: shown as text, left out, or refused in one line."""
    state = {"config": config_to_dict(tiny_config(tmp_path, tmp_path)), "step": 5, **change}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert_card_is_plain(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        {"metric": _MARK},
        {"metric": "top1\u202e"},
        {"model": _MARK, _MARK: _MARK},
        {"value": 10**400},
        {"metric": "top1\ny: |\n  z", "model": "trained"},
        {"split": "a" * 100_000},
    ],
    ids=lambda row: str(row)[:40],
)
def test_what_others_wrote_of_scores_does_nothing_to_a_card(row: dict[str, Any], tmp_path: Path) -> None:
    """Of evaluation/results.json beside weights, in the card's front matter too."""
    results = {
        "weights": f"runs/{_MARK}",
        "data": {"val": {"sha256": "a\u202eb"}, "val/\u202e": {"sha256": "ab"}},  # turns the direction of writing
        "rows": [{"model": "trained", "metric": "top1", "value": 0.5, "n": 9, **row}],
    }
    (tmp_path / "model.safetensors").write_bytes(b"")
    results |= {"weights_sha256": weights_sha256(tmp_path), "image_size": tiny_model().image_size}
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(results))
    assert_card_is_plain(tmp_path)


def assert_card_is_plain(source: Path) -> None:
    """No tag, control character or cell of a stranger's stands in a card, and its front matter is YAML."""
    weights = in_memory(build_model(tiny_model(), 3), tiny_model())
    object.__setattr__(weights, "source", source)
    try:
        text = model_card(weights, "pretrain", title="t", command="c", versions={}, loading="l", proof="p")
    except UserError as error:
        assert len(one_line(error)) < 1500
        return
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    yaml.safe_load(front)
    assert all(letter.isprintable() or letter == "\n" for letter in text) and len(text) < 20_000
    plain = re.sub("``.*?``", "", body)  # what is code is shown as it is
    assert "<b>" not in plain and "a|b" not in plain
