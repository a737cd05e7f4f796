"""Conversion: the formats, how each is written, verified and loaded, and the files in their place when all is right.

`convert` hands on files at OUT and their card; tools/convert.py calls it. docs/conversion.md says what goes where.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from pretrain.errors import StorageError
from pretrain.escape import shown
from pretrain.models.card import model_card
from pretrain.models.google import class_names_file, for_google, read_google, write_google
from pretrain.models.onnx_file import write_onnx
from pretrain.models.publish import WRITTEN, check_free, publish_files, publish_folder, staging
from pretrain.models.tensors import Weights
from pretrain.models.timm_folder import read_timm_folder, write_own_folder, write_timm_folder
from pretrain.models.transformers_folder import for_transformers, read_transformers_folder, write_transformers_folder
from pretrain.models.verify import Comparison, Source, compare, same_tensors
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


@dataclass(frozen=True)
class Conversion:
    """What is converted, to what, and how."""

    source: Source
    target: str  # of TARGETS
    out: Path  # folder to write; of npz the file
    naming: str  # of npz
    verified: bool
    command: str  # as it was typed, for the card
    repository: str | None  # OWNER/NAME of the hub from which the card loads; None: from the folder
    licence: str | None = None  # of the weights, for the card

    @property
    def place(self) -> Path:
        """Where the result goes, whatever the current folder is by then."""
        return self.out.resolve()

    @property
    def beside(self) -> list[Path]:
        """The files that belong to a result that is a file: class names and card."""
        return [class_names_file(self.place), self.place.with_suffix(".md")] if self.target == "npz" else []


def check_place(conversion: Conversion, *, overwrite: bool) -> None:
    """Raises UserError when something is where the result goes, unless it may be replaced."""
    check_free(conversion.place, conversion.beside, overwrite=overwrite)


def convert(conversion: Conversion, weights: Weights) -> bool:
    """Writes, verifies and publishes; returns False, with the reason on stderr, when the result is not the source.

    Raises StorageError when a disk is full or fails. What was at OUT is then unchanged, in both cases.
    """
    out, beside = conversion.place, conversion.beside
    try:
        with staging(out) as folder:
            written = folder if beside else folder / "written"
            if not _write(conversion, weights, written / out.name if beside else written, folder):
                return False
            if beside:
                publish_files(written, out, beside)
            else:
                publish_folder(written, out)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise StorageError(f"{conversion.out}: cannot be written ({error}); what was there is unchanged") from None
    return True


def files_for_hub(conversion: Conversion) -> dict[str, Path]:
    """Returns the files at OUT by the names that they have on the hub."""
    out = conversion.place
    files = {name: out / name for name in WRITTEN}
    if conversion.beside:
        names, card = conversion.beside
        files = {out.name: out, names.name: names, "README.md": card}  # the one card that the hub shows
    return {name: path for name, path in files.items() if path.exists()}


def _write(conversion: Conversion, weights: Weights, out: Path, work: Path) -> bool:
    """Writes and verifies the files at `out`, in the staging folder, and their card; returns whether they are right."""
    TARGETS[conversion.target].write(weights, out, conversion.naming)
    proof = "Not verified: --no-verify was given."
    if conversion.verified:
        comparison = _verify(conversion, weights, out, work)
        if comparison is None:
            return False
        proof = f"Verified in fresh processes, largest value 1: {_in_words(comparison)}."
    card = out.with_suffix(".md") if conversion.beside else out / "README.md"
    text = model_card(
        weights,
        conversion.target,
        title=conversion.place.name,
        command=conversion.command,
        versions=versions(),
        loading=loading(conversion.target, weights, conversion.out.name, conversion.repository),
        proof=proof,
        licence=conversion.licence,
        without=conversion.source.without,
    )
    card.write_text(text, encoding="utf-8")
    return True


def _verify(conversion: Conversion, weights: Weights, out: Path, work: Path) -> Comparison | None:
    """Prints what the verification found; returns it when it is rounding, None when it is more."""
    target, problem = TARGETS[conversion.target], None
    if target.read and target.expected:
        problem = same_tensors(target.expected(weights, conversion.naming), target.read(out, weights.model.image_size))
        print(shown("tensors read back: " + (problem or "all equal, bit for bit")))
    with staging(work / "verification") as folder:
        comparison = compare(conversion.source, weights, conversion.target, out, folder)
    for name, title in (("logits", "largest logit difference"), ("features", "of the head's input")):
        for found in comparison.differences:
            if found.output == name:
                print(f"{title}: {found.largest_difference:.2e}, {found.ratio:.2e} of the largest")
    taken = ", ".join(f"{side} {num_bytes / 1e9:.2f} GB" for side, num_bytes in comparison.memory_bytes.items())
    print(f"memory of the verifying processes beyond their imports: {taken}")
    if comparison.passed and not problem:
        return comparison
    reason = problem or f"more than {comparison.max_ratio:g} of the largest"
    print(shown(f"error: {conversion.out}: not written: {reason}"), file=sys.stderr)
    return None


def _in_words(comparison: Comparison) -> str:
    return ", ".join(f"{found.output} differ by {found.ratio:.1e}" for found in comparison.differences)


def loading(target: str, weights: Weights, place: str, repository: str | None = None) -> str:
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
