"""Weights: Google's .npz, safetensors, PyTorch's files, JSON of folders and checkpoints; each is loaded whole."""

import argparse
import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from tiny import tiny_config
from weights_on_disk import in_memory, save_run, tiny_model

from fuzz.harness import Seed, Target
from fuzz.mutate import ODD_VALUES, bomb, changed_bytes, changed_json, changed_zip, json_seeds, npy, unzipped, zipped
from fuzz.spare import spare_configs, spare_initial_values
from pretrain.checkpoint.layout import manifest_text
from pretrain.models import load_model
from pretrain.models.build import build_model
from pretrain.models.google import write_google
from pretrain.models.tensors import Weights
from pretrain.models.timm_folder import write_own_folder, write_timm_folder
from pretrain.models.transformers_folder import write_transformers_folder
from pretrain.storage import crc32c

NAMES = ("ash", "birch", "cedar")


def tiny_weights(**changes: Any) -> Weights:
    model = tiny_model(**changes)
    return in_memory(build_model(model, len(NAMES)), model, NAMES)


# --- files of tensors ------------------------------------------------------------------------------------------------


def npz(folder: Path) -> Target:
    """Weights of Google's, under each of its namings."""
    spare_initial_values()
    good = []
    for naming in ("released", "vit_jax", "big_vision"):
        write_google(tiny_weights(class_position=naming != "big_vision"), folder / f"{naming}.npz", naming)
        good.append((folder / f"{naming}.npz").read_bytes())
    members = unzipped(good[0])

    def call(data: bytes, own: Path) -> None:
        (own / "a.npz").write_bytes(data)
        load_model(own / "a.npz")

    seeds = [zipped([(name, changed) if n == at else (name, data) for n, (name, data) in enumerate(members)])
             for at in (0, len(members) - 1) for changed in _odd_arrays()]  # fmt: skip
    seeds += [b"", b"PK\5\6" + bytes(18), good[0][:300], good[0][:-30], zipped([]), zipped([("a.npy", b"")])]
    seeds += [
        zipped([*members, (f"Transformer/encoderblock_{n}/x.npy", npy(_V0 % "1,", b""))]) for n in (10**6, 10**12)
    ]
    return Target(good, seeds, _slow_npz(members), changed_zip, call)


_F4 = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }"
_V0 = "{'descr': '|V0', 'fortran_order': False, 'shape': (%s), }"


def _odd_arrays() -> list[bytes]:
    found = [
        npy(header, b"")
        for header in ("{'descr': (\n", "{", "", "'", '"""', "(" * 200, "{'descr': '<f4'}", "\\", "0o8", "{**{}}")
    ]
    found += [
        npy(_F4 % shape, bytes(320))
        for shape in ("-16, -5", "-80,", "10**30,", "80.0,", "True,", "0, 1000000000000", "80, 1")
    ]
    found += [npy(_V0 % shape, b"") for shape in ("1000000000000,", "10" * 15 + ",", "0,", "16, 5")]
    found += [
        npy(" " * 20_000, b"", 2),
        npy("", b"", 2, length=1 << 31),
        npy("", b"", 1, length=65_535),
        npy("", b"", 9),
        b"\x93NUMPY",
    ]
    found += [
        npy(_F4 % "80," + " " * 12_000, bytes(320), 2),
        npy("{'a': " * 2000, b"", 2),
        npy("-" * 9000 + "1", b"", 2),
    ]
    return found


def _slow_npz(members: list[tuple[str, bytes]]) -> list[Seed]:
    body = [member for member in members if not member[0].startswith("head/")]
    bias = ("head/bias.npy", npy(_F4 % "5000000,", bytes(20_000_000)))
    million = 1 << 20
    return [
        partial(bomb, b" " * million, 1000, b"\x93NUMPY\2\0" + (1000 * million).to_bytes(4, "little")),
        partial(bomb, bytes(million), 1000, npy(_F4 % f"{250 * million},", b"")),
        lambda: bomb(bytes(640_000), 1000, npy(_F4 % "32, 5000000", b""), "head/kernel.npy", zipped([*body, bias])),
        lambda: zipped(
            [*body, *((f"Transformer/encoderblock/a{n}.npy", npy(_V0 % "1000, 1", b"")) for n in range(3000))]
        ),
        lambda: zipped(
            [*body, *((f"Transformer/encoderblock_{n}/a.npy", npy(_V0 % "1,", b"")) for n in range(60_000))]
        ),
    ]


def _in_folder(made: Path, name: str) -> Callable[[bytes, Path], object]:
    """What loads a folder of weights with its file `name` replaced."""
    spare_configs()
    spare_initial_values()

    def call(data: bytes, own: Path) -> None:
        for path in made.iterdir():
            if path.name != name:
                os.link(path, own / path.name)
        (own / name).write_bytes(data)
        load_model(own)

    return call


def safetensors(folder: Path) -> Target:
    """model.safetensors of a folder of ours."""
    write_own_folder(tiny_weights(), folder / "own")
    good = (folder / "own" / "model.safetensors").read_bytes()
    size = int.from_bytes(good[:8], "little")
    header, payload = json.loads(good[8 : 8 + size]), good[8 + size :]

    def mutate(data: bytes, random: Random) -> bytes:
        if random.random() < 0.2:
            return changed_bytes(data, random)
        text = changed_json(json.dumps(header).encode(), random)
        return _safetensors_of(text, payload if random.random() < 0.8 else changed_bytes(payload, random))

    kinds = (
        "BOOL",
        "U8",
        "I8",
        "I32",
        "I64",
        "F16",
        "BF16",
        "F64",
        "C64",
        "F8_E4M3",
        "F8_E5M2",
        "F4",
        "f32",
        "",
        1,
        None,
    )
    name = next(name for name in header if name != "__metadata__")
    changed = [header | {name: header[name] | {"dtype": kind}} for kind in kinds]
    changed += [header | {name: header[name] | {"shape": odd}} for odd in ODD_VALUES]
    changed += [header | {name: header[name] | {"data_offsets": odd}} for odd in ODD_VALUES]
    changed += [
        header | {f"a{n}": {"dtype": "F32", "shape": [0], "data_offsets": [len(payload)] * 2} for n in range(20_000)}
    ]
    seeds = [_safetensors_of(json.dumps(one).encode(), payload) for one in changed]
    seeds += [
        struct.pack("<Q", length) + good[8:]
        for length in (0, 1, 1 << 63, (1 << 64) - 1, size - 1, size + 8, 200_000_000)
    ]
    seeds += [
        b"",
        good[:7],
        good[: size + 8],
        good[:-4],
        good + b"\0",
        _safetensors_of(b"[" * 200_000, payload),
        good[:8] + b"\0" * size,
    ]
    nan = b"\xff" * 4 + payload[4:]
    seeds.append(_safetensors_of(json.dumps(header).encode(), nan))
    Random(0).shuffle(seeds)
    return Target([good], seeds, [], mutate, _in_folder(folder / "own", "model.safetensors"))


def _safetensors_of(header: bytes, payload: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + payload


def safetensors_index(folder: Path) -> Target:
    """model.safetensors.index.json, which names the files."""
    write_own_folder(tiny_weights(), folder / "own")
    (folder / "own" / "model.safetensors").rename(folder / "own" / "a.safetensors")
    names = ["patch_embed.proj.weight", "head.bias"]
    values = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "a.safetensors")}
    call = _in_folder(folder / "own", "model.safetensors.index.json")
    return Target([json.dumps(values).encode()], json_seeds(values), [], changed_json, call)


def torch_file(folder: Path) -> Target:
    """pytorch_model.bin beside a config.json."""
    weights = tiny_weights()
    write_own_folder(weights, folder / "own")
    (folder / "own" / "model.safetensors").unlink()
    tensors = {name: tensor.read() for name, tensor in weights.tensors.items()}
    kinds: list[Any] = [
        tensors,
        {"state_dict": tensors, "args": argparse.Namespace(model="a"), "arch": "vit_tiny_patch16_224"},
    ]
    good = [_saved(kind) for kind in kinds] + [_saved(tensors, _use_new_zipfile_serialization=False)]
    first = next(iter(tensors))
    odd: list[Any] = [
        [],
        {},
        1,
        "a",
        {"state_dict": None},
        {"state_dict": {}},
        {"model": {1: torch.zeros(1)}},
        torch.zeros(3),
        {1: 2},
    ]
    odd += [
        tensors | {first: value}
        for value in (torch.zeros(0), torch.zeros(1).expand(10**9), torch.zeros(2, dtype=torch.int8), 1)
    ]
    odd += [
        tensors | {first: value}
        for value in (torch.zeros(3).to_sparse(), torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta"))
    ]
    odd += [{"state_dict": tensors, "args": odd, "arch": odd} for odd in (1, [], {"num_classes": "x"}, "a")]
    seeds = [_saved(value) for value in odd]
    seeds += [
        b"",
        b"\x80\2",
        good[0][:500],
        good[0][:-100],
        b"PK\5\6" + bytes(18),
        b"\x80\2" + b"(" * 100_000,
        b"c__builtin__\neval\n.",
    ]
    call = _in_folder(folder / "own", "pytorch_model.bin")
    return Target(good, seeds, [], partial(changed_zip, content=changed_bytes), call)


def _saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


# --- JSON of folders -------------------------------------------------------------------------------------------------


def _config(made: Path, first: list[Any], name: str = "config.json") -> Target:
    good = (made / name).read_bytes()
    values = json.loads(good)
    seeds = [json.dumps(one).encode() for one in first]
    return Target([good], seeds + json_seeds(values), [], changed_json, _in_folder(made, name))


def config_own(folder: Path) -> Target:
    """config.json of a folder of ours."""
    write_own_folder(tiny_weights(), folder / "own")
    values = json.loads((folder / "own" / "config.json").read_text())
    ours = values["pretrain"]
    first = [
        values | {"pretrain": ours | {"model": ours["model"] | change}}
        for change in (
            {"depth": 1024}, {"depth": 10**6}, {"width": 65_536, "heads": 8}, {"mlp_dim": 10**9}, {"image_size": 10**6,
            "patch_size": 1},
            {"image_size": 65_536}, {"trunk": [10**6]}, {"trunk": [2] * 1000}, {"trunk": [100] * 4},
            {"name": "timm:resnet50"},
            {"name": "timm:vit_gigantic_patch14_224"}, {"name": "22B", "width": None, "depth": None, "mlp_dim": None,
            "heads": None},
            {"representation_size": 10**9}, {"heads": 0}, {"patch_size": 0}, {"trunk_width": 32 * 10**6, "trunk": []},
            {"positions": "relative"},
            {"image_size": 16.0}, {"depth": True}, {"width": "32"}, {"num_classes": 10**9}, {"dropout": float("nan")},
        )
    ]  # fmt: skip
    first += [
        values | {"num_classes": odd}
        for odd in (0, -1, 10**9, 10**30, 3.0, True, "3", None, [], float("inf"), float("nan"))
    ]
    return _config(folder / "own", first)


def config_timm(folder: Path) -> Target:
    """config.json as timm writes it."""
    write_timm_folder(tiny_weights(), folder / "timm")
    path = folder / "timm" / "config.json"
    values = json.loads(path.read_text())
    del values["pretrain"]
    path.write_text(json.dumps(values))
    swin, resnet, convnext = "swin_tiny_patch4_window7_224", "resnet50", "convnext_tiny"
    first = [
        {"architecture": name, "num_classes": 5, "model_args": arguments}
        for name, arguments in (
            (swin, {"depths": [10**6, 2, 2, 2]}), (resnet, {"layers": [10**6, 2, 2, 2]}), (convnext, {"depths": [10**5,
            1, 1, 1]}),
            ("vit_tiny_patch16_224", {"depth": 1024}), ("vit_tiny_patch16_224", {"depth": 10**6}), (swin,
            {"embed_dim": 10**6}),
            (swin, {"depths": [2] * 5000}), (resnet, {"layers": [500, 500]}), (swin, {"depths": "22"}),
            ("deit3_base_patch16_224", {"depth": 900}),
            ("vit_tiny_patch16_224", {"embed_dim": 10**7}), ("vit_tiny_patch16_224", {"img_size": 10**6}), (resnet,
            {"stem_width": 10**7}),
            ("efficientnet_b0", {"depth_multiplier": 10**5}), ("vit_tiny_patch16_224", {"block_fn": "x"}), (resnet,
            {"block": []}),
            ("vit_tiny_patch16_224", {"act_layer": "x"}), ("vit_tiny_patch16_224", {"checkpoint_path": "/etc/passwd"}),
            ("hf-hub:a/b", {}),
            ("vit_tiny_patch16_224", {"num_classes": 10**9}), ("mlp_mixer", {}), ("mixer_b16_224",
            {"num_blocks": 10**5}), ("local-dir:/etc", {}),
            ("vit_tiny_patch16_224", {"mlp_ratio": 1e30}), ("vit_tiny_patch16_224", {"patch_size": 0}), ("nfnet_f0",
            {"depths": [10**5] * 4}),
        )
    ]  # fmt: skip
    return _config(folder / "timm", first)


def config_transformers(folder: Path) -> Target:
    """config.json as transformers writes it."""
    write_transformers_folder(tiny_weights(), folder / "theirs")
    values = json.loads((folder / "theirs" / "config.json").read_text())
    first = [
        values | change
        for change in (
            {"hidden_size": 16.0}, {"num_hidden_layers": 1024}, {"num_hidden_layers": 10**9},
            {"num_hidden_layers": True}, {"id2label": {}},
            {"id2label": {"1000000000": "a"}}, {"id2label": {"-1": "a"}}, {"id2label": {"a": "b"}}, {"image_size": [16,
            16, 16]},
            {"id2label": {}, "num_labels": 10**9}, {"id2label": {}, "num_labels": float("inf")}, {"image_size": 10**9},
            {"patch_size": 0},
            {"hidden_size": 10**9}, {"num_attention_heads": 0}, {"layer_norm_eps": "x"},
            {"architectures": "ViTForImageClassification"},
            {"hidden_act": []}, {"hidden_act": {}}, {"problem_type": []}, {"pretrain": []}, {"pretrain": {"mean": 1}},
            {"architectures": 1},
        )
    ]  # fmt: skip
    return _config(folder / "theirs", first)


def preprocessor(folder: Path) -> Target:
    """preprocessor_config.json beside it."""
    write_transformers_folder(tiny_weights(), folder / "theirs")
    name = "preprocessor_config.json"
    values = json.loads((folder / "theirs" / name).read_text())
    first = [values | {"rescale_factor": odd} for odd in (0, 1e-320, 1e308, "a", None, True, float("nan"))]
    first += [
        values | {"crop_size": odd, "do_center_crop": True} for odd in (0, -1, 10**9, True, 16.0, {}, {"height": 16})
    ]
    return _config(folder / "theirs", first, name)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint_manifest(folder: Path) -> Target:
    """MANIFEST.json of a checkpoint, with the checksum of what it says."""
    step = _checkpoint(folder)
    values = json.loads((step / "MANIFEST.json").read_text())

    def call(data: bytes, own: Path) -> None:
        _load_checkpoint(step, own, "MANIFEST.json", data)

    def sealed(data: bytes) -> bytes:
        with suppress(Exception):
            changed = json.loads(data)
            changed.pop("crc32c", None)
            return manifest_text(changed).encode()
        return data

    def mutate(data: bytes, random: Random) -> bytes:
        changed = changed_json(data, random)
        return sealed(changed) if random.random() < 0.8 else changed

    good = (step / "MANIFEST.json").read_bytes()
    return Target([good], [sealed(seed) for seed in json_seeds(values)], [], mutate, call)


def checkpoint_state(folder: Path) -> Target:
    """state.json of a checkpoint, whose checksum the manifest has."""
    step = _checkpoint(folder)
    values = json.loads((step / "state.json").read_text())
    model = values["config"]["model"]
    first: list[Any] = [
        values | {"num_classes": odd} for odd in (0, -1, 10**9, 10**30, 3.0, True, "3", None, float("inf"))
    ]
    first += [values | {"class_names": odd} for odd in ([], ["a"], [1, 2, 3], [None] * 3, {}, "abc", 1, [[]] * 3)]
    first += [
        values | {"config": values["config"] | {"model": model | {"depth": odd}}} for odd in (1024, 10**9, 2.0, True)
    ]
    seeds = [json.dumps(one).encode() for one in first]

    def call(data: bytes, own: Path) -> None:
        _load_checkpoint(step, own, "state.json", data)

    return Target([json.dumps(values).encode()], seeds + json_seeds(values), [], changed_json, call)


def checkpoint_index(folder: Path) -> Target:
    """index.json of a checkpoint, whose checksum the manifest has: where each part of each tensor lies."""
    step = _checkpoint(folder)
    values = json.loads((step / "index.json").read_text())

    def call(data: bytes, own: Path) -> None:
        _load_checkpoint(step, own, "index.json", data)

    return Target([json.dumps(values).encode()], json_seeds(values), [], changed_json, call)


def _checkpoint(folder: Path) -> Path:
    spare_configs()
    spare_initial_values()
    save_run(tiny_config(folder / "shards", folder), list(NAMES))
    return next((folder / "tiny" / "checkpoints").glob("step-*"))


def _load_checkpoint(step: Path, own: Path, name: str, data: bytes) -> None:
    """Loads a run whose one checkpoint has another file `name`."""
    target = own / "checkpoints" / step.name
    target.mkdir(parents=True)
    for path in step.iterdir():
        shutil.copyfile(path, target / path.name)
    (target / name).write_bytes(data)
    if name != "MANIFEST.json":
        manifest = json.loads((step / "MANIFEST.json").read_text())
        manifest.pop("crc32c")
        for entry in manifest["files"]:
            if entry["path"] == name:
                entry |= {"bytes": len(data), "crc32c": crc32c(target / name)}
        (target / "MANIFEST.json").write_text(manifest_text(manifest))
    load_model(own)
