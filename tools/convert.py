"""Converts a run or a checkpoint into a folder that timm loads, and proves it: same images, same logits.

python tools/convert.py CHECKPOINT OUT --to timm
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.errors import UserError
from pretrain.models.build import build_model
from pretrain.models.weights import Weights, load_tensors, read_weights, write_timm_folder

FILES = ("config.json", "model.safetensors")
MAX_RATIO = 1e-5  # of the largest logit: float32 rounding is 1e-7 to 3e-6

# What a user of timm runs: nothing of this package. Argument: the folder.
_TIMM_PROGRAM = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
with torch.no_grad():
    tokens = model.forward_features(load_file("images.safetensors")["images"])
    outputs = {"pre_logits": model.forward_head(tokens, pre_logits=True), "logits": model.forward_head(tokens)}
save_file({name: output.contiguous() for name, output in outputs.items()}, "outputs.safetensors")
"""


def main() -> int:
    parser = cli.parser(
        "Converts a run (its newest valid checkpoint), a checkpoint step-N, or a converted folder, and checks in\n"
        "another process that the result gives the trained model's logits. Class names travel along.",
        "python tools/convert.py runs/NAME converted/NAME --to timm",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="run, checkpoint or converted folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write: config.json and model.safetensors")
    parser.add_argument("--to", choices=["timm"], default="timm", help="format (default timm)")
    parser.add_argument("--force", action="store_true", help=f"overwrite {' and '.join(FILES)} of an existing OUT")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"{arguments.out}: is a file; give a folder that is new or empty")
    if out.is_dir() and any(out.iterdir()) and not arguments.force:
        raise UserError(f"{arguments.out}: is not empty; give another folder, or --force to overwrite its weights")

    weights = read_weights(arguments.checkpoint)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".tmp-{out.name}-") as staging:
            folder = Path(staging) / "folder"
            write_timm_folder(weights, folder)
            if not _verify(weights, folder):
                print(
                    f"error: more than {MAX_RATIO:g} of the largest; {arguments.out} was not written", file=sys.stderr
                )
                return 1
            _move(folder, out)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise UserError(f"{arguments.out}: cannot be written ({error})") from None
    names = f", {len(weights.class_names)} class names" if weights.class_names else ""
    print(f"{arguments.out}: {len(weights.tensors)} tensors, {weights.num_classes} classes{names}. To load it:")
    print(f'timm.create_model("local-dir:{arguments.out}", pretrained=True)')
    return 0


def _verify(weights: Weights, folder: Path) -> bool:
    """Prints how far timm's logits, in another process, are from the trained model's; returns whether that is rounding.

    The head's input is compared too: a head that is still zero would hide a wrong body.
    """
    model = build_model(weights.model, weights.num_classes)
    load_tensors(model, weights)
    size = weights.model.image_size
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    parts: Any = model.eval()  # forward_features and forward_head, as every model of timm has them
    with torch.no_grad():
        tokens = parts.forward_features(images)
        ours = {"pre_logits": parts.forward_head(tokens, pre_logits=True), "logits": parts.forward_head(tokens)}
    with tempfile.TemporaryDirectory() as work:
        save_file({"images": images}, Path(work) / "images.safetensors")
        command = [sys.executable, "-c", _TIMM_PROGRAM, str(folder)]
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=work, env=offline, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"timm cannot load what was written: {done.stderr.strip()[-1000:]}")
        theirs = load_file(Path(work) / "outputs.safetensors")
    ratios = []
    for name, title in (("logits", "largest logit difference"), ("pre_logits", "of the head's input")):
        difference, largest = (theirs[name] - ours[name]).abs().max().item(), ours[name].abs().max().item()
        ratios.append(difference / max(largest, 1e-30))
        print(f"{title}: {difference:.2e}, {ratios[-1]:.2e} of the largest")
    return all(ratio <= MAX_RATIO for ratio in ratios)  # False also for NaN


def _move(folder: Path, out: Path) -> None:
    """Publishes the files; an OUT being overwritten has no config.json meanwhile, so that it never looks complete."""
    if not out.exists():
        os.replace(folder, out)
        return
    (out / "config.json").unlink(missing_ok=True)
    for name in reversed(FILES):
        shutil.move(folder / name, out / name)


if __name__ == "__main__":
    cli.run(main)
