"""The report: curves, last and best figures, restarts; of unfinished and torn runs too; mistakes are one line."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config
from weights_on_disk import one_line_error, run_tool

from pretrain.config import config_to_yaml
from pretrain.errors import UserError
from pretrain.report import _moving_mean, markdown, read_runs, summary, write_report


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


def test_the_tool_writes_three_files_of_overlaid_runs(tmp_path: Path) -> None:
    """A picture of a readable size, a page with a row per run and the evaluation, and the same numbers as JSON."""
    runs = [make_run(tmp_path, "first"), make_run(tmp_path, "second", points=300)]
    add_evaluation(runs[0])
    (runs[0] / "DONE").write_text('{"step": 20}')
    done = run_tool("report", *runs, "--out", tmp_path / "out")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.splitlines() == [
        str(tmp_path / "out" / name) for name in ("curves.png", "report.md", "report.json")
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
    values = json.loads(paths[2].read_text(), parse_constant=lambda word: pytest.fail(f"{word} in report.json"))
    assert values["runs"][0]["best"]["val/top1"]["step"] == 10 and values["runs"][0]["last"]["train/loss"] is None
    assert values["runs"][0]["steps"] == 25


def test_a_run_with_a_single_line_is_drawn(tmp_path: Path) -> None:
    """No validation, no config, no gradient norm: what is missing is left empty."""
    run = tmp_path / "bare"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 5, "train/loss": 2.0}\n')
    paths = write_report(read_runs([run]), run / "report")
    assert all(path.stat().st_size for path in paths)
    assert "| bare | 5, not done |  |  | 2.0000 |  |  |  |  |" in paths[1].read_text()


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    """By their paths; a bar in a name does not break the table."""
    runs = read_runs([make_run(tmp_path / "a", "same"), make_run(tmp_path / "b", "same")])
    assert [run.name for run in runs] == [str(tmp_path / "a" / "same"), str(tmp_path / "b" / "same")]
    values = {**summary(runs[0]), "run": "x|y"}
    assert r"| x\|y | 20 of 20" in markdown([values])


def test_the_moving_mean_is_the_mean_of_the_finite_neighbours() -> None:
    """By hand, with shorter windows at the ends and a gap; a constant stays what it is."""
    found = _moving_mean(np.array([1.0, 2.0, math.nan, 4.0, 9.0]), 3)
    np.testing.assert_allclose(found, [1.5, 1.5, 3.0, 6.5, 6.5])
    np.testing.assert_allclose(_moving_mean(np.full(50, 7.0), 9), 7.0)


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    """No run, an empty one, foreign results: exit code 2, or a UserError that names the file."""
    assert "metrics.jsonl: not found; give the folder of a run" in one_line_error(run_tool("report", tmp_path / "no"))
    run = make_run(tmp_path)
    (run / "evaluation").mkdir()
    (run / "evaluation" / "results.json").write_text('{"rows": []}')
    with pytest.raises(UserError, match="results.json: was not written by tools/evaluate.py"):
        read_runs([run])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="metrics.jsonl: is empty"):
        read_runs([run])
