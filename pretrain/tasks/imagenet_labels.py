"""Which predictions count on ImageNet's variants: the ReaL labels, and the classes of ImageNet-A and -R."""

import json
from collections.abc import Sequence
from importlib.resources import files as package_files

from pretrain.errors import UserError
from pretrain.shards.imagenet import wnids
from pretrain.tasks.table import Task


def scored_classes(task: Task) -> list[int] | None:
    """Returns the classes whose logits count, in order; None: all. Of ImageNet-A and -R, 200 of the 1000 do."""
    if task.scored_wnids is None:
        return None
    return [wnids().index(wnid) for wnid in wnids(task.scored_wnids)]


def real_labels(names: Sequence[str]) -> list[list[int]]:
    """Returns the ReaL labels of ImageNet validation images by name; an image with an empty list is not scored.

    Folders in front of a name do not count: val/n01751748/ILSVRC2012_val_00000001 is ILSVRC2012_val_00000001. The
    lists are those of google-research/reassessed-imagenet, as timm ships them. Raises UserError on another name.
    """
    lists = json.loads(package_files("timm.data").joinpath("_info", "imagenet_real_labels.json").read_text())
    by_name = {f"ILSVRC2012_val_{number:08d}": found for number, found in enumerate(lists, start=1)}
    bare = [name.rpartition("/")[2] for name in names]
    unknown = next((name for name, key in zip(names, bare) if key not in by_name), None)
    if unknown is not None:
        raise UserError(f"{unknown!r} is not an ImageNet validation image (ILSVRC2012_val_00000001): ReaL needs names")
    return [by_name[key] for key in bare]
