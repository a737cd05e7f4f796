"""Do the samples that a run lists follow from the order: the step of each, the sum of every epoch?"""

import re
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from pretrain.audit.folder import LeftOut, Listed, Run, Segment
from pretrain.audit.logs import StepLines, lie
from pretrain.audit.records import REPAIRED, Outcome
from pretrain.checkpoint.layout import MAX_STEP
from pretrain.data.order import share
from pretrain.json_files import Fields, brief

MAX_CHOSEN_STEPS = 256  # whose lines in samples-RANK.jsonl are compared
MAX_CHOSEN_LINES = 20_000  # over all ranks: looking one up in a large log takes a millisecond
MAX_EPOCHS = 100_000  # takes a minute; a receipt may claim a data set of one sample
MAX_LISTED_EPOCHS = 3  # the newest, each with a row of its own in the table
_SAMPLE_LOG = re.compile(r"samples-([0-9]{5})\.jsonl")


def check_listed(run: Run) -> Outcome:
    """Each bad or damaged sample belongs to the step that it is listed for, and is listed once."""
    for listed in (run.bad, run.damaged):
        _check_steps(run, listed)
        _check_once(listed)
    return Outcome("bad and damaged samples against the order: is it of that step?", len(run.bad) + len(run.damaged))


def _check_steps(run: Run, listed: Listed) -> None:
    if not len(listed):
        return
    # Lines written since the newest checkpoint by a resume with other weights follow another order.
    lines = np.flatnonzero(listed.steps <= run.trained) if run.order.mixture else np.arange(len(listed))
    steps, epochs, indices = (column[lines] for column in (listed.steps, listed.epochs, listed.indices))
    if (too_large := np.flatnonzero(indices >= run.order.num_samples)).size:
        first = int(too_large[0])
        lie(listed.place(lines[first]), f"index {indices[first]}", f"less than the {run.order.num_samples} samples")
    # This also rejects epochs so large that positions would not fit into 64 bits.
    most = np.max(run.order.given(steps) / np.array(run.order.sizes)[:, None], axis=0, initial=0) + run.order.repeats
    if (late := np.flatnonzero(epochs > most)).size:
        first = int(late[0])
        sample = f"epoch {epochs[first]}, index {indices[first]} at step {steps[first]}"
        lie(listed.place(lines[first]), sample, "an epoch that was begun, by the order")
    held = run.order.steps_of(epochs, indices) + 1  # state.step counts the steps done
    wrong = np.flatnonzero(held != steps)
    if wrong.size:
        first = int(wrong[0])
        where = f"step {held[first]}" if held[first] else "no step: it is not trained on"
        sample = f"epoch {epochs[first]}, index {indices[first]} at step {steps[first]}"
        lie(listed.place(lines[first]), sample, f"{where}, by the order")
    late = np.flatnonzero(listed.steps > run.trained)
    if run.done is not None and late.size:
        lie(listed.place(int(late[0])), f"step {listed.steps[late[0]]}", f"at most {run.trained}, the last one")
    early = np.flatnonzero(listed.steps <= run.first_step)
    if early.size:
        lie(listed.place(int(early[0])), f"step {listed.steps[early[0]]}", f"more than {run.first_step}, its first")


def _check_once(listed: Listed) -> None:
    order = np.lexsort((listed.indices, listed.epochs))
    again = (np.diff(listed.epochs[order]) == 0) & (np.diff(listed.indices[order]) == 0)
    if again.any():
        second = int(order[int(np.flatnonzero(again)[0]) + 1])
        sample = f"epoch {listed.epochs[second]}, index {listed.indices[second]}"
        lie(listed.place(second), f"{sample} is listed twice", "once: an epoch has each sample once")


def check_every_epoch(run: Run) -> Outcome:
    """A sample that is bad in one epoch is bad in each that has come to it: its bytes do not change."""
    if len(versions := _decoders(run)) > 1:
        raise LeftOut(f"decoders changed between starts ({'; '.join(map(str, versions))})")
    count = 0
    for listed in (run.bad, run.damaged):
        reasons = dict(zip(listed.indices.tolist(), listed.reasons))
        for number, (index, reason) in enumerate(zip(listed.indices.tolist(), listed.reasons)):
            if reasons[index] != reason:
                lie(listed.place(number), f"index {index}: {reason}", f"{reasons[index]}, as its other lines say")
        indices = np.unique(listed.indices[listed.indices < run.order.num_samples])  # check_listed reports the others
        told = set(zip(listed.epochs.tolist(), listed.indices.tolist()))
        for epoch in range(_epochs_begun(run)) if len(indices) else ():
            steps = run.order.steps_of(np.full(len(indices), epoch), indices) + 1
            for index, step in zip(indices.tolist(), steps.tolist()):
                if run.first_step < step <= run.trained and (epoch, index) not in told:
                    found = f"has no line for epoch {epoch}, index {index} (step {step})"
                    lie(listed.path, found, f"one: it is {reasons[index]} in another epoch {REPAIRED}")
                count += 1
    return Outcome("listed samples in all other epochs: listed there too?", count)


def _decoders(run: Run) -> set[tuple[object, ...]]:
    found = [start.values.values.get("versions") for start in run.starts]
    return {tuple(v.get(name) for name in ("torchvision", "pillow")) for v in found if isinstance(v, dict)}


def check_skipped(run: Run) -> Outcome:
    """The samples of each skipped step are those of the order, and a step is skipped once."""
    last = run.first_step
    for row in run.skipped:
        step = row.integer("step", 1, MAX_STEP)
        if step <= last:
            lie(row.source, f"step {step} after step {last}", "each step once")
        if run.done is not None and step > run.trained:
            lie(row.source, f"step {step}", f"at most {run.trained}, the last one")
        if run.order_holds(step) and row.values.get("indices") != run.order.samples(step - 1)[1].tolist():
            lie(row.source, f"indices {brief(row.values.get('indices'))}", f"those of step {step} by the order")
        last = step
    return Outcome("samples of skipped steps against the order", len(run.skipped))


def _epochs_begun(run: Run) -> int:
    """Returns how many epochs have been begun. Raises LeftOut where they are too many to add up one by one."""
    epochs, seen = 0, run.order.seen_in(run.trained)
    while any(seen(epochs)):
        if (epochs := epochs + 1) > MAX_EPOCHS:
            raise LeftOut(f"more than {MAX_EPOCHS:,} epochs")
    return epochs


def check_epochs(run: Run) -> list[Outcome]:
    """Adds up every epoch: used, bad, skipped, held out, outside of the subset.

    All epochs together have all slots of the steps.
    """
    order, begun = run.order, _epochs_begun(run)
    bad: dict[_Pass, Counter[str]] = {}
    listed = zip(_passes(run, run.bad.epochs, run.bad.indices), run.bad.steps.tolist(), run.bad.reasons)
    for of_pass, step, reason in listed:
        if step <= run.trained:
            bad.setdefault(of_pass, Counter())[reason] += 1
    skipped, seen_in = _skipped_by_pass(run), order.seen_in(run.trained)
    slots, used, finished, passes, told = 0, 0, 0, 0, []
    for epoch in range(begun):
        later = seen_in(epoch + MAX_LISTED_EPOCHS)
        for source, seen in enumerate(seen_in(epoch)):
            of_pass = source, epoch
            own = seen - bad.get(of_pass, Counter()).total() - skipped[of_pass]
            if own < 0:
                what = f"{_pass_name(run, of_pass)} has {seen - own} bad and skipped samples"
                lie(run.bad.path, what, f"at most the {seen} seen")
            slots, used, passes = slots + seen, used + own, passes + (seen > 0)
            finished += seen == order.sizes[source]
            if seen and not later[source]:
                told.append(Outcome(_sum(run, of_pass, seen, own, bad.get(of_pass, Counter()), skipped[of_pass]), seen))
    if slots != run.trained * order.global_batch:
        lie(run.saved[-1].place, f"{run.trained} steps", f"slots of the epochs' sum, {slots}")
    total = sum((counter.total() for counter in bad.values()), 0)
    each = f"passes of {len(order.sizes)} sources" if run.sources else f"each {order.num_samples:,} samples"
    whole = (
        f"{finished:,} finished of {passes:,}, {each}; {used:,} used + {total:,} bad + "
        f"{sum(skipped.values()):,} skipped = {slots:,} = {run.trained:,} steps x {order.global_batch:,}"
    )
    branched = f"bad and skipped ones up to step {run.first_step}, of the other run" if run.first_step else ""
    return [Outcome(whole, passes, branched), *told]


_Pass = tuple[int, int]  # index of a mixture's source, 0 for a single set; epoch


def _passes(run: Run, epochs: np.ndarray, indices: np.ndarray) -> list[_Pass]:
    return list(zip(run.order.sources_of(indices).tolist(), epochs.tolist()))


def _pass_name(run: Run, of_pass: _Pass) -> str:
    source, epoch = of_pass
    return f"{run.sources[source].text('name')}, epoch {epoch}" if run.sources else f"epoch {epoch}"


def _sum(run: Run, of_pass: _Pass, seen: int, used: int, bad: Counter[str], skipped: int) -> str:
    reasons = f" ({', '.join(f'{count:,} {reason}' for reason, count in sorted(bad.items()))})" if bad else ""
    parts = f"{used:,} used + {bad.total():,} bad{reasons} + {skipped:,} skipped"
    name, size = _pass_name(run, of_pass), run.order.sizes[of_pass[0]]
    if seen < size:
        return f"{name}, under way: {parts} = {seen:,} of {size:,}"
    order = run.order
    if run.sources:
        return f"{name}: {parts} = {size:,}"
    beyond = order.num_samples - order.held_out - size
    outside = f" + {beyond:,} not in data.subset" if beyond else ""
    return f"{name}: {parts} + {order.held_out:,} held out{outside} = {order.num_samples:,}"


def _skipped_by_pass(run: Run) -> Counter[_Pass]:
    """Returns, by pass, the number of samples in skipped steps that are not bad."""
    found: Counter[_Pass] = Counter()
    passes = _passes(run, run.bad.epochs, run.bad.indices) if run.skipped else []
    bad = Counter(zip(passes, run.bad.steps.tolist()))
    for row in run.skipped:
        if (step := row.integer("step", 1, MAX_STEP)) <= run.trained:
            for of_pass, count in Counter(_passes(run, *run.order.samples(step - 1))).items():
                found[of_pass] += count - bad[of_pass, step]
    return found


def check_sample_logs(run: Run) -> Outcome:
    """samples-RANK.jsonl has each step once, on the ranks that its start had, with the samples of the order."""
    found = ((_SAMPLE_LOG.fullmatch(path.name), path) for path in run.folder.iterdir())  # glob hides errors
    paths = {int(match[1]): path for match, path in found if match}
    segments = [replace(s, last=min(s.last, run.trained)) for s in run.segments if s.first <= run.trained]
    if not paths:
        written = any(segment.samples_logged for segment in segments)
        raise LeftOut(
            f"no samples-RANK.jsonl here{', though they were written' if written else ': log.samples is off'}"
        )
    with ExitStack() as stack:
        logs = {rank: stack.enter_context(closing(StepLines(path))) for rank, path in sorted(paths.items())}
        logged = [segment for segment in segments if _is_logged(segment, logs)]
        steps = _chosen(run, logged, len(logs))
        count = 0
        for step in steps:
            segment = next(s for s in logged if s.first <= step <= s.last)
            _check_step(run, step, segment, logs)
            count += segment.world_size
        for log in logs.values():
            if run.done is not None and log.last_step > run.trained:
                lie(log.path, f"has a line of step {log.last_step}", f"none behind {run.trained}, the last one")
    of_steps = sum(s.last - s.first + 1 for s in logged)
    told = [] if len(steps) == of_steps else [f"{of_steps - len(steps):,} of {of_steps:,} logged steps: --full"]
    if of_steps < run.trained - run.first_step:
        told.append(f"{run.trained - run.first_step - of_steps:,} steps were not logged")
    return Outcome(f"lines of samples-RANK.jsonl, of {len(steps):,} steps, against the order", count, "; ".join(told))


def _is_logged(segment: Segment, logs: dict[int, StepLines]) -> bool:
    if segment.samples_logged is not None:
        return segment.samples_logged
    # Not recorded by an earlier version: if there is any line of the segment, all must be there.
    return any(log.has_step(segment.first, segment.last) for log in logs.values())


def _chosen(run: Run, segments: list[Segment], num_logs: int) -> list[int]:
    lengths = [segment.last - segment.first + 1 for segment in segments]
    total = sum(lengths)
    most = total if run.options.full else min(MAX_CHOSEN_STEPS, max(1, MAX_CHOSEN_LINES // num_logs))
    places = range(total)
    if total > most:
        random = np.random.default_rng([run.options.seed, 1])
        places = np.sort(random.choice(total, most, replace=False)).tolist()
    ends = np.cumsum(lengths)
    found = []
    for place in places:
        number = int(np.searchsorted(ends, place, side="right"))
        found.append(segments[number].last - (int(ends[number]) - 1 - place))
    return found


def _check_step(run: Run, step: int, segment: Segment, logs: dict[int, StepLines]) -> None:
    epochs, indices = run.order.samples(step - 1)
    expected = np.stack([epochs, indices], axis=1)
    for rank in range(segment.world_size):
        path = run.folder / f"samples-{rank:05d}.jsonl"
        line = logs[rank].line_of(step) if rank in logs else None
        if line is None:
            lie(path, f"has no line of step {step} where it belongs", f"one, of {segment.world_size} ranks")
        own = expected[share(len(indices), rank, segment.world_size)]
        if (found := _samples(line, path, step)) != own.tolist():
            lie(path, *_difference(step, found, own.tolist()))
    for rank in logs:
        if rank >= segment.world_size and logs[rank].line_of(step) is not None:
            lie(logs[rank].path, f"has a line of step {step}", f"none: that start had {segment.world_size} ranks")


def _samples(line: bytes, path: Path, step: int) -> object:
    source = f"{path}: step {step}"
    return Fields.parse(line, source, max_marks=1 << 40).values.get("samples")


def _difference(step: int, found: object, expected: list[list[int]]) -> tuple[str, str]:
    """Returns what a line has, and what it should have."""
    if not isinstance(found, list) or len(found) != len(expected):
        count = len(found) if isinstance(found, list) else brief(found)
        return f"step {step} has {count} samples", f"{len(expected)}, this rank's share of the step"
    place = next(number for number, pair in enumerate(found) if pair != expected[number])
    return f"step {step}, sample {place} is [epoch, index] {brief(found[place])}", f"{expected[place]}, by the order"
