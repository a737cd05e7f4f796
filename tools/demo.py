"""Everything after installation, in minutes and without a network: from data to weights, fine-tuning and a report.

python tools/demo.py      (`make demo` installs first)
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pretrain import cli
from pretrain.cluster.local import environment, gpu_is_here, launcher
from pretrain.config import load_config
from pretrain.errors import UserError


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
    with cli.loading():
        from pretrain.shards.demo_sets import make_characters, make_digits

    began, out = time.monotonic(), arguments.out.resolve()  # the commands below run in the repository
    _step(1, f"data: {arguments.images:,} printed characters, and real handwriting")
    make_characters(out / "characters", arguments.images)
    make_digits(out)
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
    cli.tell(f"table:   {run / 'evaluation' / 'results.md'}")
    cli.tell(f"curves:  {out / 'report' / 'curves.png'}")
    cli.tell(f"page:    {out / 'report' / 'report.html'}")
    cli.tell(f"weights: {out / 'weights'}")


def _train(out: Path, config: str, *overrides: str) -> Path:
    """Trains by a config and returns the run's folder. Raises UserError when the run was stopped before its end."""
    path = f"configs/{config}.yaml"
    name = load_config(ROOT / path, overrides).name
    ranks = launcher(None if gpu_is_here() else 2)  # all GPUs, or else two ranks on the CPU
    _run(*ranks, "launch/pretrain.py", "--config", path, f"output={out / 'runs'}", *overrides)
    run = out / "runs" / name
    if not (run / "DONE").exists():
        raise UserError(f"{run}: the training stopped before its end; the same command goes on from there")
    return run


def _run(*command: object) -> None:
    words = [str(word) for word in command]
    shown = [Path(words[0]).name, *words[1:]]
    cli.tell("$ " + " ".join(shown))
    code = subprocess.run(words, cwd=ROOT, env=environment(num_threads=1)).returncode
    if code:
        raise UserError(f"{' '.join(shown[:2])} ended with exit code {code}; what went wrong stands above")


def _step(number: int, title: str) -> None:
    print(f"\n[{number}/6] {title}", flush=True)


if __name__ == "__main__":
    cli.run(main)
