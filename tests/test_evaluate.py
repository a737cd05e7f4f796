"""tools/evaluate.py: its figures are those of a direct computation, on one rank and on two; mistakes are one line."""

import io
import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from ranks import run_ranks
from tiny import make_shards, tiny_config
from torch import nn
from weights_on_disk import ROOT, load_tool, one_line, one_line_error, randomised, run_tool, save_run

from pretrain.cluster import ranks
from pretrain.config import DataConfig
from pretrain.data.images import to_float
from pretrain.data.loader import Batch, eval_batches
from pretrain.data.manifest import load_manifest
from pretrain.errors import DeviceMemoryError, StorageError, UserError
from pretrain.evaluation import evaluators, subject
from pretrain.evaluation.classification import Predict
from pretrain.evaluation.features import pre_logits
from pretrain.evaluation.fewshot import fewshot
from pretrain.evaluation.jobs import as_head_reads
from pretrain.evaluation.names import NEEDS, missing_data, named
from pretrain.evaluation.results import pages, with_earlier
from pretrain.models.build import build_model
from pretrain.models.formats import OF_RUN
from pretrain.models.weights import load_model, read_weights, weights_sha256
from pretrain.report.figures import summary
from pretrain.report.page import markdown
from pretrain.report.runs import _read_evaluation, read_runs
from pretrain.shards.existing import index_existing
from pretrain.tasks.table import VTAB

torch.set_num_threads(1)
NAMES = [f"shade {i}" for i in range(7)]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, nn.Module]:
    """Two sets of shards, a run, and its model."""
    folder = tmp_path_factory.mktemp("evaluate")
    train, test = make_shards(folder / "train"), make_shards(folder / "test", num_samples=53, seed=1)
    config = tiny_config(train, folder, data__eval_crop=0.9, loss="sigmoid")
    return train, test, folder / "tiny", save_run(config, NAMES)


def all_images(shards: Path, image_size: int = 16, **transform: Any) -> Batch:
    manifest = load_manifest(shards)
    config = DataConfig(workers=0, **{"eval_crop": 0.9, **transform})
    options = {"batch_size": manifest.num_samples, "image_size": image_size, "config": config}
    return next(eval_batches(manifest, np.arange(manifest.num_samples), **options))


@torch.no_grad()
def expected_rows(train: Path, test: Path, model: Any) -> dict[tuple[str, str], float]:
    """The same figures without the tool: every image in one batch, as the head sees it and as few-shot sees it."""
    own, labels = all_images(test), all_images(test).labels[:, 0]
    batches = [all_images(shards, eval_transform="fewshot", eval_crop=0.875) for shards in (train, test)]
    logits = model(to_float(own.images, torch.float32))
    best = logits.topk(5).indices == labels[:, None]
    targets = F.one_hot(labels, 7).float()
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()
    rows = {("trained", "loss"): loss.item()}
    rows |= {
        ("trained", "top1"): best[:, 0].float().mean().item(),
        ("trained", "top5"): best.any(1).float().mean().item(),
    }
    random: Any = build_model(tiny_config(train, train).model, 7).eval()

    def pre_logits(model: Any) -> list[np.ndarray]:
        images = [to_float(batch.images, torch.float32) for batch in batches]
        return [model.forward_head(model.forward_features(x), pre_logits=True).numpy() for x in images]

    pixels = [(batch.images.flatten(1).float() / 255).numpy() for batch in batches]
    kinds = {"trained": pre_logits(model), "random weights": pre_logits(random), "raw pixels": pixels}
    for name, (x_train, x_test) in kinds.items():
        arguments = x_train, batches[0].labels[:, 0].numpy(), x_test, labels.numpy()
        rows |= {(name, score.metric): score.value for score in fewshot(*arguments, shots=(1, 5))}
    return rows


def assert_results(folder: Path, expected: dict[tuple[str, str], float]) -> None:
    results = json.loads((folder / "results.json").read_text())
    found = {(row["model"], row["metric"]): row["value"] for row in results["rows"]}
    assert found == pytest.approx(expected, abs=1e-5)
    assert {row["n"] for row in results["rows"]} == {53}
    assert results["weights"].endswith("step-0000000020") and results["loss"] == "sigmoid"
    assert results["data"]["fewshot_train"]["num_samples"] == 101
    assert results["transform"] == {"name": "timm", "crop": 0.9, "interpolation": "bicubic"}
    assert results["fewshot"]["transform"] == {"name": "fewshot", "crop": 0.875, "interpolation": "bicubic"}


def test_figures_are_those_of_a_direct_computation(places: tuple[Path, Path, Path, nn.Module]) -> None:
    """Loss (the run's own), top-1, top-5 and few-shot accuracies, trained and both baselines; also as Markdown."""
    train, test, run, model = places
    options = ["--shots", "5", "1", "--batch-size", "16", "--workers", "0", "--baselines"]
    done = run_tool("evaluate", run, "--val", test, "--fewshot", train, test, *options)
    assert done.returncode == 0, done.stderr
    expected = expected_rows(train, test, model)
    assert_results(run / "evaluation", expected)
    page = (run / "evaluation" / "results.md").read_text()
    top1 = expected["trained", "top1"]
    assert f"| top1 | {top1:.2%} |  |  | 53 |" in page
    assert "| metric | trained | random weights | raw pixels | images |" in page and "| 5-shot | " in page
    assert f"{top1:.2%}" in done.stdout and "results.json" in done.stdout and not done.stderr


def evaluate_on_rank(arguments: list[str]) -> None:
    """The tool's main, with the option that the deepspeed launcher gives."""
    sys.argv = ["evaluate.py", f"--local_rank={os.environ['LOCAL_RANK']}", *arguments]
    load_tool("evaluate").main()


@pytest.mark.slow
def test_two_ranks_write_the_same_figures(places: tuple[Path, Path, Path, nn.Module], tmp_path: Path) -> None:
    """As under `deepspeed` or `srun`, which set RANK and WORLD_SIZE: rank 0 writes, over the images of both."""
    train, test, run, model = places
    options = ["--val", test, "--fewshot", train, test, "--shots", 1, 5, "--batch-size", 8, "--baselines"]
    run_ranks(evaluate_on_rank, 2, [str(value) for value in (run, *options, "--out", tmp_path)])
    assert_results(tmp_path, expected_rows(train, test, model))


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """tools/evaluate.py in this process, without a process group."""
    module = load_tool("evaluate")
    monkeypatch.setattr(ranks, "start", lambda timeout_s: torch.device("cpu"))
    return module


@pytest.fixture
def evaluate(tool: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Its main."""

    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(value) for value in ("evaluate.py", *arguments)])
        tool.main()

    return call


# --- several calls, one table ----------------------------------------------------------------------------------------


def table_of(out: Path) -> dict[str, tuple[float, int]]:
    """Values and n by metric, as the report reads them; no metric twice."""
    run = Path(shutil.copytree(out, out.parent / f"{out.name}-run" / "evaluation", dirs_exist_ok=True)).parent
    results = _read_evaluation(run)
    assert results
    table = {row["metric"]: (row["value"], row["n"]) for row in results["rows"]}
    page = (out / "results.md").read_text()
    assert len(table) == len(results["rows"]) and all(f"| {m} |" in page for m in table if not m.endswith("-std"))
    return table


def record_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_rows_of_an_earlier_call_stay(
    places: tuple[Path, Path, Path, nn.Module],
    evaluate: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Head, few-shot, nearest neighbours and probes call after call: the rows and the record of one call for all."""
    train, test, run, _ = places
    for name in "ab":
        (tmp_path / name).symlink_to(train.parent)
    val, few, named = ["--val", test], ["--fewshot", train, test], ["--data", tmp_path, "--tasks"]
    out = ["--workers", 0, "--out", tmp_path / "several"]
    evaluate(run, *out, *val)
    wrong = (tmp_path / "several" / "wrong.json").read_bytes()
    evaluate(run, *out, *few, "--shots", 1)
    for task in ("knn:a", "probe:a", "probe:b"):
        evaluate(run, *out, *named, task)
    evaluate(run, *out, *few, "--shots", 5)
    assert (tmp_path / "several" / "wrong.json").read_bytes() == wrong and not capsys.readouterr().err
    alone = ["--workers", 0, "--out", tmp_path / "one"]
    evaluate(run, *alone, *val, *few, "--shots", 1, 5, *named, "knn:a,probe:a,probe:b")
    assert len(table_of(tmp_path / "one")) == 13 and table_of(tmp_path / "several") == table_of(tmp_path / "one")
    several, one = (record_of(tmp_path / name) for name in ("several", "one"))
    assert {**several, "rows": None} == {**one, "rows": None} and len(one["probe"]["c"]) == 2


def test_few_shot_may_learn_from_the_set_it_tests_on(
    places: tuple[Path, Path, Path, nn.Module],
    evaluate: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a large set some images are learnt from, and all are tested."""
    _, test, run, _ = places
    monkeypatch.setattr("pretrain.evaluation.fewshot.MAX_TRAIN", 40)
    evaluate(run, "--workers", 0, "--out", tmp_path, "--fewshot", test, test, "--shots", 1)
    assert table_of(tmp_path)["1-shot"][1] == 53


def test_a_job_that_ends_the_command_takes_no_earlier_rows_with_it(
    places: tuple[Path, Path, Path, nn.Module],
    evaluate: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What each job found is written when it is done: storage, memory or a time limit may end the next."""

    def unreachable(*_: Any) -> Any:
        raise StorageError("the mount is gone")

    train, test, run, _ = places
    (tmp_path / "a").symlink_to(train.parent)
    predictions = tmp_path / "predictions.jsonl"
    options = ["--workers", 0, "--out", tmp_path, "--val", test, "--data", tmp_path, "--tasks", "knn:a,probe:a"]
    options += ["--predictions", predictions]
    monkeypatch.setitem(evaluators.EVALUATORS, "probe", evaluators.EVALUATORS["probe"]._replace(score=unreachable))
    with pytest.raises(StorageError, match="the mount is gone"):
        evaluate(run, *options)
    assert len(table_of(tmp_path)) == 5 and "probe:a/train" not in record_of(tmp_path)["data"]
    assert len(predictions.read_text().splitlines()) == 53
    monkeypatch.undo()
    evaluate(run, *options)
    assert len(table_of(tmp_path)) > 5 and "probe:a/train" in record_of(tmp_path)["data"]


def test_wrong_predictions_tell_of_what_they_are(
    places: tuple[Path, Path, Path, nn.Module], evaluate: Callable[..., None], tmp_path: Path
) -> None:
    """The data by its folder and digest, and the weights: a page shows them beside no other accuracy."""
    _, test, run, _ = places
    evaluate(run, "--workers", 0, "--out", tmp_path, "--val", test)
    wrong, record = json.loads((tmp_path / "wrong.json").read_text()), record_of(tmp_path)
    assert wrong["data"] == f"{test.parent.name}/{test.name}" and wrong["items"]
    assert wrong["data_sha256"] == record["data"]["val"]["sha256"] == load_manifest(test).sha256
    assert wrong["weights_sha256"] == record["weights_sha256"]


def test_rows_on_other_data_or_by_another_protocol_are_dropped(
    places: tuple[Path, Path, Path, nn.Module],
    evaluate: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What was measured again is replaced; what the record would now describe wrongly goes, and is told."""
    train, test, run, _ = places
    other = make_shards(tmp_path / "other", num_samples=9, seed=2)
    out, options = tmp_path / "out", ["--workers", 0, "--out", tmp_path / "out"]
    evaluate(run, *options, "--val", test, "--fewshot", train, test, "--shots", 1, 5)
    before = table_of(out)
    evaluate(run, *options, "--val", other)
    after = table_of(out)
    assert not capsys.readouterr().err and after.keys() == before.keys()
    assert {metric: n for metric, (_, n) in after.items()} == {m: 53 if "shot" in m else 9 for m in before}
    evaluate(run, *options, "--fewshot", train, other, "--shots", 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 rows of an earlier call are dropped (other data or protocol): 5-shot, 5-shot-std" in line
    assert set(table_of(out)) == {"loss", "top1", "top5", "1-shot", "1-shot-std"}
    evaluate(run, *options, "--fewshot", train, other, "--shots", 5, "--fewshot-transform", "timm")
    assert "(other data or protocol): 1-shot, 1-shot-std" in capsys.readouterr().err
    assert record_of(out)["fewshot"]["shots"] == [5]


def test_rows_of_other_weights_stay(
    places: tuple[Path, Path, Path, nn.Module],
    evaluate: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that went on: results and the mistakes' pictures of both checkpoints are there; a damaged file is told."""
    train, test, _, _ = places
    save_run(tiny_config(train, tmp_path), NAMES, step=20)
    run, out = tmp_path / "tiny", tmp_path / "tiny" / "evaluation"
    near = ["--workers", 0, "--data", train.parent.parent, "--tasks", f"knn:{train.parent.name}"]
    evaluate(run, "--workers", 0, "--val", test)
    first, wrong = record_of(out), (out / "wrong.json").read_bytes()
    save_run(tiny_config(train, tmp_path), NAMES, step=30)
    evaluate(run, *near)
    assert not capsys.readouterr().err and not (out / "wrong.json").exists()
    assert record_of(out)["others"] == [first] and len(record_of(out)["rows"]) == 2
    assert set(record_of(out)["data"]) == {f"{near[-1]}/train", f"{near[-1]}/test"}
    page = (out / "results.md").read_text()
    assert page.count("step-0000000020") and page.count("step-0000000030") and "| top1 |" in page
    evaluate(run / "checkpoints" / "step-0000000020", *near)
    assert not capsys.readouterr().err and (out / "wrong.json").read_bytes() == wrong
    assert len(record_of(out)["rows"]) == 5 and len(record_of(out)["others"][0]["rows"]) == 2
    evaluate(run / "checkpoints" / "step-0000000020", *near, "--loss", "sigmoid")
    dropped, removed = capsys.readouterr().err.splitlines()
    assert "3 rows of an earlier call are dropped (other loss): loss" in dropped and "wrong.json: removed" in removed
    (out / "results.json").write_text('{"rows": [1]}')
    evaluate(run, *near)
    assert "cannot be read as an earlier call's" in capsys.readouterr().err and len(table_of(out)) == 2


def test_either_of_a_run_that_keeps_an_average_is_scored(
    places: tuple[Path, Path, Path, nn.Module], evaluate: Callable[..., None], tmp_path: Path
) -> None:
    """Each with its own figures, beside the other's; results.md and the report say whose they are."""
    train, test, _, _ = places
    config = tiny_config(train, tmp_path, data__eval_crop=0.9)
    kept = {"average": randomised(build_model(config.model, 7), seed=1)}
    kept["trained"] = save_run(config, NAMES, average=kept["average"])
    run, images = tmp_path / "tiny", all_images(test)
    evaluate(run, "--workers", 0, "--val", test)
    evaluate(run, "--workers", 0, "--val", test, "--weights", "trained")
    record = record_of(run / "evaluation")
    (other,) = record["others"]
    values = {}
    for found in (record, other):
        with torch.no_grad():
            logits = kept[found["of_run"]](to_float(images.images, torch.float32))
        values[found["of_run"]] = {row["metric"]: row["value"] for row in found["rows"]}
        loss = F.cross_entropy(logits, images.labels[:, 0]).item()
        assert values[found["of_run"]]["loss"] == pytest.approx(loss, rel=1e-5)
    assert list(values) == ["trained", "average"] and values["trained"] != values["average"]
    page = (run / "evaluation" / "results.md").read_text()
    (found,) = read_runs([run])
    told = markdown([summary(found)])
    for of_run, words in OF_RUN.items():
        digest = weights_sha256(run / "checkpoints" / "step-0000000020", of_run)[:12]
        assert f"weights {digest}, {words}." in page and f"weights {digest}, {words}:" in told


def test_another_image_size_is_another_measurement(
    places: tuple[Path, Path, Path, nn.Module],
    evaluate: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its rows are of the model with resized positions, and stand beside none of the trained size."""
    train, test, run, _ = places
    options = ["--workers", 0, "--out", tmp_path, "--val", test]
    evaluate(run, *options, "--fewshot", train, test, "--shots", 1)
    with pytest.raises(UserError, match="--image-size is 0, expected at least 1"):
        evaluate(run, *options, "--image-size", 0)
    capsys.readouterr()
    evaluate(run, *options, "--image-size", 24)
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 rows of an earlier call are dropped (other image size): 1-shot, 1-shot-std" in line
    assert record_of(tmp_path)["image_size"] == 24 and set(table_of(tmp_path)) == {"loss", "top1", "top5"}
    images = all_images(test, image_size=24)
    with torch.no_grad():
        right = load_model(run, 24)(to_float(images.images, torch.float32)).argmax(1) == images.labels[:, 0]
    assert table_of(tmp_path)["top1"][0] == pytest.approx(right.double().mean().item())


def test_what_does_not_fit_in_an_earlier_record_is_replaced(
    places: tuple[Path, Path, Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever stands in results.json: the new rows are kept, the file replaced with one warning, NaN is a number."""
    train, test, run, _ = places
    path = tmp_path / "results.json"
    row, new = ["trained", "top1", 0.5, 10], evaluators.Row("trained", "a/top1", 0.25, 20)
    data = {"path": "x", "sha256": "0", "num_samples": 10, "num_classes": 7}
    record: dict[str, Any] = {"weights": "w", "weights_sha256": "0", "model": "Ti", "image_size": 16, "loss": "softmax"}
    record |= {"transform": {"name": "vit", "crop": 1, "interpolation": "x"}, "data": {"a/test": data}, "failed": {}}
    record |= dict.fromkeys(("fewshot", "knn", "probe"))
    shot = {"shots": [5], "seeds": [0], "l2": 1.0, "transform": record["transform"], "max_train": 9}
    good = {**record, "data": {"val": data, "fewshot_test": data}, "fewshot": shot}

    def merged(text: str) -> tuple[int, str]:
        path.write_text(text)
        rows, kept = with_earlier([new], record, path)
        pages(rows, kept, [])
        assert rows[-1] == new and kept["data"]["a/test"] == data
        return len(rows), capsys.readouterr().err

    def with_row(**changes: Any) -> dict[str, Any]:
        return {**good, "rows": [{**dict(zip(evaluators.Row._fields, row)), **changes}]}

    for fine in (with_row(), with_row(value=float("nan")), with_row(metric="5-shot"), with_row(value=1)):
        assert merged(json.dumps(fine)) == (2, "")
    wrong = [with_row(**{key: v}) for key in ("model", "metric") for v in (5, None, [], {}, "\ud800")]
    wrong += [with_row(value=v) for v in (None, "1", [], True, 10**400)]
    wrong += [with_row(n=v) for v in (None, "1", 1.5, float("inf"), True, -1)]
    wrong += [{**with_row(), "data": v} for v in (None, [], 5, {"val": 5}, {"val": {}})]
    wrong += [{**with_row(), "data": {"val": {**data, "num_samples": v}}} for v in (None, "1", [], {})]
    wrong += [{**with_row(metric="5-shot"), "fewshot": v} for v in (None, [], 5, {}, {**shot, "l2": "1"})]
    wrong += [{**with_row(metric="5-shot"), "fewshot": {**shot, key: 5}} for key in ("shots", "seeds", "transform")]
    wrong += [{**with_row(), "rows": v} for v in (None, 5, {}, [5], [[]], [{}])]
    texts = [*map(json.dumps, wrong), "", "[" * 100_000, '{"rows":' * 100_000, "9" * 5000, "[]", "5", "null"]
    for text in texts:
        found, told = merged(text)
        assert found == 1 and len(told.splitlines()) == 1, text[:500]
        assert "cannot be read as an earlier call's" in told and len(told) < 600, text[:500]


def test_vtab_stands_for_its_tasks_and_a_misspelt_set_is_told(tmp_path: Path) -> None:
    """Each once, whatever else is named; a folder of one's own that is there is no misspelling."""
    found = [job.name for job in named("knn:vtab,imagenet,knn:vtab/dtd,vtab", tmp_path)]
    assert found == [*(f"knn:{name}" for name in VTAB), "imagenet", *VTAB]
    (tmp_path / "pet").mkdir()
    told = [missing_data(job, tmp_path) or "" for job in named("knn:cifar_10,knn:pet", tmp_path)]
    assert told[0].endswith("tools/make_shards.py makes shards. Did you mean: 'cifar10'?") and "mean" not in told[1]


@pytest.mark.parametrize("kind", ["folder", "file", "checkpoint"])
def test_what_tells_weights_apart(kind: str, tmp_path: Path) -> None:
    """A changed byte in a tensor file is another set of weights; results beside it, or another place, are not."""
    name = {"folder": "model.safetensors", "file": "b16.npz", "checkpoint": "MANIFEST.json"}[kind]
    found = []
    for place, content in [("first", b"1"), ("second", b"1"), ("third", b"2")]:
        (tmp_path / place / "evaluation").mkdir(parents=True)
        (tmp_path / place / name).write_bytes(content)
        (tmp_path / place / "results.json").write_text(place)
        found.append(weights_sha256(tmp_path / place / name if kind == "file" else tmp_path / place))
    assert found[0] == found[1] != found[2]


# --- two questions, one pass -----------------------------------------------------------------------------------------


def test_real_needs_no_pass_of_its_own(
    evaluate: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """13 images in 4 batches: as many forward passes for imagenet and real as for one; the same figures and lines."""
    random, names = np.random.default_rng(0), [str(number) for number in range(1000)]
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for number in range(13):
            file = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (20, 20, 3)).astype(np.uint8)).save(file, "png")
            for ending, content in (("png", file.getvalue()), ("cls", str(number).encode())):
                member = tarfile.TarInfo(f"ILSVRC2012_val_{number + 1:08d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    shards = tmp_path / "data" / "imagenet" / "val"
    index_existing([tmp_path / "images.tar"], names, shards)
    save_run(tiny_config(shards, tmp_path), names)
    seen: list[int] = []
    real_logits = subject.logits_of

    def counted(*arguments: Any) -> Predict:
        def predict(images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return real_logits(*arguments)(images)

        return predict

    monkeypatch.setattr(subject, "logits_of", counted)
    rows, lines = {}, {}
    for tasks in ("imagenet", "real", "imagenet,real"):
        seen.clear()
        out = tmp_path / tasks
        options = ["--data", tmp_path / "data", "--tasks", tasks, "--predictions", out / "all.jsonl", "--out", out]
        evaluate(tmp_path / "tiny", *options, "--batch-size", 4, "--workers", 0)
        assert seen == [4] * 4
        rows[tasks], lines[tasks] = table_of(out), (out / "all.jsonl").read_text()
    assert rows["imagenet,real"] == rows["imagenet"] | rows["real"]
    assert lines["imagenet,real"] == lines["imagenet"] + lines["real"]


def test_remembered_batches_keep_no_shared_memory() -> None:
    """Each of its tensors is an open file: 200 batches of a loader process met the limit of 1024."""
    columns = [torch.full((4, 1), number).share_memory_() for number in range(6)]
    model: Any = SimpleNamespace(predict=lambda images: images + 10, _answers={})
    predict, batches = subject.Subject._remembered(model, iter([Batch(*columns, bad=[])]), Path("real"))
    for batch in batches:
        predict(batch.images)
    kept = model._answers[Path("real")][0]
    assert not any(tensor.is_shared() for tensor in kept[:6]) and [t[0].item() for t in kept[:6]] == [10, 1, 2, 3, 4, 5]


# --- an evaluator more -----------------------------------------------------------------------------------------------


def test_the_documented_evaluator_works(
    places: tuple[Path, Path, Path, nn.Module],
    evaluate: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """docs/evaluation.md's function and row, as they stand there: scored by name, and kept by the next call."""
    train, _, run, model = places
    page = (ROOT / "docs" / "evaluation.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page.partition("## Adding an evaluator")[2], flags=re.DOTALL)
    function, row, needs = blocks
    names = dict(vars(evaluators))
    exec(function, names)
    for kind, evaluator in eval(f"{{{row}}}", names).items():
        monkeypatch.setitem(evaluators.EVALUATORS, kind, evaluator)
        monkeypatch.setitem(NEEDS, kind, eval(f"{{{needs}}}")[kind])
    (tmp_path / "a").symlink_to(train.parent)
    options = ["--workers", 0, "--out", tmp_path / "out", "--data", tmp_path, "--tasks"]
    evaluate(run, *options, "mean:a")
    evaluate(run, *options, "knn:a")
    sets = [all_images(train.parent / name) for name in ("train", "test")]
    with torch.no_grad():
        x, test_x = (pre_logits(model)(batch.images) for batch in sets)
    y, test_y = (batch.labels[:, 0] for batch in sets)
    nearest = torch.cdist(test_x, torch.stack([x[y == number].mean(0) for number in range(7)])).argmin(1)
    expected = (nearest == test_y).float().mean().item()
    assert table_of(tmp_path / "out")["mean:a/top1"] == (pytest.approx(expected), 53)
    assert {"mean:a/train", "mean:a/test", "knn:a/test"} <= set(record_of(tmp_path / "out")["data"])


# --- mistakes --------------------------------------------------------------------------------------------------------


def other_classes(folder: Path) -> Path:
    """A copy of the layout with a class more."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["label"] |= {"num_classes": manifest["label"]["num_classes"] + 1, "names": None}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


MISTAKES: dict[str, tuple[Callable[[Path, Path], list[object]], str]] = {
    "nothing to do": (lambda train, test: [], "nothing to evaluate: give --val MANIFEST"),
    "baselines of nothing": (lambda train, test: ["--val", test, "--baselines"], "--baselines .* needs --fewshot"),
    "no shots": (lambda train, test: ["--fewshot", train, test, "--shots", "0"], r"--shots is \[0\]"),
    "no batch": (lambda train, test: ["--val", test, "--batch-size", "0"], "--batch-size is 0, expected at least 1"),
    "no shards": (lambda train, test: ["--val", test / "nowhere"], "nowhere: not found; expected shards"),
    "more classes": (lambda train, test: ["--val", other_classes(test)], "has 8 classes, .* has 7"),
    "other classes": (
        lambda train, test: ["--fewshot", train, other_classes(test)],
        "7 classes.* and .*8 classes.* must have the same classes",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_line(
    mistake: str, places: tuple[Path, Path, Path, nn.Module], tmp_path: Path, evaluate: Callable[..., None]
) -> None:
    """Each before any image is read, with the way out; no results are written."""
    train, _, run, _ = places
    arguments, message = MISTAKES[mistake]
    test = make_shards(tmp_path / "test", num_samples=9)
    with pytest.raises(UserError, match=message) as caught:
        evaluate(run, "--out", tmp_path / "out", *arguments(train, test))
    assert one_line(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("batch_size", "told"), [(8, "--batch-size: 8 images at a time .* try 4$"), (1, "no memory for the model")]
)
def test_a_batch_that_does_not_fit_is_told(
    places: tuple[Path, Path, Path, nn.Module],
    evaluate: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    told: str,
) -> None:
    """With the option that mends it; a DeviceMemoryError is one line, exit code 2."""

    def no_room(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    _, test, run, _ = places
    monkeypatch.setattr(subject, "logits_of", lambda *_: no_room)
    with pytest.raises(DeviceMemoryError, match=told):
        evaluate(run, "--val", test, "--workers", 0, "--out", tmp_path, "--batch-size", batch_size)


def test_the_exit_code_tells(tmp_path: Path) -> None:
    """Weights that are not there: 2, and one line."""
    assert "nowhere: not found" in one_line_error(run_tool("evaluate", tmp_path / "nowhere", "--val", tmp_path))


def test_class_names_are_matched(
    places: tuple[Path, Path, Path, nn.Module],
    evaluate: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Labels mean what their names say: a class that the head lacks is refused; another order gives the same score."""
    _, test, run, _ = places
    shards = make_shards(tmp_path / "test", num_samples=9)
    (shards / "classes.json").write_text(json.dumps([*NAMES[:2], "other", *NAMES[3:]]))
    with pytest.raises(UserError, match="class 2 is 'other', which .* does not have"):
        as_head_reads(read_weights(run), load_manifest(shards))
    turned = Path(shutil.copytree(test, tmp_path / "turned"))
    (turned / "classes.json").write_text(json.dumps(NAMES[::-1]))
    evaluate(run, "--val", test, "--workers", 0, "--out", tmp_path / "a", "--predictions", tmp_path / "a.jsonl")
    evaluate(run, "--val", turned, "--workers", 0, "--out", tmp_path / "b", "--predictions", tmp_path / "b.jsonl")
    assert "has the 7 classes of" in (told := capsys.readouterr().err) and "in another order: mapped by name" in told
    rows = [
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in ("a.jsonl", "b.jsonl")
    ]
    assert [row["label"] for row in rows[1]] == [6 - row["label"] for row in rows[0]]
    assert [row["prediction"] for row in rows[1]] == [row["prediction"] for row in rows[0]]
