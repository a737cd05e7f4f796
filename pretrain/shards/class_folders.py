"""Original sets whose folders are classes."""

from pathlib import Path

from pretrain.errors import UserError
from pretrain.shards.archives import File, Original, files_of, is_image, original_of


def class_folders(path: Path, classes: dict[str, int]) -> list[Original]:
    """Returns the images of a folder or tar whose innermost folders bear the names of classes."""
    originals = []
    for file in files_of(path):
        if is_image(file):
            folder = _folder_of(file, path)
            original = original_of(file, class_of(folder, classes, path), folder)
            originals.append(original._replace(id=f"{folder}/{original.id}"))  # sketch_3.JPEG is in each folder
    if not originals:
        raise UserError(f"{path}: no images found; expected folders {next(iter(classes))} and so on")
    return originals


def _folder_of(file: File, path: Path) -> str:
    return Path(file.source if path.is_dir() else file.name).parent.name


def sorted_class_folders(path: Path, num_classes: int) -> list[Original]:
    """Returns the images of a folder or tar whose innermost folders are classes, numbered in alphabetical order."""
    names = sorted({_folder_of(file, path) for file in files_of(path) if is_image(file)})
    if len(names) != num_classes:
        raise UserError(f"{path}: has images in {len(names)} folders, expected one for each of {num_classes} classes")
    return class_folders(path, {name: number for number, name in enumerate(names)})


def class_of(name: str, classes: dict[str, int], path: Path) -> int:
    if name not in classes:
        raise UserError(f"{path}: {name!r} is not one of the {len(classes)} classes, as {next(iter(classes))!r} is")
    return classes[name]
