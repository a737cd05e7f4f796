"""Everything after installation, in minutes and without a network: from data to weights, fine-tuning and a report.

python tools/demo.py      (`make demo` installs first)
"""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image

from pretrain import cli
from pretrain.cluster.local import free_port
from pretrain.config import load_config
from pretrain.data.manifest import Shard, load_manifest
from pretrain.errors import UserError
from pretrain.shards.build import build, finish_manifest, write_samples
from pretrain.shards.characters import CLASS_NAMES, digits_task, render
from pretrain.shards.sources import Item

SHARD = 5000  # characters a shard
SEED = 1  # of the characters


def main() -> None:
    parser = cli.parser(
        "Generates distorted printed characters, pretrains a small ViT on them on all GPUs or else on two CPU ranks,\n"
        "converts it for timm, measures few-shot accuracy on real handwriting (scikit-learn's digits), and fine-tunes\n"
        "on it from random and from pretrained weights.",
        "python tools/demo.py --out demo",
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of all that it makes (default demo)")
    parser.add_argument("--images", type=int, default=80_000, help="characters to generate (default 80000)")
    parser.add_argument("--finetune-steps", type=int, default=200, help="steps of each fine-tuning (default 200)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to configs/demo.yaml")
    arguments = parser.parse_intermixed_args()
    if any(override.startswith(("name=", "output=")) for override in arguments.overrides):
        raise UserError("name= and output= are the demo's own; give --out for another place")
    began, out = time.monotonic(), arguments.out.resolve()  # the commands below run in the repository
    _step(1, f"data: {arguments.images:,} printed characters, and real handwriting")
    _make_characters(out / "characters", arguments.images)
    _make_digits(out)
    _step(2, "pretraining")
    run = _train(out, "demo", f"data.train={out / 'characters'}", *arguments.overrides)
    _step(3, "conversion for timm")
    _run(sys.executable, "tools/convert.py", run, out / "weights", "--to", "timm", "--overwrite")
    _step(4, "few-shot accuracy on real handwriting: random weights, pretrained weights, raw pixels")
    few_shot = ["--fewshot", out / "digits-train", out / "digits-test", "--baselines", "--out", run / "evaluation"]
    few_shot += ["--fewshot-transform", "timm"]  # the characters fill the picture: no central crop
    _run(sys.executable, "tools/evaluate.py", out / "weights", *few_shot)
    _step(5, "fine-tuning on real handwriting, from pretrained and from random weights")
    digits = [f"data.train={out / 'digits-train'}", f"data.val={out / 'digits-test'}"]
    steps = arguments.finetune_steps
    digits += [f"total_steps={steps}", f"optim.warmup_steps={min(20, steps // 10)}"]
    digits += [o for o in arguments.overrides if o.startswith("model.") and not o.startswith("model.num_classes")]
    pretrained = _train(out, "demo_digits", *digits, f"init_from={out / 'weights'}", "init_new_head=true")
    random = _train(out, "demo_digits", *digits, "name=digits_from_random_weights")
    _step(6, "report")
    _run(sys.executable, "tools/report.py", run, pretrained, random, "--out", out / "report")
    print(f"\ndone in {(time.monotonic() - began) / 60:.1f} minutes")
    print(f"table:   {run / 'evaluation' / 'results.md'}")
    print(f"curves:  {out / 'report' / 'curves.png'}")
    print(f"page:    {out / 'report' / 'report.html'}")
    print(f"weights: {out / 'weights'}")


def _train(out: Path, config: str, *overrides: str) -> Path:
    """Trains by a config and returns the run's folder. Raises UserError when the run was stopped before its end."""
    path = f"configs/{config}.yaml"
    name = load_config(ROOT / path, overrides).name
    _run(*_launcher(), "launch/pretrain.py", "--config", path, f"output={out / 'runs'}", *overrides)
    run = out / "runs" / name
    if not (run / "DONE").exists():
        raise UserError(f"{run}: the training stopped before its end; the same command goes on from there")
    return run


def _make_characters(out: Path, count: int) -> None:
    if (out / "manifest.json").exists():  # written last, so complete
        if (found := load_manifest(out).num_samples) != count:
            raise UserError(
                f"{out}: holds {found} characters, --images says {count}; remove it, or choose another --out"
            )
        return
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    numbers = range(-(-count // SHARD))
    shards: list[Shard] = []
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for shard in pool.map(partial(_write_shard, out, count), numbers):
            shards.append(shard)
            print(f"  {sum(s.num_samples for s in shards):,} of {count:,} characters", flush=True)
    finish_manifest(out, shards, CLASS_NAMES, SEED)


def _write_shard(out: Path, count: int, number: int) -> Shard:
    indices = range(number * SHARD, min(count, (number + 1) * SHARD))
    samples = ((_png(image), label) for image, label in (render(index, seed=SEED) for index in indices))
    return write_samples(samples, "png", out / f"characters-{number:06d}.tar", number)


def _make_digits(out: Path) -> None:
    train_images, train_labels, test_images, test_labels = digits_task()
    for name, images, labels in (("train", train_images, train_labels), ("test", test_images, test_labels)):
        folder = out / f"digits-{name}"
        if (folder / "manifest.json").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        items = [Item(partial(_png, image), "png", int(label), name) for image, label in zip(images, labels)]
        build(items, [str(digit) for digit in range(10)], folder, samples_per_shard=SHARD, seed=0)


def _png(image: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(image).save(file, "png", compress_level=1)
    return file.getvalue()


def _launcher() -> list[str]:
    """DeepSpeed's launcher: on all GPUs, or else with two ranks on the CPU."""
    import torch

    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    command = [deepspeed, "-q", "--master_port", str(free_port())]  # another run may have the default port
    return command if torch.cuda.is_available() else [*command, "--num_gpus", "2"]


def _run(*command: object) -> None:
    words = [str(word) for word in command]
    shown = [Path(words[0]).name, *words[1:]]
    print("$ " + " ".join(shown), flush=True)
    import torch

    cpu = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    code = subprocess.run(words, cwd=ROOT, env={**os.environ, **cpu}).returncode
    if code:
        raise UserError(f"{' '.join(shown[:2])} ended with exit code {code}; what went wrong stands above")


def _step(number: int, title: str) -> None:
    print(f"\n[{number}/6] {title}", flush=True)


if __name__ == "__main__":
    cli.run(main)
