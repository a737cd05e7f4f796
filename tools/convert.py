"""Converts weights to the format of another library, and proves it: same images, same logits, in fresh processes.

python tools/convert.py WEIGHTS OUT --to pretrain|timm|transformers|npz|onnx
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.errors import StorageError, UserError
from pretrain.models.card import model_card
from pretrain.models.google import WRITTEN, class_names_file, for_google, read_google, write_google
from pretrain.models.onnx_file import write_onnx
from pretrain.models.publish import WRITTEN as WRITTEN_IN_FOLDERS
from pretrain.models.publish import check_free, publish_files, publish_folder, staging
from pretrain.models.tensors import Weights
from pretrain.models.timm_folder import read_timm_folder, write_own_folder, write_timm_folder
from pretrain.models.transformers_folder import for_transformers, read_transformers_folder, write_transformers_folder
from pretrain.models.verify import Comparison, Source, check_installed, compare, same_tensors
from pretrain.provenance import versions


class Target(NamedTuple):
    """A format: how it is written and loaded, and, where it is read without loss, how it is compared bit for bit."""

    write: Callable[[Weights, Path, str], None]  # weights, folder or file, naming
    loading: str  # Python, with OUT, KIND and OPTIONS to be replaced
    from_hub: str  # the same from the repository REPOSITORY of the Hugging Face hub
    expected: Callable[[Weights, str], Weights] | None = None  # weights and naming -> what reading must give
    read: Callable[[Path, int], Weights] | None = None  # path and image size


TARGETS = {
    "pretrain": Target(
        lambda weights, out, naming: write_own_folder(weights, out),
        'from pretrain.models import load_model\nmodel = load_model("OUT")',
        "from huggingface_hub import snapshot_download\nfrom pretrain.models import load_model\n"
        'model = load_model(snapshot_download("REPOSITORY"))',
        lambda weights, naming: weights,
        lambda path, image_size: read_timm_folder(path),
    ),
    "timm": Target(
        lambda weights, out, naming: write_timm_folder(weights, out),
        'import timm\nmodel = timm.create_model("local-dir:OUT", pretrained=True)',
        'import timm\nmodel = timm.create_model("hf-hub:REPOSITORY", pretrained=True)',
    ),
    "transformers": Target(
        lambda weights, out, naming: write_transformers_folder(weights, out),
        'from transformers import KIND\nmodel = KIND.from_pretrained("OUT"OPTIONS)',
        'from transformers import KIND\nmodel = KIND.from_pretrained("REPOSITORY"OPTIONS)',
        lambda weights, naming: for_transformers(weights),
        lambda path, image_size: read_transformers_folder(path),
    ),
    "npz": Target(
        write_google,
        "import numpy\narrays = numpy.load(\"OUT\")  # or vision_transformer's and big_vision's own loaders",
        "import numpy\nfrom huggingface_hub import hf_hub_download\n"
        'arrays = numpy.load(hf_hub_download("REPOSITORY", "OUT"))  # or Google\'s own loaders',
        for_google,
        read_google,
    ),
    "onnx": Target(
        lambda weights, out, naming: write_onnx(weights, out),
        'import onnxruntime\nsession = onnxruntime.InferenceSession("OUT/model.onnx")',
        "import onnxruntime\nfrom huggingface_hub import snapshot_download\n"
        'session = onnxruntime.InferenceSession(snapshot_download("REPOSITORY") + "/model.onnx")',
    ),
}


def main() -> int:
    arguments = _parse()
    out = arguments.out.resolve()
    beside = [class_names_file(out), out.with_suffix(".md")] if arguments.to == "npz" else []
    check_free(out, beside, overwrite=arguments.overwrite)
    if not arguments.no_verify:
        check_installed(arguments.to)
    if arguments.push:
        from pretrain.models.hub import check_login

        check_login(arguments.push)
    config = str(arguments.config.resolve()) if arguments.trust_pickle else None
    source = Source(str(arguments.weights.resolve()), arguments.image_size, tuple(arguments.without), config)
    weights = source.read()
    try:
        with staging(out) as folder:
            written = folder if beside else folder / "written"
            if not _write(arguments, source, weights, written / out.name if beside else written, folder):
                return 1
            if beside:
                publish_files(written, out, beside)
            else:
                publish_folder(written, out)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise StorageError(f"{arguments.out}: cannot be written ({error}); what was there is unchanged") from None
    names = f", {len(weights.class_names)} class names" if weights.class_names else ""
    print(f"{arguments.out}: {len(weights.tensors)} tensors, {weights.num_classes} classes{names}. To load it:")
    print(_loading(arguments.to, weights, str(arguments.out)))
    if arguments.push:
        from pretrain.models.hub import push

        files = {name: out / name for name in WRITTEN_IN_FOLDERS}
        if beside:
            names, card = beside
            files = {out.name: out, names.name: names, "README.md": card}  # the one card that the hub shows
        print(push({name: path for name, path in files.items() if path.exists()}, arguments.push))
    return 0


def _parse() -> argparse.Namespace:
    parser = cli.parser(
        "Converts a run (its newest valid checkpoint), a checkpoint step-N, a folder of ours, timm or transformers,\n"
        "a Google .npz, or, with --trust-pickle, a checkpoint that DeepSpeed wrote. Two further processes check that\n"
        "the result gives the source's logits; else nothing is written. docs/conversion.md says what goes where.",
        "python tools/convert.py runs/NAME converted/NAME --to timm",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="what to convert")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; with --to npz a file NAME.npz")
    parser.add_argument("--to", choices=TARGETS, required=True, help="format")
    parser.add_argument("--naming", choices=WRITTEN, help="of npz: as published (default), or of the code of today")
    parser.add_argument(
        "--without", choices=["head", "pre_logits"], nargs="+", default=[], help="parts to leave out of the result"
    )
    parser.add_argument("--image-size", type=int, metavar="N", help="pixels: learned positions are resized for it")
    parser.add_argument("--no-verify", action="store_true", help="write without the proof, in a tenth of the time")
    parser.add_argument("--overwrite", action="store_true", help="replace what OUT holds, once the result is complete")
    parser.add_argument(
        "--trust-pickle", action="store_true", help="execute the pickles of DeepSpeed's checkpoint; needs --config"
    )
    parser.add_argument("--config", type=Path, metavar="RECIPE.yaml", help="names the architecture for --trust-pickle")
    parser.add_argument("--push", metavar="OWNER/NAME", help="then upload to this repository of the Hugging Face hub")
    arguments = parser.parse_args()
    if arguments.trust_pickle != (arguments.config is not None):
        raise UserError("--trust-pickle and --config RECIPE.yaml go together: pickles do not tell their architecture")
    if arguments.naming and arguments.to != "npz":
        raise UserError(f"--naming {arguments.naming} is of --to npz, not of --to {arguments.to}")
    if arguments.to == "npz" and arguments.out.suffix != ".npz":
        raise UserError(f"{arguments.out}: --to npz writes a file; give a name that ends in .npz")
    if arguments.image_size is not None and arguments.image_size < 1:
        raise UserError(f"--image-size is {arguments.image_size}, expected pixels")
    return arguments


def _write(arguments: argparse.Namespace, source: Source, weights: Weights, out: Path, work: Path) -> bool:
    """Writes and verifies the files at `out`, in the staging folder, and their card; returns whether they are right."""
    target, naming = TARGETS[arguments.to], arguments.naming or "released"
    target.write(weights, out, naming)
    proof = "Not verified: --no-verify was given."
    if not arguments.no_verify:
        comparison = _verify(arguments, source, weights, out, work)
        if comparison is None:
            return False
        proof = f"Verified in fresh processes, largest value 1: {_told(comparison)}."
    card = out.with_suffix(".md") if arguments.to == "npz" else out / "README.md"
    text = model_card(
        weights,
        arguments.to,
        title=arguments.out.resolve().name,
        command=shlex.join(["python", "tools/convert.py", *sys.argv[1:]]),
        versions=versions(),
        loading=_loading(arguments.to, weights, arguments.out.name, arguments.push),
        proof=proof,
    )
    card.write_text(text, encoding="utf-8")
    return True


def _verify(
    arguments: argparse.Namespace, source: Source, weights: Weights, out: Path, work: Path
) -> Comparison | None:
    """Prints what the verification found; returns it when it is rounding, None when it is more."""
    target, naming, problem = TARGETS[arguments.to], arguments.naming or "released", None
    if target.read and target.expected:
        problem = same_tensors(target.expected(weights, naming), target.read(out, weights.model.image_size))
        print("tensors read back: " + (problem or "all equal, bit for bit"))
    with staging(work / "verification") as folder:
        comparison = compare(source, weights, arguments.to, out, folder)
    for name, title in (("logits", "largest logit difference"), ("features", "of the head's input")):
        for found in comparison.differences:
            if found.output == name:
                print(f"{title}: {found.largest_difference:.2e}, {found.ratio:.2e} of the largest")
    taken = ", ".join(f"{side} {num_bytes / 1e9:.2f} GB" for side, num_bytes in comparison.memory_bytes.items())
    print(f"memory of the verifying processes beyond their imports: {taken}")
    if comparison.passed and not problem:
        return comparison
    reason = problem or f"more than {comparison.max_ratio:g} of the largest"
    print(f"error: {arguments.out}: not written: {reason}", file=sys.stderr)
    return None


def _told(comparison: Comparison) -> str:
    return ", ".join(f"{found.output} differ by {found.ratio:.1e}" for found in comparison.differences)


def _loading(target: str, weights: Weights, place: str, repository: str | None = None) -> str:
    """Returns the lines that load the result from a place, or, if there is one, from a repository of the hub."""
    no_pooler = not weights.num_classes and weights.model.representation_size is None  # ViTModel would draw one
    words = {
        "OUT": place,
        "REPOSITORY": repository or "",
        "KIND": "ViTForImageClassification" if weights.num_classes else "ViTModel",
        "OPTIONS": ", add_pooling_layer=False" if no_pooler else "",
    }
    code = TARGETS[target].from_hub if repository else TARGETS[target].loading
    return re.sub("|".join(words), lambda found: words[found[0]], code)


if __name__ == "__main__":
    cli.run(main)
