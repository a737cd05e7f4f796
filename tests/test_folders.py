"""Folders as people have them: what is no image is passed over and counted, no picture is dropped without a word."""

import io
import json
import os
import subprocess
import sys
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from pretrain.data.images import decode
from pretrain.data.manifest import load_manifest
from pretrain.data.reader import MAX_IMAGE_BYTES, BadSample, read_sample
from pretrain.errors import UserError
from pretrain.shards.build import build
from pretrain.shards.class_list import ClassList, labels_of, read_class_list
from pretrain.shards.counts import read_counts, table_of
from pretrain.shards.make import Options, make_shards
from pretrain.shards.pictures import picture_of, read_picture
from pretrain.shards.sources import Item, Told, folder_items

ROOT = Path(__file__).resolve().parents[1]


def pixels(seed: int = 0, channels: int = 3) -> np.ndarray:
    """A small picture that has no symmetry."""
    return np.random.default_rng(seed).integers(0, 256, (9, 14, channels)).astype(np.uint8)


def picture(path: Path, seed: int = 0, form: str | None = None, **options: Any) -> Path:
    """Writes a picture in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path, form, **options)
    return path


def refusal(function: Any, *arguments: Any, **options: Any) -> str:
    """The message of a refusal, checked to be one line."""
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def stored(folder: Path) -> dict[tuple[int, bytes], int]:
    """The (label, pixels) of all samples of a data set, each with its number."""
    manifest = load_manifest(folder)
    samples = [read_sample(manifest, index) for index in range(manifest.num_samples)]
    return Counter((int(sample.label), decode(sample.image).numpy().tobytes()) for sample in samples)


def as_stored(seed: int = 0) -> bytes:
    """The pixels of `picture` as decoded."""
    return pixels(seed).transpose(2, 0, 1).tobytes()


def test_hidden_and_system_files_are_no_classes_and_no_images(tmp_path: Path) -> None:
    """At any depth; each is counted by its kind, and labels are those of the true classes."""
    root = tmp_path / "photos"
    for number, name in enumerate(("cat/1.png", "cat/deep/2.png", "dog/3.png")):
        picture(root / name, number)
    for name in (
        *(".ipynb_checkpoints/1.png", ".Trash-1000/files/2.png", "@eaDir/3.png", "__MACOSX/cat/4.png"),
        *("cat/.ipynb_checkpoints/5.png", "cat/deep/@eaDir/6.png", "$RECYCLE.BIN/7.png", "#recycle/8.png"),
    ):
        picture(root / name)
    for name in ("cat/._1.png", ".DS_Store", "dog/Thumbs.db", "cat/deep/desktop.ini"):
        (root / name).write_bytes(b"x")
    (root / "README.txt").write_text("x")
    (root / "dog" / "LICENSE").write_text("x")
    told = Told()
    items, classes = folder_items(root, told)
    assert classes == ["cat", "dog"]
    assert [(item.source.removeprefix(f"{root}/"), item.label) for item in items] == [
        ("cat/1.png", 0),
        ("cat/deep/2.png", 0),
        ("dog/3.png", 1),
    ]
    assert told.passed_over == {
        "files in hidden and system folders": 8,
        "hidden and system files": 4,
        ".txt files": 1,
        "files without an ending": 1,
    }


def test_links_count_once(tmp_path: Path) -> None:
    """A link that leads back to the root is no class; a loop says that it is one; no image in two classes."""
    root = tmp_path / "photos"
    picture(root / "cat" / "1.png")
    (root / "all").symlink_to(root)
    (root / "cat" / "up").symlink_to("..")
    told = Told()
    items, classes = folder_items(root, told)
    assert classes == ["cat"] and len(items) == 1 and told.passed_over == {"links that lead back up": 2}
    (root / "dog").symlink_to(root / "cat")
    assert "dog/1.png: is in class 'cat' too, by a link" in refusal(folder_items, root)
    (root / "dog").unlink()
    (root / "a").symlink_to(root / "b")
    (root / "b").symlink_to(root / "a")
    assert "a: is a link to" in (message := refusal(folder_items, root)) and "leads in a circle" in message
    (root / "a").unlink()
    (root / "b").unlink()
    (root / "cat" / "gone.png").symlink_to("nowhere.png")
    assert "gone.png: is a link to nowhere.png, which is not there" in refusal(folder_items, root)


@pytest.mark.parametrize("ending", ["bmp", "gif", "tif", "tiff", "avif", "jfif", "jpe"])
def test_other_formats_are_converted(tmp_path: Path, ending: str) -> None:
    """A class of them keeps all its images: pixels of lossless formats, those that AVIF decodes to, bytes of JPEG."""
    if ending == "avif" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    root = tmp_path / "photos"
    form = "JPEG" if ending in ("jfif", "jpe") else None
    path = picture(root / "cat" / f"1.{ending}", form=form)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1).tobytes()
    if ending in ("bmp", "tif", "tiff"):
        assert expected == as_stored()
    told = make_shards([root], None, tmp_path / "set", Options())[1]
    manifest = load_manifest(tmp_path / "set")
    sample = read_sample(manifest, 0)
    if form:
        assert sample.image == path.read_bytes() and not told.notes
    else:
        assert decode(sample.image).numpy().tobytes() == expected
        assert sum(count for note, count in told.notes.items() if "converted to PNG" in note) == 1


def test_of_several_pictures_the_first_is_taken_and_said(tmp_path: Path) -> None:
    """An animated GIF."""
    frames = [Image.fromarray(pixels(seed)) for seed in range(3)]
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    frames[0].save(tmp_path / "photos" / "cat" / "a.gif", save_all=True, append_images=frames[1:])
    told = make_shards([tmp_path / "photos"], None, tmp_path / "set", Options())[1]
    assert told.notes["GIF with several pictures, of which the first is taken"] == 1


def test_a_tiff_of_many_pictures_takes_no_longer() -> None:
    """Pillow counts them in the square of their number; whether there is a second one is enough."""
    file = io.BytesIO()
    Image.fromarray(pixels()[..., 0]).save(file, "tiff")
    data = file.getvalue()
    start = int.from_bytes(data[4:8], "little")
    tags = data[start : start + 2 + 12 * int.from_bytes(data[start : start + 2], "little")]  # then the next one's place
    size, again = len(tags) + 4, 20_000
    places = range(start, start + size * again, size)
    data = data[:start] + b"".join(tags + (place + size).to_bytes(4, "little") for place in places) + tags + bytes(4)
    notes, began = Counter[str](), os.times().user
    assert picture_of(data, "a.tif", notes).startswith(b"\x89PNG")
    assert os.times().user - began < 2 and notes["TIFF with several pictures, of which the first is taken"] == 1


def test_pictures_that_would_be_left_out_are_refused_by_name(tmp_path: Path) -> None:
    """A picture beside the class folders, and formats that nothing here reads."""
    root = tmp_path / "photos"
    picture(root / "cat" / "1.png")
    beside = picture(root / "2.png")
    assert "photos/2.png: is a picture beside the class folders" in refusal(folder_items, root)
    beside.unlink()
    for ending in ("heic", "psd", "svg", "nef"):
        path = root / "cat" / f"x.{ending}"
        path.write_bytes(b"x")
        assert f"x.{ending}: .{ending} pictures cannot be read here" in refusal(folder_items, root)
        path.unlink()
    for name in ("cat/b.heic", "cat/c.HEIC", "cat/a.nef", "notes.txt"):
        (root / name).write_bytes(b"x")
    told = refusal(folder_items, root)  # all of them, not one call each
    assert "a.nef: .nef pictures cannot be read here; the first of 2 .heic, 1 .nef: convert them" in told
    for path in root.rglob("?.[hn]*"):
        path.unlink()
    (root / "cat" / "c.HEIC").unlink(missing_ok=True)
    assert len(folder_items(root)[0]) == 1


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["train/cat/1.png", "test/cat/2.png"], None),
        (["Train/cat/1.png", "validation/cat/2.png", "test/old/3.png"], None),
        (["train/cat/1.png"], None),
        (["train/cat/1.png", "annotations/1.xml"], None),
        (["train/cat/1.png", "val/cat/2.png", "masks/1.png"], None),
        (["train/1.png", "test/2.png"], ["test", "train"]),  # pictures of trains and tests
        (["train/1.png", "train/old/2.png", "tram/3.png"], ["train", "tram"]),
        (["train/old/1.png", "tram/new/2.png"], ["train", "tram"]),
    ],
)
def test_parts_of_a_set_are_no_classes(tmp_path: Path, names: list[str], classes: list[str] | None) -> None:
    """photos/train/CLASS and photos/test/CLASS: a set of two classes train and test would be learnt without a word."""
    for number, name in enumerate(names):
        path = picture((tmp_path / name).with_suffix(".png"), number)
        path.rename(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    if classes is not None:
        assert folder_items(tmp_path)[1] == classes
        return
    told = refusal(folder_items, tmp_path)
    assert f"are parts of a set, which hold the classes; give one of them, {tmp_path / names[0][:5]}, and" in told


def test_an_unreadable_file_costs_itself(tmp_path: Path) -> None:
    """It is named like one that cannot be decoded, and the build goes on; nothing temporary is left."""

    def fails() -> bytes:
        raise PermissionError(13, "Permission denied", "x.png")

    (tmp_path / "a.png").write_bytes(b"")
    good = picture(tmp_path / "good.png")
    items = [Item(good.read_bytes, "png", 0, "good"), Item(fails, "png", 0, "secret.png")]
    build(items, ["a"], tmp_path / "set", samples_per_shard=5, seed=0)
    assert load_manifest(tmp_path / "set").num_samples == 1
    dropped = json.loads((tmp_path / "set" / "provenance.json").read_text())["dropped"]
    assert dropped == ["secret.png: missing: cannot be read (Permission denied)"]
    assert not list((tmp_path / "set").glob(".tmp*"))


def test_builder_and_reader_have_one_rule_of_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every reader would refuse is not written; the largest that is written can be read."""
    monkeypatch.setattr("pretrain.shards.build.decode", lambda *_: None)
    monkeypatch.setattr("pretrain.data.reader._expands", lambda data: False)
    sizes = (MAX_IMAGE_BYTES, MAX_IMAGE_BYTES + 1)
    items = [Item(lambda n=n: bytes(n), "png", 0, f"{n}.png") for n in sizes]
    build(items, ["a"], tmp_path / "set", samples_per_shard=5, seed=None)
    manifest = load_manifest(tmp_path / "set")
    assert manifest.num_samples == 1 and len(read_sample(manifest, 0).image) == MAX_IMAGE_BYTES
    (dropped,) = json.loads((tmp_path / "set" / "provenance.json").read_text())["dropped"]
    assert dropped.startswith(f"{MAX_IMAGE_BYTES + 1}.png: tar: ")


def test_a_png_with_much_text_beside_its_pixels_is_an_image(tmp_path: Path) -> None:
    """3 MB of compressed text, more than Pillow's reader allows: builder and reader take the pixels."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 3_000_000, zip=True)
    picture(tmp_path / "photos" / "cat" / "1.png", pnginfo=info)
    make_shards([tmp_path / "photos"], None, tmp_path / "set", Options())
    assert stored(tmp_path / "set") == {(0, as_stored()): 1}


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """A file of such a name is an image; left out, it is named escaped. A class of such a name is refused."""
    root = tmp_path / "photos"
    picture(root / "cat" / "1.png")
    odd = os.fsencode(root / "cat") + b"/caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes(b"broken")
    command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), str(root), str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "caf\\xe9.png" in done.stderr or "caf\\udce9.png" in done.stderr
    assert load_manifest(tmp_path / "set").num_samples == 1
    os.mkdir(os.fsencode(root) + b"/d\xf6g")
    assert "is not UTF-8, and it names a class" in refusal(folder_items, root)


def test_out_may_be_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT given as `.`: shards bear the folder's name."""
    picture(tmp_path / "photos" / "cat" / "1.png")
    (tmp_path / "trees").mkdir()
    monkeypatch.chdir(tmp_path / "trees")
    make_shards([tmp_path / "photos"], None, Path("."), Options())
    manifest = load_manifest(tmp_path / "trees")
    assert manifest.name == "trees" and manifest.shards[0].path.name == "trees-000000.tar"


def test_photos_are_turned_when_asked(tmp_path: Path) -> None:
    """EXIF orientation: kept as it lies and said, or turned without loss; transparency is said."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    picture(tmp_path / "photos" / "cat" / "1.jpg", form="webp", lossless=True, exif=exif)  # a WebP under that name
    Image.fromarray(pixels(1, 4)).save(tmp_path / "photos" / "cat" / "2.png")
    told = make_shards([tmp_path / "photos"], None, tmp_path / "kept", Options())[1]
    assert {note.partition(",")[0]: count for note, count in told.notes.items()} == {
        "that their EXIF says to turn": 1,
        "with transparency": 1,
    }
    make_shards([tmp_path / "photos"], None, tmp_path / "turned", Options(apply_orientation=True))
    clear = pixels(1, 4)[..., :3].transpose(2, 0, 1).tobytes()
    assert stored(tmp_path / "kept") == {(0, as_stored()): 1, (0, clear): 1}
    upright = np.rot90(pixels(), -1).transpose(2, 0, 1).tobytes()
    assert stored(tmp_path / "turned") == {(0, upright): 1, (0, clear): 1}
    for name, endings in (("kept", ["jpg", "png"]), ("turned", ["png", "png"])):
        with tarfile.open(tmp_path / name / f"{name}-000000.tar") as tar:
            members = [member.rpartition(".")[2] for member in tar.getnames()]
        assert sorted(ending for ending in members if ending != "cls") == endings


@pytest.mark.parametrize("form, side", [("jpg", 5300), ("webp", 4100)])
def test_photos_too_large_to_be_turned_are_refused(form: str, side: int, tmp_path: Path) -> None:
    """Before they are decoded: a progressive JPEG takes 13 bytes per pixel, a WebP 18. As they lie they are kept."""
    exif = Image.Exif()
    exif[0x0112] = 6
    options: dict[str, Any] = {"progressive": True, "subsampling": 0} if form == "jpg" else {"method": 0, "quality": 1}
    path = tmp_path / f"1.{form}"
    Image.new("RGB", (side, side)).save(path, exif=exif, **options)
    assert read_picture(path, Counter()) == path.read_bytes()
    with pytest.raises(BadSample, match=f"{side} x {side} pixels take .* MB to decode"):
        read_picture(path, Counter(), apply_orientation=True)


def test_labels_are_places_of_names(tmp_path: Path) -> None:
    """A subset of the classes, in another order: every folder gets the label of its own name."""
    names = ClassList(("n01", "n02", "n03"), source="names.json")
    assert labels_of(["n01", "n03"], names)[0] == [0, 2]
    assert "'n04' is not one of the classes of names.json" in refusal(labels_of, ["n01", "n04"], names)
    root = tmp_path / "photos"
    for number, name in enumerate(("n03", "n01")):
        picture(root / name / "1.png", number)
    told = make_shards([root], names, tmp_path / "set", Options())[1]
    assert told.classes == "2 of 3 classes of names.json, recognised by name" and not told.notes
    assert stored(tmp_path / "set") == {(2, as_stored(0)): 1, (0, as_stored(1)): 1}
    assert load_manifest(tmp_path / "set").class_names == ("n01", "n02", "n03")
    assert read_counts(tmp_path / "set") == ([1, 0, 1], ["n01", "n02", "n03"])


def test_what_folders_may_be_called() -> None:
    """Numbers, with zeros in front too; ids of the list; accents in either form; ImageNet's WordNet ids."""
    twelve = ClassList(tuple("abcdefghijkl"), source="names.json")
    assert labels_of([str(n) for n in range(12)], twelve) == (list(range(12)), "number")
    assert labels_of(["00", "11"], twelve) == ([0, 11], "number")
    assert "'12' is not one of the classes" in refusal(labels_of, ["0", "12"], twelve)
    assert "'01' are the same class" in refusal(labels_of, ["1", "01"], twelve)
    assert labels_of(["2", "0"], ClassList(("2", "0")))[0] == [0, 1]  # names that are numbers are names
    assert labels_of(["n2"], ClassList(("cat", "dog"), ("n1", "n2"))) == ([1], "id")
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert labels_of([decomposed], ClassList(("thé", composed)))[0] == [1]
    thousand = ClassList(tuple(f"class {n}" for n in range(1000)))
    assert labels_of(["n01440764", "n15075141"], thousand)[0] == [0, 999]
    own = ClassList(thousand.names, tuple(f"n{n:08d}" for n in range(1000)), "names.json")
    assert "'n01440764' is not one of the classes" in refusal(labels_of, ["n01440764"], own)  # the list has its own ids
    cranes = ClassList(("crane", "cat", "crane"), source="names.json")
    assert "'crane' stands several times in names.json (0, 2)" in refusal(labels_of, ["crane"], cranes)


def test_class_lists_are_read(tmp_path: Path) -> None:
    """A list, an object with names and ids, Keras' index; anything else is refused in one line."""
    path = tmp_path / "names.json"
    for values, names, ids in (
        (["a", ["b", "bee"]], ("a", "b, bee"), ()),
        ({"names": ["a", "b"], "wnids": ["n1", "n2"]}, ("a", "b"), ("n1", "n2")),
        ({"0": ["n1", "a"], "1": ["n2", "b"]}, ("a", "b"), ("n1", "n2")),
        ({"0": "tench", "1": "goldfish"}, ("tench", "goldfish"), ()),
    ):
        path.write_text(json.dumps(values))
        assert read_class_list(path)[:2] == (names, ids)
    for values in ({"other": 1}, 7, {"names": "ab"}, {"names": ["a"], "wnids": ["n1", "n2"]}, [1], [["a", 2]]) + (
        *({"names": {"0": "a"}}, {"names": ["a", "b"], "wnids": "xy"}, [[]], [""], ["\ud800"], []),
    ):
        path.write_text(json.dumps(values))
        assert "expected a JSON list of names" in refusal(read_class_list, path)
    for values in (
        ["a" * 5000],
        [["a"] * 2000],
        ["a", {"b": 1}],
        [None],
        [["a", []]],
        [0.5],
        {"0": None},
        {"names": []},
    ):
        path.write_text(json.dumps(values))
        assert len(refusal(read_class_list, path)) < 500
    for text in ("", "[" * 100_000, "[" * 100 + "]" * 100, "9" * 5000):
        path.write_text(text)
        assert f"{path}: is n" in refusal(read_class_list, path)
    lines = tmp_path / "names.txt"
    lines.write_text("thé\n\n tench \n", encoding="utf-8-sig")  # with a mark before the first name, as on Windows
    assert read_class_list(lines).names == ("thé", "tench")


def test_the_table_of_counts(tmp_path: Path) -> None:
    """All classes of a small set, also those without images; the ends of a large one."""
    assert table_of([3, 0, 12], ["cat", "dog", "elk"]) == [
        *("   3 cat", "   0 dog", "  12 elk"),
        "  1 classes have no image: dog",
    ]
    lines = table_of([*range(100)], [])
    assert "100 classes: 0 to 99 images, median 49.5" in lines[0] and len(lines) == 12


def test_photos_as_people_have_them(tmp_path: Path) -> None:
    """All of it at once, through the tool: its table and its counts are right to the file."""
    root = tmp_path / "photos"
    for number in range(3):
        picture(root / "cat" / f"{number}.jpg", number)
    for number, name in enumerate(("a.bmp", "b.gif", "c.tiff", "d.jfif")):
        picture(root / "dog" / name, number, "JPEG" if name == "d.jfif" else None)
    exif = Image.Exif()
    exif[0x0112] = 8
    picture(root / "dog" / "phone.jpg", 5, exif=exif)
    Image.fromarray(pixels(6, 4)).save(root / "dog" / "logo.png")
    (root / "cat" / "broken.jpg").write_bytes(b"\xff\xd8broken")
    (root / "elk").mkdir()
    (root / "elk" / "more").symlink_to(root / "elk")
    for name in ("cat/._0.jpg", ".DS_Store", "elk/notes.txt"):
        (root / name).write_bytes(b"x")
    picture(root / ".Trash-1000" / "files" / "x.jpg")
    command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), str(root), str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:5] == [
        f"{tmp_path}/set/manifest.json: 9 samples in 1 shards, 3 classes",
        *("  3 cat", "  6 dog", "  0 elk", "  1 classes have no image: elk"),
    ]
    assert sorted(lines[5:]) == [
        "passed over: 1 .txt files",
        "passed over: 1 files in hidden and system folders",
        "passed over: 1 links that lead back up",
        "passed over: 2 hidden and system files",
        "pictures: 1 BMP converted to PNG",
        "pictures: 1 GIF converted to PNG",
        "pictures: 1 TIFF converted to PNG",
        "pictures: 1 that their EXIF says to turn, kept as they lie (--apply-orientation turns them)",
        "pictures: 1 with transparency, which is dropped: the colours beneath it show",
    ]
    assert "1 images left out" in done.stderr and "broken.jpg: decode" in done.stderr
    kept = json.loads((tmp_path / "set" / "counts.json").read_text())
    assert kept["images"] == [3, 6, 0] and kept["passed_over"]["hidden and system files"] == 2


def test_without_pictures_nothing_is_written(tmp_path: Path) -> None:
    """A folder of other files says what was expected."""
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "x.txt").write_text("x")
    message = refusal(make_shards, [tmp_path / "photos"], None, tmp_path / "set", Options())
    assert "no images found; expected" in message and not (tmp_path / "set").exists()


def test_images_in_memory_are_untouched() -> None:
    """What the tests above compare with: PNG keeps pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels()).save(file, "png")
    assert decode(file.getvalue()).numpy().tobytes() == as_stored()


def test_damaged_pictures_of_other_formats_cost_themselves(tmp_path: Path) -> None:
    """Pillow raises many types on cut files; wherever a GIF or a TIFF ends, it is left out, and nothing else is."""
    for ending in ("gif", "tiff"):
        whole = picture(tmp_path / f"a.{ending}").read_bytes()
        path = tmp_path / f"cut.{ending}"
        for size in range(0, len(whole), 7):
            path.write_bytes(whole[:size])
            try:
                read_picture(path, Counter())
            except BadSample:
                continue


def test_values_that_would_be_clipped_are_refused(tmp_path: Path) -> None:
    """16-bit TIFF keeps its values; 32-bit and float ones, whose range is not known, are named, never made white."""
    ramp = np.linspace(0, 65535, 600).reshape(20, 30)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "a.tiff")
    found = decode(read_picture(tmp_path / "a.tiff", Counter()))
    assert np.array_equal(found[0].numpy(), ramp.astype(np.uint16) >> 8)
    for values in (ramp.astype(np.int32), ramp.astype(np.float32)):
        Image.fromarray(values).save(tmp_path / "b.tiff")
        with pytest.raises(BadSample, match="whose range is not known"):
            read_picture(tmp_path / "b.tiff", Counter())


def test_an_option_without_effect_is_refused(tmp_path: Path) -> None:
    """--apply-orientation of tars, which are indexed as they are."""
    (tmp_path / "a.tar").write_bytes(b"")
    options = Options(apply_orientation=True)
    assert "has no effect on" in refusal(make_shards, [tmp_path / "a.tar"], None, tmp_path / "out", options)


def test_an_out_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    """Inside the source, where it would become a class; a file; below a file."""
    root = tmp_path / "photos"
    path = picture(root / "cat" / "1.png")
    assert "would become a class of it" in refusal(make_shards, [root], None, root / "out", Options())
    for out in (path, path / "out"):
        items = [Item(bytes, "png", 0, "")]
        assert "cannot be made a folder" in refusal(build, items, [], out, samples_per_shard=1, seed=0)


def test_archives_of_other_labels_are_refused(tmp_path: Path) -> None:
    """-1 is not the last class; labels that are no whole numbers, no images, a cut file."""
    blob = np.frombuffer(picture(tmp_path / "1.png").read_bytes(), np.uint8)
    path = tmp_path / "a.npz"

    def archive(label: Any) -> Path:
        np.savez(path, blob=blob, offset=np.array([0, len(blob)]), label=label, classes=np.array(["a", "b"]))
        return path

    names = ClassList(("b", "a"), source="names.json")
    for label in (-1, 5):
        assert f"label {label} is not one of" in refusal(
            make_shards, [archive([label])], names, tmp_path / "o", Options()
        )
    assert "expected whole numbers" in refusal(make_shards, [archive([0.9])], None, tmp_path / "o", Options())
    path.write_bytes(archive([0]).read_bytes()[:200])
    assert "not an archive of images" in refusal(make_shards, [path], None, tmp_path / "o", Options())
