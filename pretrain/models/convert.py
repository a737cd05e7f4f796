"""Conversion: how each format is written, verified and loaded; files are published only when all is right.

`convert` leaves files at OUT with their card; tools/convert.py calls it. docs/conversion.md says what goes where.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from pretrain.errors import StorageError
from pretrain.escape import shown
from pretrain.models.card import model_card
from pretrain.models.google import class_names_file, for_google, write_google
from pretrain.models.onnx_file import write_onnx
from pretrain.models.publish import WRITTEN, publish_files, publish_folder, staging
from pretrain.models.tensors import Weights
from pretrain.models.timm_folder import write_own_folder, write_timm_folder
from pretrain.models.transformers_folder import for_transformers, write_transformers_folder
from pretrain.models.verify import Comparison, Source, compare, same_tensors
from pretrain.models.weights import read_weights
from pretrain.provenance import versions


class Target(NamedTuple):
    """A format: how it is written and loaded, and, where it is read without loss, how it is compared bit for bit."""

    write: Callable[[Weights, Path, str], None]  # weights, folder or file, naming
    loading: str  # Python, see `loading` for what is filled in
    from_hub: str  # the same from a repository of the Hugging Face hub
    expected: Callable[[Weights, str], Weights] | None = None  # weights and naming -> what reading must give


TARGETS = {
    "pretrain": Target(
        lambda weights, out, naming: write_own_folder(weights, out),
        'from pretrain.models import load_model\nmodel = load_model("{out}")',
        "from huggingface_hub import snapshot_download\nfrom pretrain.models import load_model\n"
        'model = load_model(snapshot_download("{repository}"))',
        lambda weights, naming: weights,
    ),
    "timm": Target(
        lambda weights, out, naming: write_timm_folder(weights, out),
        'import timm\nmodel = timm.create_model("local-dir:{out}", pretrained=True)',
        'import timm\nmodel = timm.create_model("hf-hub:{repository}", pretrained=True)',
    ),
    "transformers": Target(
        lambda weights, out, naming: write_transformers_folder(weights, out),
        'from transformers import {kind}\nmodel = {kind}.from_pretrained("{out}"{options})',
        'from transformers import {kind}\nmodel = {kind}.from_pretrained("{repository}"{options})',
        lambda weights, naming: for_transformers(weights),
    ),
    "npz": Target(
        write_google,
        "import numpy\narrays = numpy.load(\"{out}\")  # or vision_transformer's and big_vision's own loaders",
        "import numpy\nfrom huggingface_hub import hf_hub_download\n"
        'arrays = numpy.load(hf_hub_download("{repository}", "{out}"))  # or Google\'s own loaders',
        for_google,
    ),
    "onnx": Target(
        lambda weights, out, naming: write_onnx(weights, out),
        'import onnxruntime\nsession = onnxruntime.InferenceSession("{out}/model.onnx")',
        "import onnxruntime\nfrom huggingface_hub import snapshot_download\n"
        'session = onnxruntime.InferenceSession(snapshot_download("{repository}") + "/model.onnx")',
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
        told = ", ".join(f"{found.output} differ by {found.ratio:.1e}" for found in comparison.differences)
        proof = f"Verified in fresh processes, largest value 1: {told}."
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
    """Prints what the verification found; returns it if differences are rounding, None if they are larger."""
    target, problem = TARGETS[conversion.target], None
    if target.expected:
        expected = target.expected(weights, conversion.naming)
        problem = same_tensors(expected, read_weights(out, weights.model.image_size))
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


def loading(target: str, weights: Weights, place: str, repository: str | None = None) -> str:
    """Returns the Python lines that load the result from a place or, if given, from a repository of the hub."""
    no_pooler = not weights.num_classes and weights.model.representation_size is None  # ViTModel would draw one
    code = TARGETS[target].from_hub if repository else TARGETS[target].loading
    return code.format(
        out=place,
        repository=repository,
        kind="ViTForImageClassification" if weights.num_classes else "ViTModel",
        options=", add_pooling_layer=False" if no_pooler else "",
    )
