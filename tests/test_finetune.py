"""Fine-tuning: the paper's numbers in the derived configs, the choice of the rate, the table, killed sweeps."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from processes import processes_of, whole_session
from ranks import run_ranks
from scipy.ndimage import zoom
from slurm import cluster, wait_for
from tiny import make_shards, tiny_config
from weights_on_disk import ROOT, load_tool, one_line, save_run

from pretrain.checkpoint.find import newest_valid
from pretrain.checkpoint.layout import step_folders
from pretrain.cluster.jobs import is_held, run_job
from pretrain.cluster.local import on_cpu
from pretrain.config import Config, ModelConfig, config_to_yaml
from pretrain.data.images import eval_image, to_float, train_image
from pretrain.data.loader import eval_batches
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from pretrain.finetune import running
from pretrain.finetune.results import differences_from_paper, results, vtab_results, write_results, write_vtab
from pretrain.finetune.scores import DIVERGED, RunScore, chosen_lr, claim_sweep, real_score, score
from pretrain.finetune.sweep import (
    Options,
    Start,
    Sweep,
    final_runs,
    plan_sweep,
    read_start,
    selecting_runs,
)
from pretrain.models.weights import load_model, read_weights, results_folder, weights_sha256
from pretrain.optim import learning_rate
from pretrain.shards.examples import Example, write_examples
from pretrain.tasks.imagenet_labels import real_labels
from pretrain.tasks.published import PAPER_ROWS
from pretrain.tasks.table import TASKS, VTAB, task
from pretrain.train.run import train

torch.set_num_threads(1)
MODEL = ModelConfig(name="B", dropout=0.1, drop_path=0.2, head_bias=-10.0, representation_size=768, init="deit")
B16 = Start(Path("b16.npz"), MODEL, "0")
TINY = ("data.workers=0", "data.global_batch=16", "engine.precision=fp32", "evaluation.batch_size=16")


# --- the paper's protocol --------------------------------------------------------------------------------------------


@pytest.fixture
def full_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifests that say they hold the official numbers of images."""

    def say(path: Path) -> Any:
        split = path.parent.name
        name = "vtab/eurosat" if "vtab" in path.parts else path.parts[-3]
        return SimpleNamespace(num_samples=TASKS[name].num_samples[split], sha256=split)

    monkeypatch.setattr("pretrain.finetune.sweep.load_manifest", say)
    monkeypatch.setattr("pretrain.finetune.results.load_manifest", say)
    monkeypatch.setattr("pretrain.finetune.results.set_differences", lambda root: [])


def plan(name: str, **changes: Any) -> Sweep:
    asked = {"start": B16, "data": Path("data"), "out": Path("out"), "num_seeds": 3, **changes}
    return plan_sweep(task(name), Options(**asked))


@pytest.mark.parametrize(
    ("name", "steps", "warmup_steps", "rates", "held_out"),
    [
        ("imagenet", 20_000, 500, [0.003, 0.01, 0.03, 0.06], 12_812),  # 1 %
        ("cifar10", 10_000, 500, [0.001, 0.003, 0.01, 0.03], 1_000),  # 2 %
        ("cifar100", 10_000, 500, [0.001, 0.003, 0.01, 0.03], 1_000),
        ("pets", 500, 100, [0.001, 0.003, 0.01, 0.03], 368),  # 10 %
        ("flowers", 500, 100, [0.001, 0.003, 0.01, 0.03], 102),
    ],
)
def test_table_4(full_sets: None, name: str, steps: int, warmup_steps: int, rates: list[float], held_out: int) -> None:
    """ViT, Table 4 and B.1.1, as literals: steps, rates, held-out share, and what is the same for all of them."""
    sweep = plan(name)
    selecting, final = selecting_runs(sweep), final_runs(sweep, rates[0])
    assert [config.optim.lr for config in selecting] == rates
    assert [(config.seed, config.optim.lr) for config in final] == [(seed, rates[0]) for seed in range(3)]
    for config in [*selecting, *final]:
        o, d, m = config.optim, config.data, config.model
        assert (config.total_steps, o.warmup_steps) == (steps, warmup_steps)
        assert (o.name, o.momentum, o.moment_dtype, o.weight_decay, o.clip_norm) == ("sgd", 0.9, "bf16", 0.0, 1.0)
        assert learning_rate(o, steps, warmup_steps) == o.lr and learning_rate(o, steps, steps) == 0.0
        assert (d.global_batch, m.image_size, config.loss, config.label_smoothing) == (512, 384, "softmax", 0.0)
        assert (d.crop, d.crop_area, d.crop_ratio, d.flip) == ("inception", (0.05, 1.0), (0.75, 1.33), 0.5)
        assert (d.interpolation, d.antialias, d.eval_transform) == ("bilinear", False, "vit")
        assert (d.mixup, d.cutmix, d.randaugment_layers) == (0.0, 0.0, 0)
        assert (m.name, m.dropout, m.drop_path) == ("B", 0.1, 0.0)
        assert (m.init, m.head_bias, m.representation_size) == ("google", 0.0, None)  # a head of zeros
        assert m.num_classes == TASKS[name].num_classes and config.init_new_head
    folder = Path("data").absolute() / name
    test = "val" if name == "imagenet" else "test"
    assert all(
        (c.data.train, c.data.val, c.data.held_out) == (folder / "train/manifest.json", None, held_out)
        for c in selecting
    )
    assert all((c.data.train, c.data.held_out) == (folder / "train/manifest.json", 0) for c in final)
    assert all((c.data.val, c.evaluation.every_steps) == (folder / test / "manifest.json", steps) for c in final)
    assert differences_from_paper(sweep, TASKS[name].num_samples[test]) == []


def test_vtab_protocol(full_sets: None) -> None:
    """One rate, so nothing to choose; with several, the 200 images decide and the final runs see all 1,000."""
    sweep = plan("vtab/eurosat")
    folder = Path("data").absolute() / "vtab/eurosat"
    assert selecting_runs(sweep) == [] and chosen_lr(sweep) == 0.01
    for config in final_runs(sweep, 0.01):
        assert (config.total_steps, config.optim.lr, config.data.global_batch) == (2500, 0.01, 512)
        assert (config.data.train, config.data.val) == (
            folder / "trainval/manifest.json",
            folder / "test/manifest.json",
        )
        assert (config.model.image_size, config.model.num_classes, config.optim.warmup_steps) == (384, 10, 200)
    for config in selecting_runs(plan("vtab/eurosat", lr_grid=(0.03, 0.01))):
        assert (config.data.train, config.data.val) == (folder / "train/manifest.json", folder / "val/manifest.json")
        assert config.data.held_out == 0


@pytest.mark.parametrize(
    ("name", "crops", "flips"),
    [
        ("vtab/eurosat", True, True),
        ("vtab/smallnorb_azimuth", True, False),
        ("vtab/clevr_count", False, True),
        ("vtab/dsprites_location", False, False),
    ],
)
def test_vtab_images_lose_no_label(full_sets: None, name: str, crops: bool, flips: bool) -> None:
    """Crops of 384 of 448 pixels, and mirror images, only where the label stays; evaluation sees the whole image."""
    data = final_runs(plan(name), 0.01)[0].data
    assert (data.eval_transform, data.interpolation, data.antialias) == ("vit", "bilinear", False)
    for height, width in ((40, 40), (31, 57), (90, 20)):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        square = eval_image(image, 28 if crops else 24, data)  # 448 and 384, divided by 16
        squares = square.unfold(1, 24, 1).unfold(2, 24, 1)  # every crop: [3, down, across, 24, 24]
        places = set()
        for index in range(20):
            seen = train_image(image, 24, data, 0, "set", 0, index)
            for mirrored, view in enumerate((seen, seen.flip(2))):
                equal = (squares == view[:, None, None]).flatten(3).all(3).all(0)  # [down, across]
                places |= {(mirrored, *place) for place in equal.nonzero().tolist()}
        assert {place[0] for place in places} == ({0, 1} if flips else {0})
        assert len({place[1:] for place in places}) > 5 if crops else {place[1:] for place in places} == {(0, 0)}


def test_cuts_are_told(full_sets: None) -> None:
    """Fewer steps shorten the warm-up alike, more leave it; whatever differs from the paper is named, overrides too."""
    sweep = plan(
        "cifar10",
        steps=200,
        lr_grid=(0.03, 0.01, 0.03),
        num_seeds=2,
        overrides=("optim.average_decay=0.9999", "data.workers=0", "engine.compile=true", "data.order=lanes"),
    )
    config = selecting_runs(sweep)[0]
    assert (config.total_steps, config.optim.warmup_steps, config.optim.average_decay) == (200, 10, 0.9999)
    assert sweep.protocol.lr_grid == (0.01, 0.03)
    told = differences_from_paper(sweep, 9_000)
    for part in (
        "steps: 200 ",
        "lr_grid: 0.01 0.03 ",
        "9,000 of 10,000 test images could be scored",
        "2 instead of 3 seeds",
        "average",
        "data.order",
    ):
        assert any(part in one for one in told), part
    assert not any(part in one for part in ("workers", "compile") for one in told)
    assert plan("cifar10", steps=20_000).protocol.warmup_steps == 500


LARGE = replace(B16, model=ModelConfig(name="L"))
HUGE = replace(B16, model=ModelConfig(name="H", patch_size=14))


@pytest.mark.parametrize(
    ("start", "size", "average", "told"),
    [
        (LARGE, 512, True, []),  # ViT, Table 2: L/16 at 512 px, H/14 at 518, with averages
        (B16, 512, True, ["image_size: 512 instead of 384", "optim.average_decay=0.9999"]),
        (HUGE, 518, True, []),
        (HUGE, None, False, []),
        (B16, 512, False, ["image_size: 512 instead of 384"]),
        (HUGE, 512 - 8, False, ["image_size: 504 instead of 378"]),
        (B16, None, True, ["optim.average_decay=0.9999"]),
    ],
)
def test_both_imagenet_protocols_are_the_papers(
    full_sets: None, start: Start, size: int | None, average: bool, told: list[str]
) -> None:
    """Table 2's higher resolution with Polyak averages, and Table 5's 384 px without; nothing in between."""
    overrides = ("optim.average_decay=0.9999",) if average else ()
    sweep = plan("imagenet", start=start, image_size=size, overrides=overrides)
    assert differences_from_paper(sweep, 50_000) == told
    elsewhere = differences_from_paper(plan("pets", start=start, image_size=size, overrides=overrides), 3669)
    assert bool(elsewhere) == (size is not None or average)


def test_sizes_that_do_not_fit_the_patches(full_sets: None) -> None:
    """H/14 takes the 378 of 384 pixels that make patches; a size that was asked for is refused."""
    huge = HUGE
    assert final_runs(plan("cifar10", start=huge), 0.01)[0].model.image_size == 378
    assert final_runs(plan("cifar10", start=huge, image_size=518), 0.01)[0].model.image_size == 518
    with pytest.raises(UserError, match=r"model.image_size \(384\) is not a multiple of model.patch_size \(14\)"):
        final_runs(plan("cifar10", start=huge, image_size=384), 0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": ("optim.lr=0.1",)}, "give --lr"),
        ({"overrides": ("total_steps=3",)}, "give --steps"),
        ({"overrides": ("data.held_out=3",)}, "give --data"),
        ({"overrides": ("checkpoint.copy_to=/copies",)}, "the sweep sets checkpoint.copy_to itself"),
    ],
)
def test_settings_that_are_the_sweeps_own(full_sets: None, changes: dict[str, Any], message: str) -> None:
    """One line each, with the option to use."""
    with pytest.raises(UserError, match=message) as caught:
        plan("cifar10", **changes)
    one_line(caught.value)


def test_tasks_without_training_images_are_refused() -> None:
    """ReaL is scored with what was fine-tuned on ImageNet."""
    with pytest.raises(UserError, match="real has no training images: fine-tune on imagenet"):
        plan("real")


# --- a tiny set under a real task's name -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of random numbers with 16 px, positions, a representation layer; Pets of 7 shades; VTAB's EuroSAT."""
    folder = tmp_path_factory.mktemp("tiny")
    for number, split in enumerate(("pets/train", "pets/test", "vtab/eurosat/train", "vtab/eurosat/val")):
        make_shards(folder / "data" / split, num_samples=101 if number % 2 == 0 else 53, seed=number)
    config = tiny_config(
        folder / "data/pets/train", folder, model__representation_size=16, model__head_bias=-6.9, loss="sigmoid"
    )
    save_run(config, [f"shade {i}" for i in range(7)])
    return folder


def tiny_sweep(folder: Path, out: Path, **changes: Any) -> Sweep:
    start = read_start(folder / "tiny", from_scratch=changes.pop("from_scratch", False))
    options = {"num_seeds": 2, "steps": 4, "image_size": 24, "overrides": TINY, **changes}
    return plan_sweep(task("pets"), Options(start=start, data=folder / "data", out=out, **options))


def test_step_0(tiny: Path, tmp_path: Path) -> None:
    """A warm-up begins with rate 0, so after one step the weights are the first ones: a head of zeros, its bias too,
    positions resized as scipy's zoom does it with the class token's row kept, no representation layer, the rest equal.
    """
    sweep = tiny_sweep(tiny, tmp_path, steps=1, overrides=(*TINY, "optim.warmup_steps=1"))
    config = final_runs(sweep, 0.03)[0]
    run_ranks(train, 1, config)
    before, after = read_weights(tiny / "tiny"), read_weights(config.output / config.name)
    assert after.model.image_size == 24 and after.num_classes == 37
    old, new = ({name: tensor.read() for name, tensor in w.tensors.items()} for w in (before, after))
    assert old["head.weight"].any() and old["head.bias"].any()
    assert new["head.weight"].shape == (37, 32) and not new.pop("head.weight").any() and not new.pop("head.bias").any()
    table, resized = old["pos_embed"][0], new.pop("pos_embed")[0]
    expected = zoom(table[1:].view(2, 2, 32).numpy(), (1.5, 1.5, 1), order=1).reshape(9, 32)
    assert torch.equal(resized[:1], table[:1])
    torch.testing.assert_close(resized[1:], torch.from_numpy(expected), rtol=0, atol=1e-6)
    assert old.keys() - new.keys() == {"pre_logits.weight", "pre_logits.bias", "head.weight", "head.bias", "pos_embed"}
    assert all(torch.equal(tensor, old[name]) for name, tensor in new.items())


def test_from_scratch_is_the_same_recipe(tiny: Path, tmp_path: Path) -> None:
    """The baseline differs in the weights alone."""
    ours, random_ones = (
        final_runs(tiny_sweep(tiny, tmp_path, from_scratch=scratch), 0.03)[0] for scratch in (False, True)
    )
    assert ours.init_from == newest_valid(tiny / "tiny" / "checkpoints")
    assert random_ones == replace(ours, init_from=None, init_new_head=False)


def test_choosing_works_without_the_test_images(tiny: Path, tmp_path: Path) -> None:
    """A selecting run ends with its score on images of train while the test shards are not even there."""
    data = shutil.copytree(tiny / "data", tmp_path / "data")
    shutil.copytree(tiny / "tiny", tmp_path / "tiny")
    sweep = tiny_sweep(tmp_path, tmp_path / "out", lr_grid=(0.01, 0.03))
    shutil.rmtree(data / "pets/test")
    assert chosen_lr(sweep) is None
    for config in selecting_runs(sweep):
        assert not any(name in config_to_yaml(config) for name in ("pets/test", "val/manifest"))
        run_ranks(train, 1, config)
        found = score(config)
        assert found is not None and found.num_images == 10
    assert chosen_lr(sweep) in (0.01, 0.03)


def test_every_test_image_counts_once(tiny: Path, tmp_path: Path) -> None:
    """The score of a final run on 2 ranks is that of all 53 images in one batch, counted by hand."""
    config = final_runs(tiny_sweep(tiny, tmp_path, steps=20), 0.03)[0]
    run_ranks(train, 2, config)
    found = score(config)
    manifest = load_manifest(config.data.val or Path())
    options = {"batch_size": 53, "image_size": 24, "config": config.data}
    (batch,) = eval_batches(manifest, np.arange(53), **options)
    with torch.no_grad():
        logits = load_model(config.output / config.name)(to_float(batch.images, torch.float32))
    assert found == RunScore((logits.argmax(1) == batch.labels[:, 0]).double().mean().item(), 53)
    assert 0.0 < found.top1 < 1.0


# --- choosing, and the table -----------------------------------------------------------------------------------------


WRONG_SCORES: list[Any] = [
    {"val/top1": value, "val/images": 10, "rows": [{"metric": "real/top1", "value": value, "n": 10}]}
    for value in (None, "0.5", [], True, -0.5, 1.5, 50, float("nan"), float("inf"), 10**400)
]
WRONG_SCORES += [
    {"val/top1": 0.5, "val/images": n, "rows": [{"metric": "real/top1", "value": 0.5, "n": n}]}
    for n in (None, "10", [], True, -1, 10**30, float("nan"), float("inf"))
]
WRONG_SCORES += [{"rows": rows} for rows in (None, 5, {}, [5], [[]], [{}], [{"metric": 5}])]


def pretend(config: Config, top1: float | None, num_images: int = 10) -> None:
    """Writes what a finished run leaves; None: a diverged one."""
    folder = config.output / config.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config_to_yaml(config))
    if top1 is None:
        (folder / DIVERGED).touch()
    else:
        (folder / "DONE").write_text(json.dumps({"step": 4, "val/top1": top1, "val/images": num_images}))


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ([0.1, 0.5, 0.4, 0.3], 0.003),
        ([0.1, 0.5, 0.5, 0.3], 0.003),  # equal: the lower rate
        ([0.0, 0.0, 0.0, 0.0], 0.001),
        ([0.1, 0.2, 0.3, None], 0.01),  # did not stay finite
        ([None, None, 0.0, None], 0.01),
    ],
)
def test_the_best_rate_is_chosen(tiny: Path, tmp_path: Path, scores: list[float | None], chosen: float) -> None:
    """By the held-out images; of equals the lowest; never one that diverged; not before all are scored."""
    sweep = tiny_sweep(tiny, tmp_path)
    for config, top1 in zip(selecting_runs(sweep), scores):
        assert chosen_lr(sweep) is None
        pretend(config, top1)
    assert chosen_lr(sweep) == chosen


def test_no_finite_rate_is_one_line(tiny: Path, tmp_path: Path) -> None:
    """With the way out."""
    sweep = tiny_sweep(tiny, tmp_path)
    for config in selecting_runs(sweep):
        pretend(config, None)
    with pytest.raises(UserError, match="did not stay finite with any of .* give a lower --lr"):
        chosen_lr(sweep)


def test_results(tiny: Path, tmp_path: Path) -> None:
    """Mean and sample standard deviation of the seeds, the choice, what differs; incomplete until all are done."""
    sweep = tiny_sweep(tiny, tmp_path, lr_grid=(0.01, 0.03))
    assert results(sweep) is None
    for config, top1 in zip(selecting_runs(sweep), (0.4, 0.5)):
        pretend(config, top1)
    assert results(sweep) is None
    first, second = final_runs(sweep, 0.03)
    pretend(second, 0.7, 53)
    found = results(sweep)
    assert found and (found["values"], found["seeds"], found["std"], found["complete"]) == ([0.7], [1], None, False)
    pretend(first, 0.5, 53)
    found = results(sweep)
    assert found and found["complete"] and found["values"] == [0.5, 0.7] and found["n"] == 53 and found["lr"] == 0.03
    assert found["mean"] == pytest.approx(0.6) and found["std"] == pytest.approx(0.1 * 2**0.5)
    assert found["selection"] == [{"lr": 0.01, "top1": 0.4, "n": 10}, {"lr": 0.03, "top1": 0.5, "n": 10}]
    assert "no task.json: the set was not prepared by tools/make_shards.py --task" in found["differs"]
    write_results(sweep.folder, found)
    assert json.loads((sweep.folder / "results.json").read_text()) == found
    assert "**60.00% ± 14.14** top1 on 53 test images (2 seeds)" in (sweep.folder / "results.md").read_text()


def test_a_score_of_other_settings_is_refused(tiny: Path, tmp_path: Path) -> None:
    """A finished run is used only for the very config that it ran with."""
    pretend(selecting_runs(tiny_sweep(tiny, tmp_path))[0], 0.5)
    longer = selecting_runs(tiny_sweep(tiny, tmp_path, steps=5))[0]
    with pytest.raises(UserError, match="other settings .*total_steps: was 4, is 5.* another --out") as caught:
        score(longer)
    one_line(caught.value)


def test_what_is_no_score_is_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DONE, results.json of ReaL labels and sweep.json: types and ranges, in one line with the way out."""
    sweep = tiny_sweep(tiny, tmp_path)
    config = selecting_runs(sweep)[0]
    monkeypatch.setattr("pretrain.finetune.scores.load_config", lambda _: config)
    pretend(config, 0.5)
    folder = config.output / config.name
    (folder / "evaluation").mkdir()
    ask = {folder / "DONE": (score, config, "remove"), sweep.folder / "sweep.json": (claim_sweep, sweep, "give")}
    ask[folder / "evaluation" / "results.json"] = (real_score, config, "move")
    for text in ["", "[" * 100_000, "[]", "5", "9" * 5000, *map(json.dumps, WRONG_SCORES)]:
        text = text.replace('{"rows"', '{"weights": "step-0000000004", "image_size": 24, "rows"')
        text = text.replace('{"val', '{"weights": "step-0000000004", "image_size": 24, "val')
        for path, (read, argument, said) in ask.items():
            path.write_text(text)
            with pytest.raises(UserError, match=said) as caught:
                read(argument)
            one_line(caught.value)


def test_real_is_of_the_final_checkpoint(tiny: Path, tmp_path: Path) -> None:
    """Not of another one of the run that was evaluated later, nor at another size, nor of the trained weights beside
    their average; also once it has been removed.
    """
    config = final_runs(tiny_sweep(tiny, tmp_path), 0.03)[0]
    folder = config.output / config.name
    checkpoint = folder / "checkpoints" / "step-0000000004"
    shutil.copytree(newest_valid(tiny / "tiny" / "checkpoints") or Path(), checkpoint)

    def record(name: str, digest: str, size: int, top1: float) -> dict[str, Any]:
        rows = [{"metric": "real/top1", "value": top1, "n": 10}]
        return {"weights": f"checkpoints/{name}", "weights_sha256": digest, "image_size": size, "rows": rows}

    digest, path = weights_sha256(checkpoint), folder / "evaluation" / "results.json"
    path.parent.mkdir()
    own, larger = record(checkpoint.name, digest, 24, 0.5), record(checkpoint.name, digest, 48, 0.6)
    before = record("step-0000000002", "0" * 64, 24, 0.7)
    trained = record(checkpoint.name, "1" * 64, 24, 0.8) | {"of_run": "trained"}  # not the average, which is the result
    path.write_text(json.dumps(before | {"others": [larger, trained, own]}))
    assert real_score(config) == RunScore(0.5, 10)
    shutil.rmtree(checkpoint)
    assert real_score(config) == RunScore(0.5, 10)
    path.write_text(json.dumps(before | {"others": [larger]}))
    assert real_score(config) is None


def test_a_sweep_belongs_to_its_weights_and_data(tiny: Path, tmp_path: Path) -> None:
    """Scores of other weights or other images under the same paths are never mixed in."""
    sweep = tiny_sweep(tiny, tmp_path)
    claim_sweep(sweep)
    claim_sweep(sweep)
    assert sweep.start.weights and sweep.start.sha256 == read_start(tiny / "tiny", from_scratch=False).sha256
    with pytest.raises(UserError, match="begun with another weights; give another --out"):
        claim_sweep(replace(sweep, start=replace(sweep.start, sha256="other")))
    with pytest.raises(UserError, match="begun with another data; give another --out"):
        claim_sweep(replace(sweep, test=sweep.train))


def vtab_lines(values: list[float]) -> list[dict[str, Any]]:
    common = {
        "complete": True,
        "lr": 0.01,
        "n": 100,
        "seeds": [0, 1],
        "from_scratch": False,
        "differs": [],
        "weights": "0",
    }
    return [{"task": name, "values": [value, value], **common} for name, value in zip(VTAB, values)]


def test_vtab_is_the_flat_mean() -> None:
    """The paper's Table 9 gives the VTAB scores of its Table 2 to 0.02 points, and section 13's means of the groups."""
    rows = [row for row in PAPER_ROWS if "vtab/dtd" in row.scores]
    expected = [(77.63, [86.7, 87.0, 65.0]), (76.28, [85.6, 86.7, 63.0]), (72.72, [83.3, 84.7, 57.5])]
    assert len(rows) == 3
    for row, (mean, groups) in zip(rows, expected):
        found = vtab_results(vtab_lines([row.scores[name] for name in VTAB]))
        assert (found["task"], found["complete"], found["std"]) == ("vtab", True, 0.0)
        assert found["mean"] == pytest.approx(mean, abs=0.02)
        assert list(found["groups"].values()) == pytest.approx(groups, abs=0.06)


def test_an_incomplete_vtab_says_so(tmp_path: Path) -> None:
    """Wherever the figure goes, its name tells; what is missing is listed; seeds that a task lacks are left out."""
    lines = vtab_lines([0.5, 0.7])
    lines[0] |= {"values": [0.5], "seeds": [1], "complete": False}
    found = vtab_results(lines)
    assert found["task"] == "vtab, incomplete: 2 of 19 tasks" and not found["complete"]
    assert (found["seeds"], found["mean"], len(found["missing"])) == ([1], pytest.approx(0.6), 17)
    write_vtab(tmp_path, found)
    assert "Missing: vtab/dtd, " in (tmp_path / "vtab" / "results.md").read_text()
    assert vtab_results(vtab_lines([0.5] * 18))["task"] == "vtab, incomplete: 18 of 19 tasks"


@pytest.mark.parametrize(
    ("weights", "folder"),
    [
        ("runs/a", "runs/a/finetune"),
        ("runs/a/checkpoints/step-0000000020", "runs/a/finetune"),
        ("google/ViT-B_16.npz", "google/ViT-B_16/finetune"),
    ],
)
def test_default_folders(weights: str, folder: str, tmp_path: Path) -> None:
    """Where the report of a run looks; never inside a checkpoint."""
    path = tmp_path / weights
    path.parent.mkdir(parents=True)
    path.touch() if path.suffix == ".npz" else path.mkdir()
    assert results_folder(path, "finetune") == tmp_path / folder


# --- the command -----------------------------------------------------------------------------------------------------


def arguments(folder: Path, out: Path, *more: object) -> list[str]:
    words = [folder / "tiny", "--task", "pets", "--data", folder / "data", "--out", out, "--seeds", 2, "--steps", 4]
    return [*map(str, [*words, "--image-size", 24, *more]), *TINY]


def call(monkeypatch: pytest.MonkeyPatch, words: list[str], train: Callable[..., int] | None = None) -> int:
    tool = load_tool("finetune")
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
    if train:
        monkeypatch.setattr(running, "train", train)
    return tool.main()


def trained(config: Config, sweep: Sweep, ranks: int) -> int:
    """Instead of seconds of training: higher rates score better, until they diverge."""
    if config.optim.lr > 0.02:
        folder = config.output / config.name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(config_to_yaml(config))
        return 77
    pretend(config, config.optim.lr + config.seed / 10, 53)
    (config.output / config.name / "checkpoints").mkdir()
    return 0


def test_a_whole_sweep(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A diverged rate is left out, nothing is done twice, selecting runs keep no checkpoints, --collect repeats it."""
    assert call(monkeypatch, arguments(tiny, tmp_path), trained) == 0
    found = json.loads((tmp_path / "pets" / "results.json").read_text())
    assert found["lr"] == 0.01 and found["values"] == [0.01, 0.11] and found["selection"][3]["top1"] is None
    assert [path.parent.name for path in sorted(tmp_path.glob("pets/*/checkpoints"))] == [
        "final-lr0.01-seed0",
        "final-lr0.01-seed1",
    ]
    told = capsys.readouterr().out
    assert "pets: not the paper's protocol: steps: 4 instead of 500" in told
    assert told.startswith(
        "pets: 6 trainings: 4 to choose the rate, 2 final\npets: training 1 of 6: learning rate 0.001"
    )
    assert "pets: training 6 of 6: final, learning rate 0.01, seed 1\n" in told

    def never(*_: Any) -> int:
        raise AssertionError("trains again")

    before = (tmp_path / "pets" / "results.json").read_bytes()
    for more in ((), ("--collect",), ("--run", 3), ("--run", 5)):
        assert call(monkeypatch, arguments(tiny, tmp_path, *more), never) == 0
    assert (tmp_path / "pets" / "results.json").read_bytes() == before


def test_an_array_gives_the_same_table(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """--list names 4 + 2 runs; --run does one; a final one before the choice is refused; the table is the same."""
    assert call(monkeypatch, arguments(tiny, tmp_path / "a", "--list")) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[0] == "0\tpets\tselect, learning rate 0.001" and len(told.out.splitlines()) == 6
    assert told.out.splitlines()[5] == "5\tpets\tfinal, seed 1" and "0-3, then 4-5" in told.err
    with pytest.raises(UserError, match="selecting runs are not done yet"):
        call(monkeypatch, arguments(tiny, tmp_path / "a", "--run", 4), trained)
    with pytest.raises(UserError, match="--run is 6, expected 0 to 5"):
        call(monkeypatch, arguments(tiny, tmp_path / "a", "--run", 6), trained)
    for index in (3, 0, 2, 1, 5, 4):
        assert call(monkeypatch, arguments(tiny, tmp_path / "a", "--run", index), trained) == 0
    assert call(monkeypatch, arguments(tiny, tmp_path / "a", "--collect")) == 0
    assert call(monkeypatch, arguments(tiny, tmp_path / "b"), trained) == 0
    assert (tmp_path / "a/pets/results.json").read_bytes() == (tmp_path / "b/pets/results.json").read_bytes()


def test_codes_of_runs_that_stopped_or_failed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """130 when a run was asked to stop, whatever that returned; 76 when it was killed; else the run's own code."""
    for code, expected in ((0, 130), (-10, 130), (-15, 130), (-9, 76), (-11, 76), (2, 2), (75, 75), (78, 78)):
        assert call(monkeypatch, arguments(tiny, tmp_path), lambda *_, code=code: code) == expected
    final = [*arguments(tiny, tmp_path, "--lr", "0.03")]
    assert call(monkeypatch, final, trained) == 77  # nothing else to choose


HOLDS = """import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
input()
"""


def test_a_sweep_stops_at_a_run_that_another_process_trains(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for that, nor go on with the next one; the way out is one of this command's options."""
    lock, begun = tmp_path / "pets" / "select-lr0.001" / "lock", []
    lock.parent.mkdir(parents=True)

    def refused(config: Config, *_: Any) -> int:
        begun.append(config.name)
        return run_job([sys.executable, "-c", "raise SystemExit(2)"], os.environ, lock)

    words = [sys.executable, "-c", HOLDS, str(lock)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        with pytest.raises(UserError, match="select-lr0.001: in use, .* --out gives another folder"):
            call(monkeypatch, arguments(tiny, tmp_path), refused)
        process.communicate(b"\n")
    assert begun == ["select-lr0.001"]


ASKS_TO_STOP = """import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.kill(os.getppid(), signal.SIGTERM)
assert signal.sigtimedwait([signal.SIGTERM], 20), "it was not passed on"
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_asked_to_stop(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A signal to the command alone reaches the run, except a terminal's SIGINT, which the run has got already; the
    command waits for the run, and starts no other one even when this one has just ended well.
    """
    wait = f"signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])\n"
    wait += "Path('ready').touch()\n"
    wait += "time.sleep(1)\n" if number == signal.SIGINT else f"assert signal.sigtimedwait([{int(number)}], 60)\n"
    script = tmp_path / "launch" / "pretrain.py"
    script.parent.mkdir()
    script.write_text(f"import signal, time\nfrom pathlib import Path\n{wait}Path('saved').touch()\n")
    monkeypatch.setattr(running, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    config = selecting_runs(tiny_sweep(tiny, tmp_path))[0]
    pretend(config, 0.5)

    def kill() -> None:
        while not Path("ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)  # a shell's background job ignores SIGINT
    killer = threading.Thread(target=kill)
    killer.start()
    assert running.train(config, tiny_sweep(tiny, tmp_path), 1) == 130
    killer.join()
    assert Path("saved").exists()
    assert signal.getsignal(number) == before


def test_scoring_is_asked_to_stop_too(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM to the command alone while a final run is scored: tools/evaluate.py gets it, and is no orphan."""
    script = tmp_path / "tools" / "evaluate.py"
    script.parent.mkdir()
    script.write_text(ASKS_TO_STOP)
    monkeypatch.setattr(running, "ROOT", tmp_path)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # so that a failure ends this test alone
    try:
        sweep = replace(tiny_sweep(tiny, tmp_path), task=task("imagenet"))
        config = final_runs(sweep, 0.03)[0]
        pretend(config, 0.5)
        options = Options(sweep.start, tiny / "data", tmp_path, num_seeds=1, num_gpus=1)
        assert running._run(config, sweep, options, selecting=False) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "stopped; the same command goes on\n"


def test_missing_sets(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """One task: refused with the command that prepares it. VTAB: each is named, others go on, the mean is marked, and
    the exit code is not 0.
    """
    with pytest.raises(UserError, match="no data: flowers: .*tools/make_shards.py --task flowers") as caught:
        call(monkeypatch, [*arguments(tiny, tmp_path), "--task", "flowers"])
    one_line(caught.value)
    vtab = tiny / "data" / "vtab/eurosat"
    for split in ("trainval", "test"):
        if not (vtab / split).exists():
            shutil.copytree(vtab / ("val" if split == "test" else "train"), vtab / split)
    assert call(monkeypatch, [*arguments(tiny, tmp_path), "--task", "vtab"], trained) == 2
    told = capsys.readouterr().err.splitlines()
    assert len([line for line in told if line.startswith("missing: vtab/")]) == 18
    found = json.loads((tmp_path / "vtab" / "results.json").read_text())
    assert found["task"] == "vtab, incomplete: 1 of 19 tasks" and found["tasks"].keys() == {"vtab/eurosat"}
    assert json.loads((tmp_path / "vtab-eurosat" / "results.json").read_text())["task"] == "vtab/eurosat"


def test_a_task_that_fails_does_not_stop_the_others(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its exit code is the command's; the other task is done, and the mean marked."""
    for name in ("svhn", "eurosat"):
        for split in ("trainval", "train", "val", "test"):
            shutil.copytree(tiny / "data/vtab/eurosat/train", tmp_path / "data/vtab" / name / split)

    def diverges_on_svhn(config: Config, sweep: Sweep, ranks: int) -> int:
        return 77 if sweep.task.name == "vtab/svhn" else trained(config, sweep, ranks)

    words = [*arguments(tiny, tmp_path), "--task", "vtab", "--data", str(tmp_path / "data")]
    assert call(monkeypatch, words, diverges_on_svhn) == 77
    assert json.loads((tmp_path / "vtab/results.json").read_text())["task"] == "vtab, incomplete: 1 of 19 tasks"
    assert "vtab/svhn: no final run is done" in capsys.readouterr().err


# --- real processes --------------------------------------------------------------------------------------------------

ENVIRONMENT = {**os.environ, **on_cpu(1)}


def start_tool(words: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools" / "finetune.py"), *words]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **options)


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of 2 rates and 2 seeds that nothing happened to: 4 runs."""
    out = tmp_path_factory.mktemp("undisturbed")
    process = start_tool(arguments(tiny, out, *SWEEP))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return out / "pets"


SWEEP_STEPS = 80  # long enough to be met by a signal
SWEEP = ("--lr", "0.003,0.01", "--steps", SWEEP_STEPS)


def check_same_sweep(out: Path, undisturbed: Path) -> None:
    """The tables are the same bytes, and so is each run's DONE: its loss has all bits of the weights in it, where an
    accuracy on 53 images forgives much."""
    names = ["results.json", "results.md", *(f"{path.parent.name}/DONE" for path in undisturbed.glob("*/DONE"))]
    assert len(names) == 6
    for name in names:
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.long)])
def test_a_killed_sweep_ends_with_the_same_table(kills: int, undisturbed: Path, tiny: Path, tmp_path: Path) -> None:
    """The process group killed with SIGKILL in some runs at random steps: the bytes are the same."""
    choose, out = random.Random(time.time_ns()), tmp_path / "pets"
    for runs_done in sorted(choose.sample(range(4), kills)):
        process = start_tool(arguments(tiny, tmp_path, *SWEEP))
        step = choose.randrange(SWEEP_STEPS)
        print(f"to be killed after {runs_done} runs, in step {step} of the next")
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and process.poll() is None:
            ended = len(list(out.glob("*/DONE")))
            logs = [path.read_text().count('"train/loss"') for path in out.glob("*/metrics.jsonl")]
            if ended > runs_done or (
                ended == runs_done and len(logs) > ended and sum(logs) >= SWEEP_STEPS * ended + step
            ):
                break
            time.sleep(0.002)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        assert not (out / "results.json").exists()
    last = start_tool(arguments(tiny, tmp_path, *SWEEP))
    output, _ = last.communicate(timeout=900)
    assert last.returncode == 0, output
    check_same_sweep(out, undisturbed)
    starts = [len(path.read_text().splitlines()) for path in out.glob("*/starts.jsonl")]
    assert len(starts) == 4 and sum(starts) <= 4 + kills


@pytest.mark.long
def test_imagenet_is_scored_by_real_labels_too(tiny: Path, tmp_path: Path) -> None:
    """Each final run by tools/evaluate.py, their mean in a line of its own, its n the images that have labels."""
    shutil.copytree(tiny / "data/pets/train", tmp_path / "data/imagenet/train")
    val = Path(shutil.copytree(tiny / "data/pets/test", tmp_path / "data/imagenet/val"))
    names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, 54)]
    write_examples(val, (Example(index, f"{name}.JPEG", 0, "") for index, name in enumerate(names)))
    words = [*arguments(tiny, tmp_path / "out"), "--task", "imagenet", "--data", str(tmp_path / "data"), "--lr", "0.03"]
    done = start_tool(words)
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0, output
    line = json.loads((tmp_path / "out/real/results.json").read_text())
    labelled = sum(map(bool, real_labels(names)))
    assert line["task"] == "real" and line["n"] == labelled < 53 and len(line["values"]) == 2
    assert f"{labelled} instead of 46,837 images with ReaL labels" in line["differs"]
    for seed, value in enumerate(line["values"]):
        scored = tmp_path / f"out/imagenet/final-lr0.03-seed{seed}/evaluation/results.json"
        rows = json.loads(scored.read_text())["rows"]
        assert [row["value"] for row in rows if row["metric"] == "real/top1"] == [value]
    assert "ViT-H/14" in output and "JFT-300M" in output and "88.55%" in output  # names are folded
    again = start_tool(words)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and "$" not in output, output  # nothing is trained or scored again


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGINT])
def test_a_signal_to_the_command_saves(tiny: Path, tmp_path: Path, number: int) -> None:
    """With two ranks, SIGTERM to the command alone, Ctrl-C to all of them: exit code 130 when all have saved and gone,
    no DONE, no traceback."""
    words = arguments(tiny, tmp_path, "--steps", 100_000, "--num-gpus", 2)
    run = tmp_path / "pets" / "select-lr0.001"
    with whole_session(start_tool([*words, "checkpoint.every_steps=100000"])) as process:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and not (run / "metrics.jsonl").exists():
            time.sleep(0.05)
        (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped; the same command goes on" in output, output
    assert "Traceback" not in output
    assert len(step_folders(run / "checkpoints")) == 1 and not (run / "DONE").exists()


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_training_ends_when_the_command_is_killed(tiny: Path, tmp_path: Path, num_ranks: int) -> None:
    """SIGKILL to the command alone: nobody trains on, and what was trained is saved."""
    words = arguments(tiny, tmp_path, "--steps", 100_000, "--num-gpus", num_ranks)
    run = tmp_path / "pets" / "select-lr0.001"
    with whole_session(start_tool([*words, "checkpoint.every_steps=100000"])) as process:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and not (run / "metrics.jsonl").exists():
            time.sleep(0.05)
        process.kill()
        output, _ = process.communicate(timeout=60)  # until its ranks have closed their output too
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and processes_of(process.pid):
            time.sleep(0.05)
        assert not processes_of(process.pid), output
    assert len(step_folders(run / "checkpoints")) == 1 and not is_held(run / "lock"), output


# --- as SLURM job arrays ---------------------------------------------------------------------------------------------

SCRIPT = ROOT / "launch" / "finetune.sbatch"


def queue_is_empty(run: Callable[..., str]) -> bool:
    return not run("squeue", "--noheader")


@pytest.mark.slow
def test_the_job_script_requeues_what_can_go_on(tmp_path: Path) -> None:
    """Stopped (130), killed by a signal (138), short of storage (75): again, up to the limit; errors are not."""
    codes = {0: [0], 1: [130, 0], 2: [138] * 3, 3: [75] * 3, 4: [2], 5: [1]}  # of an element's starts
    tool = tmp_path / "tools" / "finetune.py"
    tool.parent.mkdir()
    tool.write_text(
        "import pathlib, sys\n"
        "starts = pathlib.Path('starts' + sys.argv[-1])\n"
        "before = starts.read_text().splitlines() if starts.exists() else []\n"
        "starts.write_text(chr(10).join([*before, ' '.join(sys.argv)]))\n"
        f"sys.exit({codes}[int(sys.argv[-1])][len(before)])\n"
    )
    with cluster(tmp_path / "s") as run:
        run("sbatch", "--array=0-5", SCRIPT, "runs/a", "--task", "pets", cwd=tmp_path, MAX_RESTARTS="2")
        wait_for(partial(queue_is_empty, run), run)
        states = run("squeue", "--noheader", "--states=all", "--format=%K %T").splitlines()
    for number, expected in codes.items():
        started = (tmp_path / f"starts{number}").read_text().splitlines()
        assert started == [f"tools/finetune.py runs/a --task pets --run {number}"] * len(expected)
    ended = dict(line.split() for line in states)
    assert {int(number) for number, state in ended.items() if state == "COMPLETED"} == {0, 1}
    assert {state for state in ended.values()} == {"COMPLETED", "FAILED"}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_sweep_as_job_arrays(undisturbed: Path, tiny: Path, tmp_path: Path) -> None:
    """As the script's header says; one run is signalled as before its time limit, one killed: the same table."""
    sweep, out = arguments(tiny, tmp_path / "b", *SWEEP), tmp_path / "b" / "pets"
    with cluster(tmp_path / "s") as run:
        submit = partial(run, "sbatch", "--parsable", f"--output={tmp_path}/%A_%a.out", cwd=ROOT)
        first = submit("--array=0-1", SCRIPT, *sweep)
        final = submit("--array=2-3", f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes", SCRIPT, *sweep)
        collect = f"python tools/finetune.py {shlex.join(sweep)} --collect"
        submit(f"--dependency=afterany:{final}", "--gpus-per-node=0", "--wrap", collect)
        for name in ("select-lr0.003", "select-lr0.01"):
            wait_for((out / name / "metrics.jsonl").exists, run)
            if name == "select-lr0.003":
                run("scancel", "--signal=USR1", f"{first}_0")  # as --signal=USR1@120 does: to the step, not the script
            else:
                os.kill(process_of(out / "configs" / f"{name}.yaml"), signal.SIGKILL)
        wait_for(partial(queue_is_empty, run), run, seconds=300)
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.out")}
    assert [logs[f"{first}_{number}.out"].count("requeued (restart 1 of at most 20)") for number in (0, 1)] == [1, 1], (
        logs
    )
    check_same_sweep(out, undisturbed)


def process_of(config: Path) -> int:
    """Returns the process that trains a config."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(config).encode() in path.read_bytes().split(b"\0"):
                return int(path.parent.name)
    raise AssertionError(f"nobody trains {config}")
