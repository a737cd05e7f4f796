"""What --train and --test name: folders of class folders, folders of splits, manifests; which part each one is.

`find_parts` hands on a path for each part that is there; own_data.py makes shards of them.
"""

from pathlib import Path

from pretrain.errors import UserError
from pretrain.escape import shown
from pretrain.shards.listing import files_below, is_of_the_system
from pretrain.shards.pictures import stored_ending
from pretrain.shards.sources import SPLIT_NAMES, holds_classes, is_split_name

MANIFEST = "manifest.json"


def find_parts(train: Path, test: Path | None) -> tuple[dict[str, Path], list[str]]:
    """Returns where train, val and test are, those that are there, and what is to be told.

    A folder with train, val, test inside is taken apart; where one of val and test is there, it is scored. Val that
    --test names is the test and chooses nothing. Raises UserError for what is no folder or manifest, and for pictures
    that would be left out.
    """
    _check("--train", train)
    inside = _parts_inside(train)
    parts = inside or {"train": train}
    told = [f"{train}: its folders {', '.join(path.name for path in inside.values())} are taken as such"] * bool(inside)
    if test is not None:
        _check("--test", test)
        of_test = _parts_inside(test)
        scored = of_test.get("test") or of_test.get("val") or test
        if of_test and scored == test:
            raise UserError(f"{test}: has train inside, and neither val nor test; give --test the folder to score")
        parts["test"] = scored
    elif "val" in parts and "test" not in parts:
        parts["test"] = parts.pop("val")
    places = {name: _place(path) for name, path in parts.items()}
    if places.get("test") == places["train"]:
        raise UserError(f"{parts['test']}: is what is trained on; leave out --test, and a part is held out of it")
    if "val" in places and places["val"] == places["test"]:
        del parts["val"]
    return parts, told


def is_manifest(path: Path) -> bool:
    """Returns whether a path names shards: their manifest.json, or the folder that holds it."""
    return path.name == MANIFEST or (path / MANIFEST).is_file()


def _place(path: Path) -> Path:
    """The folder of a part, which its manifest.json names as well."""
    place = path.resolve()
    return place.parent if place.name == MANIFEST else place


def name_of(train: Path) -> str:
    """Returns what a set is called: the name of its folder; of photos/train, or photos/manifest.json, "photos"."""
    place = train.resolve()
    while place.name == MANIFEST or is_split_name(place.name):
        place = place.parent
    return shown(place.name) or "data"


def _check(option: str, path: Path) -> None:
    """Raises UserError unless a path is a folder or a manifest."""
    if not path.exists():
        raise UserError(f"{option} {path}: not found; expected a folder of class folders, or a manifest.json")
    if not path.is_dir() and not is_manifest(path):
        raise UserError(
            f"{option} {path}: is a file; give a folder of class folders ({option} photos for photos/CLASS/NAME.jpg), "
            f"or make shards of it with tools/make_shards.py and give their folder"
        )


def _parts_inside(folder: Path) -> dict[str, Path]:
    """The parts that a folder holds as folders of their own; none where it holds classes, or is of shards."""
    if not folder.is_dir() or is_manifest(folder):
        return {}
    folders = {path.name.lower(): path for path in sorted(folder.iterdir()) if _is_folder(path)}
    if folders and all(map(is_split_name, folders)) and not any(map(_holds_classes, folders.values())):
        first = next(iter(folders.values()))
        raise UserError(f"{first}: holds no class folders; expected {first}/CLASS/NAME.jpg")
    found = {}
    for part, names in SPLIT_NAMES.items():
        here = [folders[name] for name in names if name in folders and _holds_classes(folders[name])]
        if here:
            found[part] = here[0]
    if "train" not in found:
        return {}
    for path in folders.values():
        if path not in found.values() and any(stored_ending(file.name) for file in files_below(path)):
            raise UserError(
                f"{path}: holds pictures beside {', '.join(one.name for one in found.values())}, which are taken as "
                f"the parts of a set; move it elsewhere, or give --train {found['train']} and --test"
            )
    return found


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not is_of_the_system(path.name)


def _holds_classes(folder: Path) -> bool:
    """Whether a folder has folders and no pictures of its own, or is of shards: else it is a class itself."""
    return is_manifest(folder) or holds_classes(folder)
