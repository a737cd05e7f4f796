"""Proof that converted weights are the trained model: both sides' outputs, each by its own code in a fresh process.

Both import at once, and then compute one after the other, so that two models are never in memory together. Compared
are the logits and the head's input, since a head that is still zero would hide a wrong body.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from pretrain.config import MINUS_ONE_TO_ONE, Normalisation, load_config
from pretrain.errors import UserError
from pretrain.models.claims import check_tensors
from pretrain.models.deepspeed_pickles import read_deepspeed
from pretrain.models.equivalent import part_names, resized, without
from pretrain.models.tensors import Weights
from pretrain.models.weights import model_of, read_weights

MAX_RATIO = 1e-5  # of the largest value: float32 rounding gives 1e-7 to 3e-6
HYBRID_MAX_RATIO = 1e-4  # a trunk's float32 outputs are 1e-5 from its float64 ones already (R26+S, nearly initial)
_ROOT = Path(__file__).resolve().parents[2]
_IN_MINUS_ONE_TO_ONE = ("npz", "onnx")  # targets that take images in [-1, 1], whatever the weights' own are
_FOLDERS = ("PRETRAIN_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE")  # where weights by name are found
_PIPE = subprocess.PIPE
_LARGE = 100_000_000  # above so many parameters only one image is compared


@dataclass(frozen=True)
class Source:
    """Weights to be converted, as plain values that can be passed to another process."""

    path: str
    image_size: int | None = None  # pixels; None: the trained ones
    without: tuple[str, ...] = ()  # parts to leave out: "head", "pre_logits"
    config: str | None = None  # recipe of a checkpoint that DeepSpeed wrote, whose pickles are trusted
    of_run: str | None = None  # as in `read_weights`

    def read(self) -> Weights:
        """Returns the weights. Raises UserError unless they have exactly the tensors of their architecture."""
        path = Path(self.path)
        if self.config is None:
            weights = read_weights(path, self.image_size, self.of_run)
        else:
            weights = read_deepspeed(path, load_config(self.config))
            weights = weights if self.image_size is None else resized(weights, self.image_size)
        for part in self.without:
            if not part_names(weights, part):
                raise UserError(f"{weights.source}: has no {part} to leave out")
        if set(self.without) == {"pre_logits"} and weights.num_classes:
            raise UserError(
                f"{weights.source}: the head was trained on the representation layer and means nothing without it; "
                "--without head pre_logits leaves out both"
            )
        weights = without(weights, *self.without)
        check_tensors(weights)
        return weights


class Difference(NamedTuple):
    """How far the two sides are apart."""

    output: str  # "logits" or "features", the head's input
    largest_difference: float
    ratio: float  # of the largest value


class Comparison(NamedTuple):
    """What the two processes found."""

    differences: list[Difference]
    max_ratio: float  # what is still rounding
    memory_bytes: dict[str, int]  # each process's peak, above what its imports had taken

    @property
    def passed(self) -> bool:
        return all(difference.ratio <= self.max_ratio for difference in self.differences)  # False also for NaN


def compare(source: Source, weights: Weights, target: str, out: Path, work: Path) -> Comparison:
    """Returns how far a target's own code is from the source's model on random images, normalised as each expects it.

    target: "pretrain", "npz", "timm", "transformers" or "onnx", whose files are at `out`; work: a folder for the
    outputs. Raises UserError when the memory does not suffice, RuntimeError when the target's code fails.
    """
    size = weights.model.image_size
    num_values = sum(torch.Size(tensor.shape).numel() for tensor in weights.tensors.values())
    images = torch.rand(1 if num_values > _LARGE else 4, 3, size, size, generator=torch.Generator().manual_seed(0))
    argument = str(out)
    if target in ("pretrain", "npz"):
        argument = json.dumps(asdict(Source(str(out), size if target == "npz" else None)))
    with (
        _started(_OURS, json.dumps(asdict(source)), work / "ours.safetensors") as ours,
        _started(_PROGRAMS[target], argument, work / "theirs.safetensors") as theirs,
    ):
        _write_images(images, weights.normalisation, work)
        memory_bytes = {"ours": _computed(ours, "ours")}
        _write_images(images, MINUS_ONE_TO_ONE if target in _IN_MINUS_ONE_TO_ONE else weights.normalisation, work)
        memory_bytes[target] = _computed(theirs, "theirs")
    outputs, others = load_file(work / "ours.safetensors"), load_file(work / "theirs.safetensors")
    differences = []
    for name, values in outputs.items():
        largest_difference, largest = (others[name] - values).abs().max().item(), values.abs().max().item()
        differences.append(Difference(name, largest_difference, largest_difference / max(largest, 1e-30)))
    max_ratio = MAX_RATIO if weights.model.trunk_units is None else HYBRID_MAX_RATIO
    return Comparison(differences, max_ratio, memory_bytes)


def _write_images(pixels: torch.Tensor, normalisation: Normalisation, work: Path) -> None:
    """Writes pixels [B, 3, H, W] in [0, 1] as a side's model takes them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalisation)
    images = pixels * 2 - 1 if normalisation == MINUS_ONE_TO_ONE else (pixels - mean) / std
    save_file({"images": images}, work / "images.safetensors")


def check_installed(target: str) -> None:
    """Raises UserError when the code that would read the result is not there."""
    module = {"onnx": "onnxruntime"}.get(target, target)
    if target in ("transformers", "onnx") and importlib.util.find_spec(module) is None:
        raise UserError(f"--to {target} is verified with {module}, which is not installed: pip install {module}")


def same_tensors(expected: Weights, found: Weights) -> str | None:
    """Returns what differs first, bit for bit; None when nothing does. Holds two tensors at a time.

    Logits do not show everything: biases of keys cancel in the softmax.
    """
    if expected.num_classes != found.num_classes:
        return "the classes differ"
    if expected.tensors.keys() != found.tensors.keys():
        return f"tensors differ: {sorted(expected.tensors.keys() ^ found.tensors.keys())[:3]}"
    for name, tensor in expected.tensors.items():
        if not torch.equal(tensor.read(), found.tensors[name].read()):
            return f"{name} differs"
    return None


@contextmanager
def _started(program: str, argument: str, outputs: Path) -> Iterator[subprocess.Popen[str]]:
    """Starts a program in the folder of `outputs`; it imports what it needs, and waits there for `_computed`."""
    command = [sys.executable, "-c", PEAK_MEMORY + program + _END, argument, str(outputs)]
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    folders = {name: os.environ[name] for name in _FOLDERS if os.environ.get(name)}
    # Relative paths are of the current folder, not of the program's. Those with ~ or $ are left to the hub's library.
    environment |= {name: os.path.abspath(value) for name, value in folders.items() if value[0] not in "~$"}
    with subprocess.Popen(
        command, cwd=outputs.parent, env=environment, stdin=_PIPE, stdout=_PIPE, stderr=_PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # where the other has failed


def _computed(process: subprocess.Popen[str], side: str) -> int:
    """Lets a program compute on images.safetensors; returns the bytes that it took beyond its imports."""
    told, errors = process.communicate("compute\n")
    if process.returncode < 0:
        raise UserError(
            f"the verification ({side}) was killed by signal {-process.returncode}, as when memory is short; "
            "--no-verify writes without proof"
        )
    if process.returncode:
        raise RuntimeError(f"the verification ({side}) failed: {errors.strip()[-2000:]}")
    return int(told.split()[-1])


def our_outputs(source: Source, images: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """Returns the head's input, and the logits where there is a head, of weights as this package computes them."""
    parts = model_of(weights := source.read())
    with torch.no_grad():
        tokens = parts.forward_features(images)  # type: ignore[operator]  # timm's models have it too
        outputs = {"features": parts.forward_head(tokens, pre_logits=True)}  # type: ignore[operator]
        if weights.num_classes:
            outputs["logits"] = parts.forward_head(tokens)  # type: ignore[operator]
    return outputs


# What a user of the target would run. argv: the folder or file, where the outputs go. They take over `images`.
PEAK_MEMORY = """
import sys
from safetensors.torch import load_file, save_file
def peak():  # of this process alone: getrusage's figure begins with that of the process that started it
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
def imported():
    taken = peak()
    sys.stdin.readline()
    return taken
"""
_END = """
save_file({name: value.contiguous() for name, value in outputs.items()}, sys.argv[2])
print(peak() - imports)
"""
_OURS = """
import json, torch
from pretrain.models.verify import Source, our_outputs
imports = imported()
outputs = our_outputs(Source(**json.loads(sys.argv[1])), load_file("images.safetensors")["images"])
"""
_TIMM = """
import timm, torch
imports = imported()
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
with torch.no_grad():
    tokens = model.forward_features(load_file("images.safetensors")["images"])
    outputs = {"features": model.forward_head(tokens, pre_logits=True), "logits": model.forward_head(tokens)}
"""
_TRANSFORMERS = """
import torch
from safetensors import safe_open
from transformers import ViTForImageClassification, ViTModel
imports = imported()
with safe_open(sys.argv[1] + "/model.safetensors", "pt") as file:
    names = file.keys()
classifies, pooled = "classifier.weight" in names, "pooler.dense.weight" in names
kind, options = (ViTForImageClassification, {}) if classifies else (ViTModel, {"add_pooling_layer": pooled})
model, told = kind.from_pretrained(sys.argv[1], output_loading_info=True, use_safetensors=True, **options)
assert not told["missing_keys"] and not told["unexpected_keys"], told
images = load_file("images.safetensors")["images"]
with torch.no_grad():
    body = (model.vit if classifies else model).eval()(images)
    outputs = {"features": body.pooler_output if pooled else body.last_hidden_state[:, 0]}
    if classifies:
        outputs["logits"] = model(images).logits
"""
_ONNX = """
import onnxruntime, torch
imports = imported()
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
found = session.run(names, {"images": load_file("images.safetensors")["images"].numpy()})
outputs = {name: torch.from_numpy(values) for name, values in zip(names, found)}
"""
_PROGRAMS = {"pretrain": _OURS, "npz": _OURS, "timm": _TIMM, "transformers": _TRANSFORMERS, "onnx": _ONNX}
