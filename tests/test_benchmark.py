"""The yardstick: the real training step, timed, with figures that follow from each other; and the table of models."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import make_shards
from weights_on_disk import load_tool

from pretrain.benchmark.cells import RANDOM_IMAGES, cell_config, cell_rows
from pretrain.benchmark.device import attention_ms, gpu_state, measured_peak
from pretrain.benchmark.measure import build_engine, config_of_run, plan_cell, summary_ms
from pretrain.benchmark.model import activation_bytes
from pretrain.benchmark.model import counted as counted_columns
from pretrain.benchmark.peer_table import GPU_MODELS, cells_of, fitting_batch
from pretrain.benchmark.peers import LoopFailed, Schedule, compared
from pretrain.benchmark.table import TABLE
from pretrain.config import VIT_SHAPES, ModelConfig
from pretrain.data.loader import single_labels
from pretrain.errors import UserError
from pretrain.losses import per_image_loss
from pretrain.models.build import build_model
from pretrain.models.profile import train_flops
from pretrain.provenance import processor

ROOT = Path(__file__).resolve().parents[1]
tool = load_tool("benchmark")


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_what_a_short_stay_on_a_gpu_yields_first() -> None:
    """Our own loop of every model, compiled; then each beside its peers, the largest last, compiled, then eager."""
    alone = [(model, "on", ["ours"], None) for model in GPU_MODELS]
    peers = ["L/16", "B/16", "S/16", "H/14", "g/14"]
    beside = [(model, mode, ["ours", "timm", "plain"], None) for mode in ("on", "off") for model in peers]
    assert cells_of(None, None, None, on_gpu=True) == alone + beside
    read = [(model, "on", ["ours"], "set") for model in ("L/16", "S/16")]
    assert cells_of(None, None, None, on_gpu=True, data="set") == alone + read + beside
    assert cells_of(["Ti/16"], None, ["timm"], on_gpu=False) == [("Ti/16", "off", ["ours", "timm"], None)]


def test_batches_fit_into_a_gpu() -> None:
    """The largest power of two by the plan, unless one is asked for."""
    options = {"batch": None, "image_size": 224, "precision": "bf16", "zero_stage": 1, "checkpoint_activations": False}
    batches = {model: fitting_batch(model, 1, options, 80 << 30) for model in GPU_MODELS}
    for batch, needed in batches.values():
        assert 8 <= batch <= 512 and needed <= 0.85 * (80 << 30)
    assert batches["S/16"][0] == 512 and batches["g/14"][0] < batches["L/16"][0] < batches["S/16"][0]
    assert fitting_batch("g/14", 1, options | {"batch": 128}, 80 << 30)[0] == 128  # as asked for
    assert fitting_batch("timm:resnet50", 1, options, 80 << 30) == (128, 80 << 30)


@pytest.mark.parametrize("words", [[], ["--in-one"]], ids=["processes", "in-one"])
def test_a_cell_beside_a_peer(words: list[str], tmp_path: Path) -> None:
    """Rate, FLOP/s, step time and ratio agree; a CPU has no peak and so no MFU; nothing is measured twice."""
    out = tmp_path / "folder" / "cells.jsonl"
    cell = ["train", "--model", "Ti/16", "--image-size", "32", "--batch", "4", "--steps", "4", "--compile", "off"]
    cell += ["--peer", "--rounds", "2", "--processes", "1", "--loops", "timm", "--out", str(out), *words]
    result = benchmark(*cell)
    assert result.returncode == 0, result.stderr
    values, theirs = map(json.loads, out.read_text().splitlines())
    assert values["images_per_s"] == pytest.approx(4000 / values["ms_per_step"]["median"], rel=1e-3)
    flops = train_flops(ModelConfig(name="Ti", image_size=32), 1000)
    assert values["tflop_per_s"] == pytest.approx(values["images_per_s"] * flops / 1e12, abs=1e-4)
    assert values["mfu"] is None and values["compile"] is False and values["zero_stage"] == 1
    assert values["ms_per_step"]["p10"] <= values["ms_per_step"]["median"] <= values["ms_per_step"]["p90"]
    assert values["first_loss"] == pytest.approx(np.log(1000), rel=1e-3)
    assert theirs["first_loss"] == pytest.approx(np.log(1000), rel=0.2)
    assert [row["loop"] for row in (values, theirs)] == ["ours", "timm"] and theirs["interleaved"]
    assert ("shared by all loops" in out.with_suffix(".md").read_text()) == bool(words) == theirs["in_one"]
    for row in (values, theirs):
        parts = sum(row["parts_ms"].values())
        assert 0.3 * row["ms_per_step"]["median"] < parts < 1.5 * row["ms_per_step"]["p90"], row
        assert all(row["parts_ms"][name] > 0 for name in ("forward", "backward", "optimizer"))
    ratios = sorted(b / a for a, b in zip(values["rounds_ms"], theirs["rounds_ms"]))
    assert theirs["ratio"] == pytest.approx({"median": sum(ratios) / 2, "low": ratios[0], "high": ratios[1]}, abs=1e-3)
    assert "| Ti/16 | timm | off | 1 |" in out.with_suffix(".md").read_text() and out.with_suffix(".png").exists()
    assert values["attention_ms"]["math"] > 0 and theirs["attention_ms"] is None
    assert values["memory_reserved_gb"] is None and values["rounds_gpu"] == [None, None]
    written = out.read_text()
    again = benchmark(*cell)
    assert "measured before" in again.stdout and out.read_text() == written


# --- loops in turn ---------------------------------------------------------------------------------------------------


FAKE_LOOP = """
import fcntl, json, pathlib, sys
cell = json.loads(sys.argv[-1])
name, number, mode, log = cell["loop"], 0, cell["options"]["mode"], cell["options"]["log"]
device, shared = open(log + "-device", "w"), False
try:
    fcntl.flock(device, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    shared = True
if name == "broken":
    sys.exit("ValueError: no")
if name == "large" and shared or name == "huge":
    sys.exit("torch.OutOfMemoryError: CUDA out of memory.")
if mode == "exclusive" and shared:
    sys.exit("error: CUDA cannot use the GPUs here (CUDA error: CUDA-capable device(s) is/are busy or unavailable)")
with open(log + "-starts", "a") as file:
    file.write(name + " ")
print("chatter", flush=True)
print(0, flush=True)
for line in sys.stdin:
    number += 1
    with open(log, "a") as file:
        file.write(name + " ")
    print(number, flush=True)
ms = cell["options"]["ms"][name]
if mode == "luck":
    ms *= pathlib.Path(log + "-starts").read_text().split().count(name)
row = {"model": "M", "loop": name, "first_loss": ms, "rounds_ms": [ms] * number, "rounds_gpu": [None] * number}
print(json.dumps(row))
"""


def in_turns(
    loops: list[str], log: Path, monkeypatch: pytest.MonkeyPatch, *, mode: str = "", processes: int = 1
) -> list[dict[str, Any]]:
    """Loops that do nothing but write down when they started, and when their rounds were."""
    made = lambda what, cell: [sys.executable, "-c", FAKE_LOOP, json.dumps(cell)]  # noqa: E731
    monkeypatch.setattr("pretrain.benchmark.peers.command_of", made)
    options = {"log": str(log), "ms": {"ours": 10.0, "timm": 12.0, "large": 5.0}, "mode": mode}
    cell = {"model": "M", "compiled": False, "options": options}
    return compared(loops, cell, Schedule(num_ranks=1, threads=1, rounds=3, processes=processes))


def timeouts_of_groups(model: str) -> set[float]:
    """Of all groups of a rank that is about to be timed, in seconds."""
    options = {"batch": 1, "warmup": 1, "steps": 2, "precision": "fp32", "image_size": 16, "data": None}
    options |= {"checkpoint_activations": False, "zero_stage": 1}
    plan = plan_cell(options)
    build_engine(config_of_run(model, options, plan), plan.device)
    backends = [group._get_backend(plan.device) for group in torch.distributed.distributed_c10d._world.pg_map]
    return {backend.options._timeout.total_seconds() for backend in backends}


def test_ranks_wait_for_other_loops_however_long_they_compile() -> None:
    """A rank waits for rank 0 while its peers start; engine.timeout_s of a run, ten minutes, would end that."""
    assert run_ranks(timeouts_of_groups, 1, "Ti/16") == [{86_400.0}]


def test_rounds_are_taken_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each second round backwards; whoever takes 1.2 times as long has the ratio 1.2."""
    ours, timm = in_turns(["ours", "timm"], tmp_path / "log", monkeypatch)
    assert (tmp_path / "log").read_text() == "ours timm timm ours ours timm "
    assert (ours["ratio"]["median"], timm["ratio"]) == (1.0, {"median": 1.2, "low": 1.2, "high": 1.2})
    assert timm["interleaved"]


def test_loops_that_do_not_fit_together_run_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And their rows say so: for want of memory, or on a GPU that takes one process at a time."""
    rows = in_turns(["ours", "large"], tmp_path / "log", monkeypatch)
    assert [row["interleaved"] for row in rows] == [False, False] and rows[1]["ratio"]["median"] == 0.5
    assert (tmp_path / "log").read_text() == "ours " * 3 + "large " * 3
    rows = in_turns(["ours", "timm"], tmp_path / "exclusive", monkeypatch, mode="exclusive")
    assert [row["interleaved"] for row in rows] == [False, False] and rows[1]["ratio"]["median"] == 1.2


def test_our_row_outlives_a_peer_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails alone too, or for another reason: its row says why, and the others are compared without it."""
    ours, huge, timm = in_turns(["ours", "huge", "timm"], tmp_path / "log", monkeypatch)
    assert huge == {
        "model": "M",
        "loop": "huge",
        "compile": False,
        "ranks": 1,
        "failed": "torch.OutOfMemoryError: CUDA out of memory.",
    }
    assert ours["ratio"]["median"] == 1.0 and timm["ratio"]["median"] == 1.2
    assert (tmp_path / "log").read_text() == "ours " * 3 + "timm " * 3  # none of them twice
    ours, broken, timm = in_turns(["ours", "broken", "timm"], tmp_path / "other", monkeypatch)
    assert broken["failed"] == "ValueError: no" and (ours["interleaved"], timm["interleaved"]) == (True, True)
    with pytest.raises(LoopFailed, match="broken: ValueError: no"):
        in_turns(["broken", "ours"], tmp_path / "none", monkeypatch)


def test_rounds_are_spread_over_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All loops are started anew, each second time backwards; a row is one process's, with the rounds of all.

    Here our second process is half as fast as the first one, as luck would have it; so is timm's.
    """
    log = tmp_path / "log"
    ours, timm = in_turns(["ours", "timm"], log, monkeypatch, mode="luck", processes=2)
    assert log.read_text() == "ours timm timm ours timm ours "
    assert (tmp_path / "log-starts").read_text() == "ours timm timm ours "
    assert ours["rounds_ms"] == [10.0, 10.0, 20.0] and timm["rounds_ms"] == [12.0, 12.0, 24.0]
    assert ours["first_loss"] == 10.0 and ours["processes"] == 2 and ours["rounds_gpu"] == [None] * 3
    assert timm["ratio"] == {"median": 1.2, "low": 1.2, "high": 1.2}
    rows = in_turns(["ours", "large"], tmp_path / "alone", monkeypatch, processes=3)
    assert (tmp_path / "alone").read_text() == "ours large large ours ours large " and not rows[0]["interleaved"]


def test_a_failed_peer_is_shown_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its row has the reason, and the command fails; want of memory will not be less the next time, the rest may."""
    numbers: dict[str, Any] = dict.fromkeys(
        ("images_per_s", "tflop_per_s", "measured_peak_tflop_per_s", "memory_gb"), 1.0
    )
    numbers["parts_ms"] = dict.fromkeys(("forward", "backward", "optimizer", "collectives", "data"), 1.0)
    about = {"mfu": None, "image_size": 32, "batch_per_rank": 4, "precision": "bf16", "data": RANDOM_IMAGES, "steps": 1}
    about |= {"device": "cpu", "versions": {"torch": "2", "timm": "1"}, "commit": None, "interleaved": True}
    about |= {"rounds_ms": [1.0], "ratio": {"median": 1.0, "low": 1.0, "high": 1.0}}
    key, out = {"model": "Ti/16", "compile": False, "ranks": 1}, tmp_path / "cells.jsonl"
    reasons, calls = {"timm": "RuntimeError: a bad day", "plain": "CUDA out of memory."}, []

    def fails(loops: list[str], cell: dict[str, Any], *_: Any, **__: Any) -> list[dict[str, Any]]:
        calls.append(loops)
        return [key | {"loop": "ours"} | numbers | about, key | {"loop": loops[1], "failed": reasons[loops[1]]}]

    monkeypatch.setattr("pretrain.benchmark.peer_table._device", lambda: ("cpu", 0))
    monkeypatch.setattr("pretrain.benchmark.peer_table.compared", fails)
    for loop, times in (("timm", 2), ("plain", 1)):
        calls.clear()
        for _ in range(2):
            command = ["train", "--peer", "--model", "Ti/16", "--loops", loop, "--out", str(out)]
            monkeypatch.setattr(sys, "argv", ["benchmark.py", *command])
            with pytest.raises(UserError, match="1 loops failed"):
                tool.main()
        assert len(calls) == times and reasons[loop] in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 4
    page = out.with_suffix(".md").read_text()
    assert "| Ti/16 | timm | off | 1 |  |" in page and "- Ti/16, timm, compile off: RuntimeError: a bad day" in page


def test_the_device_is_asked_in_a_process_that_ends() -> None:
    """The parent never imports torch: a context of its own would keep a GPU in EXCLUSIVE_PROCESS from the loops."""
    code = (
        "import sys; sys.modules['torch'] = None; from pretrain.benchmark.peer_table import _device; print(_device())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{(processor(), 0)}\n"


# --- what the device gives -------------------------------------------------------------------------------------------


def test_the_peak_is_measured_with_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ones each time: constant ones take less power on a GPU, which then clocks higher than in training."""
    products: list[torch.Tensor] = []

    def once(product: Any, *_: Any) -> list[float]:
        products.append(product())
        return [1.0]

    monkeypatch.setattr("pretrain.benchmark.device.step_times_ms", once)
    config = cell_config("Ti/16", 32, 2, "fp32")
    found = [measured_peak(config, 2, torch.device("cpu")) for _ in range(2)]
    assert found[0] == {"measured_peak_tflop_per_s": round(4 * 8 * 192 * 768 / 1e9, 4)}
    assert torch.equal(*products) and products[0].std() > 100 and len(products[0].unique()) > 1000


def test_attention_is_timed_by_each_kernel_that_there_is() -> None:
    """On a CPU two of four; none for a model whose attention is not known."""
    found = attention_ms(cell_config("Ti/16", 32, 2, "fp32"), 2, torch.device("cpu"))
    assert found is not None and [*found] == ["flash", "cudnn", "efficient", "math"]
    assert found["flash"] and found["math"] and found["cudnn"] is None and found["efficient"] is None
    assert attention_ms(cell_config("timm:resnet18", 32, 2, "fp32"), 2, torch.device("cpu")) is None


def test_clock_and_power_are_asked_of_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the GPU's own number, since NVML does not heed CUDA_VISIBLE_DEVICES; None where NVML is away or refuses."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12-34"))
    nvml: Any = ModuleType("pynvml")
    nvml.NVMLError, nvml.NVML_CLOCK_SM, nvml.nvmlInit = ZeroDivisionError, 1, lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0x24
    nvml.nvmlDeviceGetClockInfo = lambda handle, kind: {("GPU-12-34", 1): 1410}[handle, kind]
    nvml.nvmlDeviceGetPowerUsage = lambda handle: 698_765
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    throttled_by = ["software power cap", "software thermal slowdown"]
    assert gpu_state(gpu) == {"sm_clock_mhz": 1410, "power_w": 698.8, "throttled_by": throttled_by}
    nvml.nvmlDeviceGetPowerUsage = lambda handle: 1 / 0
    assert gpu_state(gpu) is None and gpu_state(torch.device("cpu")) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_state(gpu) is None


SMALL_SHAPES = """
from pretrain.config import VIT_SHAPES
for name, shape in VIT_SHAPES.items():
    VIT_SHAPES[name] = shape._replace(depth=2)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("models", "mode"), [(None, "off"), (["S/16"], "on")])
def test_every_cell_of_a_gpu_runs(
    models: list[str] | None, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of a GPU in its order, on a CPU: true widths, patches of 14 and 16, two blocks, 112 pixels.

    Eager, two models on real images too; and one compiled. Each cell's processes find the shapes cut short.
    """
    (tmp_path / "sitecustomize.py").write_text(SMALL_SHAPES)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr("pretrain.benchmark.peer_table._device", lambda: ("no GPU", 80 << 30))
    data, out = None if models else str(make_shards(tmp_path / "squares")), tmp_path / "cells.jsonl"
    command = ["--image-size", "112", "--batch", "2", "--steps", "2", "--warmup", "1", "--rounds", "1", "--peer"]
    command += ["--compile", mode, "--out", str(out)]
    command += ["--model", *models] if models else ["--data", str(data), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "train", *command])
    tool.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["model"], row["loop"], row["compile"]) for row in rows] == [
        (cell.model, loop, mode == "on")
        for cell in cells_of(models, [mode], None, on_gpu=True, data=data)
        for loop in cell.loops
    ]
    for row in rows:
        shape = VIT_SHAPES[row["model"].partition("/")[0]]
        assert row["parameters"] < 6 * shape.width * (2 * shape.width + shape.mlp_dim), row["model"]  # of two blocks
        assert row["images_per_s"] > 0 and (row["loop"] != "ours" or row["attention_ms"]["math"] > 0)
        assert row["first_loss"] == pytest.approx(np.log(7 if row["data"] == data else 1000), rel=0.25), row


@pytest.mark.slow
def test_saves_are_one_json_line(tmp_path: Path) -> None:
    """What training waits for, at once and behind it; nothing is left in the folder."""
    options = ["--image-size", "32", "--batch", "4", "--steps", "2", "--precision", "fp32", "--folder", str(tmp_path)]
    result = benchmark("save", "--model", "Ti/16", *options)
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["checkpoint_gb"] == pytest.approx(12 * values["parameters"] / 1e9, abs=2e-3)
    assert all(values[name]["median"] > 0 for name in ("blocked_ms_at_once", "blocked_ms_behind", "ms_per_step"))
    assert values["until_published_ms"]["median"] > values["blocked_ms_behind"]["median"]
    assert list(tmp_path.iterdir()) == []
    assert "is not a folder" in benchmark("save", "--folder", str(tmp_path / "none")).stderr


@pytest.mark.slow
def test_starts_are_timed_beside_another_checkout() -> None:
    """New and resumed, by each way; here the other checkout is this one."""
    result = benchmark("start", "--ranks", "1", "--rounds", "1", "--beside", str(ROOT))
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    ways = ["python", "python", f"python, {ROOT}", f"python, {ROOT}"]
    assert [(row["way"], row["start"]) for row in rows] == list(zip(ways, ["new", "resumed"] * 2))
    assert all(0 < row["first_step_s"] <= row["exit_s"] for row in rows)
    assert all(low <= median <= high for low, median, high in rows[0]["ratios"].values())
    assert "has no launch/pretrain.py" in benchmark("start", "--beside", str(ROOT / "docs")).stderr


@pytest.mark.parametrize("command", ["train", "train --bottleneck --data x", "model", "save", "start", "data"])
def test_a_wrong_out_is_told_before_anything_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that was measured for minutes would be lost, under a traceback."""
    missing, folder = tmp_path / "no" / "rows.jsonl", "is a folder, expected a file"
    cases = [(command, missing, f"there is no folder {missing.parent}"), (command, tmp_path, folder)]
    if command == "train":  # whose folder is made
        cases.append(("train --peer", tmp_path, folder))
    for words, out, told in cases:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *words.split(), "--out", str(out)])
        with pytest.raises(UserError, match=f"--out {out}: {told}"):
            tool.main()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--ranks 8", "--ranks has no effect without --peer"),
        ("--in-one", "--in-one has no effect without --peer"),
        *((f"--{name} 2", f"--{name} has no effect without --peer") for name in ("rounds", "processes", "threads")),
        ("--loops plain", "--loops has no effect without --peer"),
        ("--bottleneck --data x --ranks 2 --peer", "--peer has no effect with --bottleneck"),
        ("--bottleneck --data x --rounds 2", "--rounds has no effect with --bottleneck"),
        ("--bottleneck --data x --steps 9", "--steps has no effect with --bottleneck"),
    ],
)
def test_options_without_effect_are_refused(words: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is measured that is not what was asked for."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "train", *words.split()])
    monkeypatch.setattr("pretrain.benchmark.cells.cell_rows", lambda what, cell: ([], "measured"))
    with pytest.raises(UserError, match=told):
        tool.main()


@pytest.mark.parametrize("what", ["train", "model", "save"])
def test_a_wrong_model_is_told_before_anything_runs(what: str) -> None:
    """Exit code 2, one line."""
    result = benchmark(what, "--model", "B/16", "X/16")
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "--model X/16: expected SIZE/PATCH" in result.stderr


# --- the order of samples --------------------------------------------------------------------------------------------


def run_order(*arguments: str) -> None:
    """The command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmark.py", "order", *arguments])
        tool.main()


def test_reading_and_mixing_of_an_order(capsys: pytest.CaptureFixture[str]) -> None:
    """Lanes read whole blocks, as often as nodes share lanes; they mix shuffled shards as permuted does, not sorted."""
    run_order("--samples", "128000", "--classes", "100", "--batch", "512", "--ranks", "8", "60")
    numbers, few, many, *mixing = map(json.loads, capsys.readouterr().out.splitlines())
    assert (numbers["block_samples"], numbers["num_lanes"]) == (83, 64)
    assert few["read_amplification_per_rank"] == 1.0
    assert many["read_amplification_per_node"] == 1.094  # of 7 borders of nodes, 6 cut one of the 64 lanes
    assert few["requests_per_1000_images"] == 12.0
    of = {(row["order"], row["shards"]): row for row in mixing}
    assert len(of) == 4 and {row["ideal"] for row in mixing} == {99.4}
    for key, row in of.items():
        assert (row["classes_of_a_step"] < 60) if key == ("lanes", "sorted") else row["classes_of_a_step"] > 98
        assert (row["variance_over_mean"] > 4) if key == ("lanes", "sorted") else 0.8 < row["variance_over_mean"] < 1.2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--samples", "0"), "--samples is 0, expected 1 to 2"),
        (("--ranks", "0"), "--ranks is .0., expected numbers from 1 on"),
        (("--batch", "4", "--ranks", "5"), "--ranks: 5 is more than --batch"),
        (("--batch", str(1 << 17)), "--batch 131072, --samples 1281167: beyond 64 bits"),
    ],
)
def test_sizes_that_no_run_has_are_refused(arguments: tuple[str, ...], told: str) -> None:
    """In one line that names the option."""
    with pytest.raises(UserError, match=told):
        run_order(*arguments)


# --- the table of models ---------------------------------------------------------------------------------------------


def test_counted_columns_equal_the_reference_numbers(test_fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and FLOPs of the default table at 224 and 384 pixels are those of flops_params.json, exactly."""
    monkeypatch.setattr("pretrain.benchmark.model.activation_bytes", lambda *_: 0)  # half a minute; tested below
    entries = json.loads((test_fixtures / "flops_params.json").read_text())["models"]
    by_shape = {tuple(shape): name for name, shape in VIT_SHAPES.items()}
    wanted = {}
    for key, entry in entries.items():
        patch, size = re.findall(r"patch(\d+)_(\d+)", key)[0]
        if "params" in entry:
            shape = (entry["width"], entry["depth"], entry["mlp"], entry["heads"])
            wanted[f"{by_shape[shape]}/{patch}", int(size)] = entry
    compared = 0
    for model in TABLE:
        for size in (224, 384):
            if (model, size) not in wanted:
                assert model.endswith("/14") and size == 384
                continue
            entry, row = wanted[model, size], counted_columns(cell_config(model, size, 1, "fp32"), "cpu")
            found = row["parameters"], row["forward_flops"], row["train_flops"]
            assert found == (entry["params"], entry["flops_fwd_torch_counter"], entry["train_flops_3x"]), (model, size)
            compared += 1
    assert compared == 14


def test_activations_of_a_vit_are_those_of_its_formula() -> None:
    """Exactly, for Ti/16 at 64 pixels in float32: what each layer must keep, written out by hand.

    Of a block's token: each norm's input, mean and deviation; the inputs of qkv and MLP; q, k, v, output and the
    logarithm of the attention's sums, but no attention matrix; for the projection that same output, counted once; the
    inputs of GELU and of the layer after it.
    """
    batch, tokens, width, mlp, heads, depth, classes = 3, 17, 192, 768, 3, 12, 1000
    block = 2 * (width + 2) + 2 * width + (3 * width + width + heads) + 2 * mlp
    last_norm = width + 2 + width  # and its output: the head keeps a view of it, the class token, and so all of it
    per_image = tokens * (depth * block + last_norm) + 3 * 64 * 64 + classes  # images, softmax
    label = 8 + 4  # bytes: a class and its weight
    config = cell_config("Ti/16", 64, batch, "fp32")
    assert activation_bytes(config, "cpu") == batch * (4 * per_image + label)


@pytest.mark.parametrize(
    ("model", "pooling", "precision"),
    [("Ti/16", "token", "bf16"), ("Ti/16", "map", "fp32"), ("R+Ti/16", "gap", "bf16"), ("timm:resnet18", None, "fp32")],
)
def test_activations_are_what_a_real_step_saves(model: str, pooling: Any, precision: str) -> None:
    """Counting without memory gives the bytes of real tensors: distinct addresses, no parameters."""
    config = cell_config(model, 64, 2, precision, pooling=pooling)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network = build_model(config.model, 1000).to(dtype)
    own = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = network(torch.rand(2, 3, 64, 64).to(dtype))
        loss = per_image_loss(logits, *single_labels(torch.tensor([1, 2])), "softmax").sum()
    found = sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in own)
    assert activation_bytes(config, "cpu") == found > 0
    loss.backward()


def counted(model: str) -> dict[str, Any]:
    numbers = {"parameters": 1, "forward_flops": 2, "train_flops": 6, "activation_bytes": 3}
    where = {"pooling": "token", "batch": 2, "precision": "fp32", "device": "cpu", "versions": {"torch": "2"}}
    return {"model": model, "image_size": 64, **numbers, **where, "not_timed": None}


def run_model(*arguments: str) -> None:
    """The command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmark.py", "model", *arguments])
        tool.main()


def test_no_row_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A cell that dies keeps what it counted, one that cannot exist says why, and the command fails at the end."""
    timed = {**counted("Ti/16"), "forward_ms": {"median": 4.0}, "train_ms": {"median": 8.0}}
    timed |= {"forward_images_per_s": 500.0, "train_images_per_s": 250.0}
    cells = {"Ti/16": ([counted("Ti/16"), timed], None), "S/16": ([counted("S/16")], "ended by signal 9")}
    monkeypatch.setattr("pretrain.benchmark.table.cell_rows", lambda what, cell: cells[cell["model"]])
    out = tmp_path / "models.jsonl"
    with pytest.raises(UserError, match="1 of 3 rows are not complete"):
        run_model("--model", "Ti/16", "S/16", "H/14", "--image-size", "64", "--out", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["model"], row.get("parameters"), row["not_timed"]) for row in rows] == [
        ("Ti/16", 1, None),
        ("S/16", 1, "ended by signal 9"),
        ("H/14", None, "model.image_size (64) is not a multiple of model.patch_size (14)"),
    ]
    page = out.with_suffix(".md").read_text()
    assert page.count("\n|") == 4 and "| Ti/16 | 64 | 1 | 0.00 | 0.00 | 0.0 | 4 | 500.0 | 8 | 250.0 |  |" in page
    assert "batch 2, fp32" in page
    shown = capsys.readouterr().out
    assert "ended" in shown and "signal" in shown  # folded


def test_reasons_are_found_in_what_a_cell_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error's own line, not the last one of a message that goes on below it; else the signal."""
    ends = [
        (1, '{"model": 1}\n', "Traceback\nValueError: too big\n  more\n", ([{"model": 1}], "ValueError: too big")),
        (2, "", "error: timm has no model 'x'\n", ([], "timm has no model 'x'")),
        (-9, "", "", ([], "ended by signal 9")),
        (0, 'chatter\n{"model": 1}\n', "", ([{"model": 1}], None)),
    ]
    for code, stdout, stderr, expected in ends:
        done = subprocess.CompletedProcess([], code, stdout, stderr)
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        assert cell_rows("model", {}) == expected


@pytest.mark.slow
def test_the_table_is_measured(tmp_path: Path) -> None:
    """A small model is timed, one above --max-params is not trained and says so; figures follow from each other."""
    out = tmp_path / "models.jsonl"
    sizes = ["--image-size", "32", "--batch", "2", "--steps", "3", "--warmup", "1", "--max-params", "7000000"]
    result = benchmark("model", "--model", "Ti/16", "S/16", *sizes, "--pooling", "map", "--out", str(out))
    assert result.returncode == 0, result.stderr
    small, large = (json.loads(line) for line in out.read_text().splitlines())
    for name in ("forward", "train"):
        assert small[f"{name}_images_per_s"] == pytest.approx(2000 / small[f"{name}_ms"]["median"], rel=1e-3)
    assert small["train_ms"]["median"] > small["forward_ms"]["median"] and small["not_timed"] is None
    assert large["not_timed"] == "training: more than 7,000,000 parameters (--max-params)"
    assert large["forward_ms"] and "train_ms" not in large and large["activation_bytes"] > 0
    assert small["pooling"] == "map" and small["train_flops"] == 3 * small["forward_flops"]


def test_deciles_lie_within_what_was_measured() -> None:
    """Of three steps, one of them slow: no decile below the fastest or above the slowest."""
    assert summary_ms([100.0, 110.0, 400.0]) == {"median": 110.0, "p10": 102.0, "p90": 342.0}
