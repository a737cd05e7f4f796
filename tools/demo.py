"""Everything after installation, in minutes and without a network: from data to weights, fine-tuning and a report.

python tools/demo.py      (`make demo` installs first)
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pretrain import cli
from pretrain.cluster.jobs import PART_OF, STOPPED, run_job
from pretrain.cluster.local import environment, gpu_is_here, options_of_ranks
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
    parser.add_argument("--images", type=int, default=64_000, help="characters to generate (default 64000)")
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
    num_ranks = None if gpu_is_here() else 2  # all GPUs, or else two ranks on the CPU
    characters = f"data.train={out / 'characters'}"
    command, run = _training(out, "demo", characters, *arguments.overrides, num_ranks=num_ranks)
    _run(*command, lock=run / "lock")
    _check_done(run)
    digits = [f"data.train={out / 'digits-train'}", f"data.val={out / 'digits-test'}"]
    steps = arguments.finetune_steps
    digits += [f"total_steps={steps}", f"optim.warmup_steps={min(20, steps // 10)}"]
    digits += [o for o in arguments.overrides if o.startswith("model.") and not o.startswith("model.num_classes")]
    # Two fine-tunings, on one rank each, run beside the other work, because neither fills two cores.
    command, random = _training(out, "demo_digits", *digits, "name=digits_from_random_weights", num_ranks=1)
    with _beside(out / "digits_from_random_weights.log", command):
        _step(3, "conversion for timm; beside it, told below: fine-tuning on real handwriting from random weights")
        _run(sys.executable, "tools/convert.py", run, out / "weights", "--to", "timm", "--overwrite")
        start = f"init_from={out / 'weights'}", "init_new_head=true"
        command, pretrained = _training(out, "demo_digits", *digits, *start, num_ranks=1)
        with _beside(out / "digits_from_pretrained_weights.log", command):
            _step(
                4, "few-shot accuracy on real handwriting; beside it, told below: fine-tuning from pretrained weights"
            )
            few_shot = ["--fewshot", out / "digits-train", out / "digits-test", "--baselines"]
            few_shot += ["--fewshot-transform", "timm"]  # the characters fill the picture: no central crop
            _run(sys.executable, "tools/evaluate.py", out / "weights", *few_shot, "--out", run / "evaluation")
    _check_done(pretrained)
    _check_done(random)
    _step(5, "report")
    _run(sys.executable, "tools/report.py", run, pretrained, random, "--out", out / "report")
    print(f"\ndone in {(time.monotonic() - began) / 60:.1f} minutes")
    cli.tell(f"table:   {run / 'evaluation' / 'results.md'}")
    cli.tell(f"curves:  {out / 'report' / 'curves.png'}")
    cli.tell(f"page:    {out / 'report' / 'report.html'}")
    cli.tell(f"weights: {out / 'weights'}")
    cli.tell("next:    python tools/finetune.py google:B_16 --train photos     (photos/CLASS/NAME.jpg)")


def _training(out: Path, config: str, *overrides: str, num_ranks: int | None) -> tuple[list[str], Path]:
    """Returns the command that trains by a config, and the run's folder. num_ranks: None means all GPUs."""
    path = f"configs/{config}.yaml"
    words = [sys.executable, "launch/pretrain.py", *options_of_ranks(num_ranks)]
    command = [*words, "--config", path, f"output={out / 'runs'}", *overrides]
    return command, out / "runs" / load_config(ROOT / path, overrides).name


def _check_done(run: Path) -> None:
    """Raises UserError when a run was stopped before its end."""
    if not (run / "DONE").exists():
        raise UserError(f"{run}: the training stopped before its end; the same command goes on from there")


def _run(*command: object, lock: Path = Path(os.devnull)) -> None:
    """Runs a command, which at an interrupt saves and ends. lock: the file that it locks while it writes."""
    words = [str(word) for word in command]
    with chdir(ROOT):
        code = run_job(words, environment(num_threads=1), lock)
    if code == STOPPED:
        raise KeyboardInterrupt
    _check(words, code)


@contextmanager
def _beside(log: Path, command: Sequence[object]) -> Iterator[None]:
    """Runs a command beside the block, and prints its output after that of the block.

    If the block ends early, also by SIGTERM or SIGUSR1, the command is asked to stop. Raises UserError when the command
    fails.
    """
    words = [str(word) for word in command]
    cli.tell("$ " + " ".join([Path(words[0]).name, *words[1:]]))
    process: subprocess.Popen[bytes] | None = None
    asked = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, signal.default_int_handler) for number in asked}
    try:
        with log.open("wb") as file:
            own = {**environment(num_threads=1), PART_OF: str(os.getpid())}
            process = subprocess.Popen(words, cwd=ROOT, env=own, stdout=file, stderr=file)
        yield
        process.wait()
    finally:
        if process and process.poll() is None:
            process.terminate()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
        print(f"\n{log.read_text(errors='replace')}", end="", flush=True)
    assert process is not None
    _check(words, process.returncode)


def _check(words: Sequence[str], code: int) -> None:
    if code:
        name = " ".join([Path(words[0]).name, *words[1:2]])
        raise UserError(f"{name} ended with exit code {code}; what went wrong stands above")


def _step(number: int, title: str) -> None:
    print(f"\n[{number}/5] {title}", flush=True)


if __name__ == "__main__":
    cli.run(main)
