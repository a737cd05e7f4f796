"""What only a GPU can show. Skipped elsewhere; run with `pytest -m gpu -n 6`: some 70 starts of ten seconds and more.

Where time is short: `-k "twice or logits or losses or fused or copies or finite"` first, which take a few steps.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import whole_session
from safetensors.torch import save_file
from tiny import NUM_CLASSES, changed, make_shards, tiny_config

from pretrain.checkpoint.behind import HostCopies
from pretrain.checkpoint.find import newest_valid
from pretrain.checkpoint.layout import step_of
from pretrain.cluster import ranks
from pretrain.cluster.local import launcher, launcher_or_python
from pretrain.config import Config, ModelConfig, OptimConfig, config_to_dict
from pretrain.data.loader import Batch, single_labels
from pretrain.data.order import plan_batch
from pretrain.engine import step as engine_step
from pretrain.engine.ahead import CopyAhead
from pretrain.engine.step import Engine
from pretrain.models.build import build_model
from pretrain.optim import build_optimizer, parameter_groups

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),  # of up to three trainings, each with a limit of its own
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextmanager
def start_on_gpu(shards: Path, output: Path, *overrides: str, words: list[str]) -> Iterator[subprocess.Popen[Any]]:
    """Starts a training by these words, in a session of its own, of which nothing holds the GPU behind the block."""
    output.mkdir(exist_ok=True)
    file = output / "tiny.yaml"
    file.write_text(yaml.safe_dump(config_to_dict(tiny_config(shards, output, engine__precision="bf16"))))
    command = [*words, str(ROOT / "launch" / "pretrain.py"), "--config", str(file), *overrides]
    with whole_session(subprocess.Popen(command, env=without_cpu(), start_new_session=True)) as process:
        yield process


def train_on_gpu(shards: Path, output: Path, *overrides: str, words: list[str]) -> None:
    with start_on_gpu(shards, output, *overrides, words=words) as process:
        assert process.wait(timeout=500) == 0


def without_cpu() -> dict[str, str]:
    """The environment, less what keeps the other tests' ranks on the CPU."""
    return {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}


def on_gpu(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a function of this file returns in a process of its own, whose DeepSpeed has not chosen the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DS_ACCELERATOR", raising=False)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
            return processes.submit(function, *arguments).result(timeout=500)


def steps_logged(output: Path) -> int:
    path = output / "tiny" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=0)


def wait_for_steps(output: Path, steps: int, process: subprocess.Popen[Any]) -> None:
    until = time.monotonic() + 300
    while steps_logged(output) < steps:
        assert process.poll() is None and time.monotonic() < until, f"ended with {process.poll()}"
        time.sleep(0.02)


ACCUMULATED = "engine.max_micro_batch_size=5"  # 12 images in three micro-batches
EVERYTHING = ("optim.average_decay=0.9", "evaluation.every_steps=5", "data.held_out=20", "model.drop_path=0.1")
DEIT_III = ("optim.name=lamb", "optim.moment_dtype=bf16", "model.layer_scale=1e-4", "data.repeats=3", "data.mixup=0.8")
DEIT_III += ("loss=sigmoid", "label_threshold=0", "data.three_augment=true")


@pytest.mark.parametrize(
    "changes",
    [
        ("engine.zero_stage=1",),  # compiled, by default
        ("engine.zero_stage=2", "engine.compile=false"),
        ("engine.zero_stage=3",),
        ("engine.zero_stage=1", ACCUMULATED),
        ("engine.zero_stage=2", ACCUMULATED),
        ("engine.zero_stage=1", "engine.compile=true", *EVERYTHING),
        ("engine.zero_stage=1", *DEIT_III),
        ("engine.zero_stage=3", *DEIT_III),
        ("engine.zero_stage=1", "engine.compile=max-autotune"),
        ("engine.zero_stage=1", "engine.checkpoint_activations=true", "model.drop_path=0.1"),
    ],
    ids=" ".join,
)
def test_a_resumed_run_is_the_same_run(changes: tuple[str, ...], tmp_path: Path) -> None:
    """On one GPU, with dropout: stopped half-way and resumed equals uninterrupted, bit for bit."""
    shards = make_shards(tmp_path / "squares")
    recipe = (*changes, "model.dropout=0.1", "data.workers=1", "optim.schedule=rsqrt")
    train_on_gpu(shards, tmp_path / "whole", *recipe, words=launcher(1))
    for total_steps in (10, 20):
        train_on_gpu(shards, tmp_path / "parts", *recipe, f"total_steps={total_steps}", words=launcher_or_python(1))
    expect_same_end(tmp_path / "whole", tmp_path / "parts")


def expect_same_end(whole: Path, parts: Path) -> None:
    """Two runs' last checkpoints hold the same bits."""
    first, second = (newest_valid(output / "tiny" / "checkpoints") for output in (whole, parts))
    assert first and second
    for path in first.glob("*.safetensors"):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_a_stop_is_heard_and_costs_nothing(tmp_path: Path) -> None:
    """SIGTERM in the midst of training: exit code 0 after a save, and the same command ends as if nothing had been."""
    shards = make_shards(tmp_path / "squares")
    recipe = ("total_steps=600", "log.every_steps=1", "checkpoint.every_steps=1000", "model.dropout=0.1")
    train_on_gpu(shards, tmp_path / "whole", *recipe, words=launcher_or_python(1))
    with start_on_gpu(shards, tmp_path / "parts", *recipe, words=launcher_or_python(1)) as process:
        wait_for_steps(tmp_path / "parts", 10, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
    stopped = newest_valid(tmp_path / "parts" / "tiny" / "checkpoints")
    assert stopped is not None and 10 <= step_of(stopped) < 600, stopped
    train_on_gpu(shards, tmp_path / "parts", *recipe, words=launcher_or_python(1))
    expect_same_end(tmp_path / "whole", tmp_path / "parts")


# --- one step, in a process of its own -------------------------------------------------------------------------------


def engine_on_gpu(config: Config) -> tuple[Engine, Batch]:
    """As `engine_here`, on a GPU."""
    engine, batch = engine_here(config)
    assert engine.device.type == "cuda"
    return engine, batch


def engine_here(config: Config) -> tuple[Engine, Batch]:
    """An engine, and one batch of random images: equal for equal configs. Not compiled, which takes minutes."""
    device, config = ranks.start(60), changed(config, engine__compile=False)
    plan = plan_batch(config.data.global_batch, 1, config.engine.max_micro_batch_size)
    engine = Engine(build_model(config.model, NUM_CLASSES, seed=0), config, plan, device)
    slots, side = plan.micro_batch * plan.accumulation, config.model.image_size
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (slots, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.arange(slots) % NUM_CLASSES
    batch = Batch(images, *single_labels(labels), torch.ones(slots, dtype=torch.bool), labels, labels, [])
    return engine, batch.to(device)


def held_by(engine: Engine) -> list[torch.Tensor]:
    return [s.values.cpu().clone() for s in engine.weights() + engine.moments() + engine.averages()]


def same_bits(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    assert len(ours) == len(theirs) > 0
    return all(torch.equal(one, other) for one, other in zip(ours, theirs))


def nan_step(config: Config) -> tuple[bool, bool, bool, bool]:
    """Whether a step with a NaN was applied, and changed a bit; whether the next one was, and all is finite then."""
    engine, batch = engine_on_gpu(config)
    engine.train_step(batch, 1e-3)
    before, plain = held_by(engine), engine_step.per_image_loss
    engine_step.per_image_loss = lambda logits, *more: plain(logits, *more) * float("nan")
    bad = engine.train_step(batch, 1e-3)
    unchanged = same_bits(before, held_by(engine))
    engine_step.per_image_loss = plain
    engine.check()
    for _ in range(20):  # fp16 looks for its loss scale first
        good = engine.train_step(batch, 1e-3)
        if good.applied:
            break
    finite = all(bool(values.isfinite().all()) for values in held_by(engine))
    ranks.stop()
    return bad.applied, unchanged, good.applied, finite


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("stage", "max_micro_batch_size"), [(1, 256), (1, 5), (2, 256), (2, 5), (3, 256), (3, 5)])
def test_a_step_that_is_not_finite_changes_nothing(
    stage: int, max_micro_batch_size: int, precision: str, tmp_path: Path
) -> None:
    """On each stage, with and without accumulation: skipped, no bit changed, and the next step is fine."""
    changes: dict[str, Any] = {"engine__precision": precision, "engine__zero_stage": stage}
    changes |= {"engine__max_micro_batch_size": max_micro_batch_size, "optim__average_decay": 0.5}
    assert on_gpu(nan_step, tiny_config(tmp_path, tmp_path, **changes)) == (False, True, True, True)


def several_losses(config: Config) -> tuple[str, list[float]]:
    """The device of this process, and the losses of six steps on the same images."""
    engine, batch = engine_here(config)
    rate = {"lion": 1e-3, "sgd": 0.1}.get(config.optim.name, 1e-2)
    found = [float(engine.train_step(batch, rate).sums[0]) for _ in range(6)]
    ranks.stop()
    return engine.device.type, found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"optim__name": "lamb", "model__layer_scale": 0.1, "loss": "sigmoid", "label_threshold": 0.0},
        {"optim__name": "lamb", "engine__zero_stage": 3, "engine__max_micro_batch_size": 5},
        {"optim__name": "lion", "optim__betas": [0.9, 0.99], "optim__moment_dtype": "bf16", "model__pooling": "map"},
        {"optim__name": "sgd", "model__positions": "relative", "engine__zero_stage": 2},
        {"optim__moment_dtype": "bf16", "engine__max_micro_batch_size": 5, "optim__layer_decay": 0.8},
        {"model__parallel_blocks": True, "model__qk_norm": True, "model__rms_norm": True, "label_smoothing": 0.1},
    ],
    ids=str,
)
def test_losses_are_those_of_the_cpu(changes: dict[str, Any], precision: str, tmp_path: Path) -> None:
    """Each optimizer and stage, and what else trains: gradients and updates too. To rounding, which grows in bf16."""
    from ranks import (
        run_ranks as on_cpus,
    )  # here: its import keeps a process on the CPU, and `on_gpu` imports this file

    config = tiny_config(tmp_path, tmp_path, engine__precision=precision, **changes)
    [(cpu, expected)], (gpu, found) = on_cpus(several_losses, 1, config), on_gpu(several_losses, config)
    assert (cpu, gpu) == ("cpu", "cuda") and expected[-1] < 0.95 * expected[0]
    assert found == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 2e-2)


TOKENS = {197: (224, 16), 257: (224, 14), 577: (384, 16)}  # image size and patch size; heads of 64, as in all ViTs


def shape_of(tokens: int, **changes: Any) -> dict[str, Any]:
    image_size, patch_size = TOKENS[tokens]
    shape = {"width": 192, "depth": 3, "mlp_dim": 384, "heads": 3, "image_size": image_size, "patch_size": patch_size}
    return {"name": "Ti", "pooling": "token", **shape, **changes}


def one_step(config: Config) -> list[torch.Tensor]:
    engine, batch = engine_on_gpu(config)
    engine.train_step(batch, 1e-3)
    found = held_by(engine)
    engine.close()
    return found


def stepped_twice(config: Config) -> bool:
    """Whether a step from the same state has the same bits, moments included, five times in a row."""
    first = one_step(config)
    same = all(same_bits(first, one_step(config)) for _ in range(4))
    ranks.stop()
    return same


@pytest.mark.parametrize(("tokens", "deterministic"), [(197, False), (197, True), (257, True), (577, True)])
def test_the_same_step_twice(tokens: int, deterministic: bool, tmp_path: Path) -> None:
    """What docs/training.md says of exact resumption on GPUs: bit for bit.

    Wide, so that the GPU is full: with three heads 257 tokens had the same bits by chance, without `deterministic`.
    """
    model = shape_of(tokens, width=1024, heads=16, depth=2)
    config = tiny_config(tmp_path, tmp_path, engine__precision="bf16", engine__deterministic=deterministic)
    assert on_gpu(stepped_twice, changed(config, model=model, data__global_batch=64))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"positions": "relative"}, {"pooling": "map"}], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_logits_are_those_of_the_cpu(tokens: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 to rounding, without TF32; in bf16 as near as 8 bits come. The share of the largest logit."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as ranks.start has it
    torch.manual_seed(0)
    model = build_model(ModelConfig(**shape_of(tokens, **changes)), NUM_CLASSES, seed=0).eval()
    head = model.get_submodule("head")
    assert isinstance(head.weight, torch.Tensor)
    head.weight.normal_(std=0.5)  # it begins as zeros
    images = torch.randn(4, 3, *[TOKENS[tokens][0]] * 2)
    expected = model(images)
    for dtype, most in ((torch.float32, 2e-4), (torch.bfloat16, 5e-2)):
        found = model.to("cuda", dtype)(images.to("cuda", dtype)).float().cpu()
        assert (found - expected).abs().max() <= most * expected.abs().max(), dtype


def test_the_fused_adamw_is_the_plain_one() -> None:
    """On the device, against torch's plain loop over the same gradients: 30 steps of 1e-2."""
    generator = torch.Generator().manual_seed(0)
    model, plain = (torch.nn.Linear(300, 400, device="cuda") for _ in range(2))
    plain.load_state_dict(model.state_dict())
    ours = build_optimizer(OptimConfig(lr=1e-2, weight_decay=0.1), model)
    theirs = torch.optim.AdamW(parameter_groups(plain, 0.1), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, foreach=False)
    assert ours.defaults["fused"] and not theirs.defaults["fused"]
    for _ in range(30):
        for parameter, other in zip(model.parameters(), plain.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=generator).cuda()
            other.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
    for parameter, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(parameter, other, rtol=0, atol=5e-6)


# --- several GPUs ----------------------------------------------------------------------------------------------------


def rank_process(output: Path, rank: int) -> int:
    """The process of a rank of the training that writes there, by its command line and what its launcher told it."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile, or somebody else's
            words, variables = ((folder / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            if str(output / "tiny.yaml").encode() in words and f"RANK={rank}".encode() in variables:
                return int(folder.name)
    raise AssertionError(f"no rank {rank} of {output} runs")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_lost_rank_ends_the_others_and_costs_an_interval(tmp_path: Path) -> None:
    """kill -9 of rank 1 while NCCL waits for it: the run ends in time, says that it may be tried again, and goes on."""
    shards = make_shards(tmp_path / "squares")
    recipe = ("total_steps=3000", "log.every_steps=1", "checkpoint.every_steps=50", "engine.timeout_s=60")
    with start_on_gpu(shards, tmp_path, *recipe, words=launcher(2)) as process:
        wait_for_steps(tmp_path, 120, process)
        os.kill(rank_process(tmp_path, 1), signal.SIGKILL)
        assert process.wait(timeout=240) != 0
    reached = newest_valid(tmp_path / "tiny" / "checkpoints")
    assert reached is not None and step_of(reached) >= 50
    stop = json.loads((tmp_path / "tiny" / "STOP.json").read_text())
    assert stop["retry"] is True, stop
    train_on_gpu(shards, tmp_path, *recipe, words=launcher(2))
    assert (tmp_path / "tiny" / "DONE").exists()


def losses(output: Path) -> list[float]:
    lines = (output / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "fp32"), ("adamw", "bf16"), ("lamb", "fp32")])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_are_one(stage: int, optimizer: str, precision: str, tmp_path: Path) -> None:
    """Over NCCL: the losses of one GPU, but for rounding. LAMB adds up norms of parameters over the ranks itself."""
    shards = make_shards(tmp_path / "squares")
    recipe = [f"engine.zero_stage={stage}", f"engine.precision={precision}", f"optim.name={optimizer}"]
    recipe += [ACCUMULATED, "log.every_steps=1"]
    for num_ranks in (1, 2):
        train_on_gpu(shards, tmp_path / str(num_ranks), *recipe, words=launcher_or_python(num_ranks))
    one, two = (losses(tmp_path / str(num_ranks)) for num_ranks in (1, 2))
    assert len(one) == 20 and two == pytest.approx(one, rel=1e-4 if precision == "fp32" else 3e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("stage", "max_micro_batch_size"), [(1, 256), (2, 256), (2, 3), (3, 256)])
def test_overlapped_reductions_have_the_same_bits(stage: int, max_micro_batch_size: int, tmp_path: Path) -> None:
    """200 steps of two ranks in bf16, with reductions beside the backward pass and behind it: a race of streams would
    show. 302M parameters, so that a backward pass fills seven buckets. Two numbers have one sum, in whatever order.
    """
    shards = make_shards(tmp_path / "squares")
    recipe = [f"engine.zero_stage={stage}", f"engine.max_micro_batch_size={max_micro_batch_size}"]
    recipe += ["model.width=1024", "model.depth=24", "model.mlp_dim=4096", "model.heads=16", "engine.compile=false"]
    recipe += ["total_steps=200", "checkpoint.every_steps=1000", "checkpoint.behind=false"]
    for overlap in ("true", "false"):
        words = launcher(2)
        train_on_gpu(shards, tmp_path / overlap, *recipe, f"engine.overlap_reduction={overlap}", words=words)
    expect_same_end(tmp_path / "true", tmp_path / "false")


SMALL_GPU = """
import runpy, torch
torch.cuda.set_per_process_memory_fraction(0.1)  # so that tests beside this one keep the rest
runpy.run_module("pretrain.benchmark", run_name="__main__", alter_sys=True)
"""


def test_out_of_memory_is_told() -> None:
    """Exit code 2, one line that names the key. Ti/16 saves some 15 MB an image."""
    options = {"batch": 4096, "precision": "bf16", "warmup": 1, "steps": 2, "image_size": 224, "data": None}
    options |= {"checkpoint_activations": False, "zero_stage": 1, "fp8": False, "kernels": False, "paced": False}
    cell = json.dumps({"model": "Ti/16", "compiled": False, "options": options})
    words = [sys.executable, "-P", "-c", SMALL_GPU, "train", cell]
    environment = without_cpu() | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 2, result.stderr
    assert "\nerror: engine.max_micro_batch_size: 4096 images at a time" in f"\n{result.stderr}", result.stderr


def test_a_peer_is_measured_beside_us(tmp_path: Path) -> None:
    """A small cell, compiled and eager, with a measured peak."""
    small = ["--image-size", "32", "--batch", "8", "--steps", "3", "--warmup", "2", "--rounds", "2"]
    benchmark("--peer", "--model", "Ti/16", *small, "--out", str(tmp_path / "cells.jsonl"), timeout_s=1500)
    rows = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert {(row["loop"], row["compile"]) for row in rows} == {
        (loop, compiled) for loop in ("ours", "timm", "plain") for compiled in (True, False)
    }
    assert all(row["parts_ms"]["forward"] > 0 and row["measured_peak_tflop_per_s"] > 0 for row in rows)


def benchmark(*arguments: str, timeout_s: float = 500) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "train", *arguments]
    result = subprocess.run(command, env=without_cpu(), capture_output=True, text=True, timeout=timeout_s)
    assert result.returncode == 0, result.stderr
    return result


def test_benchmark_reports_mfu() -> None:
    """One eager cell of Ti/16 on the GPU."""
    assert '"images_per_s"' in benchmark("--model", "Ti/16", "--compile", "off").stdout


def test_copies_are_pinned_and_whole(tmp_path: Path) -> None:
    """Taken on the device's stream, waited for, written: the bytes of safetensors; later steps do not touch them."""
    tensors = {"b": torch.arange(3_000_001.0, device="cuda"), "a": torch.ones(5, dtype=torch.bfloat16, device="cuda")}
    save_file(tensors, tmp_path / "theirs")
    copy = HostCopies().take({"ours": tensors})["ours"]
    for tensor in tensors.values():
        tensor.zero_()
    copy.write(tmp_path / "ours")
    assert copy._bytes.is_pinned()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(("copies_wait", "steps_wait"), [(100_000_000, 20_000_000), (20_000_000, 100_000_000)])
def test_a_batch_copied_ahead_is_whole(copies_wait: int, steps_wait: int) -> None:
    """Copies held up longer than steps (some 60 and 12 ms): no step reads too early. Steps longer than copies: no
    batch's memory is given away while a step may read it.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    ahead, shape, slots = CopyAhead(device), (64, 3, 224, 224), torch.arange(64)
    images = [torch.full(shape, number, dtype=torch.uint8) for number in range(8)]
    batches = [
        # Pinned, all of it, as the loader gives it: the host would wait for the stream to copy anything else.
        Batch(*(part.pin_memory() for part in (image, *single_labels(slots), slots >= 0)), slots, slots, [])
        for image in images
    ]
    assert ahead._stream is not None
    found = []
    for batch, following in zip(batches, [*batches[1:], None]):
        with torch.cuda.stream(ahead._stream):
            torch.cuda._sleep(copies_wait)
        arrived = ahead.take(batch, following)
        torch.cuda._sleep(steps_wait)
        found.append(torch.stack([arrived.images.min(), arrived.images.max(), arrived.labels.sum()]))
        del arrived
    expected = int(slots.sum())
    assert torch.stack(found).tolist() == [[number, number, expected] for number in range(8)]
