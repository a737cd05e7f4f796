"""Google's published ViT .npz files: names, sizes and licences.

Names come from google-research/vision_transformer (README, its table of recommended files with their sizes),
google-research/big_vision (VANITY_NAMES of models/vit.py), timm 1.0 (pretrained_cfgs of its vision_transformer*.py)
and, for imagenet21k+imagenet2012 and H/14, jeonsworld/ViT-pytorch and lukemelas/PyTorch-Pretrained-ViT.
"""

import re
from typing import NamedTuple

from pretrain.config.checks import did_you_mean
from pretrain.errors import UserError

BUCKET = "https://storage.googleapis.com/vit_models"  # public; also gs://vit_models


class GoogleFile(NamedTuple):
    """A file of Google's bucket."""

    path: str  # in the bucket
    mebibytes: int | None = None  # as the README gives it; None: not given
    sha256: str | None = None  # None: nobody published it; then the server's CRC-32C is compared
    licence: str = "Apache-2.0"  # of vision_transformer, which publishes the files; timm's cards of them say the same


_I21K, _I1K = "augreg/{}-i21k-300ep-lr_0.001-{}", "augreg/{}-i1k-300ep-lr_0.001-{}"
_TO_1K = "--imagenet2012-steps_20k-lr_{}-res_{}"

# By model, as AugReg's authors and timm name it: the pre-trained file, its size, and the fine-tuned ones.
_RECOMMENDED = {  # README of vision_transformer: the best of each model in pre-training
    "L_16": ("aug_strong1-wd_0.1-do_0.0-sd_0.0", 1243, [("0.01", 384)]),
    "B_16": ("aug_medium1-wd_0.1-do_0.0-sd_0.0", 391, [("0.03", 384), ("0.01", 384), ("0.01", 224)]),
    "S_16": ("aug_light1-wd_0.03-do_0.0-sd_0.0", 115, [("0.03", 384), ("0.03", 224)]),
    "R50_L_32": ("aug_medium1-wd_0.1-do_0.1-sd_0.1", 1337, [("0.01", 384), ("0.01", 224)]),
    "R26_S_32": ("aug_light1-wd_0.1-do_0.0-sd_0.0", 170, [("0.01", 384)]),
    "Ti_16": ("aug_none-wd_0.03-do_0.0-sd_0.0", 37, [("0.03", 384), ("0.03", 224)]),
    "B_32": ("aug_light1-wd_0.1-do_0.0-sd_0.0", 398, [("0.01", 384)]),
    "S_32": ("aug_none-wd_0.1-do_0.0-sd_0.0", 118, [("0.01", 384)]),
    "R_Ti_16": ("aug_none-wd_0.03-do_0.0-sd_0.0", 40, [("0.03", 384), ("0.03", 224)]),
}
_OTHERS = (  # timm and big_vision
    ("B_8", "aug_medium1-wd_0.1-do_0.0-sd_0.0", [("0.01", 224)]),
    ("B_8", "aug_medium2-wd_0.1-do_0.0-sd_0.0", []),
    ("L_16", "aug_medium1-wd_0.1-do_0.1-sd_0.1", [("0.01", 224), ("0.01", 384)]),
    ("B_32", "aug_medium1-wd_0.03-do_0.0-sd_0.0", [("0.03", 224)]),
    ("S_32", "aug_light1-wd_0.03-do_0.0-sd_0.0", [("0.03", 224), ("0.03", 384)]),
    ("R26_S_32", "aug_medium2-wd_0.03-do_0.0-sd_0.0", [("0.03", 384)]),
    ("R50_L_32", "aug_medium2-wd_0.1-do_0.0-sd_0.0", [("0.01", 384)]),
)
_FINE_TUNED_ONLY = (  # neither timm nor big_vision names a file of their pre-training
    (_I21K, "B_32", "aug_light1-wd_0.1-do_0.0-sd_0.0", [("0.03", 384)]),
    (_I21K, "R26_S_32", "aug_light0-wd_0.03-do_0.1-sd_0.1", [("0.03", 224)]),
    (_I1K, "B_16", "aug_strong2-wd_0.1-do_0.1-sd_0.1", [("0.01", 224), ("0.01", 384)]),
    (_I1K, "B_32", "aug_medium2-wd_0.1-do_0.1-sd_0.1", [("0.01", 224), ("0.01", 384)]),
    (_I1K, "S_16", "aug_medium2-wd_0.1-do_0.0-sd_0.0", [("0.01", 224), ("0.01", 384)]),
)
_PAPER = ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14", "R50+ViT-B_16")
_PAPER_1K = ("ViT-B_16", "ViT-B_16-224", "ViT-B_32", "ViT-L_16", "ViT-L_16-224", "ViT-L_32", "R50+ViT-B_16")


def _files() -> dict[str, GoogleFile]:
    found: dict[str, int | None] = {f"imagenet21k/{name}": None for name in _PAPER}
    found |= {f"imagenet21k+imagenet2012/{name}": None for name in _PAPER_1K}
    recommended = [(model, *row) for model, row in _RECOMMENDED.items()]
    others = [(model, recipe, None, fine_tuned) for model, recipe, fine_tuned in _OTHERS]
    for model, recipe, mebibytes, fine_tuned in [*recommended, *others]:
        found[_I21K.format(model, recipe)] = mebibytes
        found |= {_I21K.format(model, recipe) + _TO_1K.format(*of): None for of in fine_tuned}
    for upstream, model, recipe, fine_tuned in _FINE_TUNED_ONLY:
        found |= {upstream.format(model, recipe) + _TO_1K.format(*of): None for of in fine_tuned}
    found |= {f"sam/{name}": None for name in ("ViT-B_16", "ViT-B_32")}
    return {name: GoogleFile(f"{name}.npz", mebibytes) for name, mebibytes in found.items()}


FILES = _files()
# The longest in the table has 102 letters; a file's name has at most 255.
_AUGREG = re.compile(r"augreg/[\w.+-]{1,200}", re.ASCII)
# ViT-B_16: the paper's, pre-trained on ImageNet-21k; B_16: AugReg's recommended one.
SHORT = {name: f"imagenet21k/{name}" for name in _PAPER}
SHORT |= {model: _I21K.format(model, recipe) for model, (recipe, _, _) in _RECOMMENDED.items()}


def google_file(name: str) -> GoogleFile:
    """Returns the file that a name means: ViT-B_16, B_16, or FOLDER/NAME. Raises UserError for one not in the table."""
    plain = name.removesuffix(".npz")
    if found := FILES.get(SHORT.get(plain, plain)):
        return found
    if _AUGREG.fullmatch(plain) and ".." not in plain:
        return GoogleFile(f"{plain}.npz")  # one of 50,000, listed in the bucket's augreg/index.csv
    raise UserError(
        f"google:{name}: is not in the table of Google's files: {', '.join(SHORT)}, or FOLDER/NAME as in "
        f"pretrain/models/google_files.py.{did_you_mean(plain, [*SHORT, *FILES])}"
    )
