"""Which parts --train and --test name: folders of class folders, folders of splits, manifests.

`find_parts` returns a path for each part that exists; own_data.py makes shards of them.
"""

from pathlib import Path

from pretrain.errors import UserError
from pretrain.escape import shown
from pretrain.shards.listing import files_below, is_of_the_system
from pretrain.shards.pictures import stored_ending
from pretrain.shards.sources import SPLIT_NAMES, holds_classes, is_split_name

MANIFEST = "manifest.json"


def find_parts(train: Path, test: Path | None) -> tuple[dict[str, Path], list[str]]:
    """Returns the paths of train, val and test, where they exist, and notes for the user.

    A folder with train, val, test inside is split into these. Where only one of val and test exists, it is the test
    set. A val that --test names is the test set too, and is not used to choose the learning rate. Raises UserError for
    what is neither a folder nor a manifest, and for pictures that would be left out.
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
    """Returns the folder of a part; a part may be named by its folder or by the manifest.json in it."""
    place = path.resolve()
    return place.parent if place.name == MANIFEST else place


def name_of(train: Path) -> str:
    """Returns the name of a set, which is its folder's: "photos" for photos/train and for photos/manifest.json."""
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
    """Returns the parts that a folder holds as subfolders; {} where it holds classes or shards."""
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
    """Returns whether a folder holds folders and no pictures of its own, or shards: otherwise it is itself a class."""
    return is_manifest(folder) or holds_classes(folder)
