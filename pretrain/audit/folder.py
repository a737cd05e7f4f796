"""The content of a run's folder, read on demand: starts, checkpoints, logs; and the data set that it names.

Imports no torch, so that the audit begins at once.
"""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.audit.logs import Lie, lie, open_log, rows, rows_of
from pretrain.checkpoint.layout import MAX_RANKS, MAX_STEP, own_file, read_manifest, step_folders, step_of
from pretrain.config import MAX_SOURCES, Config, Source, load_config
from pretrain.data.lanes import lanes_in
from pretrain.data.manifest import MAX_SAMPLES, Manifest, check_shards, load_manifest
from pretrain.data.mixture import Mixture, joined, phases_in, source_lanes_in
from pretrain.data.order import Order, order_of
from pretrain.data.store import store_at
from pretrain.errors import UserError
from pretrain.json_files import Fields, brief
from pretrain.storage import crc32c

ORDERS = (("permuted", "v1"), ("lanes", "v1"))  # names and versions
MAX_COUNT = 2**63 - 1
_MAX_STARTS_BYTES = 256 << 20
_MAX_DONE_BYTES = 1 << 20  # a step and some scores


class LeftOut(Exception):
    """A check cannot be made, for the reason given; it has not passed either."""


@dataclass(frozen=True)
class Options:
    """What the audit reads."""

    full: bool  # every step, every listed sample, every byte
    data: Path | None  # where the data set is; None: where the config says
    no_data: bool
    seed: int  # of the random choices


@dataclass(frozen=True)
class Start:
    """A line of starts.jsonl."""

    place: str  # file and line
    step: int
    world_size: int
    branched: bool  # it continued from another run's checkpoint; not recorded by earlier versions
    values: Fields
    before: str  # SHA-256 of the lines before this one
    until: str  # SHA-256 of the lines up to and including this one


@dataclass(frozen=True)
class Segment:
    """The steps first..last whose log lines are from one start."""

    first: int
    last: int  # MAX_STEP for those of the last start
    world_size: int
    samples_logged: bool | None  # None: not recorded


@dataclass(frozen=True)
class Saved:
    """A checkpoint, as its state.json describes it."""

    path: Path
    step: int
    state: Fields

    @property
    def place(self) -> Path:
        """The file to name in a message."""
        return self.path / "state.json"

    @property
    def train(self) -> Fields:
        """The run's counters."""
        return self.state.part("train")

    @property
    def said_order(self) -> Fields:
        """What the checkpoint says about order and data set."""
        return self.state.part("data").part("order")

    @property
    def receipt(self) -> Fields | None:
        """What the checkpoint says about the samples seen; None in checkpoints of earlier versions."""
        return self.state.part("receipt") if self.state.values.get("receipt") else None

    @property
    def starts(self) -> str:
        """SHA-256 of the lines of starts.jsonl when it was saved; "" where that is not recorded."""
        return self.state.text("starts_sha256", "")


@dataclass(frozen=True)
class Listed:
    """bad_samples.jsonl or damaged_samples.jsonl as columns: int64 steps, epochs and indices, reasons, shards."""

    path: Path
    steps: np.ndarray
    epochs: np.ndarray
    indices: np.ndarray
    reasons: list[str]
    shards: list[str]

    def __len__(self) -> int:
        return len(self.steps)

    def place(self, number: int) -> str:
        """The line to name in a message."""
        return f"{self.path}: line {number + 1}"

    def counts(self, until: int) -> dict[str, int]:
        """Returns how many samples of steps up to `until` are listed, by reason."""
        return Counter(self.reasons[: np.searchsorted(self.steps, until, side="right")])


def own_parts(path: Path, sources: Sequence[Source]) -> Path:
    """Returns the shortest end of a set's path, its folder or more, that no other set of the mixture shares."""
    folders = [source.path.parent if source.path.suffix == ".json" else source.path for source in sources]
    own = path.parent if path.suffix == ".json" else path
    for depth in range(1, len(own.parts) + 1):
        if sum(folder.parts[-depth:] == own.parts[-depth:] for folder in folders) == 1:
            return Path(*own.parts[-depth:])
    return Path(*own.parts[1:])


class Run:
    """A run's folder. Each part is read on first access, which may raise UserError; Lie is a subclass."""

    def __init__(self, folder: Path, options: Options) -> None:
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: has no config.yaml; expected the folder of a run, such as runs/NAME")
        self.folder, self.options = folder, options

    @cached_property
    def done(self) -> Fields | None:
        """The content of DONE; None while there is none."""
        path = self.folder / "DONE"
        try:
            with open_log(path) as file:
                return Fields.parse(file.read(_MAX_DONE_BYTES), str(path))
        except FileNotFoundError:
            return None

    @property
    def saved(self) -> list[Saved]:
        """The checkpoints, oldest first; each state.json was checked against the checksum in its manifest."""
        if isinstance(self._saved, Exception):
            raise self._saved
        return self._saved

    @cached_property
    def _saved(self) -> list[Saved] | Exception:
        """Cached, the error too, since nearly every check reads the checkpoints."""
        found = []
        for path in reversed(step_folders(self.folder / "checkpoints")):
            try:
                found.append(_saved(path))
            except (UserError, OSError) as error:
                if path.exists():  # otherwise a running training has just deleted it, as too old
                    return error
        return found

    @cached_property
    def config(self) -> Config:
        """The config of the last start."""
        return load_config(self.folder / "config.yaml")

    @cached_property
    def starts(self) -> list[Start]:
        """The lines of starts.jsonl."""
        path = self.folder / "starts.jsonl"
        if not os.path.lexists(path):
            raise Lie(f"{path}: is missing; expected a line for each start")
        with open_log(path) as file:
            text = file.read(_MAX_STARTS_BYTES + 1)
        if len(text) > _MAX_STARTS_BYTES:
            raise Lie(f"{path}: has more than {_MAX_STARTS_BYTES:,} bytes, which is the limit of such a file")
        found, begin, digest = [], 0, hashlib.sha256()
        for fields in rows_of(io.BytesIO(text), path):  # not from the file: a start may be added meanwhile
            step, world_size = fields.integer("step", 0, MAX_STEP), fields.integer("world_size", 1, MAX_RANKS)
            before, end = digest.hexdigest(), text.index(b"\n", begin) + 1
            digest.update(text[begin:end])
            until, begin = digest.hexdigest(), end
            branched = fields.flag("branched", False)
            found.append(Start(fields.source, step, world_size, branched, fields, before, until))
        if not found:
            raise Lie(f"{path}: is empty; expected a line for each start")
        return found

    @cached_property
    def segments(self) -> list[Segment]:
        """Which start wrote the log lines of each step: a start drops the lines after its step and rewrites them."""
        kept: list[Start] = []
        for start in self.starts[self.origin :]:
            while kept and kept[-1].step >= start.step:
                kept.pop()
            kept.append(start)
        ends = [*(start.step for start in kept[1:]), MAX_STEP]
        return [
            Segment(s.step + 1, end, s.world_size, s.values.flag("samples_logged") if _tells_logged(s) else None)
            for s, end in zip(kept, ends)
        ]

    @cached_property
    def origin(self) -> int:
        """The index of the start with which the run began.

        The last start that branched off, since one that was killed in its first save left nothing; the first start
        where none did, or an earlier version did not record it.
        """
        return max((number for number, start in enumerate(self.starts) if start.branched), default=0)

    @cached_property
    def first_step(self) -> int:
        """0, or for a run that branched off, the step of the other run's checkpoint."""
        return self.starts[self.origin].step

    @property
    def newest(self) -> Saved:
        """The newest checkpoint."""
        if not self.saved:
            raise LeftOut("no checkpoint yet")
        return self.saved[-1]

    @cached_property
    def trained(self) -> int:
        """The steps that count: those of the newest checkpoint. Later ones are not saved yet, or will be repeated."""
        return self.newest.step

    @cached_property
    def identity(self) -> tuple[str, Mapping[str, Any]]:
        """The file of the newest checkpoint that describes order and data set, and what it says."""
        return str(self.newest.place), self.newest.said_order.values

    @cached_property
    def manifest(self) -> Manifest:
        """The data set on the disk."""
        if self.options.no_data:
            raise LeftOut("--no-data")
        data, loaded = self.config.data, []
        for source in data.sources[: max(2, len(self.sources))]:  # a start may have added one and saved nothing yet
            path = self.options.data or source.path
            if self.options.data and data.is_mixture:
                path /= own_parts(source.path, data.sources)
            if not path.exists():
                raise LeftOut(f"{path} is not here; give its place with --data")
            loaded.append(load_manifest(path))
        store = store_at(data.store, data.store_gb)
        loaded = [replace(manifest, store=store) if manifest.is_remote else manifest for manifest in loaded]
        return joined(loaded, all_classes=data.join_classes)[0] if data.is_mixture else loaded[0]

    @cached_property
    def own_data(self) -> Manifest:
        """The data set, if it is the run's and complete: otherwise its samples prove nothing. Raises LeftOut."""
        if self.manifest.sha256 != self.identity[1].get("manifest_sha256"):
            raise LeftOut("the data set on the disk is another one")
        if self.manifest.num_samples != self.order.num_samples:
            raise LeftOut("the data set on the disk has another number of samples")
        shards = self.manifest.shards
        paths = [s.path.with_suffix(".idx") for s in shards] + [s.path for s in shards if not s.url]
        if missing := sum(not path.exists() for path in paths):
            raise LeftOut(f"{missing} of {len(paths)} shards and indexes are not here")
        for source in self.manifest.sources or [self.manifest]:
            check_shards(source)
        return self.manifest

    def order_holds(self, step: int) -> bool:
        """Returns whether a step follows `order`: a resume may have changed a mixture's weights, unsaved."""
        return self.order.mixture is None or step <= self.trained

    @cached_property
    def order(self) -> Order:
        """The order of the run's samples. Its size is the receipt's, or the manifest's where there is no receipt."""
        place, identity = self.identity
        if (key := (identity.get("name"), identity.get("version"))) not in ORDERS:
            known = " or ".join(" ".join(names) for names in ORDERS)
            lie(place, f"order {brief(key[0])} version {brief(key[1])}", known)
        receipt = self.newest.receipt
        size = self.manifest.num_samples if receipt is None else receipt.integer("num_samples", 1, MAX_SAMPLES)
        data = self.config.data
        if data.held_out >= size:
            lie(self.folder / "config.yaml", f"data.held_out is {data.held_out}", f"less than the {size} samples")
        if data.subset and data.subset > (most := size - data.held_out):
            lie(self.folder / "config.yaml", f"data.subset is {data.subset}", f"at most {most}, what is not held out")
        order = order_of(self.config, size)
        if self.sources:
            return replace(order, mixture=self._mixture(order))
        if key[0] != "lanes":
            return order
        lanes = lanes_in(self.newest.said_order, order.num_train, order.images_per_step, self.trained)
        return replace(order, lanes=lanes)

    @cached_property
    def sources(self) -> list[Fields]:
        """The sources of a mixture, as the newest checkpoint names them; [] for a single set."""
        return self.newest.said_order.parts("sources", ())

    def _mixture(self, order: Order) -> Mixture:
        """Returns the sizes, phases and lanes of the mixture that the newest checkpoint names."""
        sizes = tuple(source.integer("num_samples", 1, MAX_SAMPLES) for source in self.sources)
        if sum(sizes) != order.num_samples or not 2 <= len(sizes) <= MAX_SOURCES:
            numbers = f"sources of {brief(list(sizes))} samples"
            lie(self.identity[0], numbers, f"2 to {MAX_SOURCES}, with {order.num_samples} samples together")
        if order.held_out:
            lie(self.folder / "config.yaml", f"data.held_out is {order.held_out}", "0: the run is a mixture")
        phases = phases_in(self.newest.said_order, len(sizes), order.global_batch)
        if self.identity[1].get("name") != "lanes":
            return Mixture(sizes, phases)
        own = zip(self.sources, sizes)
        lanes = tuple(source_lanes_in(source, size, order.global_batch, self.trained) for source, size in own)
        return Mixture(sizes, phases, lanes)

    @cached_property
    def bad(self) -> Listed:
        """Samples that could not be used."""
        return _listed(self.folder / "bad_samples.jsonl")

    @cached_property
    def damaged(self) -> Listed:
        """Samples that were used though damaged."""
        return _listed(self.folder / "damaged_samples.jsonl")

    @cached_property
    def skipped(self) -> list[Fields]:
        """Steps whose update was left out."""
        return list(rows(self.folder / "skipped_steps.jsonl"))

    @cached_property
    def metrics(self) -> list[Fields]:
        """The lines of metrics.jsonl."""
        return list(rows(self.folder / "metrics.jsonl"))


def _tells_logged(start: Start) -> bool:
    return start.values.has("samples_logged")


def _saved(path: Path) -> Saved:
    for name, num_bytes, checksum in read_manifest(path):
        file = own_file(path, name)
        if (size := file.stat().st_size) != num_bytes:
            lie(file, f"has {size} bytes", f"the {num_bytes} that MANIFEST.json names")
        if name.endswith(".json") and (found := crc32c(file)) != checksum:
            lie(file, f"has CRC-32C {found}", f"the {checksum} that MANIFEST.json names")
    file = own_file(path, "state.json")
    return Saved(path, step_of(path), Fields.read(file))


def _listed(path: Path) -> Listed:
    numbers: list[tuple[int, int, int]] = []
    reasons, shards = [], []
    for row in rows(path):
        step, epoch = row.integer("step", 1, MAX_STEP), row.integer("epoch", 0, MAX_STEP)
        numbers.append((step, epoch, row.integer("index", 0, MAX_COUNT)))
        reasons.append(row.text("reason"))
        shards.append(row.text("shard"))
    columns = np.array(numbers, np.int64).reshape(-1, 3)
    return Listed(path, columns[:, 0], columns[:, 1], columns[:, 2], reasons, shards)
