"""Reports of runs of strangers: no text of other files, no line or value that ends it, bounded sizes."""

import io
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_hostile_images import chunk, flat_png, many_scans, photo
from test_report import RECIPE, add_evaluation, make_run, with_recipe, write_finetuning

from pretrain.config import MAX_STEP
from pretrain.data.headers import MAX_SCANS
from pretrain.errors import UserError
from pretrain.report import curves, files
from pretrain.report import runs as runs_module
from pretrain.report.figures import summary
from pretrain.report.page import html, markdown
from pretrain.report.runs import MAX_METRICS, read_runs

SECRET = "TOPSECRET"


def pages(run: Path) -> str:
    """Both pages, without the picture of the curves, which takes seconds."""
    runs = read_runs([run])
    values = [summary(one) for one in runs]
    return html(runs, values) + markdown(values) + json.dumps(values)


LINKED = ["config.yaml", "recipe.yaml", "starts.jsonl", "metrics.jsonl", "bad_samples.jsonl", "skipped_steps.jsonl"]
LINKED += [
    "batch.json",
    "batch.png",
    "pictures/x.png",
    "evaluation/results.json",
    "evaluation/wrong.json",
    "finetune/x/results.json",
]


@pytest.mark.parametrize("kind", ["file", "folder above"])
def test_links_that_lead_out_are_not_followed(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file that the report reads, as a link to another's file or below a linked folder: told, no word shown."""
    other = make_run(tmp_path / "private", "other")
    add_evaluation(other)
    write_finetuning(other, "x", 0.5, metric=SECRET)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    (other / "pictures").mkdir()
    for name in ("batch.png", "pictures/x.png"):
        (other / name).write_bytes(picture.getvalue())
    (other / "batch.json").write_text(json.dumps({"side": 4, "images": [{"x": 0, "y": 0, "caption": SECRET}]}))
    row = {"step": 5, "reason": SECRET, "commit": SECRET, "recipe": SECRET, f"val/{SECRET}-shot": 0.5}
    for name in ("metrics", "starts", "bad_samples", "skipped_steps"):
        (other / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    item = {"name": SECRET, "label": SECRET, "predicted": SECRET}
    (other / "evaluation" / "wrong.json").write_text(json.dumps({"items": [item]}))
    (other / "evaluation" / "results.json").write_text(
        (other / "evaluation" / "results.json").read_text().replace("trained", SECRET)
    )
    for name in ("config.yaml", "recipe.yaml"):
        (other / name).write_text(f"# score: {SECRET}\n")
    run = tmp_path / "run"
    run.mkdir()
    write_finetuning(run, "own", 0.5)  # something to report
    if kind == "file":
        for name in LINKED:
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).symlink_to(other / name)
        told = [name for name in LINKED if name != "recipe.yaml"]  # of no start that could be read
    else:
        (run / "recipe.yaml").symlink_to(other / "recipe.yaml")
        (run / "starts.jsonl").write_text('{"step": 0, "recipe": "x.yaml"}\n')
        for name in ("evaluation", "pictures", "finetune-from-scratch"):
            (run / name).symlink_to(other / name.removesuffix("-from-scratch"))
        told = ["evaluation/results.json", "evaluation/wrong.json", "pictures/x.png", "recipe.yaml"]
    text = pages(run)
    assert SECRET not in text and "data:image" not in text
    lines = capsys.readouterr().err
    assert SECRET not in lines
    for name in told:
        assert f"{run / name}: leads out of {run}" in lines, name


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    """And a run may itself be reached by a link."""
    run = make_run(tmp_path)
    (run / "logs").mkdir()
    (run / "metrics.jsonl").rename(run / "logs" / "metrics.jsonl")
    (run / "metrics.jsonl").symlink_to("logs/metrics.jsonl")
    (tmp_path / "link").symlink_to(run)
    assert read_runs([tmp_path / "link"])[0].curves


def test_a_recipe_named_by_others_is_not_read(tmp_path: Path) -> None:
    """Only the copy in the run's folder is: not the file that a start names, by path, command or link."""
    private = tmp_path / "private.yaml"
    run = make_run(tmp_path, "large")
    with_recipe(run, RECIPE.replace("top-1 after", SECRET))
    (run / "recipe.yaml").rename(private)
    start = {"step": 0, "recipe": str(private), "command": ["x.py", "--config", str(private), f"--config={private}"]}
    (run / "starts.jsonl").write_text(json.dumps(start) + "\n")
    assert SECRET not in pages(run)
    (run / "recipe.yaml").write_bytes(private.read_bytes())
    assert SECRET in pages(run)


PNG = flat_png(8, 8, 2)
PICTURES = {
    "profile": (PNG[:-12] + chunk(b"iCCP", b"a\0") + PNG[-12:], "not a picture that can be shown"),
    "chunks": (PNG[:33] + chunk(b"abCd", b"") * 60_000 + PNG[33:], "more than 50000 chunks"),
    "scans": (many_scans(photo(64, 64, progressive=True), 100), f"more than {MAX_SCANS} scans"),
    "memory": (photo(8, 8, progressive=True).replace(b"\0\x08\0\x08\x03", b"\x1a\0\x1a\0\x03", 1), "MB to decode"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_damaged_and_costly_pictures_are_left_out(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As those of a data set are: whatever Pillow raises, and before it takes seconds or gigabytes."""
    content, said = PICTURES[case]
    assert files.picture("x", content, "run/x.png") is None
    line = capsys.readouterr().err
    assert "run/x.png: not a picture that can be shown" in line and said in line and line.count("\n") == 1


BAD_LINES: list[Any] = [
    {"step": math.inf, "train/loss": 1},
    {"step": math.nan, "train/loss": 1},
    {"step": 1e30, "train/loss": 1},
    {"step": 10**40, "train/loss": 1},
    {"step": -1, "train/loss": 1},
    {"step": True, "train/loss": 1},
    {"step": "5", "train/loss": 1},
    {"step": 5, "train/loss": 10**400},
    {"step": 5, "val/top1": -1e200},
    {"train/loss": 1},
    [1, 2],
    7,
]


def test_lines_of_metrics_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Are left out and counted; the figures are those of the others."""
    run = make_run(tmp_path)
    expected = summary(read_runs([run])[0])
    raw = ['{"step": 5, "x": ' + "[" * 100_000, '{"step": 1e400}', '{"step": ' + "9" * 5000 + "}", "\x00", "nul"]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(line + "\n" for line in [*map(json.dumps, BAD_LINES), *raw])
    assert summary(read_runs([run])[0]) == expected
    assert f"metrics.jsonl: {len(BAD_LINES) + len(raw)} damaged lines left out" in capsys.readouterr().err
    assert "tiny" in pages(run)


@pytest.mark.parametrize(
    "change",
    [
        {"command": 5},
        {"command": {"a": 1}},
        {"command": [1]},
        {"versions": ["torch"]},
        {"versions": "2.15"},
        {"versions": {"torch": 2}},
        {"world_size": 1e400},
        {"world_size": [2]},
        {"commit": {"a": 1}},
        {"time": 17},
        {"recipe": ["a"]},
    ],
    ids=str,
)
def test_starts_of_other_types_are_left_out(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The start before is then the last one."""
    run = make_run(tmp_path)
    with (run / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"step": 15, "commit": "c3", **change}) + "\n")
    assert [start["commit"] for start in read_runs([run])[0].starts] == ["a1", "b2"]
    assert "starts.jsonl: 1 damaged lines left out" in capsys.readouterr().err


def row(**change: Any) -> dict[str, Any]:
    one = {"model": "m", "metric": "top1", "value": 0.5, "n": 3, **change}
    return {"format": "pretrain-evaluation", "weights": "w", "rows": [one]}


def tuned(**change: Any) -> dict[str, Any]:
    return {"task": "x", "metric": "top1", "mean": 0.5, **change}


WRONG = {"name": "a", "label": "b", "predicted": "c"}
FILES: list[tuple[str, Any]] = [
    ("evaluation/results.json", row(n=math.inf)),
    ("evaluation/results.json", row(n=3.0)),
    ("evaluation/results.json", row(value=10**400)),
    ("evaluation/results.json", row(value="0.5")),
    ("evaluation/results.json", row(metric=["top1"])),
    ("evaluation/results.json", [1]),
    ("evaluation/results.json", "[" * 100_000),
    ("finetune/x/results.json", tuned(mean=10**400)),
    ("finetune/x/results.json", tuned(mean=True)),
    ("finetune/x/results.json", tuned(n=1e400)),
    ("finetune/x/results.json", tuned(image_size=0)),
    ("finetune/x/results.json", tuned(values=5)),
    ("finetune/x/results.json", tuned(values=[0.5, "x"])),
    ("finetune/x/results.json", tuned(differs="text")),
    ("finetune/x/results.json", "[" * 100_000),
    ("evaluation/wrong.json", {"items": 5}),
    ("evaluation/wrong.json", {"items": [5]}),
    ("evaluation/wrong.json", {"items": [{**WRONG, "probability": 1e400}]}),
    ("evaluation/wrong.json", {"items": [{**WRONG, "path": 5}]}),
    ("evaluation/wrong.json", {"items": [WRONG], "confusion": 5, "classes": ["a"]}),
    ("evaluation/wrong.json", {"items": [WRONG], "confusion": [[0, 1, 1]], "classes": ["a"]}),
    ("evaluation/wrong.json", {"items": [WRONG], "confusion": [[0, 0, 1]], "classes": 5}),
    ("evaluation/wrong.json", "[" * 100_000),
]


@pytest.mark.parametrize(("name", "content"), FILES, ids=lambda value: str(value)[:50])
def test_results_of_other_types_are_refused(name: str, content: Any, tmp_path: Path) -> None:
    """In one line with the file's name."""
    run = make_run(tmp_path)
    (run / name).parent.mkdir(parents=True)
    (run / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=name) as caught:
        read_runs([run])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def not_a_number_anywhere(run: Path) -> None:
    add_evaluation(run)
    (run / "evaluation" / "results.json").write_text(json.dumps(row(value=math.nan)))
    write_finetuning(run, "x", math.inf, std=math.nan, lr=math.inf, values=[math.nan])
    metrics = ("train/loss", "val/top1", "val/loss", "train/images_per_s", "train/skipped_steps", "train/bad_samples")
    values = [math.inf, -math.inf, math.nan, math.inf]
    lines = [{"step": 30 + n, **dict.fromkeys(metrics, value)} for n, value in enumerate(values)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def folders_for_files(run: Path) -> None:
    for name in LINKED:
        if not (run / name).exists():
            (run / name).mkdir(parents=True)


def links_in_a_circle(run: Path) -> None:
    (run / "recipe.yaml").symlink_to("recipe.yaml")
    (run / "batch.png").symlink_to("batch.png")


def far_apart(run: Path) -> None:
    lines = [{"step": MAX_STEP, "train/loss": 1e100, "val/top1": 1e-300}, {"step": 0, "train/loss": -1e100}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def strange_names(run: Path) -> None:
    line = {"step": 5, **{f"val/{name}-shot": 0.5 for name in ("\ud800", "\x1b]0;x\x07", "a\nb", "\u202e", "x" * 9000)}}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (run / "bad_samples.jsonl").write_text(
        "".join(json.dumps({"step": 1, "reason": f"reason {n}"}) + "\n" for n in range(500))
    )


@pytest.mark.parametrize(
    "make", [not_a_number_anywhere, folders_for_files, links_in_a_circle, far_apart, strange_names]
)
def test_odd_folders_are_reported(make: Callable[[Path], None], tmp_path: Path) -> None:
    """With what can be used."""
    run = make_run(tmp_path)
    make(run)
    text = pages(run)
    assert "tiny" in text and "\x1b" not in text and "\u202e" not in text and text.count("reason ") < 200


def test_sizes_are_compared_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A large config, line, log, picture, and more metrics or pictures than a page can hold: told and left out."""
    run = make_run(tmp_path)
    (run / "config.yaml").write_text("#" * 200_000)
    (run / "pictures").mkdir()
    for number in range(3):
        Image.new("L", (50, 50)).save(run / "pictures" / f"{number}.png")
    Image.new("L", (300, 300)).save(run / "batch.png")
    (run / "skipped_steps.jsonl").write_bytes(b"x" * (3 << 20) + b'\n{"step": 1}\n')
    line = {"step": 1, **{f"val/{number}-shot": 0.5 for number in range(MAX_METRICS + 10)}}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (run / "bad_samples.jsonl").write_text('{"step": 1, "reason": "tar"}\n' * 2000)
    monkeypatch.setattr(files, "MAX_LOG_BYTES", 30_000 + (4 << 20))
    monkeypatch.setattr(files, "MAX_PIXELS", 3000)
    monkeypatch.setattr(runs_module, "MAX_PICTURES", 3)
    found = read_runs([run])[0]
    assert found.config is found.config_text is None and len(found.curves) == MAX_METRICS
    assert found.skipped_at == [1] and [picture.name for picture in found.pictures] == ["0", "1"]
    assert len(curves.panels_of([found])) <= curves.MAX_PANELS + len(curves.PANELS)
    told = capsys.readouterr().err
    for text in ("more than 100,000 bytes", "200 metrics", "3 pictures", "3,000 pixels", "accuracies over steps"):
        assert text in told, text
    monkeypatch.setattr(files, "MAX_LOG_BYTES", 10_000)
    assert read_runs([run])[0].bad_samples["tar"] < 500
    assert "what comes after its first 10,000 bytes is left out" in capsys.readouterr().err


def test_the_picture_of_curves_takes_any_names_and_values(tmp_path: Path) -> None:
    """What fonts have no sign for, and figures that are far apart."""
    run = make_run(tmp_path)
    far_apart(run)
    with (run / "metrics.jsonl").open("a") as file:
        names = ["\ud800", "\x1b]0;x\x07", "a\nb", "x" * 9000]
        file.write(json.dumps({"step": 5, **{f"val/{name}-shot": 0.5 for name in names}}) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curves.draw_curves(read_runs([run]), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
