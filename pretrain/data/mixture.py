"""Several data sets (sources) as one: assigns each slot to a source, exactly by weight, and numbers all their samples.

Each source has a quota in a cycle of Q slots, and a fixed schedule assigns the slots: at every slot each source is less
than one sample from its share. A source is read in passes, each in the order of a keyed permutation, or of lanes of its
own. Quotas may change at a step; passes then continue where they are. A pure function of the slot: no memory, no state.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import lcm

import numpy as np

from pretrain.config import MAX_REWEIGHT_STEP, DataConfig
from pretrain.data.classes import ClassMatch, join_classes
from pretrain.data.lanes import Lanes, choose_lanes, fits, lanes_in, place, position_of, seen
from pretrain.data.manifest import Manifest, read_as
from pretrain.data.permutation import unvisit, visit
from pretrain.errors import ConfigError, UserError
from pretrain.json_files import Fields, brief

MAX_CYCLE = 1 << 16  # slots: a schedule takes 1 MB, and 0.1 s to make for a few sources, 1 s for 64


def quotas_of(weights: Sequence[float]) -> tuple[tuple[int, ...], bool]:
    """Returns each source's slots per cycle, and whether they have exactly the weights' proportions.

    A decimal number is taken as written: 0.6 is three fifths. Where no cycle of up to MAX_CYCLE slots has the exact
    proportions, they are rounded to the nearest of a cycle of MAX_CYCLE. Raises ConfigError when a source with a weight
    above 0 would get no slot.
    """
    written = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(written) for weight in written]
    if (cycle := lcm(*(share.denominator for share in shares))) <= MAX_CYCLE:
        return tuple(int(share * cycle) for share in shares), True
    quotas = [int(share * MAX_CYCLE) for share in shares]
    lost = sorted(range(len(shares)), key=lambda number: quotas[number] - shares[number] * MAX_CYCLE)
    for number in lost[: MAX_CYCLE - sum(quotas)]:
        quotas[number] += 1
    if small := [weight for weight, quota in zip(weights, quotas) if weight and not quota]:
        raise ConfigError(
            f"data.train: weight {small[0]:g} is less than one of {MAX_CYCLE:,} samples, the longest "
            "cycle; raise it, or leave that set out"
        )
    return tuple(quotas), False


def schedule(quotas: Sequence[int]) -> np.ndarray:
    """Returns the source of each slot of a cycle, int64 [sum of quotas].

    After any number of slots each source is less than one sample from its share of them: the chairman assignment
    (R. Tijdeman, Discrete Mathematics 32, 1980). Among the sources far enough behind their share, the one with the
    earliest deadline gets the slot. Smooth weighted round robin, and shares rounded down, do not keep that bound.
    """
    cycle, parts = sum(quotas), 2 * sum(quota > 0 for quota in quotas) - 2

    def deadline(source: int) -> int:
        """The last slot at which the source's next sample may come."""
        return -(-(parts - 1 + parts * given[source]) * cycle // (parts * quotas[source]))

    taken = [source for source, quota in enumerate(quotas) if quota]
    if len(taken) == 1:
        return np.full(cycle, taken[0])
    given = [0] * len(quotas)
    deadlines = {source: deadline(source) for source in taken}
    chosen = np.empty(cycle, np.int64)
    for slot in range(1, cycle + 1):
        due = [s for s in taken if parts * (quotas[s] * slot - given[s] * cycle) >= cycle]
        source = min(due, key=lambda source: deadlines[source])
        chosen[slot - 1] = source
        given[source] += 1
        deadlines[source] = deadline(source)
    return chosen


@dataclass(frozen=True)
class Phase:
    """The proportions that apply from a slot on."""

    first_slot: int
    quotas: tuple[int, ...]  # each source's slots per cycle; 0: nothing is taken from it

    @property
    def cycle(self) -> int:
        """Slots after which the schedule repeats."""
        return sum(self.quotas)

    @cached_property
    def schedule(self) -> np.ndarray:
        """The source of each slot of a cycle: int64 [cycle]."""
        return schedule(self.quotas)

    @cached_property
    def slots(self) -> list[np.ndarray]:
        """Each source's slots of a cycle, ascending."""
        return [np.flatnonzero(self.schedule == source) for source in range(len(self.quotas))]

    def takes(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns each slot's source, and the source's samples in the phase before it: int64; slots: of the phase."""
        cycles, rest = np.divmod(slots, self.cycle)
        sources, within = self.schedule[rest], np.empty_like(slots)
        for source in np.unique(sources).tolist():
            these = sources == source
            within[these] = np.searchsorted(self.slots[source], rest[these])
        return sources, cycles * np.array(self.quotas)[sources] + within

    def given(self, slots: np.ndarray) -> np.ndarray:
        """Returns how many samples of each source the phase's first `slots` slots hold: int64, a row per source."""
        cycles, rest = np.divmod(slots, self.cycle)
        return np.array([cycles * quota + np.searchsorted(own, rest) for quota, own in zip(self.quotas, self.slots)])


@dataclass(frozen=True)
class SourceLanes:
    """The order `lanes` of one source of a mixture, in which rounds take the place of steps.

    The source's q-th sample of the run is slot q % round_samples of round q // round_samples, however many of its
    samples a step has: so weights may change while passes continue.
    """

    round_samples: int  # about as many as a step has of it, so that a node's slots stay within few lanes
    lanes: Lanes


@dataclass(frozen=True)
class Mixture:
    """The parameters of a mixture. An epoch here is a pass through one source; each source counts its own."""

    sizes: tuple[int, ...]  # samples of each source; the sources' indices follow each other
    phases: tuple[Phase, ...]  # ascending, the first from slot 0 on; passes continue from one to the next
    lanes: tuple[SourceLanes, ...] = ()  # of each source; empty: `permuted`

    @cached_property
    def first_indices(self) -> np.ndarray:
        """The index of each source's first sample, and the end: int64 [sources + 1]."""
        return np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)

    @cached_property
    def _first_slots(self) -> np.ndarray:
        return np.array([phase.first_slot for phase in self.phases])

    @cached_property
    def _before(self) -> np.ndarray:
        """Samples of each source before each phase: int64 [phases, sources]."""
        return np.array([self.given(slot) for slot in self._first_slots])

    def sources_of(self, indices: np.ndarray) -> np.ndarray:
        """Returns which source each index belongs to, int64."""
        return np.searchsorted(self.first_indices, indices, side="right") - 1

    def samples(self, positions: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (epoch, index) of slots counted from the run's start: int64 of one shape."""
        sources, places = np.empty_like(positions), np.empty_like(positions)
        phases = np.searchsorted(self._first_slots, positions, side="right") - 1
        for phase in np.unique(phases).tolist():
            these = phases == phase
            sources[these], within = self.phases[phase].takes(positions[these] - self._first_slots[phase])
            places[these] = within + self._before[phase, sources[these]]
        epochs, indices = np.empty_like(positions), np.empty_like(positions)
        for source in np.unique(sources).tolist():
            these = sources == source
            epochs[these], own = self._visit(places[these], source, seed)
            indices[these] = own + self.first_indices[source]
        return epochs, indices

    def positions(self, epochs: np.ndarray, indices: np.ndarray, seed: int) -> np.ndarray:
        """Returns the slots that hold each (epoch, index), int64, -1 where none does: the inverse of `samples`."""
        sources = self.sources_of(indices)
        positions = np.full_like(indices, -1)
        for source in np.unique(sources).tolist():
            these = np.flatnonzero(sources == source)
            own = indices[these] - self.first_indices[source]
            places = self._unvisit(epochs[these], own, source, seed)
            phases = np.searchsorted(self._before[:, source], places, side="right") - 1
            for number in np.unique(phases).tolist():
                phase, among = self.phases[number], phases == number
                if quota := phase.quotas[source]:
                    cycles, within = np.divmod(places[among] - self._before[number, source], quota)
                    slots = cycles * phase.cycle + phase.slots[source][within]
                    positions[these[among]] = phase.first_slot + slots
        return positions

    def _visit(self, places: np.ndarray, source: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Pass and sample at places in the sequence of a source's passes."""
        if not self.lanes:
            return visit(places, self.sizes[source], *_key(seed, source))
        own = self.lanes[source]
        at = np.divmod(places, own.round_samples)
        return place(own.lanes, self.sizes[source], own.round_samples, _lanes_key(seed, source), *at)

    def _unvisit(self, epochs: np.ndarray, samples: np.ndarray, source: int, seed: int) -> np.ndarray:
        """The inverse of `_visit`."""
        if not self.lanes:
            return unvisit(epochs, samples, self.sizes[source], *_key(seed, source))
        own, places = self.lanes[source], np.empty_like(samples)
        for epoch in np.unique(epochs).tolist():
            these, key = epochs == epoch, _lanes_key(seed, source)
            size = self.sizes[source]
            places[these] = position_of(own.lanes, size, own.round_samples, key, epoch, samples[these])
        return places

    def seen_in(self, slots: int) -> Callable[[int], list[int]]:
        """Returns how many samples of each source's pass the first `slots` slots hold, as a function of the pass."""
        given = self.given(np.asarray(slots)).tolist()
        parts = list(zip(self.lanes, self.sizes, given))
        return lambda epoch: [seen(own.lanes, size, own.round_samples, epoch, count) for own, size, count in parts]

    def given(self, slots: np.ndarray) -> np.ndarray:
        """Returns how many samples of each source the first `slots` slots hold: int64, a row for each source."""
        total = np.zeros((len(self.sizes), *slots.shape), np.int64)
        ends = [*(phase.first_slot for phase in self.phases[1:]), np.iinfo(np.int64).max]
        for phase, end in zip(self.phases, ends):
            total += phase.given(np.clip(slots, phase.first_slot, end) - phase.first_slot)
        return total


def phases_of(data: DataConfig) -> tuple[Phase, ...]:
    """Returns the phases of a config's mixture. Raises ConfigError when a weight is too small."""
    return tuple(Phase(step * data.global_batch, quotas_of(weights)[0]) for step, weights in data.phases)


def begun(phases: Sequence[Phase], slot: int, num_sources: int) -> list[Phase]:
    """Returns the phases that began before a slot, always the first one, with quota 0 for sources added later."""
    padded = [Phase(p.first_slot, (*p.quotas, *[0] * (num_sources - len(p.quotas)))) for p in phases]
    return [phase for phase in padded if phase.first_slot < max(1, slot)]


def told_phases(phases: Sequence[Phase], global_batch: int) -> str:
    """Returns phases as text for a message."""
    return ", ".join(f"{brief(list(phase.quotas))} from step {phase.first_slot // global_batch} on" for phase in phases)


def phases_in(order: Fields, num_sources: int, global_batch: int) -> tuple[Phase, ...]:
    """Reads the phases in the order that a checkpoint states. Raises UserError when they are impossible."""
    found = []
    for fields in order.parts("phases"):
        quotas, step = fields.values.get("quotas"), fields.integer("step", 0, MAX_REWEIGHT_STEP)
        if (
            not isinstance(quotas, list)
            or not all(type(quota) is int and quota >= 0 for quota in quotas)
            or len(quotas) != num_sources
            or not 0 < sum(quotas) <= MAX_CYCLE
        ):
            fields.wrong("quotas", f"{num_sources} integers from 0 on, with a sum of 1 to {MAX_CYCLE}")
        found.append(Phase(step * global_batch, tuple(quotas)))
    slots = [phase.first_slot for phase in found]
    if not found or slots[0] or slots != sorted(set(slots)):
        order.wrong("phases", "phases at rising steps from 0 on")
    return tuple(found)


def choose_source_lanes(
    sources: Sequence[Manifest], phases: Sequence[Phase], global_batch: int, steps: int
) -> tuple[SourceLanes, ...]:
    """Returns lanes for each source of a mixture. Raises ConfigError when a run of so many steps is too long for them.

    A round has as many samples as a step of the first phase that uses the source, but at most a quarter of the source.
    """
    chosen = []
    for number, source in enumerate(sources):
        phase = next(phase for phase in phases if phase.quotas[number])
        of_step = global_batch * phase.quotas[number] // phase.cycle
        size, batch = source.num_samples, max(1, min(of_step, source.num_samples // 4))
        own = SourceLanes(batch, choose_lanes(source.block_samples, size, batch))
        if not fits(own.lanes, size, batch, _rounds(steps, global_batch, batch)):
            raise ConfigError(
                f"data.order: total_steps ({steps}) x global_batch ({global_batch}) is beyond the 64 bits that the "
                "order lanes counts with; lower one of them, or set data.order=permuted"
            )
        chosen.append(own)
    return tuple(chosen)


def _rounds(steps: int, global_batch: int, round_samples: int) -> int:
    return steps * global_batch // round_samples + 1


def lanes_as_numbers(own: SourceLanes) -> dict[str, int]:
    """Returns a source's lanes as a checkpoint stores them."""
    return {"round_samples": own.round_samples, **asdict(own.lanes)}


def source_lanes_in(source: Fields, num_samples: int, global_batch: int, steps: int) -> SourceLanes:
    """Reads a source's lanes that a checkpoint stores. Raises UserError when they are impossible."""
    batch = source.integer("round_samples", 1, global_batch)
    return SourceLanes(batch, lanes_in(source, num_samples, batch, _rounds(steps, global_batch, batch)))


def _lanes_key(seed: int, source: int) -> str:
    return f"{seed}/source/{source}"


def _key(seed: int, source: int) -> tuple[object, ...]:
    return "source", source, "epoch", seed


def joined(sources: Sequence[Manifest], *, all_classes: bool = False) -> tuple[Manifest, list[str]]:
    """Returns the sources concatenated to one set, and lines for the user about their classes.

    Labels are mapped by name to the classes of the source with the most of them, or with all_classes to those of all
    sources together. The second source of a name gets a number. Raises UserError when a source is given twice, or,
    naming the first difference, when its classes do not match.
    """
    for number, source in enumerate(sources):
        if same := [other.path for other in sources[:number] if other.sha256 == source.sha256]:
            raise UserError(f"data.train: {same[0]} and {source.path} are the same set; give it once, with one weight")
    names: list[str] = []
    for number, source in enumerate(sources, 1):
        names.append(f"{source.name}#{number}" if source.name in names else source.name)
    whole, own, told = _with_all_classes(sources) if all_classes else _with_the_widest(sources)
    return (
        replace(
            whole,
            name=" + ".join(names),
            sha256=hashlib.sha256("\n".join(source.sha256 for source in sources).encode()).hexdigest(),
            num_samples=sum(source.num_samples for source in sources),
            shards=tuple(shard for source in sources for shard in source.shards),
            multi_label=any(source.multi_label for source in sources),
            store=next((source.store for source in sources if source.store), None),
            sources=tuple(replace(source, name=name) for source, name in zip(own, names)),
        ),
        told,
    )


def _with_the_widest(sources: Sequence[Manifest]) -> tuple[Manifest, list[Manifest], list[str]]:
    """The source with the most classes, all sources with labels mapped to its classes, and lines for the user."""
    widest = max(sources, key=lambda source: source.num_classes)
    try:
        read = [(source, None) if source is widest else read_as(source, widest) for source in sources]
    except UserError as error:
        way_out = "data.join_classes=true takes the classes of all sets together"
        raise UserError(f"data.train: {error}; or {way_out}") from None
    return widest, [source for source, _ in read], [told for _, told in read if told]


def _with_all_classes(sources: Sequence[Manifest]) -> tuple[Manifest, list[Manifest], list[str]]:
    """A set with the classes of all sources, the sources with labels mapped to these, and a line for the user."""
    names, meanings = join_classes([source.class_names for source in sources], [str(source.path) for source in sources])
    own, told, known = [], [], 0
    for source, labels in zip(sources, meanings):
        own.append(source.with_meaning(ClassMatch(labels, None), names))
        new = sum(label >= known for label in labels)
        told.append(f"{new:,} of {source.path.parent} ({source.num_classes:,})")
        known += new
    whole = replace(sources[0], num_classes=len(names), class_names=names)
    return whole, own, [f"data.train: {len(names):,} classes together: {', '.join(told)}"]


def source_of(manifest: Manifest, index: int) -> tuple[Manifest, int]:
    """Returns the set that a sample comes from, a mixture's source or the set itself, and the sample's index there."""
    for source in manifest.sources:
        if index < source.num_samples:
            return source, index
        index -= source.num_samples
    return manifest, index


def shard_name(manifest: Manifest, index: int) -> str:
    """Returns the name of the shard that holds a sample; in a mixture the source's name precedes it."""
    source, own = source_of(manifest, index)
    shard = source.locate(own)[0].path.name
    return f"{source.name}/{shard}" if manifest.sources else shard
