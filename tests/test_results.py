"""Results of several sets of weights in one folder: each one's stay, whatever the names and the order."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.evaluation.evaluators import Row
from pretrain.evaluation.results import pages, set_aside, with_earlier, write_pages
from pretrain.report.runs import _read_evaluation


def record(digest: str, weights: str) -> dict[str, Any]:
    """What a call on weights keeps."""
    transform = {"name": "vit", "crop": 1.0, "interpolation": "bilinear"}
    about = {"format": "pretrain-evaluation", "version": 1, "weights": weights, "weights_sha256": digest * 64}
    data = {"val": {"path": "val", "sha256": "0", "num_samples": 9, "num_classes": 7}}
    about |= {"model": "Ti", "image_size": 16, "num_classes": 7, "loss": "softmax", "transform": transform}
    return {**about, "data": data, **dict.fromkeys(("fewshot", "knn", "probe")), "failed": {}, "versions": {}}


def call(out: Path, digest: str, weights: str, metric: str, value: float) -> None:
    """What tools/evaluate.py does with what it found: here one row, and a picture that tells whose it is."""
    rows, merged = with_earlier([Row("trained", metric, value, 9)], record(digest, weights), out / "results.json")
    set_aside(out, digest * 64)
    write_pages(out, {**pages(rows, merged, []), **({"wrong.json": digest} if metric == "top1" else {})})


CALLS = [("a", "X", "top1", 0.1), ("b", "X.npz", "top1", 0.2), ("a", "X", "top5", 0.3), ("c", "X", "top1", 0.4)]


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))][::5])
def test_results_of_several_weights_stay(
    order: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """X, X.npz and what was trained anew into X, in any order: every row is there, those of the last weights first."""
    calls = [CALLS[number] for number in order]
    for done, (digest, weights, metric, value) in enumerate(calls, 1):
        call(tmp_path, digest, weights, metric, value)
        top = json.loads((tmp_path / "results.json").read_text())
        values = [row["value"] for each in (top, *top.get("others", ())) for row in each["rows"]]
        assert sorted(values) == sorted(v for *_, v in calls[:done]) and top["weights_sha256"] == digest * 64
    page = (tmp_path / "results.md").read_text()
    assert page.count("# X") == 3 and all(f"{value:.2%}" in page for *_, value in CALLS)
    assert all(page.count(f"px, weights {digest * 12}.") == 1 for digest in "abc")
    assert not capsys.readouterr().err
    pictures = {path.read_text().strip() for path in tmp_path.glob("wrong*.json")}
    assert pictures == {"a", "b", "c"} and (tmp_path / "wrong.json").read_text().strip() == digest
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "results.json").rename(tmp_path / "evaluation" / "results.json")
    read = _read_evaluation(tmp_path)
    assert read and read["weights"] == calls[-1][1]


def test_results_of_before_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of before there were others, of these weights or of others: its rows stay."""
    old = {**record("a", "X"), "rows": [Row("trained", "top1", 0.5, 9)._asdict()]}
    for digest, expected in (("a", 2), ("b", 1)):
        (tmp_path / "results.json").write_text(json.dumps(old))
        call(tmp_path, digest, "X2", "top5", 0.9)
        top = json.loads((tmp_path / "results.json").read_text())
        assert len(top["rows"]) == expected and top.get("others", []) == ([] if digest == "a" else [old])
    del old["weights_sha256"]
    (tmp_path / "results.json").write_text(json.dumps(old))
    call(tmp_path, "b", "X2", "top5", 0.9)
    assert json.loads((tmp_path / "results.json").read_text())["others"] == [old]
    assert not capsys.readouterr().err
