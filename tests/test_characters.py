"""The demo's data: printed characters, a pure function of (seed, index), and the handwritten digits as the task."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from pretrain.shards import characters


def test_an_image_has_the_promised_shape_and_a_label_in_range() -> None:
    """`render` hands on a uint8 RGB square of the asked size, and a label that indexes CLASS_NAMES."""
    for image_size in (16, 32, 48):
        image, label = characters.render(3, seed=0, image_size=image_size)
        assert image.shape == (image_size, image_size, 3)
        assert image.dtype == np.uint8
        assert isinstance(label, int)
        assert 0 <= label < len(characters.CLASS_NAMES)


def test_the_same_index_gives_the_same_bytes_in_any_order() -> None:
    """No hidden state: rendering other images in between, or backwards, changes nothing."""
    forward = [characters.render(index, seed=5) for index in range(40)]
    backward = [characters.render(index, seed=5) for index in reversed(range(40))][::-1]
    for (image, label), (again, label_again) in zip(forward, backward, strict=True):
        assert label == label_again
        assert image.tobytes() == again.tobytes()


def test_a_fresh_process_gives_the_same_bytes() -> None:
    """Nothing depends on the process (string hashing, cache order), so two writers can share one set."""
    program = (
        "import hashlib; from pretrain.shards import characters;"
        "print(hashlib.sha256(b''.join(characters.render(i, seed=2)[0].tobytes() for i in (9, 4, 11))).hexdigest())"
    )
    digests = {
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    }
    assert len(digests) == 1


def test_different_indices_and_seeds_give_different_images() -> None:
    """200 indices under two seeds are 400 different images: neither argument is ignored."""
    images = {characters.render(index, seed=seed)[0].tobytes() for seed in (0, 1) for index in range(200)}
    assert len(images) == 400


def test_a_label_is_told_without_rendering() -> None:
    """The label of an image, and of no other one."""
    told = [characters.label_of(index, seed=3) for index in range(50)]
    assert told == [characters.render(index, seed=3)[1] for index in range(50)]


def test_every_label_is_reached_about_equally_often() -> None:
    """No class is missing or rare: over 60 images per class, each count stays within half and twice the mean."""
    classes = len(characters.CLASS_NAMES)
    labels = [characters.label_of(index, seed=0) for index in range(60 * classes)]
    counts = np.bincount(labels, minlength=classes)
    assert counts.min() > 30
    assert counts.max() < 120


def test_every_character_belongs_to_one_class_and_case_pairs_that_look_alike_are_merged() -> None:
    """All 62 letters and digits are used exactly once, and the look-alikes share a label."""
    used = "".join(characters.CLASS_CHARACTERS)
    assert sorted(used) == sorted("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
    assert len(set(characters.CLASS_NAMES)) == len(characters.CLASS_NAMES)
    label_of = {character: label for label, group in enumerate(characters.CLASS_CHARACTERS) for character in group}
    for alike in ("0Oo", "1Il", "Cc", "Ss", "Vv", "Zz"):
        assert len({label_of[character] for character in alike}) == 1
    for apart in ("aA", "gG", "69", "b6"):
        assert len({label_of[character] for character in apart}) == 2


def test_every_font_draws_every_character_as_a_shape_of_its_own() -> None:
    """The font list holds text fonts: each has all 62 glyphs, and no two classes are the same placeholder picture."""
    for group in characters.CLASS_CHARACTERS:
        for character in group:
            assert len(characters._fonts_with(character)) == len(characters.FONT_FILES)
    for path in characters._fonts_with("0"):
        shapes = {characters._glyph(path, name)[0].tobytes() for name in characters.CLASS_NAMES}
        assert len(shapes) == len(characters.CLASS_NAMES)


def test_the_character_is_visible_in_every_image() -> None:
    """Ink and paper differ in brightness after all distortion: no image is blank."""
    for index in range(2000):
        image, _ = characters.render(index, seed=7)
        brightness = image @ np.array([0.299, 0.587, 0.114])
        assert brightness.max() - brightness.min() > 20, index


def test_digits_task_splits_all_digits_into_two_parts_of_fixed_size() -> None:
    """797 + 1,000 images, together exactly scikit-learn's 1,797, every class in both parts."""
    train, train_labels, test, test_labels = characters.digits_task()
    assert train.shape == (797, 32, 32, 3) and test.shape == (1000, 32, 32, 3)
    assert train.dtype == test.dtype == np.uint8
    assert train_labels.shape == (797,) and test_labels.shape == (1000,)
    assert set(train_labels.tolist()) == set(test_labels.tolist()) == set(range(10))
    # 25 shots of every class must be there to take.
    assert np.bincount(train_labels).min() >= 25

    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    assert len(np.unique(digits.images.reshape(1797, -1), axis=0)) == 1797  # so bytes identify a digit
    together = {image.tobytes() for image in np.concatenate([train, test])}
    assert len(together) == 1797
    np.testing.assert_array_equal(np.bincount(np.concatenate([train_labels, test_labels])), np.bincount(digits.target))


def test_digits_task_is_the_same_every_time_and_gray() -> None:
    """The split and the enlarging have no randomness, and the three channels agree."""
    first, second = characters.digits_task(), characters.digits_task()
    for part, again in zip(first, second, strict=True):
        np.testing.assert_array_equal(part, again)
    assert (first[0][..., 0] == first[0][..., 1]).all() and (first[0][..., 0] == first[0][..., 2]).all()
