"""The report: curves, last and best figures, restarts; of unfinished and torn runs too; mistakes are one line."""

import json
import math
import os
import re
import shutil
import struct
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config
from weights_on_disk import one_line_error, run_tool

from pretrain.config import config_to_yaml, model_from_dict, model_name
from pretrain.errors import UserError
from pretrain.escape import portable, portable_path
from pretrain.log import TIME_FORMAT
from pretrain.models.weights import weights_sha256
from pretrain.report.curves import (
    _BUCKETS,
    _log_levels,
    _reduced,
    axis_labels,
    differ_in_length,
    draw_panels,
    moving_mean,
)
from pretrain.report.fewshot import fewshot_chart
from pretrain.report.figures import config_differences, losses_table, protocol_scores, starts_table, summary, targets
from pretrain.report.page import caption, html, markdown, write_report
from pretrain.report.runs import read_runs
from pretrain.report.story import duration, headline, millions, sentence, training_seconds
from pretrain.report.target import recipe_score
from pretrain.tasks.table import VTAB


def make_run(output: Path, name: str = "tiny", *, points: int = 4) -> Path:
    """A run of `points` log lines with a validation after every second, best in the middle, restarted once."""
    folder = output / name
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for number in range(1, points + 1):
        train = {"loss": 2 / number, "top1": 0.1 * number / points, "lr": 1e-3, "images_per_s": 100.0 + number}
        train |= {"grad_norm": 1.5, "data_wait": 0.02, "skipped_steps": number // 3, "bad_samples": 2}
        rows.append({"step": 5 * number, **{f"train/{metric}": value for metric, value in train.items()}})
        if number % 2 == 0:
            top1 = 0.5 - abs(number - points / 2) / points
            rows.append({"step": 5 * number, "val/top1": top1, "val/loss": 3 - top1, "val/images": 101})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    starts = [{"step": 0, "world_size": 4, "commit": "a1", "command": ["x.py"], "versions": {"torch": "2.15.0"}}]
    starts += [{**starts[0], "step": 10, "world_size": 2, "commit": "b2"}]
    (folder / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    (folder / "config.yaml").write_text(config_to_yaml(tiny_config(Path("shards"), output, name=name)))
    return folder


def add_evaluation(run: Path) -> None:
    rows = [{"model": "trained", "metric": metric, "value": value, "n": 101} for metric, value in EVALUATION.items()]
    (run / "evaluation").mkdir()
    values = {"format": "pretrain-evaluation", "version": 1, "weights": "step-0000000020", "rows": rows}
    (run / "evaluation" / "results.json").write_text(json.dumps(values))


EVALUATION = {"loss": 1.25, "top1": 0.375, "10-shot": 0.5}


def test_last_and_best_figures_restarts_and_what_was_left_out(tmp_path: Path) -> None:
    """By hand: validation 0.5 at step 10 is the best and 0.0 at step 20 the last one."""
    values = summary(read_runs([make_run(tmp_path)])[0])
    assert values["best"]["val/top1"] == {"step": 10, "value": 0.5}
    assert values["best"]["val/loss"] == {"step": 10, "value": 2.5}
    assert values["best"]["train/loss"] == {"step": 20, "value": 0.5}
    assert (values["last"]["val/top1"], values["last"]["train/loss"]) == (0.0, 0.5)
    assert (values["steps"], values["total_steps"], values["global_batch"]) == (20, 20, 12)
    assert (values["skipped_steps"], values["bad_samples"], values["restarts"]) == (1, 2, 1)
    assert (values["commit"], values["ranks"]) == ("b2", [4, 2])
    assert values["median_images_per_s"] == 102.5 and values["versions"] == {"torch": "2.15.0"}
    assert not values["done"]


def simulated(folder: Path, *, interval: int, failures: int, step_s: float, down_s: float) -> None:
    """Logs of a run that logs every step, saves every `interval` and fails once in 20 of them, half an interval after a
    save; each new start takes `down_s`."""
    folder.mkdir()
    began = datetime(2026, 11, 26, tzinfo=UTC)
    step, clock, starts, rows = 0, 0.0, [{"step": 0, "lost_steps": 0, "time": began.strftime(TIME_FORMAT)}], []
    for number in range(failures + 1):
        clock += down_s if number else 0.0
        for _ in range(20 * interval):
            step, clock = step + 1, clock + step_s
            at = (began + timedelta(seconds=round(clock))).strftime(TIME_FORMAT)
            rows.append({"step": step, "time": at, "train/images_per_s": 12 / step_s, "train/loss": 1.0})
        if number < failures:
            clock += interval // 2 * step_s  # until it fails; these lines the next start drops
            starts.append({"step": step, "lost_steps": interval // 2, "time": "2026-11-26T01:00:00+0000"})
    for name, lines in (("metrics", rows), ("starts", starts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "config.yaml").write_text(config_to_yaml(tiny_config(Path("shards"), folder.parent, name=folder.name)))


def test_restarts_lost_steps_and_goodput(tmp_path: Path) -> None:
    """By hand: a failure every 20 checkpoint intervals of 100 steps of 3 s, back after 5 minutes: 50 steps are done
    again each time, and of 24,000 s of steps that count in 24,000 + 3 x (150 + 300) s of running 94.7 % remain."""
    simulated(tmp_path / "run", interval=100, failures=3, step_s=3.0, down_s=300.0)
    (run,) = read_runs([tmp_path / "run"])
    values = summary(run)
    assert (values["restarts"], values["lost_steps"]) == (3, 150)
    assert values["goodput"] == pytest.approx(24_000 / (24_000 + 3 * (150 + 300)), rel=1e-4) and values["goodput"] > 0.9
    told = markdown([values]).splitlines()
    assert "- restarts: 3, 150 steps done again" in told
    (goodput,) = (line for line in told if line.startswith("- goodput: "))
    assert goodput.startswith(
        "- goodput: 94.7% of the time went into steps that count, the rest into starts, steps done"
    )
    old = (tmp_path / "run" / "metrics.jsonl").read_text().replace('"time"', '"other"')
    (tmp_path / "run" / "metrics.jsonl").write_text(old)  # of an earlier version
    assert summary(read_runs([tmp_path / "run"])[0])["goodput"] is None


def test_the_tool_writes_its_files_of_overlaid_runs(tmp_path: Path) -> None:
    """A picture of a readable size, a page with a row per run and the evaluation, and the same numbers as JSON."""
    runs = [make_run(tmp_path, "first"), make_run(tmp_path, "second", points=300)]
    add_evaluation(runs[0])
    (runs[0] / "DONE").write_text('{"step": 20}')
    done = run_tool("report", *runs, "--out", tmp_path / "out")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.splitlines() == [
        *(str(tmp_path / "out" / name) for name in ("report.html", "curves.png", "report.md", "report.json")),
        f"next: open {tmp_path / 'out' / 'report.html'} in a browser",
    ]
    png = (tmp_path / "out" / "curves.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", png[16:24])) >= 800
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| first | 20 of 20 | 50.00% at step 10 | 0.00% | 0.5000 |" in page
    assert "| second | 1,500 of 20, not done |" in page
    assert "| trained | top1 | 37.50% | 101 |" in page and "| trained | loss | 1.2500 | 101 |" in page
    values = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [run["run"] for run in values["runs"]] == ["first", "second"]
    assert values["runs"][0]["evaluation"]["rows"][1] == {
        "model": "trained",
        "metric": "top1",
        "value": 0.375,
        "n": 101,
    }
    assert not list((tmp_path / "out").glob(".tmp*"))


def test_a_run_that_is_being_written_or_diverged_is_still_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A torn last line is told and left out; NaN is neither the best value nor in the JSON."""
    run = make_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 25, "train/loss": math.nan, "val/top1": math.nan, "val/loss": math.nan}) + "\n")
        file.write('{"step": 30, "train/lo')
    paths = write_report(read_runs([run]), tmp_path / "out")
    assert "1 damaged lines left out" in capsys.readouterr().err
    values = json.loads(paths[3].read_text(), parse_constant=lambda word: pytest.fail(f"{word} in report.json"))
    assert values["runs"][0]["best"]["val/top1"]["step"] == 10 and values["runs"][0]["last"]["train/loss"] is None
    assert values["runs"][0]["steps"] == 25


def test_a_run_with_a_single_line_is_drawn(tmp_path: Path) -> None:
    """No validation, no config, no gradient norm: what is missing is left empty."""
    run = tmp_path / "bare"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 5, "train/loss": 2.0}\n')
    paths = write_report(read_runs([run]), run / "report")
    assert all(path.stat().st_size for path in paths)
    assert "| bare | 5, not done |  |  | 2.0000 |  |  |  |  |" in paths[2].read_text()


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    """By their paths; a bar in a name does not break the table."""
    runs = read_runs([make_run(tmp_path / "a", "same"), make_run(tmp_path / "b", "same")])
    assert [run.name for run in runs] == [".../a/same", ".../b/same"]
    deep = [make_run(tmp_path / name / "x", "same") for name in "ab"]  # alike in their last two parts
    assert [run.name for run in read_runs(deep)] == list(map(str, deep))
    values = {**summary(runs[0]), "run": "x|y"}
    assert r"| x\|y | 20 of 20" in markdown([values])


def test_themoving_mean_is_the_mean_of_the_finite_neighbours() -> None:
    """By hand, with shorter windows at the ends and a gap; a constant stays what it is."""
    found = moving_mean(np.array([1.0, 2.0, math.nan, 4.0, 9.0]), 3)
    np.testing.assert_allclose(found, [1.5, 1.5, 3.0, 6.5, 6.5])
    np.testing.assert_allclose(moving_mean(np.full(50, 7.0), 9), 7.0)


def test_what_was_left_out_is_counted_by_cause(tmp_path: Path) -> None:
    """Bad samples by reason, the steps that were skipped, and a line per start, from the files of the run."""
    run = make_run(tmp_path)
    reasons = ["decode", "tar", "decode"]
    lines = [
        {"step": 3, "epoch": 0, "index": 7, "shard": "a.tar", "reason": reason, "detail": ""} for reason in reasons
    ]
    (run / "bad_samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "skipped_steps.jsonl").write_text('{"step": 13, "loss": "nan", "indices": [1]}\n')
    values = summary(read_runs([run])[0])
    assert values["bad_samples_by_cause"] == {"decode": 2, "tar": 1} and values["skipped_at"] == [13]
    table = losses_table([values])
    assert table.header == ["run", "samples seen", "bad samples", "decode", "tar", "skipped steps"]
    assert table.rows == [["tiny", "240", "2 (0.833%)", "2", "1", "1 (at 13)"]]
    assert [row[2:] for row in starts_table(values).rows] == [["0", "4", "a1"], ["10", "2", "b2"]]


def write_finetuning(run: Path, task: str, mean: float | str, **more: object) -> None:
    values: dict[str, object] = {
        "task": task,
        "metric": "top1",
        "mean": mean,
        "std": 0.004,
        "values": [0.5] * 3,
        "lr": 0.01,
        "n": 500,
    }
    folder = run / "finetune" / task
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({**values, **more}))


def test_scores_stand_beside_the_papers(tmp_path: Path) -> None:
    """Each column from its task; VTAB is the mean of 19 tasks by hand, and nothing while one of them is missing."""
    run = make_run(tmp_path)
    write_finetuning(run, "imagenet", 0.75)
    write_finetuning(run, "cifar100", math.nan)
    *first, last = VTAB
    for task in first:
        write_finetuning(run, task, 0.5)
    assert "vtab" not in protocol_scores(read_runs([run])[0])
    write_finetuning(run, last, 0.88)
    write_finetuning(run, "real", 0.8)
    scores = protocol_scores(read_runs([run])[0])
    assert scores["vtab"] == pytest.approx(0.52) and scores["imagenet"] == 0.75 and "cifar100" not in scores
    paths = write_report(read_runs([run]), tmp_path / "out")
    page = paths[2].read_text()
    assert "| tiny | 75.00% | 80.00% | – | – | – | – | 52.00% | this report |" in page
    published = "88.55% | 90.72% | 99.50% | 94.55% | 97.56% | 99.68% | 77.63% | arXiv 2010.11929 v2 (ICLR 2021)"
    assert f"| ViT-H/14, JFT-300M | {published}" in page
    assert "| ViT-B/16, ImageNet | 77.91% | 83.57% | 98.13% | 87.13% | 93.81% | 89.49% | – | arXiv" in page
    assert "| svhn | 88.00% |" not in page and f"| {last.removeprefix('vtab/')} | 88.00% | 51.20% | 51.10% |" in page
    assert "| mean of all | 52.00% | 77.63% | 76.29% | 72.71% |" in page
    assert "| imagenet | tiny | top1 | 75.00% ± 0.40 | – | 3 | 0.01 | 500 | the paper's |" in page
    assert "| cifar100 | tiny | top1 | – ± 0.40 |" in page and "No run has a score" not in page
    record = json.loads(paths[3].read_text(), parse_constant=lambda word: pytest.fail(f"{word} in report.json"))
    assert [row["scores"].get("imagenet") for row in record["paper"]][:4] == [0.8836, 0.8855, 0.8776, 0.853]


def test_two_sizes_of_a_task_are_told_apart(tmp_path: Path) -> None:
    """ImageNet at 384 and at 512 pixels are both the paper's: neither hides the other."""
    run = make_run(tmp_path)
    write_finetuning(run, "imagenet", 0.85, image_size=512)
    (run / "finetune").rename(run / "finetune-512")
    write_finetuning(run, "imagenet", 0.84, image_size=384)
    values = summary(read_runs([run])[0])
    assert values["scores"] == {"imagenet": 0.85} and len(values["scores_at"]["imagenet"]) == 2
    page = write_report(read_runs([run]), tmp_path / "out")[2].read_text()
    assert "| tiny | 84.00% at 384 px, 85.00% at 512 px | – |" in page
    for size, mean in ((384, 84), (512, 85)):
        assert f"| imagenet | tiny | top1 | {mean}.00% ± 0.40 | {size} | 3 | 0.01 | 500 | the paper's |" in page


def test_another_protocol_is_no_score_of_the_papers(tmp_path: Path) -> None:
    """Fewer steps, seeds that are not done, random weights: in the table of fine-tunings, with what differs, and not
    beside the paper. Results from random weights have a folder of their own beside the others.
    """
    run = make_run(tmp_path)
    write_finetuning(run, "cifar100", 0.9, differs=["steps: 3 instead of 10000"])
    write_finetuning(run, "vtab", 0.8, complete=False)
    write_finetuning(run, "imagenet", 0.7)
    scratch = run / "finetune-from-scratch" / "imagenet"
    shutil.copytree(run / "finetune" / "imagenet", scratch)
    line = json.loads((scratch / "results.json").read_text())
    (scratch / "results.json").write_text(json.dumps({**line, "mean": 0.3, "from_scratch": True}))
    for name in ("evaluation", "evaluation-384px"):  # no results of a fine-tuning
        evaluation = run / "finetune" / "imagenet" / "final-lr0.01-seed0" / name
        evaluation.mkdir(parents=True)
        (evaluation / "results.json").write_text("{}")
    assert protocol_scores(read_runs([run])[0]) == {"imagenet": 0.7}
    page = write_report(read_runs([run]), tmp_path / "out")[2].read_text()
    assert "| 500 | steps: 3 instead of 10000 |" in page and "| 500 | not all seeds are done |" in page
    assert "| imagenet | tiny | top1 | 30.00% ± 0.40 | – | 3 | 0.01 | 500 | random weights |" in page


def test_results_of_all_weights_in_a_folder_are_shown(tmp_path: Path) -> None:
    """Two checkpoints of a run, evaluated one after the other: a table each, the last call's first."""
    run = make_run(tmp_path)
    add_evaluation(run)
    path = run / "evaluation" / "results.json"
    earlier = {"weights": "step-0000000010", "rows": [{"model": "trained", "metric": "top1", "value": 0.125, "n": 77}]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "others": [earlier]}))
    paths = write_report(read_runs([run]), tmp_path / "out")
    page = paths[2].read_text()
    assert page.index("Evaluation of step-0000000020") < page.index("Evaluation of step-0000000010")
    assert "| trained | top1 | 12.50% | 77 |" in page and "| trained | top1 | 37.50% | 101 |" in page
    assert "step-0000000010" in paths[0].read_text() and "12.50%" in paths[0].read_text()


def test_the_folder_that_out_of_an_evaluation_named(tmp_path: Path) -> None:
    """It holds the results themselves, without evaluation/ above them."""
    run = tmp_path / "run"
    run.mkdir()
    add_evaluation(run)
    (found,) = read_runs([run / "evaluation"])
    assert found.evaluation and found.evaluation["weights"] == "step-0000000020"


def test_results_without_a_run(tmp_path: Path) -> None:
    """A folder of converted weights, and the one that --out of a fine-tuning named, have results but no curves."""
    weights, out = tmp_path / "vit_b16", tmp_path / "tuned"
    write_finetuning(weights, "cifar10", 0.91)
    shutil.copytree(weights / "finetune", out)
    (out / "mine").mkdir()
    (out / "mine" / "results.json").write_text("[1]")  # somebody else's
    line = json.loads((out / "cifar10" / "results.json").read_text())
    (out / "cifar10" / "results.json").write_text(json.dumps({**line, "format": "pretrain-finetuning"}))
    for folder in (weights, out):
        done = run_tool("report", folder)
        assert done.returncode == 0, done.stderr
        page = (folder / "report" / "report.md").read_text()
        assert f"| {folder.name} | – | – | 91.00% | – | – | – | – | this report |" in page
        assert "no training log here" in (folder / "report" / "report.html").read_text()


RECIPE = """# A recipe.
#
# command:   deepspeed launch/pretrain.py --config recipes/of_mine.yaml init_from=demo/weights [key=value ...]
# score:     top-1 after
#            fine-tuning
# deviations: none
#
#   model      | days | score | overrides
#   B/16       |  1.5 | 79.15 | (this file)
#   B/32       |  0.4 | 74.91 | name=small total_steps=40
name: large
# score: not in the header
"""


def test_the_recipes_promise_is_the_line_of_the_run(tmp_path: Path) -> None:
    """The header's paragraph, its table's line for this run's name; of the copy in the run's folder."""
    assert recipe_score(RECIPE, "small") == "B/32: 74.91. top-1 after fine-tuning"
    assert recipe_score(RECIPE, "large") == "B/16: 79.15. top-1 after fine-tuning"
    assert recipe_score(RECIPE, "other") == "top-1 after fine-tuning"
    assert recipe_score("name: x\n", "x") is None


def with_recipe(run: Path, header: str = RECIPE) -> None:
    """Gives a run the recipe that its config came from: the header above its own settings, named "large"."""
    config = (run / "config.yaml").read_text().replace(f"name: {run.name}\n", "name: large\n", 1)
    (run / "recipe.yaml").write_text(header.partition("name: large")[0] + config)
    (run / "starts.jsonl").write_text(json.dumps({"step": 0, "recipe": "recipes/of_mine.yaml"}) + "\n")


@pytest.mark.parametrize(
    ("name", "changed", "score"),
    [
        ("large", {}, "B/16: 79.15. top-1 after fine-tuning"),
        ("small", {"total_steps: 20": "total_steps: 40"}, "B/32: 74.91. top-1 after fine-tuning"),
        ("other", {}, None),  # its command starts from weights
        ("small", {}, None),  # its line has twice the steps
        ("large", {"total_steps: 20": "total_steps: 10"}, None),
        ("large", {"global_batch: 12": "global_batch: 24"}, None),
        ("large", {"train: shards": "train: own/photos"}, None),
        ("large", {"depth: 2": "depth: 3"}, None),
        ("large", {"lr: 0.002": "lr: 0.001"}, None),
        ("large", {"loss: softmax": "loss: sigmoid"}, None),
        ("large", {"flip: 0.5": "flip: 0.0"}, None),
        ("large", {"init_from: null": "init_from: demo/weights"}, None),
        ("large", {"workers: 0": "workers: 3", "seed: 0": "seed: 1"}, "B/16: 79.15. top-1 after fine-tuning"),
        ("other", {"init_from: null": "init_from: /there/demo/weights"}, "top-1 after fine-tuning"),  # its command's
    ],
)
def test_a_promise_holds_for_the_recipes_runs_alone(
    tmp_path: Path, name: str, changed: dict[str, str], score: str | None
) -> None:
    """The settings are the recipe's, or those of the run's line in its table, or of the header's command."""
    run = make_run(tmp_path, name)
    with_recipe(run)
    text = (run / "config.yaml").read_text()
    for before, after in changed.items():
        assert before in text
        text = text.replace(before, after, 1)
    (run / "config.yaml").write_text(text)
    found = targets([summary(one) for one in read_runs([run, run])])
    assert [(of["score"], len(of["runs"])) for of in found] == ([] if score is None else [(score, 2)])


def test_a_run_in_a_sentence(tmp_path: Path) -> None:
    """Model by its real shape, data, epochs, time by the log's own rates, machine; then the last validation."""
    run = make_run(tmp_path)  # 4 lines of 5 steps of 12 images, at 101 to 104 images/s
    start = {"step": 0, "world_size": 2, "parameters": 824_111, "train_set": "trees", "train_images": 96}
    start |= {"num_classes": 7, "device": "Some CPU", "device_type": "cpu"}
    (run / "starts.jsonl").write_text(json.dumps(start) + "\n")
    one = read_runs([run])[0]
    assert training_seconds(one) == pytest.approx(sum(60 / rate for rate in (101, 102, 103, 104)))
    assert sentence(one, summary(one)) == (
        "A ViT of width 32, depth 2, 2 heads, patches of 8 px at 16 px (0.82M parameters), trained from random "
        "weights on trees (96 images of 7 classes): 20 steps of 12 images (2.5 epochs) in 2 s on 2 CPU ranks "
        "(Some CPU)."
    )
    assert headline(summary(one)) == (
        "0.00%",
        "of the validation images right (top-1), at the last validation; 50.00% at step 10",
    )
    (run / "starts.jsonl").write_text("")
    bare = read_runs([run])[0]
    assert sentence(bare, summary(bare)).endswith("random weights: 20 steps of 12 images in 2 s.")


def test_a_branch_is_told_by_its_own_steps(tmp_path: Path) -> None:
    """Steps, epochs and time from where it left the other run, which perhaps did not begin with random weights."""
    run = make_run(tmp_path)  # steps 5, 10, 15, 20
    start = {"step": 10, "train_set": "trees", "train_images": 96}
    (run / "starts.jsonl").write_text(json.dumps(start) + "\n")
    text = (run / "config.yaml").read_text().replace("branch_from: null", "branch_from: runs/long")
    (run / "config.yaml").write_text(text)
    (found,) = read_runs([run])
    told = sentence(found, summary(found))
    assert told.endswith(
        "branched from runs/long at step 10 on trees (96 images): 10 steps of 12 images (1.2 epochs) in 1 s."
    )


def test_models_go_by_their_real_shape(tmp_path: Path) -> None:
    """A named size is called so only where nothing of its shape was changed."""
    names = {
        "B/16": "ViT-B/16 at 224 px",
        "R50+B/16": "ViT-R50+B/16 at 224 px",
        "timm:resnet50": "timm's resnet50 at 224 px",
    }
    for name, told in names.items():
        values = {"name": name} if name.startswith("timm") else {"name": name}
        assert model_name(model_from_dict(values, "test")) == told
    assert [duration(s) for s in (80, 100, 4 * 3600, 40 * 3600, 20 * 86_400)] == [
        "80 s",
        "1.7 minutes",
        "4.0 hours",
        "1.7 days",
        "20 days",
    ]
    assert [millions(n) for n in (824_111, 5_700_000, 86_567_656, 1_100_000_000)] == ["0.82M", "5.7M", "87M", "1.1B"]


def test_equal_rates_are_seen_behind_each_other(tmp_path: Path) -> None:
    """Of runs with one rate the first is drawn wider; a rate of its own is as thin as every curve."""
    runs = [make_run(tmp_path, name) for name in ("first", "second", "other")]
    (runs[2] / "metrics.jsonl").write_text((runs[2] / "metrics.jsonl").read_text().replace("0.001", "0.002"))
    (panel,) = (panel for panel in draw_panels(read_runs(runs)) if panel.title == "Learning rate")
    first, second, other = (line.width for line in panel.lines)
    assert first > second == other


def test_what_all_runs_share_is_told_once(tmp_path: Path) -> None:
    """Commit and versions of two runs once, the folder of each; of one run nothing is shared."""
    values = [summary(run) for run in read_runs([make_run(tmp_path, name) for name in ("first", "second")])]
    page = html(read_runs([tmp_path / "first", tmp_path / "second"]), values)
    assert page.count("torch 2.15.0") == 1 and page.count("<dt>folder</dt>") == 2 and "<h3>All runs</h3>" in page
    assert "<h3>All runs</h3>" not in html(read_runs([tmp_path / "first"]), values[:1])


def test_weights_to_start_from_are_no_fine_tuning_to_show(tmp_path: Path) -> None:
    """A run from other weights has no empty table, and no word that nothing was fine-tuned."""
    run = make_run(tmp_path)
    config = (run / "config.yaml").read_text()
    assert "init_from: null" in config
    (run / "config.yaml").write_text(config.replace("init_from: null", "init_from: weights"))
    (found,) = read_runs([run])
    page = html([found], [summary(found)])
    assert found.config and found.config.init_from
    assert "Fine-tuning" not in page and "Nothing was fine-tuned" not in page


def test_few_shot_is_a_chart() -> None:
    """Each kind of features is a line; higher is better, bars reach one deviation, columns keep their order."""
    values = {("trained", 1): 0.5, ("trained", 25): 1.0, ("random weights", 1): 0.25, ("random weights", 25): 0.5}
    rows = [{"model": m, "metric": f"{n}-shot", "value": v, "n": 101} for (m, n), v in values.items()]
    rows += [{"model": "trained", "metric": "1-shot-std", "value": 0.1, "n": 101}]
    chart = fewshot_chart(rows)
    assert chart is not None and chart.num_images == 101 and [label for _, label in chart.x_ticks] == ["1", "25"]
    trained, random = chart.series
    assert (trained.name, trained.ends, random.ends) == (
        "trained",
        "50.0% with 1, 100.0% with 25 per class",
        "25.0% with 1, 50.0% with 25 per class",
    )
    levels = {label: y for y, label in chart.y_ticks}
    assert [mark.y for mark in trained.marks] == [levels["50"], levels["100"]]
    assert [mark.y for mark in random.marks] == [levels["25"], levels["50"]]
    tenth = (levels["0"] - levels["100"]) / 10
    bar = trained.marks[0]
    assert bar.low - bar.y == pytest.approx(tenth, abs=0.2) and bar.y - bar.high == pytest.approx(tenth, abs=0.2)
    assert trained.marks[1].low == trained.marks[1].high and bar.text == "trained, 1-shot: 50.00% ± 10.00"
    assert fewshot_chart(rows[:2]) is None and fewshot_chart([]) is None  # nothing beside it
    many = [{"model": m, "metric": f"{n}-shot", "value": 0.5, "n": 9} for n in range(1, 10) for m in ("a", "b")]
    chart = fewshot_chart(
        [*many, {"model": "of 9 alone, which no longer fits", "metric": "9-shot", "value": 0.5, "n": 9}]
    )
    assert chart is not None and [one.name for one in chart.series] == ["a", "b"] and len(chart.x_ticks) == 8


def test_runs_of_different_length_are_both_seen(tmp_path: Path) -> None:
    """A run of a tenth of the other's steps takes more than a tenth of the width: steps are logarithmic then."""
    runs = read_runs([make_run(tmp_path, "long", points=400), make_run(tmp_path, "short", points=40)])
    assert differ_in_length(runs) and not differ_in_length(runs[:1]) and not differ_in_length([])
    loss = draw_panels(runs)[0]
    ends = [max(_points(line.path)[0]) for line in loss.lines if line.kind == "mean"]
    assert ends[0] > ends[1] > 0.6 * ends[0]
    assert [label for _, label in loss.x_ticks] == ["10", "100", "1k"]
    assert len(draw_panels(runs[:1])[0].x_ticks) > 3


def test_a_page_tells_nobodys_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the working folder paths are relative, elsewhere their end; what is to be copied stays usable."""
    monkeypatch.chdir(tmp_path)
    here = (
        f"x.py --config=/home/me/secret/configs/a.yaml data.train={tmp_path}/data/x [/a/b/c/d, '/a/b/c/e'] a/b /c /c/d"
    )
    assert portable(here) == "x.py --config=.../configs/a.yaml data.train=data/x [.../c/d, '.../c/e'] a/b /c .../c/d"
    assert portable(f"/mnt{tmp_path}/runs/x", whole=True) == f"/mnt{tmp_path}/runs/x"  # elsewhere
    assert portable(f"{tmp_path}/runs/x", whole=True) == "runs/x" and portable("/a/b/c", whole=True) == "/a/b/c"
    run = make_run(tmp_path)
    with_recipe(run)
    start = {"step": 0, "command": ["/opt/someone/project/x.py", f"output={tmp_path}/runs"]}
    (run / "starts.jsonl").write_text(json.dumps(start) + "\n")
    add_evaluation(run)
    results = run / "evaluation" / "results.json"
    weights, data = "/home/some one/my runs/x/step-5", {"val": {"path": f"{tmp_path}/data/x y", "sha256": "0"}}
    results.write_text(json.dumps({**json.loads(results.read_text()), "weights": weights, "data": data}))
    paths = write_report(read_runs([run]), tmp_path / "out")
    page, text, values = (paths[number].read_text() for number in (0, 2, 3))
    for written in (page, text, values):
        assert str(tmp_path) not in written and "someone" not in written and "some one" not in written
    assert ".../project/x.py output=runs" in page and '".../x/step-5"' in values and '"data/x y"' in values
    assert [portable_path(path) for path in (tmp_path / "a b", "c/d", "/", "/a")] == ["a b", "c/d", "...", ".../a"]


def test_differences_from_the_defaults(tmp_path: Path) -> None:
    """What has no default is listed, what equals its default is not."""
    found = dict(config_differences(tiny_config(Path("shards"), tmp_path, data__crop_area=[0.5, 1.0])))
    assert found["optim.lr"] == "0.002" and found["data.crop_area"] == "[0.5, 1.0]" and found["log.samples"] == "true"
    assert found["total_steps"] == "20" and "engine.zero_stage" not in found and "optim.eps" not in found


def test_a_config_of_another_version_does_not_hide_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown key is told; the figures are there, and the file's own text."""
    run = make_run(tmp_path)
    (run / "config.yaml").write_text("no_such_key: 5\n")
    found = read_runs([run])[0]
    assert "no_such_key: no such key" in capsys.readouterr().err
    assert found.config is None and found.config_text == "no_such_key: 5\n"
    assert "no_such_key: 5" in write_report([found], tmp_path / "out")[0].read_text()


def test_a_long_curve_keeps_its_spikes() -> None:
    """Of 100,000 points some hundreds are drawn, among them the highest and the lowest, in the order of steps."""
    values = np.sin(np.arange(100_000))
    values[[777, 50_123]] = (40.0, -40.0)
    values[60_000:61_000] = math.nan
    points = _reduced(np.arange(100_000), values)
    assert len(points) <= 2 * _BUCKETS and [step for step, _ in points] == sorted(step for step, _ in points)
    assert (777, 40.0) in points and (50_123, -40.0) in points
    assert any(math.isnan(value) for _, value in points)
    few = _reduced(np.arange(3), np.array([1.0, 2.0, 3.0]))
    assert few == [(0, 1.0), (1, 2.0), (2, 3.0)]


def _points(path: str) -> np.ndarray:
    """Across and down of an SVG path's corners, [2, corners]."""
    return np.array([list(map(float, point.split())) for point in re.split("[ML]", path)[1:]]).T


def test_panels_lie_where_the_values_say(tmp_path: Path) -> None:
    """The speed of four points: equal steps apart, higher values higher, ticks at round numbers, gaps stay."""
    run = make_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 25, "train/images_per_s": math.inf, "train/grad_norm": 15.0, "val/10-shot": 0.25})
            + "\n"
        )
        file.write(
            json.dumps({"step": 30, "train/images_per_s": 50.0, "train/grad_norm": 150.0, "val/5-shot": 0.25}) + "\n"
        )
        file.write(json.dumps({"step": 35, "train/grad_norm": 0.0}) + "\n")
    panels = {panel.title: panel for panel in draw_panels(read_runs([run, run]))}
    assert list(panels)[-2:] == ["5-shot", "10-shot"]
    speed = panels["Speed"]
    path = speed.lines[0].path
    assert path.count("M") == 2 and path.count("L") == 3
    across, down = _points(path)
    np.testing.assert_allclose(np.diff(across), [*[across[1] - across[0]] * 3, 2 * (across[1] - across[0])], atol=0.2)
    assert all(np.diff(down[:4]) < 0) and down[4] > down[0]
    ticks = {label: y for y, label in speed.y_ticks}
    assert list(ticks)[0] == "0" and ticks["0"] > down[4] and abs(ticks["50"] - down[4]) < 0.1
    _, norms = _points(panels["Gradient norm before clipping"].lines[0].path)
    np.testing.assert_allclose(np.diff(norms[3:]), [norms[4] - norms[3]] * 2, atol=0.2)  # 1.5, 15, 150; 0 has no place
    assert len(norms) == 6 and norms[4] < norms[3] - 10
    assert [dot.run for dot in panels["10-shot"].dots] == [0, 1]
    assert panels["10-shot"].dots[1].text == f"{run}, 10-shot at step 25: 25"


def test_logarithmic_axes_have_round_levels() -> None:
    """1, 2 and 5 of each decade; linear numbers within a third of one."""
    assert [round(10**level, 6) for level in _log_levels(math.log10(0.9), math.log10(30))] == [1, 2, 5, 10, 20]
    assert [round(10**level, 6) for level in _log_levels(math.log10(2.1), math.log10(2.9))] == [2.2, 2.4, 2.6, 2.8]
    assert 2 <= len(_log_levels(-6, 6)) <= 8


def test_names_are_not_read_as_formulas(tmp_path: Path) -> None:
    """Dollars, underscores and braces in the name of a run or a metric are drawn, not parsed."""
    run = make_run(tmp_path).rename(tmp_path / "_a$b_{$^$")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "val/$_{$-shot": 0.5}) + "\n")
    assert write_report(read_runs([run]), tmp_path / "out")[1].stat().st_size > 10_000


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    """No clock and no chance in any file."""
    run = make_run(tmp_path)
    first, second = (write_report(read_runs([run]), tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_results_of_final_runs_are_not_the_runs_own(tmp_path: Path) -> None:
    """A final run that was fine-tuned and evaluated itself; an evaluation below finetune that is of another tool."""
    run = make_run(tmp_path)
    write_finetuning(run, "imagenet", 0.75)
    final = make_run(run / "finetune" / "imagenet", "final")
    write_finetuning(final, "pets", 0.9)
    for folder in (run / "finetune" / "x", run / "finetune-late" / "evaluation-384px"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text('{"format": "pretrain-evaluation"}')
    own = make_run(run / "finetune-photos", "final")
    (own / "evaluation").mkdir()
    (own / "evaluation" / "results.json").write_text("{}")
    (found,) = read_runs([run])
    assert [of["task"] for of in found.finetuning] == ["imagenet"]
    (found,) = read_runs([final])
    assert [of["task"] for of in found.finetuning] == ["pets"]


def with_results_of(folder: Path, digest: str, weights: str) -> None:
    """Few-shot and CIFAR-10 of the weights of a digest."""
    rows = [{"model": kind, "metric": "5-shot", "value": 0.5, "n": 9} for kind in ("trained", "raw pixels")]
    (folder / "evaluation").mkdir(exist_ok=True)
    record = {"format": "pretrain-evaluation", "weights": weights, "weights_sha256": digest, "rows": rows}
    (folder / "evaluation" / "results.json").write_text(json.dumps(record))
    write_finetuning(folder, "cifar10", 0.91, weights=digest)


def of_others(folder: Path, digest: str) -> bool:
    """Whether a report tells the results as other weights'; with their digest, which it tells in any case."""
    (run,) = read_runs([folder])
    values = summary(run)
    page, text = html([run], [values]), markdown([values])
    told = [f"{digest[:12]}; those here now are others" in each for each in (page, text)]
    told += [not values["scores"], "Few-shot accuracy" not in page]
    told.append(f"| other weights than those here now | {digest[:12]} |" in text)
    assert len(set(told)) == 1 and page.count(digest[:12]) >= 2 and f", weights {digest[:12]}" in text
    return told[0]


def test_results_of_earlier_weights_are_not_the_folders_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """convert --overwrite keeps them, and a run goes on: they are shown as what they are, and not beside the paper."""
    folder = tmp_path / "converted"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    digest = weights_sha256(folder)
    with_results_of(folder, digest, "runs/x/converted")
    assert not of_others(folder, digest)
    (folder / "model.safetensors").write_text("trained longer")
    assert of_others(folder, digest)
    run = make_run(tmp_path)
    first, later = (run / "checkpoints" / f"step-{step:010d}" for step in (100, 300))
    for checkpoint in (first, later):  # both are kept: the best one, say
        checkpoint.mkdir(parents=True)
        (checkpoint / "MANIFEST.json").write_text(checkpoint.name)
        digest = weights_sha256(first)
        if checkpoint == first:
            with_results_of(run, digest, str(first))
        assert not of_others(run, digest)
    shutil.rmtree(first)
    assert of_others(run, digest)
    shutil.rmtree(run / "finetune")
    (run / "converted").mkdir()  # as by launch/chain.sh
    for name in ("config.json", "model.safetensors"):
        (run / "converted" / name).write_text("{}")
    digest = weights_sha256(run / "converted")
    with_results_of(run, digest, str(run / "converted"))
    assert not of_others(run, digest)
    assert not capsys.readouterr().err


def test_weights_that_cannot_be_compared_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their results are shown all the same: links out of the folder, to read which would show others' files."""
    folder = tmp_path / "converted"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (tmp_path / "secret").touch()
    (folder / "model.safetensors").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "other.safetensors")  # a pipe would wait
    with_results_of(folder, "0" * 64, "converted")
    assert not of_others(folder, "0" * 64)
    (line,) = capsys.readouterr().err.splitlines()
    assert "its weights cannot be compared with those of its results" in line and "outside of its folder" in line


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    """No run, an empty one, foreign results: exit code 2, or a UserError that names the file."""
    assert "no: not found; expected the folder of a run" in one_line_error(run_tool("report", tmp_path / "no"))
    run = make_run(tmp_path)
    (run / "evaluation").mkdir()
    (run / "evaluation" / "results.json").write_text('{"rows": []}')
    with pytest.raises(UserError, match="results.json: was not written by tools/evaluate.py"):
        read_runs([run])
    (run / "evaluation" / "results.json").unlink()
    write_finetuning(run, "flowers", "high")
    with pytest.raises(UserError, match="flowers/results.json: was not written by tools/finetune.py"):
        read_runs([run])
    (run / "evaluation" / "wrong.json").write_text("[]")
    (run / "finetune" / "flowers" / "results.json").unlink()
    with pytest.raises(UserError, match="wrong.json: cannot be used as wrong predictions"):
        read_runs([run])
    with pytest.raises(UserError, match=f"{run.parent}: holds runs; give one of them or several, as {run}"):
        read_runs([run.parent])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="nothing to report: no metrics.jsonl"):
        read_runs([run])


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 0.0025, 0.005], ["0", "0.0025", "0.005"]),
        ([0, 2.5e-4, 0.001], ["0", "2.5e-4", "1e-3"]),  # a rate's axis: never 7.5e-4 below 0.001
        ([0.5, 1, 20_000], ["0.5", "1", "20,000"]),
    ],
)
def test_labels_of_an_axis_are_of_one_form(values: list[float], labels: list[str]) -> None:
    """Short ones, that fit beside the diagram."""
    assert axis_labels(values) == labels


def test_pictures_are_told_in_words() -> None:
    """By the names that tools/visualize.py gives, those of older weights too; others keep theirs."""
    assert "where it looks" in caption("rollout") and caption("rollout-0a1b").endswith("; weights 0a1b")
    assert caption("my_own-picture") == "my own-picture"
