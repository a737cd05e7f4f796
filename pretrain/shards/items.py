"""The items of a data set: a list of `Item`s, or as many as a disk holds, packed in a few arrays.

An object for each image would take a kilobyte, 14 GB for 14 million. Packed, an image is the bytes of its name, their
end and its label, and becomes an `Item` when its shard is written.
"""

import errno
import hashlib
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, overload

import numpy as np

from pretrain.data.reader import BadSample
from pretrain.errors import PASSING_ERRORS, RETRY_AFTER_S, StorageError
from pretrain.escape import shown


class Item(NamedTuple):
    """A sample to be written."""

    read: Callable[[], bytes]  # the encoded image
    ending: str  # jpg, png, webp
    label: int | list[int]  # a class, or all classes of the image; one kind for a whole data set
    source: str  # where it came from, for error messages
    may_turn: bool = False  # whether reading applies the EXIF orientation, which gives a PNG whatever the ending


# Errors after which an image may be read later: a listed file is gone, or not visible on this machine; the machine
# lacks memory or descriptors. EIO may also be a bad sector, which would end every later start: see `read_item`.
_PASSING_WHEN_READ = PASSING_ERRORS - {errno.EIO} | {errno.ENOENT, errno.ENOTDIR}
_PASSING_WHEN_READ |= {errno.ENOMEM, errno.EMFILE, errno.ENFILE}

# Makes the item of a reference; notes on its picture are added to the counter when it is read. Sent to other processes,
# so it must be a function of a module, or a `partial` of one.
ItemOf = Callable[[str, int, Counter[str]], Item]


class PackedItems(Sequence[Item]):
    """Items in arrays: bytes of the references, their ends, their labels. Indexing makes the item."""

    # None: labels are single classes. Otherwise all are lists: these for some items, one label for each other item.
    # Set once all are appended.
    lists: Mapping[int, list[int]] | None = None

    def __init__(self, item_of: ItemOf) -> None:
        self.labels = array("i")
        self._item_of = item_of
        self._texts = bytearray()
        self._ends = array("q", [0])
        self._hash = hashlib.sha256()
        self._places: array | None = None  # of the items left, among all that were appended; None: all are left

    def append(self, reference: str, label: int, stamp: object = "") -> None:
        """Adds an item. stamp: what else identifies the same file in a later run, as its size and time."""
        text = reference.encode("utf-8", "surrogateescape")
        self._texts += text
        self._ends.append(len(self._texts))
        self.labels.append(label)
        self._hash.update(b"%d %d " % (len(text), label) + text + f" {stamp}\n".encode())

    def reference(self, index: int) -> str:
        """Returns what `append` was given."""
        if self._places is not None:
            index = self._places[index]
        return self._texts[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")

    def labels_of(self, index: int) -> list[int]:
        """Returns all labels of an item, sorted."""
        return (self.lists or {}).get(index, [self.labels[index]])

    def take(self, indices: Iterable[int], notes: Counter[str]) -> list[Item]:
        """Returns the items of some indices, which add to `notes` when they are read."""
        made = ((index, self._item_of(self.reference(index), self.labels[index], notes)) for index in indices)
        if self.lists is None:
            return [item for _, item in made]
        return [item._replace(label=self.labels_of(index)) for index, item in made]

    def without(self, dropped: Iterable[int], lists: Mapping[int, Iterable[int]] | None = None) -> "PackedItems":
        """Returns the items without some, in the same order; memory is shared.

        lists: makes all labels lists, these for some items, the single label for all others; None: labels stay.
        """
        here = np.asarray(self._places) if self._places is not None else np.arange(len(self), dtype=np.int32)
        stays = np.ones(len(self), dtype=bool)
        stays[[index for index in dropped]] = False
        kept = PackedItems(self._item_of)
        kept._texts, kept._ends, kept._hash = self._texts, self._ends, self._hash
        kept._places = array("i", here[stays].tobytes())
        kept.labels = array("i", np.asarray(self.labels)[stays].tobytes())
        if lists is None:
            lists = self.lists
        if lists is not None:
            place = np.cumsum(stays) - 1
            kept.lists = {int(place[index]): sorted(labels) for index, labels in lists.items() if stays[index]}
        return kept

    def relabelled(self, labels: Sequence[int]) -> "PackedItems":
        """Replaces each label k by labels[k], in place, and returns the same object."""
        self.labels = array("i", np.asarray(labels, dtype=np.int32)[np.asarray(self.labels)].tobytes())
        if self.lists is not None:
            self.lists = {index: sorted({labels[k] for k in own}) for index, own in self.lists.items()}
        return self

    def digest(self) -> str:
        """Returns the SHA-256 of references, labels and stamps as appended, of which are left, and of labels now."""
        digest = self._hash.copy()
        digest.update(self.labels)
        if self._places is not None:
            digest.update(self._places)
        if self.lists is not None:
            for index in sorted(self.lists):  # piece by piece: as one text it takes gigabytes
                digest.update(f"{index} {self.lists[index]}\n".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        found = range(len(self))[index]
        return self.take(found, Counter()) if isinstance(found, range) else self.take([found], Counter())[0]

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))


class Unreadable(BadSample):
    """An image that the disk fails to return: its bytes may be good, and a later read may succeed."""


def read_item(item: Item) -> bytes:
    """Returns an image's bytes. Raises StorageError for errors that may pass, Unreadable for all others.

    So an image is not left out for good because its disk was away. EIO is retried as often as in training.
    """
    for wait_s in (*RETRY_AFTER_S, None):
        try:
            return item.read()
        except StorageError:
            raise
        except OSError as error:  # of this file; the disk that is written to has errors of its own
            if error.errno in _PASSING_WHEN_READ:
                why = f"cannot be read for now ({error.strerror}); the same command goes on"
                raise StorageError(shown(f"{item.source}: {why}")) from None
            if error.errno != errno.EIO or wait_s is None:
                raise Unreadable("missing", f"cannot be read ({error.strerror})") from None
            time.sleep(wait_s)
    raise AssertionError


def taken(items: Sequence[Item], indices: Iterable[int], notes: Counter[str]) -> list[Item]:
    """Returns some items, of either kind of sequence; packed ones add to `notes` when they are read."""
    return items.take(indices, notes) if isinstance(items, PackedItems) else [items[index] for index in indices]


def digest_of(items: Sequence[Item]) -> str:
    """Returns the SHA-256 of what items are: names and labels; of packed ones also their stamps."""
    if isinstance(items, PackedItems):
        return items.digest()
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.label} {item.ending} {item.source}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
