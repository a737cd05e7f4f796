"""The flat twin: a page of torch and timm, without this package, has the losses of the real run."""

import ast
import json
import runpy
import sys
from pathlib import Path

import pytest
from ranks import run_ranks

from pretrain.config import load_config
from pretrain.shards.demo_sets import make_digits
from pretrain.train.run import train

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TWIN = EXAMPLES / "plain_loop.py"


def test_the_twin_is_a_page_without_this_package() -> None:
    """At most 120 lines; nothing of the package is imported, whose mistakes it would share."""
    text = TWIN.read_text()
    nodes = list(ast.walk(ast.parse(text)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
    assert len(text.splitlines()) <= 120
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {
        "timm",
        "torch",
        "torchvision",
        "yaml",
    }


@pytest.mark.slow
def test_the_twin_prints_the_losses_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """examples/plain_loop.yaml through the system on one rank, then the twin on the run's folder: 50 losses to 1e-6."""
    make_digits(tmp_path)
    here = [f"output={tmp_path}", f"data.train={tmp_path / 'digits-train'}", "data.workers=0"]
    config = load_config(EXAMPLES / "plain_loop.yaml", here)
    run_ranks(train, 1, config)
    rows = (config.output / config.name / "metrics.jsonl").read_text().splitlines()
    ours = [json.loads(row)["train/loss"] for row in rows]
    capsys.readouterr()
    runpy.run_path(str(TWIN))["main"](config.output / config.name)
    theirs = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    worst = max(abs(a - b) for a, b in zip(ours, theirs))
    print(f"{len(theirs)} losses, {ours[0]:.6f} to {ours[-1]:.6f}, largest difference {worst:.1e}")
    assert len(ours) == len(theirs) == 50 and worst <= 1e-6
    assert min(ours) < ours[0] - 0.1, "nothing was learnt"
