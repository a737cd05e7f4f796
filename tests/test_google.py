"""Google's .npz: the logits of Google's own code, the same tensors back, and files that are not what they should be."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from weights_on_disk import in_memory, one_line, randomised, tiny_model

from pretrain.errors import UserError
from pretrain.models import load_model
from pretrain.models.build import build_model
from pretrain.models.formats import NPZ_NAMINGS
from pretrain.models.google import NAMINGS, class_names_file, write_google
from pretrain.models.positions import Grid, resize_axis, resize_table
from pretrain.models.weights import read_weights

torch.set_num_threads(1)

FIXTURES = {  # folder: (tolerance of logits, of encoded tokens), from the fixtures' README
    "vt_token": (1e-5, 2e-5),
    "vt_token_rep": (1e-5, 2e-5),
    "vt_hybrid_22": (2e-5, 1e-4),
    "bv_gap_learn": (1e-5, 2e-5),
    "bv_gap_sincos2d": (1e-5, 2e-5),
    "bv_map_learn": (1e-5, 2e-5),
    "bv_tok_learn": (1e-5, 2e-5),
}
BOTH_NAMINGS = [(name, "checkpoint.npz") for name in FIXTURES] + [
    (name, "checkpoint_released_names.npz") for name in FIXTURES if name.startswith("vt_")
]


def reference(folder: Path, name: str) -> torch.Tensor:
    """An array of a fixture; images as [B, 3, H, W]."""
    array = torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False))
    return array.permute(0, 3, 1, 2) if name == "images" else array


@pytest.mark.parametrize(("name", "file"), BOTH_NAMINGS)
@torch.no_grad()
def test_outputs_equal_those_of_googles_code(name: str, file: str, test_fixtures: Path) -> None:
    """Tokens after the last norm, the head's input and logits, from both namings, within the fixture's tolerance."""
    folder = test_fixtures / name
    model: Any = load_model(folder / file, image_size=json.loads((folder / "config.json").read_text())["image_size"])
    tokens = model.forward_features(reference(folder, "images"))
    logits, encoded = FIXTURES[name]
    found = {"encoded": tokens, "pre_logits": model.forward_head(tokens, pre_logits=True)}
    found["logits"] = model(reference(folder, "images"))
    for what, tolerance in (("encoded", encoded), ("pre_logits", encoded), ("logits", logits)):
        assert (found[what] - reference(folder, what)).abs().max() <= tolerance, what


@pytest.mark.parametrize(("name", "file"), BOTH_NAMINGS)
def test_a_file_comes_back_bit_for_bit(name: str, file: str, test_fixtures: Path, tmp_path: Path) -> None:
    """npz -> here -> npz: the same keys, shapes, types and bits, key biases and trunk kernels included."""
    source = test_fixtures / name / file
    naming = "released" if "released" in file else "vit_jax" if name.startswith("vt_") else "big_vision"
    write_google(read_weights(source), tmp_path / "back.npz", naming)
    before, after = np.load(source), np.load(tmp_path / "back.npz")
    assert sorted(before) == sorted(after)
    for key in before:
        assert (before[key].dtype, before[key].shape) == (after[key].dtype, after[key].shape), key
        assert before[key].tobytes() == after[key].tobytes(), key


@pytest.mark.parametrize(
    ("name", "source"), [("vt_token_res_up", "vt_token"), ("bv_tok_learn_res_down", "bv_tok_learn")]
)
@torch.no_grad()
def test_another_resolution_gives_googles_positions_and_logits(name: str, source: str, test_fixtures: Path) -> None:
    """Corner-aligned: positions to 1e-6, logits to 1e-5. Half-pixel interpolation, as timm reads files, is far off."""
    folder = test_fixtures / name
    size = json.loads((folder / "config.json").read_text())["image_size"]
    model: Any = load_model(test_fixtures / source / "checkpoint.npz", image_size=size)
    expected = reference(folder, "pos_embedding_resized")
    assert (model.pos_embed - expected).abs().max() <= 1e-6
    model.head.weight.copy_(reference(folder, "head_kernel").T)
    model.head.bias.copy_(reference(folder, "head_bias"))
    assert (model(reference(folder, "images")) - reference(folder, "logits")).abs().max() <= 1e-5
    old = read_weights(test_fixtures / source / "checkpoint.npz").tensors["pos_embed"].read()[:, -16:]
    half_pixel = torch.nn.functional.interpolate(
        old.unflatten(1, (4, 4)).permute(0, 3, 1, 2), size=(size // 8, size // 8), mode="bilinear", align_corners=False
    )
    patches = (size // 8) ** 2
    assert (half_pixel.flatten(2).transpose(1, 2) - expected[:, -patches:]).abs().max() > 0.2


def test_resizing_is_scipys_zoom() -> None:
    """Google calls scipy.ndimage.zoom(order=1); up, down, one to many, with a class row kept as it is. The X and Y
    tables of 2-D positions go by the same rule.
    """
    from scipy import ndimage

    table = torch.randn(1, 1 + 5 * 5, 6, generator=torch.Generator().manual_seed(0))
    for side in (2, 3, 8, 13):
        found = resize_table(table, Grid(5, 5), Grid(side, side))
        zoomed = ndimage.zoom(table[0, 1:].view(5, 5, 6).numpy(), (side / 5, side / 5, 1), order=1)
        assert torch.equal(found[:, 0], table[:, 0])
        assert np.abs(found[0, 1:].view(side, side, 6).numpy() - zoomed).max() < 1e-6
        axis = table[0, :5]
        zoomed = ndimage.zoom(axis.numpy(), (side / 5, 1), order=1)
        assert np.abs(resize_axis(axis, side).numpy() - zoomed).max() < 1e-6


# --- without Google's outputs: every model that a file can hold -------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "token": {},
    "token_no_row": {"class_position": False},
    "gap": {"pooling": "gap"},
    "gap_sincos2d": {"pooling": "gap", "positions": "sincos2d", "image_size": 24},
    "token_sincos2d": {"positions": "sincos2d"},
    "map": {"pooling": "map"},
    "rep": {"representation_size": 24},
    "learned2d": {"positions": "learned2d"},
    "none": {"positions": "none", "pooling": "gap"},
    "hybrid": {"trunk": [1, 2], "trunk_width": 32, "image_size": 32},
    "stem_only": {"trunk": [], "trunk_width": 32, "image_size": 32},
    "headless": {},
}
CANNOT = {("map", "released"), ("map", "vit_jax"), ("hybrid", "big_vision"), ("stem_only", "big_vision")}


@pytest.mark.parametrize("naming", NPZ_NAMINGS)
@pytest.mark.parametrize("variant", MODELS)
def test_every_model_survives_every_naming(variant: str, naming: str, tmp_path: Path) -> None:
    """Random values in every tensor: the same logits after writing and reading, and what reads as the same model comes
    back bit for bit; what Google's code has not is refused with the reason.
    """
    config = tiny_model(**MODELS[variant])
    model = randomised(build_model(config, 0 if variant == "headless" else 5))
    weights, path = in_memory(model, config), tmp_path / "model.npz"
    if (variant, naming) in CANNOT:
        with pytest.raises(UserError, match=f"cannot be written as {naming} .npz: .* has no"):
            write_google(weights, path, naming)
        return
    write_google(weights, path, naming)
    again = read_weights(path, config.image_size)
    x = torch.rand(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        difference = (load_model(path, config.image_size)(x) - model(x)).abs().max()
    assert difference <= 1e-6 * model(x).abs().max()  # a class row is folded or split by one addition
    if again.model == config:
        for name, tensor in weights.tensors.items():
            assert torch.equal(again.tensors[name].read(), tensor.read()), name
    exact = {"released", "vit_jax"} if config.class_position else {"big_vision"}
    assert again.model == config or naming not in exact or config.positions != "learned"


def test_what_a_file_has_no_place_for_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The transform of evaluation, unless the code of its names has that, and the sigmoid loss."""
    config = tiny_model()
    model = randomised(build_model(config, 5))
    for transform, naming in (("vit", "released"), ("big_vision", "big_vision")):
        write_google(in_memory(model, config, eval_transform=transform, loss="softmax"), tmp_path / "w.npz", naming)
    assert not capsys.readouterr().err
    write_google(in_memory(model, config, eval_transform="timm", loss="sigmoid"), tmp_path / "w.npz", "released")
    told = capsys.readouterr().err
    assert "no place for eval_transform=timm: who reads it takes vit, nor for the loss, sigmoid" in told


@pytest.mark.parametrize("prefix", ["opt/target/", "params/", "params/img/"])
@pytest.mark.parametrize("naming", NPZ_NAMINGS)
def test_prefixes_scanned_blocks_and_bfloat16_are_understood(naming: str, prefix: str, tmp_path: Path) -> None:
    """The same tensors from any tree of a training state, whose optimizer counts in integers, with blocks stacked along
    an axis, and bf16 as void.
    """
    config = tiny_model(depth=3)
    weights = in_memory(randomised(build_model(config, 5)), config)
    write_google(weights, tmp_path / "plain.npz", naming)
    arrays = dict(np.load(tmp_path / "plain.npz"))
    inside = {name for name in arrays if "encoderblock_0/" in name}
    for name in inside:
        stacked = np.stack([arrays.pop(name.replace("block_0", f"block_{i}")) for i in range(3)])
        arrays[name.replace("encoderblock_0", "encoderblock")] = stacked
    arrays |= {"opt/state/step": np.int32(7), "opt/0/count": np.int32(7), "opt/0/mu": np.zeros(3, np.float32)}
    half = torch.from_numpy(arrays["embedding/kernel"]).bfloat16()
    arrays["embedding/kernel"] = half.view(torch.int16).numpy().view("V2")
    np.savez(
        tmp_path / "scanned.npz", **{prefix * (not name.startswith("opt/")) + name: a for name, a in arrays.items()}
    )
    plain, scanned = read_weights(tmp_path / "plain.npz"), read_weights(tmp_path / "scanned.npz")
    assert scanned.model == plain.model
    for name, tensor in plain.tensors.items():
        expected = tensor.read() if name != "patch_embed.proj.weight" else tensor.read().bfloat16().float()
        assert torch.equal(scanned.tensors[name].read(), expected), name


@pytest.mark.parametrize("variant", ["token", "token_no_row", "gap", "map"])
def test_older_files_of_big_vision_are_understood(variant: str, tmp_path: Path) -> None:
    """Positions inside the encoder, with or without a row for the class token; a MAP head in the open; names of before
    flax.linen: its own reader mends all of these (models/vit.py, fix_old_checkpoints).
    """
    config = tiny_model(**MODELS[variant])
    weights = in_memory(randomised(build_model(config, 5)), config)
    write_google(weights, tmp_path / "new.npz", "vit_jax" if variant == "token" else "big_vision")
    renamed = {
        "Transformer/posembed_input/pos_embedding": "pos_embedding",
        "pos_embedding": "Transformer/pos_embedding",
    }
    before_linen = [("Attention_0", "Attention_1"), ("LayerNorm_1", "LayerNorm_2"), ("MlpBlock_0", "MlpBlock_3")]
    old = {}
    for name, array in np.load(tmp_path / "new.npz").items():
        for today, then in before_linen if "encoderblock" in name else ():
            name = name.replace(today, then)
        old[renamed.get(name, name).removeprefix("MAPHead_0/")] = array
    np.savez(tmp_path / "old.npz", **old)
    again = read_weights(tmp_path / "old.npz")
    assert again.model == config
    for name, tensor in weights.tensors.items():
        assert torch.equal(again.tensors[name].read(), tensor.read()), name


@torch.no_grad()
@pytest.mark.parametrize("naming", NPZ_NAMINGS)
def test_layer_scale_is_folded_into_the_layers_before_it(naming: str, tmp_path: Path) -> None:
    """Google's blocks have no place for it: the same function without it, as far as float32 tells."""
    config = tiny_model(depth=3, layer_scale=0.1)
    model = randomised(build_model(config, 5))
    write_google(in_memory(model, config), tmp_path / "folded.npz", naming)
    again = load_model(tmp_path / "folded.npz")
    assert read_weights(tmp_path / "folded.npz").model.layer_scale is None
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = model(images)
    assert (again(images) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_positions_that_are_no_tensor_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file without positions may be one of fixed positions or one that lost its learned ones: said, unless the user
    names the size; where Google's code has no fixed positions, refused, naming the key.
    """
    config = tiny_model(pooling="gap", positions="sincos2d", image_size=24)
    write_google(in_memory(randomised(build_model(config, 5)), config), tmp_path / "fixed.npz", "big_vision")
    assert read_weights(tmp_path / "fixed.npz").model.image_size == 224
    assert "fixed.npz: has no pos_embedding: taken as sincos2d at 224 pixels" in capsys.readouterr().err
    assert read_weights(tmp_path / "fixed.npz", 24).model == config and not capsys.readouterr().err
    for naming, settings in [("released", {}), ("vit_jax", MODELS["hybrid"]), ("released", MODELS["stem_only"])]:
        config, path = tiny_model(**settings), tmp_path / "lost.npz"
        write_google(in_memory(randomised(build_model(config, 5)), config), path, naming)
        _arrays(lambda a: a.pop(NAMINGS["released"].positions))(path)
        with pytest.raises(UserError, match="lost.npz: has no tensor Transformer/posembed_input/pos_embedding"):
            read_weights(path, config.image_size)


def test_units_of_a_trunk_are_counted_without_gaps(tmp_path: Path) -> None:
    """Four bytes that claim a millionth unit, or stage, do not make one be built."""
    config = tiny_model(**MODELS["hybrid"])
    for name, message in [
        ("block2/unit999999", "tensors missing: block2/unit3, though there is block2/unit999999"),
        ("block999999/unit1", "tensors missing: block3, though there is block999999"),
    ]:
        write_google(in_memory(randomised(build_model(config, 5)), config), tmp_path / "model.npz", "vit_jax")
        _arrays(lambda a, name=name: a.update({f"{name}/x": np.zeros(1, "f4")}))(tmp_path / "model.npz")
        with pytest.raises(UserError, match=f"model.npz: {message}"):
            read_weights(tmp_path / "model.npz")


def test_the_published_layout_is_what_timms_reader_expects(tmp_path: Path) -> None:
    """An independent reader of published files, timm's: the same parameters and, with its GELU set right, logits."""
    import timm
    from timm.models.vision_transformer import _load_weights

    config = tiny_model()
    model = randomised(build_model(config, 5))
    write_google(in_memory(model, config), tmp_path / "model.npz", "released")
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    theirs: Any = timm.create_model("vit_base_patch16_224", num_classes=5, act_layer="gelu_tanh", **options)
    _load_weights(theirs, str(tmp_path / "model.npz"))
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(theirs.named_parameters())[name], parameter), name


# --- files that are not what they should be ---------------------------------------------------------------------------


class _Payload:
    """Unpickling this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch '{self.target}'",)


def _arrays(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def change(path: Path) -> None:
        arrays = dict(np.load(path))
        edit(arrays)
        np.savez(path, **arrays)

    return change


def _with_object(path: Path) -> None:
    arrays = dict(np.load(path))
    del arrays["cls"]
    arrays["cls"] = np.array([_Payload(path.parent / "executed")], dtype=object)
    np.savez(path, **arrays)


def _with_object_beside(path: Path) -> None:
    arrays = {f"opt/target/{name}": array for name, array in np.load(path).items()}
    arrays["opt/state"] = np.array([_Payload(path.parent / "executed")], dtype=object)
    np.savez(path, **arrays)


def _compressed_wrongly(method: int) -> Callable[[Path], Any]:
    """A compressed member whose first bytes are none that its method knows."""

    def change(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
            start = archive.getinfo("cls.npy").header_offset + 30 + len("cls.npy")
        data = bytearray(path.read_bytes())
        data[start + 4 : start + 40] = b"\xff" * 36
        data[start] = 7 if method == zipfile.ZIP_DEFLATED else data[start]
        path.write_bytes(data)

    return change


def _with_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Payload(path.parent / "executed")))


def _bit_flipped(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("head/kernel.npy")
    data = bytearray(path.read_bytes())
    data[info.header_offset + info.file_size // 2 + 100] ^= 16
    path.write_bytes(data)


def _not_finite(arrays: dict[str, Any]) -> None:
    arrays["Transformer/encoder_norm/bias"][3] = np.nan


MLP = "Transformer/encoderblock_1/MlpBlock_3/Dense_0"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "key missing": (_arrays(lambda a: a.pop(f"{MLP}/bias")), f"tensors missing: {MLP}/bias"),
    "first key missing": (_arrays(lambda a: a.pop("embedding/kernel")), "has no tensor embedding/kernel"),
    "key too many": (_arrays(lambda a: a.update(spare=np.zeros(2, "f4"))), "tensors unknown: spare"),
    "shape": (_arrays(lambda a: a.update({f"{MLP}/bias": np.zeros(63, "f4")})), rf"{MLP}/bias has shape \(63,\)"),
    "axes": (
        _arrays(lambda a: a.update({"embedding/kernel": np.zeros(63, "f4")})),
        "embedding/kernel has shape .* expected 4",
    ),
    "no square": (
        _arrays(lambda a: a.update({NAMINGS["released"].positions: np.zeros((1, 7, 32), "f4")})),
        ".*/pos_embedding has 6 patches, which is no square",
    ),
    "NaN": (_arrays(_not_finite), "Transformer/encoder_norm/bias holds values that are not finite"),
    "integers": (_arrays(lambda a: a.update(cls=np.zeros((1, 1, 32), "i4"))), "cls is of type int32"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 500), "damaged, or not what its name says"),
    "empty": (lambda path: os.truncate(path, 0), "damaged, or not what its name says"),
    "bit": (_bit_flipped, "damaged, or not what its name says .*Bad CRC-32 for file 'head/kernel.npy'"),
    "object": (_with_object, "cls holds Python objects, which would execute code"),
    "pickle": (_with_pickle, "damaged, or not what its name says"),
    "object beside": (_with_object_beside, "opt/state holds Python objects, which would execute code"),
    "deflate": (_compressed_wrongly(zipfile.ZIP_DEFLATED), "damaged, or not what its name says .*decompressing"),
    "lzma": (_compressed_wrongly(zipfile.ZIP_LZMA), "damaged, or not what its name says"),
    "positions missing": (
        _arrays(lambda a: a.pop(NAMINGS["released"].positions)),
        "has no tensor Transformer/posembed_input/pos_embedding",
    ),
    "no values": (
        _arrays(lambda a: a.update({"head/kernel": np.zeros((0, 10**12), "f4")})),
        "head/kernel has shape .* which holds no values",
    ),
    "a block far away": (
        _arrays(lambda a: a.update({"Transformer/encoderblock_4000/x": np.zeros(1, "f4")})),
        "tensors missing: Transformer/encoderblock_2, though there is Transformer/encoderblock_4000",
    ),
    "too many blocks": (
        _arrays(lambda a: a.update({f"Transformer/encoderblock_{n}/x": np.zeros(1, "f4") for n in range(2, 1025)})),
        "model: depth 1025, width 32 and mlp_dim 64 are too large: at most 1024 blocks",
    ),
    "scanned: a number": (
        _arrays(lambda a: a.update({"Transformer/encoderblock/LayerNorm_0/scale": np.float32(1)})),
        r"Transformer/encoderblock/LayerNorm_0/scale has shape \(\), expected blocks first",
    ),
    "scanned: empty": (
        _arrays(lambda a: a.update({"Transformer/encoderblock/x": np.zeros((10**12, 0), "f4")})),
        r"Transformer/encoderblock/x has shape \(1000000000000, 0\), expected blocks first, 1 to 1024",
    ),
    "scanned: no blocks": (
        _arrays(lambda a: a.update({"Transformer/encoderblock/x": np.zeros((3, 0), "f4")})),
        r"Transformer/encoderblock/x has shape \(3, 0\), expected blocks first, 1 to 1024",
    ),
    "scanned: too many": (
        _arrays(lambda a: a.update({"Transformer/encoderblock/x": np.zeros((2000, 1), "f4")})),
        r"Transformer/encoderblock/x has shape \(2000, 1\), expected blocks first, 1 to 1024",
    ),
    "class names": (
        lambda path: class_names_file(path).write_text('["one", "two"]'),
        "has 2 class names for 5 classes",
    ),
    "something else": (lambda path: path.write_text("weights"), "damaged, or not what its name says"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_line_that_names_it(damage: str, tmp_path: Path) -> None:
    """A UserError of one line with the file and the tensor; nothing in the file is executed."""
    path = tmp_path / "model.npz"
    config = tiny_model()
    write_google(in_memory(randomised(build_model(config, 5)), config), path, "released")
    break_it, message = DAMAGES[damage]
    break_it(path)
    with pytest.raises(UserError, match=f"model.npz: {message}") as caught:
        load_model(path)
    one_line(caught.value)
    assert not (tmp_path / "executed").exists()
