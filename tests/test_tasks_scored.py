"""Named tasks through tools/evaluate.py: real photos against timm, any number of ranks, sets that are missing."""

import base64
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from tiny import make_shards, tiny_config
from torch import nn
from weights_on_disk import load_tool, run_tool, save_run

from pretrain.config import DataConfig
from pretrain.data.loader import eval_batches
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from pretrain.evaluation.classification import among
from pretrain.evaluation.features import pre_logits
from pretrain.evaluation.knn import knn
from pretrain.evaluation.predictions import MAX_WRONG
from pretrain.evaluation.probe import probe
from pretrain.shards.existing import index_existing
from pretrain.tasks.imagenet_labels import scored_classes
from pretrain.tasks.table import task

pytestmark = pytest.mark.slow  # 120 photos, several times
torch.set_num_threads(1)
NAMES = [f"shade {i}" for i in range(7)]
PHOTOS = {"227px": range(150, 250), "fullsize": range(20)}  # of 500 and 20
WITH_REAL_LABELS = 111  # of these 120


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def values_of(folder: Path) -> dict[str, tuple[float, int]]:
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {row["metric"]: (row["value"], row["n"]) for row in rows}


def assert_same_lines(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same images in the same order, with the same classes; probabilities to rounding."""
    for line, other in zip(found, expected, strict=True):
        assert line["probabilities"] == pytest.approx(other["probabilities"], abs=2e-6)
        assert {**line, "probabilities": None} == {**other, "probabilities": None}


# --- real photos -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, nn.Module]:
    """120 ImageNet validation photos as ROOT/imagenet/val, and timm's ViT-Ti/16 of random weights in a folder."""
    import timm
    from timm.models import save_for_hf

    folder = tmp_path_factory.mktemp("photos")
    tars = [_part(test_data / f"imagenet_val_{size}_dev-000000.tar", PHOTOS[size], folder) for size in PHOTOS]
    names = [str(number) for number in range(1000)]
    index_existing(tars, names, folder / "data" / "imagenet" / "val")
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=1000).eval()
    with torch.no_grad():
        model.head.weight.normal_(std=0.5)  # predictions that differ between images
    save_for_hf(model, str(folder / "weights"), safe_serialization=True)
    return folder / "data", folder / "weights", model


def _part(tar: Path, places: range, folder: Path) -> Path:
    """The photos of a tar at `places`, each with what belongs to it, as a tar of the same name."""
    with tarfile.open(tar) as given, tarfile.open(folder / tar.name, "w") as part:
        keys: dict[str, int] = {}
        for member in given:
            if keys.setdefault(member.name.partition(".")[0], len(keys)) in places:
                part.addfile(member, given.extractfile(member))
    return folder / tar.name


@pytest.fixture(scope="module")
def scored(photos: tuple[Path, Path, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What the tool wrote of three tasks, the data of one of which is not there; and how it ended."""
    data, weights, _ = photos
    out = tmp_path_factory.mktemp("scored")
    options = ["--tasks", "imagenet,real,imagenet_v2", "--data", data, "--out", out, "--predictions", out / "all.jsonl"]
    return out, run_tool("evaluate", weights, *options, "--batch-size", 64, "--workers", 1)


@pytest.fixture(scope="module")
def by_timm(photos: tuple[Path, Path, nn.Module]) -> dict[str, tuple[int, torch.Tensor]]:
    """Label and logits of each photo by its name, by timm's own transform and model, tars read by tarfile."""
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    data, _, model = photos
    transform: Any = create_transform(**resolve_data_config({}, model=model))
    found = {}
    for size in PHOTOS:
        with tarfile.open(data.parent / f"imagenet_val_{size}_dev-000000.tar") as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in (name for name in members if name.endswith(".jpg")):
            image = Image.open(io.BytesIO(members[name])).convert("RGB")
            with torch.no_grad():
                logits = model(transform(image)[None])[0]
            found[name.removesuffix(".jpg")] = int(members[name.replace(".jpg", ".cls")]), logits
    return found


def test_every_photo_is_predicted_as_by_timm(
    scored: tuple[Path, Any], by_timm: dict[str, tuple[int, torch.Tensor]]
) -> None:
    """All, name by name: label, best class, the five best and their probabilities; top-1 and loss follow."""
    out, _ = scored
    lines = [line for line in lines_of(out / "all.jsonl") if line["task"] == "imagenet"]
    assert [line["index"] for line in lines] == list(range(120)) and {line["name"] for line in lines} == set(by_timm)
    assert len({line["prediction"] for line in lines}) > 20
    for line in lines:
        label, logits = by_timm[line["name"]]
        best = logits.softmax(dim=0).topk(5)
        assert (line["label"], line["prediction"]) == (label, int(best.indices[0])), line["name"]
        np.testing.assert_allclose(line["probabilities"], best.values.numpy(), rtol=2e-3, atol=1e-6)
    labels = torch.tensor([label for label, _ in by_timm.values()])
    logits = torch.stack([logits for _, logits in by_timm.values()])
    values = values_of(out)
    assert values["imagenet/loss"] == (
        pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4),
        120,
    )
    assert values["imagenet/top1"] == (pytest.approx((logits.argmax(1) == labels).float().mean().item()), 120)
    in_five = (logits.topk(5).indices == labels[:, None]).any(dim=1)
    assert values["imagenet/top5"] == (pytest.approx(in_five.float().mean().item()), 120)


@pytest.mark.parametrize("ranks, batch_size", [(2, 64), pytest.param(3, 37, marks=pytest.mark.long)])
def test_photos_on_several_ranks_are_predicted_alike(
    ranks: int, batch_size: int, photos: tuple[Path, Path, nn.Module], scored: tuple[Path, Any], tmp_path: Path
) -> None:
    """All, on ranks and in batches that do not divide them: the lines and n of one rank in batches of 64."""
    data, weights, _ = photos
    options = ["--tasks", "imagenet,real", "--data", data, "--out", tmp_path, "--predictions", tmp_path / "all.jsonl"]
    options += ["--batch-size", batch_size, "--workers", 0]
    assert run_ranks(evaluate_on_rank, ranks, [str(weights), *map(str, options)]) == [0] * ranks
    found, expected = lines_of(tmp_path / "all.jsonl"), lines_of(scored[0] / "all.jsonl")
    assert len(found) == 120 + WITH_REAL_LABELS
    assert_same_lines(found, expected)
    values, others = values_of(tmp_path), values_of(scored[0])
    assert {metric: n for metric, (_, n) in values.items()} == {metric: n for metric, (_, n) in others.items()}
    for metric, (value, _) in values.items():
        assert value == pytest.approx(others[metric][0], rel=1e-6 if metric.endswith("loss") else 0)


def test_real_is_joined_by_name(
    scored: tuple[Path, Any], by_timm: dict[str, tuple[int, torch.Tensor]], test_data: Path
) -> None:
    """Not all have labels; joined here by the number in the name, with the lists of the data pack."""
    lists = json.loads((test_data / "real.json").read_text())
    ours = {name: lists[int(name[-8:]) - 1] for name in by_timm}
    right = [int(logits.argmax()) in ours[name] for name, (_, logits) in by_timm.items() if ours[name]]
    assert len(right) == WITH_REAL_LABELS
    assert values_of(scored[0])["real/top1"] == (pytest.approx(np.mean(right)), WITH_REAL_LABELS)
    lines = {line["name"]: line for line in lines_of(scored[0] / "all.jsonl") if line["task"] == "real"}
    assert {name for name, labels in ours.items() if labels} == set(lines)
    for name, line in lines.items():
        assert ([line["label"]] if isinstance(line["label"], int) else line["label"]) == ours[name]


def test_a_missing_set_names_itself_and_its_command(scored: tuple[Path, Any]) -> None:
    """The other tasks are scored and written; exit code 2; one line says where the set comes from."""
    out, done = scored
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if "imagenet_v2" in line]
    assert "make_shards.py --task imagenet_v2" in told[0] and "github.com/modestyachts/ImageNetV2" in told[0]
    assert told[-1] == "error: 1 of 3 not scored: imagenet_v2" and "Traceback" not in done.stderr
    assert set(json.loads((out / "results.json").read_text())["failed"]) == {"imagenet_v2"}
    assert "**not scored**: imagenet_v2" in (out / "results.md").read_text()


def test_the_most_confident_mistakes_are_shown(
    scored: tuple[Path, Any], by_timm: dict[str, tuple[int, torch.Tensor]]
) -> None:
    """24 of them, of highest probability first, each with a picture of at most 96 pixels of that photo."""
    items = json.loads((scored[0] / "wrong.json").read_text())["items"]
    wrong = {
        name: float(logits.softmax(0).max())
        for name, (label, logits) in by_timm.items()
        if int(logits.argmax()) != label
    }
    expected = sorted(wrong, key=lambda name: -wrong[name])[:MAX_WRONG]
    assert len(items) == MAX_WRONG
    np.testing.assert_allclose([item["probability"] for item in items], [wrong[name] for name in expected], rtol=2e-3)
    for item in items:
        label, logits = by_timm[item["name"]]
        assert (item["label"], item["predicted"]) == (str(label), str(int(logits.argmax())))
        with Image.open(io.BytesIO(base64.b64decode(item["png_base64"], validate=True))) as picture:
            assert picture.format == "PNG" and max(picture.size) <= 96 and max(picture.size) > 90


# --- ranks, batch sizes, other evaluators ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, nn.Module]:
    """ROOT with own sets pets/train, pets/test; a run of 7 classes; its model."""
    folder = tmp_path_factory.mktemp("own")
    train = make_shards(folder / "data" / "shades" / "train")
    make_shards(folder / "data" / "shades" / "test", num_samples=53, seed=1)
    return folder / "data", folder / "tiny", save_run(tiny_config(train, folder), NAMES)


def evaluate_on_rank(arguments: list[str]) -> int:
    """tools/evaluate.py in this process; returns its exit code."""
    sys.argv = ["evaluate.py", *arguments]
    try:
        load_tool("evaluate").main()
    except UserError as error:
        return error.exit_code
    return 0


TASKS = "knn:shades,probe:shades,fewshot:shades,knn:nowhere"


@pytest.fixture(scope="module")
def alone(places: tuple[Path, Path, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank writes with batches of 53, the whole set."""
    return evaluated(places, tmp_path_factory.mktemp("alone"), ranks=1, batch_size=53)


def evaluated(places: tuple[Path, Path, nn.Module], out: Path, *, ranks: int, batch_size: int) -> Path:
    data, run, _ = places
    options = ["--val", data / "shades" / "test", "--tasks", TASKS, "--data", data, "--shots", 1, 5, "--out", out]
    options += ["--predictions", out / "all.jsonl", "--batch-size", batch_size, "--workers", 0]
    assert set(run_ranks(evaluate_on_rank, ranks, [str(run), *map(str, options)])) == {2}  # knn:nowhere
    return out


@pytest.mark.parametrize(
    "ranks, batch_size",
    [(1, 7), (2, 64), (3, 8), pytest.param(2, 5, marks=pytest.mark.slow), pytest.param(3, 1, marks=pytest.mark.slow)],
)
def test_ranks_and_batch_sizes_change_nothing(
    ranks: int, batch_size: int, alone: Path, places: tuple[Path, Path, nn.Module], tmp_path: Path
) -> None:
    """53 images on 1, 2 and 3 ranks in batches that do not divide them: each predicted once, alike, in index order."""
    out = evaluated(places, tmp_path, ranks=ranks, batch_size=batch_size)
    found, expected = lines_of(out / "all.jsonl"), lines_of(alone / "all.jsonl")
    assert [line["index"] for line in found] == list(range(53))
    assert_same_lines(found, expected)
    values, others = values_of(out), values_of(alone)
    assert values.keys() == others.keys()
    for metric, (value, n) in values.items():
        tolerance = 1e-6 if metric == "loss" else 0
        assert value == pytest.approx(others[metric][0], abs=tolerance) and n == 53


def test_features_are_scored_as_by_hand(alone: Path, places: tuple[Path, Path, nn.Module]) -> None:
    """knn:NAME and probe:NAME on the weights' own transform, one batch of everything; the missing set is told."""
    data, _, model = places
    arrays = []
    for split in ("train", "test"):
        manifest = load_manifest(data / "shades" / split)
        options = {"batch_size": 128, "image_size": 16, "config": DataConfig(workers=0)}
        batch = next(eval_batches(manifest, np.arange(manifest.num_samples), **options))
        with torch.no_grad():
            arrays += [pre_logits(model)(batch.images[batch.valid]).numpy(), batch.labels[batch.valid, 0].numpy()]
    values = values_of(alone)
    scores, c = probe(*arrays)
    expected = {f"probe:shades/{row.metric}": row.value for row in scores}
    expected |= {f"knn:shades/{row.metric}": row.value for row in knn(*arrays, device=torch.device("cpu"))}
    assert {metric: values[metric][0] for metric in expected} == pytest.approx(expected, abs=1e-6)
    results = json.loads((alone / "results.json").read_text())
    assert results["probe"]["c"] == {"probe:shades": c}
    assert "data/nowhere/train: not found; make shards" in results["failed"]["knn:nowhere"]


MISTAKES: dict[str, tuple[list[object], str]] = {
    "no such task": (
        ["--tasks", "imagenett", "--data", "."],
        "'imagenett' is not a task. Did you mean: 'imagenet'. There are imagenet",
    ),
    "no such kind": (["--tasks", "kmeans:pets", "--data", "."], "'kmeans:pets' is neither a task nor fewshot:NAME"),
    "no folder": (["--tasks", "imagenet"], "no data: imagenet: no val in data/imagenet; get the set from"),
    "nothing to learn from": (["--tasks", "knn:imagenet_v2", "--data", "."], "imagenet_v2 has no training images"),
    "no head": (["--tasks", "knn:pets", "--data", ".", "--predictions", "x"], "--predictions are of the model's head"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_anything_is_read(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, with the way out; not even the weights are opened: an empty folder is none."""
    arguments, message = MISTAKES[mistake]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path), *map(str, arguments)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load_tool("evaluate").main()


def test_a_head_of_other_classes_is_refused(places: tuple[Path, Path, nn.Module], tmp_path: Path) -> None:
    """A head of 7 classes on CIFAR-10, prepared: told what to do instead, exit code 2, nothing written."""
    make_shards(tmp_path / "cifar10" / "train", num_samples=9)
    make_shards(tmp_path / "cifar10" / "test", num_samples=9)
    done = run_tool("evaluate", places[1], "--tasks", "cifar10", "--data", tmp_path, "--out", tmp_path / "out")
    warned, error = done.stderr.splitlines()
    assert done.returncode == 2 and error == "error: none of cifar10 can be scored" and not (tmp_path / "out").exists()
    assert "cifar10 has 10 classes, the head of" in warned and "as in knn:cifar10" in warned


def test_imagenet_a_is_scored_among_its_classes() -> None:
    """The best of 200 logits, though one outside is larger; label numbers stay ImageNet's; loss over the 200."""
    classes = scored_classes(task("imagenet_a"))
    assert classes and len(classes) == 200
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    outside = next(number for number in range(1000) if number not in classes)
    logits[:, outside] += 10
    restricted = among(lambda _: logits, classes)(torch.zeros(0))
    np.testing.assert_array_equal(restricted.argmax(1).numpy(), np.array(classes)[logits[:, classes].argmax(1).numpy()])
    labels = torch.tensor(classes)[torch.arange(64) % 200]
    expected = torch.nn.functional.cross_entropy(logits[:, classes], torch.arange(64) % 200)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(restricted, labels), expected)
