"""Every variant of the model trains under ZeRO 1 and 3, resumes bit for bit, and keeps its logits when converted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import make_shards, tiny_config

from pretrain.errors import UserError
from pretrain.models import load_model
from pretrain.models.equivalent import without
from pretrain.models.google import write_google
from pretrain.models.timm_folder import write_own_folder, write_timm_folder
from pretrain.models.transformers_folder import write_transformers_folder
from pretrain.models.weights import read_weights
from pretrain.train.run import train

torch.set_num_threads(1)

# ViT paper, Table 8: every kind of position at every place; then poolings, the representation layer, trunks.
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"positions": "none"},
    "learned_stem": {},
    "learned_every_layer": {"positions_at": "every_layer"},
    "learned_shared": {"positions_at": "shared"},
    "learned2d_stem": {"positions": "learned2d"},
    "learned2d_every_layer": {"positions": "learned2d", "positions_at": "every_layer"},
    "learned2d_shared": {"positions": "learned2d", "positions_at": "shared"},
    "relative": {"positions": "relative"},
    "relative_gap": {"positions": "relative", "pooling": "gap"},
    "sincos2d_gap": {"positions": "sincos2d", "pooling": "gap"},
    "token_without_row": {"class_position": False},
    "map": {"pooling": "map"},
    "representation": {"representation_size": 48},
    "gap_representation_exact": {"pooling": "gap", "representation_size": 16, "gelu": "exact"},
    "hybrid": {"trunk": [1, 1], "trunk_width": 32},
    "stem_only": {"trunk": [], "trunk_width": 32},
    "22b": {"name": "22B"},  # its form, at the small width
    "deit3": {"layer_scale": 1e-4, "class_position": False, "drop_path": 0.1, "drop_path_rule": "uniform"},
}
# The others take part in `make test-all` at one stage, in turn, and in `make test-long` at the other.
QUICK = ("learned2d_every_layer", "relative", "map", "22b")


def _marked(variant: str, stage: int) -> Any:
    turn = 3 if variant in QUICK else (1, 3)[list(VARIANTS).index(variant) % 2]
    mark = pytest.mark.long if stage != turn else () if variant in QUICK else pytest.mark.slow
    return pytest.param(variant, stage, marks=mark)


@pytest.mark.parametrize(("variant", "stage"), [_marked(v, stage) for v in VARIANTS for stage in (1, 3)])
def test_a_variant_trains_resumes_and_converts(variant: str, stage: int, tmp_path: Path) -> None:
    """20 steps on 2 ranks; from step 10 again to the same bits; every tensor has moved; then the same logits from the
    run, a folder of ours, and each of timm, transformers and .npz that has such a model.
    """
    shards = make_shards(tmp_path / "shards")
    changes = {f"model__{key}": value for key, value in VARIANTS[variant].items()}
    config = tiny_config(shards, tmp_path, **changes, engine__zero_stage=stage, checkpoint__every_steps=10)
    run_ranks(train, 2, config)
    run = tmp_path / "tiny"
    first = {name: tensor.read() for name, tensor in read_weights(run).tensors.items()}
    shutil.rmtree(run / "checkpoints" / "step-0000000020")
    (run / "DONE").unlink()
    run_ranks(train, 2, config)
    starts = [json.loads(line)["step"] for line in (run / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, 10]
    again = {name: tensor.read() for name, tensor in read_weights(run).tensors.items()}
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)

    before = {name: t.read() for name, t in read_weights(run / "checkpoints" / "step-0000000010").tensors.items()}
    assert not [name for name in first if torch.equal(first[name], before[name])], "tensors that did not train"

    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    logits = load_model(run)(x)
    write_own_folder(read_weights(run), tmp_path / "own")
    assert torch.equal(load_model(tmp_path / "own")(x), logits)
    written = [name for name in ("timm", "transformers", "npz") if _survives(name, run, tmp_path / name, x)]
    assert set(written) == _expected(VARIANTS[variant])


def _survives(target: str, run: Path, out: Path, images: torch.Tensor) -> bool:
    """Writes the weights for a target and compares logits; False when it refuses them."""
    weights = read_weights(run)
    if target == "timm" and weights.model.representation_size is not None:
        weights = without(weights, "head", "pre_logits")
    try:
        if target == "timm":
            write_timm_folder(weights, out)
        elif target == "transformers":
            write_transformers_folder(weights, out)
        else:
            out = out.with_suffix(".npz")
            write_google(weights, out, "big_vision" if weights.model.pooling == "map" else "released")
    except UserError:
        return False
    model: Any = load_model(run)
    expected = model(images) if weights.num_classes else model.forward_features(images)[:, 0]
    if not weights.num_classes and weights.model.pooling == "gap":
        expected = model.forward_features(images).mean(1)
    assert (load_model(out, 16)(images) - expected).abs().max() <= 1e-5 * expected.abs().max(), target
    return True


def _expected(model: dict[str, Any]) -> set[str]:
    """Which targets have such a model (docs/conversion.md)."""
    if model.get("positions") == "relative" or "positions_at" in model or model.get("name") == "22B":
        return set()
    targets = {"timm", "npz"}
    if model.get("pooling", "token") == "token" and "representation_size" not in model and "trunk" not in model:
        targets.add("transformers")
    if "trunk" in model:
        targets.remove("timm")  # its hybrids are five named ones
    if model.get("gelu") == "exact":
        targets.remove("npz")
    return targets
