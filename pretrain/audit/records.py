"""Do a run's own files agree: starts, checkpoints and their receipts, config, curves, counts of what was left out?"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

from pretrain.audit import mixtures
from pretrain.audit.folder import MAX_COUNT, LeftOut, Run, Saved
from pretrain.audit.logs import Lie, lie
from pretrain.checkpoint.layout import MAX_STEP, own_file, read_manifest
from pretrain.config import config_from_dict, config_to_dict, resume_differences
from pretrain.errors import ConfigError, UserError
from pretrain.json_files import brief
from pretrain.storage import crc32c

# Added to the message when a sample differs from what is listed, which has innocent causes too.
REPAIRED = "(a file repaired since, or another version's limits of decoding, look like this too)"


class Outcome(NamedTuple):
    """What a check that found nothing wrong has compared, and how often."""

    compared: str
    count: int
    left_out: str = ""  # what could not be checked


def check_starts(run: Run) -> Outcome:
    """Each start begins at a step that had been saved, with the run's seed and batch, and none is missing."""
    config, branched, chained = run.config, run.config.branch_from is not None, 0
    data = config.data
    of_data = {key: getattr(data, key) for key in ("global_batch", "held_out", "subset", "repeats")}
    expected = {"seed": config.seed, **of_data}
    for number, start in enumerate(run.starts):
        if start.branched and not branched:
            lie(start.place, "a start that branched off", "none, for config.yaml names no branch_from")
        if number == 0 and start.step and not branched:
            lie(start.place, f"the first start is at step {start.step}", "0, for config.yaml names no branch_from")
        for key, value in expected.items():
            if start.values.values.get(key, value) != value:
                lie(start.place, f"{key} is {brief(start.values.values[key])}", f"{value}, as config.yaml has it")
        if start.world_size > config.data.global_batch:
            lie(start.place, f"{start.world_size} ranks", f"at most {config.data.global_batch}, the global batch")
        if (before := start.values.text("starts_before", "")) and before != start.before:
            found = "the lines before it are not those that it was written behind"
            lie(start.place, found, f"SHA-256 {before[:16]}...")
        chained += bool(before)
        if number > run.origin and start.step < run.first_step:
            lie(start.place, f"step {start.step}", f"{run.first_step} or more, where the run began")
    told = "" if chained == len(run.starts) else f"{len(run.starts) - chained} of an earlier version: not chained"
    return Outcome(
        "step, ranks, seed, batch, held out, subset, repeats; each knows the lines before it", len(run.starts), told
    )


def check_history(run: Run) -> Outcome:
    """Checkpoints lie where the starts say: none is ahead of a later start, ranks are those of its start."""
    newest, place, starts = run.newest, run.folder / "starts.jsonl", run.starts
    for saved in run.saved:
        world = saved.state.integer("world_size", 1, MAX_COUNT)
        if not saved.starts:
            continue
        if not (count := _num_starts(run, saved)):
            found = f"its {len(starts)} lines do not begin as they did"
            lie(place, found, f"those that {saved.place} was saved behind")
        own = starts[count - 1]
        if own.world_size != world:
            lie(saved.place, f"saved by {world} ranks", f"{own.world_size}, those of start {count}")
        if own.step > saved.step:
            lie(own.place, f"a start at step {own.step}", f"at most {saved.step}, at which it saved {saved.path.name}")
        for later in starts[count:]:
            if later.step < saved.step:
                expected = f"from {saved.step} or later: {saved.path.name} was there"
                lie(later.place, f"goes on from step {later.step}", expected)
            if later.branched:
                expected = f"nothing saved before, but {saved.path.name} was there"
                lie(later.place, f"branched off at step {later.step}", expected)
    last = starts[-1]
    if last.step > newest.step:
        lie(last.place, f"goes on from step {last.step}", f"at most {newest.step}, the newest checkpoint's")
    known = _num_starts(run, newest)
    if known and known < len(starts) and last.step != newest.step:
        lie(last.place, f"goes on from step {last.step}", f"{newest.step}, the newest checkpoint's")
    for later in starts[known:] if run.done is not None and known else ():
        if later.step != newest.step:  # after a kill between the last save and DONE, a start only writes DONE
            lie(later.place, f"a start at step {later.step} behind the end of the run", f"{newest.step}, the last step")
    told = "" if all(saved.starts for saved in run.saved) else "checkpoints of an earlier version name no start"
    return Outcome("checkpoints against starts: steps, ranks, number of starts", len(run.saved), told)


def _num_starts(run: Run, saved: Saved) -> int:
    """Returns how many starts there were when a checkpoint was saved; 0 when the file does not begin with these."""
    return next((number for number, start in enumerate(run.starts, 1) if start.until == saved.starts), 0)


def check_files(run: Run) -> Outcome:
    """Every file of every checkpoint has its size, and its checksum: of tensors in full mode only."""
    count, gone = 0, 0
    for saved in run.saved:  # sizes, and the checksums of JSON, were compared when it was read
        try:
            for name, _, checksum in read_manifest(saved.path):
                count += 1
                if run.options.full and (found := crc32c(own_file(saved.path, name))) != checksum:
                    lie(saved.path / name, f"has CRC-32C {found}", f"the {checksum} that MANIFEST.json names")
        except (UserError, OSError):
            if saved.path.exists():  # otherwise a running training has just deleted it, as too old
                raise
            gone += 1
    if not run.saved:
        raise LeftOut("no checkpoint yet")
    told = [f"{gone} checkpoints, deleted meanwhile"] if gone else []
    told += [] if run.options.full else ["checksums of tensors: --full"]
    return Outcome("files of checkpoints", count, "; ".join(told))


def check_receipts(run: Run) -> Outcome:
    """A checkpoint's receipt says what its counters, its config and its fingerprint say."""
    missing = 0
    for saved in run.saved:
        for key, value in (("step", saved.state), ("train: step", saved.train)):
            if (found := value.integer("step", 0, MAX_STEP)) != saved.step:
                lie(saved.place, f"{key} is {found}", f"{saved.step}, as the folder's name says")
        if saved.receipt is None:
            missing += 1
            continue
        for key, value in _expected_receipt(run, saved).items():
            if (found := saved.receipt.values.get(key)) != value:
                lie(saved.place, f"receipt: {key} is {brief(found)}", f"{brief(value)}, as the rest of the file says")
        if (found := saved.receipt.values.get("num_samples")) != (size := mixtures.num_samples(run, saved)):
            lie(saved.place, f"receipt: num_samples is {brief(found)}", size)
    told = f"{missing} checkpoints of an earlier version have none" if missing else ""
    return Outcome(
        "receipts against counters, config and fingerprint of the same checkpoint", len(run.saved) - missing, told
    )


def _expected_receipt(run: Run, saved: Saved) -> dict[str, object]:
    config = saved.state.part("config")
    data = config.part("data")
    batch = data.integer("global_batch", 1, MAX_COUNT)
    return {
        **saved.said_order.values,
        **mixtures.expected_receipt(run, saved),
        "seed": config.values.get("seed"),
        "global_batch": batch,
        **{key: data.values.get(key) for key in ("held_out", "subset", "repeats")},
        "steps": saved.step,
        "samples_seen": saved.step * batch,
        **{key: saved.train.values.get(key) for key in ("bad_samples", "damaged_samples", "skipped_steps")},
    }


def check_config(run: Run) -> Outcome:
    """config.yaml, and the config in every checkpoint, are those of one run; so are order and data set."""
    path, (place, identity) = run.folder / "config.yaml", run.identity
    compared: list[dict[str, object]] = []  # mostly one; parsing one takes 50 ms
    mixtures.check_weights(run, run.config, path, run.trained)
    for saved in run.saved:
        _check_identity(run, saved, place, identity)
        if saved.state.texts("class_names", ()) != run.saved[-1].state.texts("class_names", ()):
            lie(saved.place, "its class_names", f"those of {place}")
        if (values := saved.state.part("config").values) in compared:
            continue
        compared.append(values)
        try:
            config = config_from_dict(values, str(saved.place))
        except ConfigError as error:
            raise Lie(str(error)) from None
        mixtures.check_weights(run, config, saved.place, saved.step)
        before = config_to_dict(config)
        if differences := resume_differences(before, run.config):
            lie(path, f"not the config of {saved.place}: {differences[0]}", "the same: no resume may change it")
    return Outcome("config.yaml and the configs, orders and classes of checkpoints", len(run.saved))


def _check_identity(run: Run, saved: Saved, place: str, identity: Mapping[str, Any]) -> None:
    own = saved.said_order.values
    for key in {**identity, **own}.keys() - mixtures.check_identity(run, saved):
        if own.get(key) != identity.get(key):
            lie(saved.place, f"data {key} is {brief(own.get(key))}", f"{brief(identity.get(key))}, as {place} says")


def check_done(run: Run) -> Outcome:
    """DONE is of the last step, which is saved, and its scores are those of that checkpoint."""
    if run.done is None:
        raise LeftOut("the run is not done")
    path, step = run.folder / "DONE", run.done.integer("step", 0, MAX_STEP)
    if not run.saved:
        lie(path, f"step {step} is done", "a checkpoint of it")
    newest = run.saved[-1]
    for other, name in ((newest.step, newest.path), (run.config.total_steps, "config.yaml: total_steps")):
        if step != other:
            lie(path, f"step is {step}", f"{other}, that of {name}")
    metrics = {key: value for key, value in run.done.values.items() if key != "step"}
    if not _same(metrics, newest.state.part("metrics").values):
        lie(path, f"scores {brief(metrics)}", f"those of {newest.place}: {brief(newest.state.values['metrics'])}")
    return Outcome("DONE against config.yaml and the newest checkpoint", 1 + len(metrics))


def check_counts(run: Run) -> Outcome:
    """A checkpoint's counts of bad and damaged samples and of skipped steps are those of the lists up to its step."""
    base: dict[str, int] | None = None if run.first_step else {}  # counts of the run that it branched from
    for saved in run.saved:
        said = _said(saved)
        listed = {f"bad ({reason})": count for reason, count in run.bad.counts(saved.step).items()}
        listed["damaged"] = sum(run.damaged.counts(saved.step).values())
        listed["skipped steps"] = sum(row.integer("step", 1, MAX_STEP) <= saved.step for row in run.skipped)
        if base is None:
            base = {key: said.get(key, 0) - listed.get(key, 0) for key in {*said, *listed}}
        for key in sorted({*said, *listed}):
            own = said.get(key, 0) - base.get(key, 0)
            if own != listed.get(key, 0):
                name = {"damaged": "damaged_samples", "skipped steps": "skipped_steps"}.get(key, "bad_samples")
                found = f"{key}: {listed.get(key, 0)} lines up to step {saved.step}"
                lie(run.folder / f"{name}.jsonl", found, f"the {own} that {saved.place} counts")
    if not run.saved:
        raise LeftOut("no checkpoint yet")
    told = "what the run that it branched from left out" if run.first_step else ""
    return Outcome("counts in checkpoints against the lists: bad by reason, damaged, skipped", len(run.saved), told)


def _said(saved: Saved) -> dict[str, int]:
    bad = saved.train.part("bad_samples")
    return {f"bad ({reason})": bad.integer(reason, 0, MAX_COUNT) for reason in bad.values} | {
        "damaged": saved.train.integer("damaged_samples", 0, MAX_COUNT, 0),  # not counted by earlier versions
        "skipped steps": saved.train.integer("skipped_steps", 0, MAX_COUNT),
    }


def check_metrics(run: Run) -> Outcome:
    """The curves have one line a step, at the steps that are due, with the epoch and counts that belong to it."""
    path, last, trained = run.folder / "metrics.jsonl", run.first_step, run.trained
    steps_listed = [run.bad.steps.tolist(), run.damaged.steps.tolist(), [row.values["step"] for row in run.skipped]]
    base: list[int] | None = None if run.first_step else [0, 0, 0]
    seen: set[int] = set()
    for row in (row for row in run.metrics if "train/loss" in row.values):
        step = row.integer("step", 1, MAX_STEP)
        if step <= last:
            lie(row.source, f"step {step} after step {last}", "each step once")
        if run.done is not None and step > trained:
            lie(row.source, f"step {step}", f"at most {trained}, at which the run was done")
        epoch = run.order.epochs(step)
        if run.order_holds(step) and row.values.get("train/epoch") != epoch:
            lie(row.source, f"train/epoch is {brief(row.values.get('train/epoch'))}", f"{epoch} at step {step}")
        defaults = {"bad_samples": ..., "damaged_samples": 0, "skipped_steps": ...}  # as in _said
        said = [int(row.number(f"train/{key}", 0, MAX_COUNT, default)) for key, default in defaults.items()]
        listed = [bisect_right(steps, step) for steps in steps_listed]
        base = base or [one - other for one, other in zip(said, listed)]
        if step <= trained and (own := [one - other for one, other in zip(said, base)]) != listed:
            lie(row.source, f"{own} bad, damaged, skipped so far", f"{listed}, as their lists have it")
        last = step
        seen.add(step)
    _check_due(run, seen)
    return Outcome(f"lines of {path.name}: steps, epoch, counts", len(seen))


def _check_due(run: Run, seen: set[int]) -> None:
    """Checks that the last start logged at the interval of config.yaml; earlier ones may have had another interval."""
    every, total, path = run.config.log.every_steps, run.config.total_steps, run.folder / "metrics.jsonl"
    begun, trained = run.starts[-1].step, run.trained  # a checkpoint may claim billions: no loop over all steps
    due = range((begun // every + 1) * every, trained + 1, every) if every else ()
    for step in chain(due, [total] if begun < total <= trained else []):
        if step not in seen:
            lie(path, f"has no line of step {step}", f"one: log.every_steps is {every}")


def check_scores(run: Run) -> Outcome:
    """A checkpoint's scores are those that the curves have at its step."""
    rows: dict[int, dict[str, object]] = {}
    for row in run.metrics:
        rows.setdefault(row.integer("step", 0, MAX_STEP), {}).update(row.values)
    count = 0
    for saved in run.saved:
        metrics = saved.state.part("metrics").values
        logged = {key: rows.get(saved.step, {}).get(key) for key in metrics}
        if saved.step > run.first_step and not _same(metrics, logged):
            lie(saved.place, f"metrics are {brief(metrics)}", f"{brief(logged)}, as metrics.jsonl has them")
        count += len(metrics)
    return Outcome("scores in checkpoints against metrics.jsonl", count)


def _same(ours: dict, theirs: dict) -> bool:
    """Returns whether keys and values are equal; NaN equals NaN."""
    return ours.keys() == theirs.keys() and all(
        ours[key] == theirs[key] or (_is_nan(ours[key]) and _is_nan(theirs[key])) for key in ours
    )


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
