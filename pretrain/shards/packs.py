"""Packs that are divided into splits already: .npz, or tars of KEY.jpg and KEY.cls."""

import re
from pathlib import Path

from pretrain.data.manifest import LABEL_ENDING
from pretrain.data.reader import MAX_LABEL_BYTES
from pretrain.errors import UserError
from pretrain.escape import shown
from pretrain.shards.archives import Original, content_of, is_image, members_of, original_of
from pretrain.shards.sources import encoded_items

_SPLIT_WORD = re.compile(r"(?<![a-z])(trainval|train|val|validation|dev_?test|test)(?![a-z])")


def split_of(path: Path) -> str | None:
    """Returns the split in a pack's name: train, val or test (cifar100_val200.npz, eurosat_devtest.tar.gz)."""
    found = set(_SPLIT_WORD.findall(path.name.lower()))
    names = {"validation": "val", "devtest": "test", "dev_test": "test"}
    return names.get(word := found.pop(), word) if len(found) == 1 else None


def pack_originals(path: Path) -> list[Original]:
    """Returns the samples of a .npz pack, or of a .tar or .tar.gz of KEY.jpg and KEY.cls, in the pack's order."""
    if path.suffix == ".npz":
        items, classes = encoded_items(path)
        labels = [item.label for item in items if isinstance(item.label, int)]  # all of them: an array of integers
        named = [classes[label] if label < len(classes) else "" for label in labels]
        return [Original(f"{path.name}[{i}]", item, named[i]) for i, item in enumerate(items)]
    members = members_of(path)
    labels = {name.rpartition(".")[0]: file for file in members if (name := file.name).endswith(f".{LABEL_ENDING}")}
    originals = []
    for file in members:
        key = file.name.rpartition(".")[0]
        if is_image(file):
            text = content_of(labels[key], MAX_LABEL_BYTES).strip() if key in labels else b""
            if not text.isdigit() or len(text) > 9:
                named = f"{shown(file.name)} has no label; expected {shown(key)}.{LABEL_ENDING} with digits"
                raise UserError(f"{path}: {named}")
            originals.append(original_of(file, int(text))._replace(id=key))
    return originals
