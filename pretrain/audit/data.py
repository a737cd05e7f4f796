"""Is the data set on the disk the one that the run names, and are exactly the samples bad that the run lists?"""

from collections.abc import Iterator

import numpy as np

from pretrain.audit.folder import LeftOut, Run
from pretrain.audit.logs import lie
from pretrain.audit.records import REPAIRED, Outcome
from pretrain.data.manifest import Manifest
from pretrain.data.mixture import shard_name, source_of
from pretrain.json_files import brief
from pretrain.storage import sha256

MAX_SAMPLES_READ = 4096  # of a random choice, for each of two checks: 2 ms a sample
MAX_SHARD_BYTES_READ = 2 << 30  # of a random choice of shards: SHA-256 takes 2 s per gigabyte


def check_manifest(run: Run) -> Outcome:
    """The manifest on the disk has the digest that the run names, and the number of samples."""
    place, identity = run.identity
    manifest = run.manifest
    if len(manifest.sources) != len(run.sources):
        found = f"data.train names {len(manifest.sources)} sets"
        lie(run.folder / "config.yaml", found, f"{len(run.sources)}, {place}")
    for source, said in zip(manifest.sources, run.sources):
        for key, own in (
            ("manifest_sha256", source.sha256),
            ("name", source.name),
            ("num_samples", source.num_samples),
        ):
            if own != said.values.get(key):
                lie(source.path, f"{key} {brief(own)}", f"{brief(said.values.get(key))}, as {said.source} says")
    if manifest.sha256 != (named := identity.get("manifest_sha256")):
        lie(manifest.path, f"SHA-256 {manifest.sha256[:16]}...", f"{str(named)[:16]}..., as {place} says")
    if manifest.num_samples != run.order.num_samples:
        lie(manifest.path, f"{manifest.num_samples} samples", f"{run.order.num_samples}, as {place} says")
    return Outcome("manifest on the disk: its digest, number of samples", max(1, len(manifest.sources)))


def check_classes(run: Run) -> Outcome:
    """The classes' names beside the manifest, which its digest does not cover, are those of the checkpoints."""
    if run.manifest.sha256 != run.identity[1].get("manifest_sha256"):
        raise LeftOut("the data set on the disk is another one")
    newest, names = run.saved[-1], run.manifest.class_names
    said = newest.state.texts("class_names", ())
    for number, (was, now) in enumerate(zip(said, names)):
        if was != now:
            path = run.manifest.path.parent / "classes.json"
            lie(path, f"class {number} is {now!r}", f"{was!r}, as {newest.place} says")
    if len(said) != len(names):
        lie(newest.place, f"{len(said)} class names", f"the {len(names)} of {run.manifest.path.parent}")
    return Outcome("names of classes", len(names))


def check_shard_bytes(run: Run) -> Outcome:
    """Shards have the SHA-256 that the manifest lists: a choice of them, or all."""
    shards, chosen, num_bytes = [shard for shard in run.own_data.shards if not shard.url], [], 0
    if not shards:
        raise LeftOut("shards on a server: make_shards.py --verify reads them")
    for number in np.random.default_rng([run.options.seed, 2]).permutation(len(shards)).tolist():
        num_bytes += shards[number].num_bytes
        if chosen and not run.options.full and num_bytes > MAX_SHARD_BYTES_READ:
            break
        chosen.append(shards[number])
    for shard in chosen:
        if (found := sha256(shard.path)) != shard.sha256:
            lie(shard.path, f"SHA-256 {found[:16]}...", f"{shard.sha256[:16]}..., as the manifest says")
    rest = len(shards) - len(chosen)
    return Outcome(
        "shards on the disk: SHA-256; sizes of all", len(chosen), f"{rest:,} more shards: --full" if rest else ""
    )


def check_listed_again(run: Run) -> Outcome:
    """Listed samples are read again, each once: does it fail, for that reason, in that shard?"""
    manifest = run.own_data
    places: dict[int, tuple[str, str, str]] = {}
    for listed in (run.bad, run.damaged):
        for number, (index, reason, shard) in enumerate(zip(listed.indices.tolist(), listed.reasons, listed.shards)):
            own = shard_name(manifest, index) if index < manifest.num_samples else "no shard"
            if shard != own:
                lie(listed.place(number), f"index {index} is in {shard}", own)
            places.setdefault(index, (listed.place(number), reason, shard))
    indices = _chosen(run, np.array(sorted(places), np.int64), 3)
    for index, found in zip(indices, _reasons(manifest, indices)):
        place, reason, _ = places[index]
        if found != reason:
            lie(place, f"index {index} is {reason}", f"{found or 'good'}, as it is when read again {REPAIRED}")
    left = len(places) - len(indices)
    return Outcome("bad and damaged samples, read again", len(indices), f"{left:,} more: --full" if left else "")


def check_steps_again(run: Run) -> Outcome:
    """All samples of a choice of steps are read again: is what fails listed, and nothing else?"""
    manifest, batch = run.own_data, run.order.global_batch
    all_steps = range(run.first_step, run.trained)  # a checkpoint may claim billions: build no array of them
    steps, most = all_steps, max(1, MAX_SAMPLES_READ // batch)
    if not run.options.full and len(all_steps) > most:
        random = np.random.default_rng([run.options.seed, 4])
        steps = [all_steps[place] for place in sorted(random.choice(len(all_steps), most, replace=False).tolist())]
    known = {
        (epoch, index): reason
        for listed in (run.bad, run.damaged)
        for epoch, index, reason in zip(listed.epochs.tolist(), listed.indices.tolist(), listed.reasons)
    }
    counted = _strict(run) or run.saved[-1].train.has("damaged_samples")
    count = 0
    for step in steps:
        epochs, indices = run.order.samples(step)
        if len(indices) > MAX_SAMPLES_READ and not run.options.full:
            some = np.random.default_rng([run.options.seed, 5]).permutation(len(indices))[:MAX_SAMPLES_READ]
            epochs, indices = epochs[some], indices[some]
        for epoch, index, found in zip(epochs.tolist(), indices.tolist(), _reasons(manifest, indices.tolist())):
            listed = known.get((epoch, index))
            if found != listed and (counted or (found, listed) != ("damaged", None)):
                name = "damaged_samples" if "damaged" in (found, listed) and not _strict(run) else "bad_samples"
                said = f"lists it as {listed}" if listed else "does not list it"
                what = f"epoch {epoch}, index {index} (step {step + 1})"
                expected = f"{found or 'good'}, as it is when read again {REPAIRED}"
                lie(run.folder / f"{name}.jsonl", f"{what}: {said}", expected)
            count += 1
    left = len(all_steps) - len(steps)
    told = [f"{left:,} more steps: --full"] if left else []
    told += [] if counted else ["damage was not listed by that version"]
    return Outcome(f"samples of {len(steps):,} steps, read again", count, "; ".join(told))


def _chosen(run: Run, indices: np.ndarray, key: int) -> list[int]:
    if run.options.full or len(indices) <= MAX_SAMPLES_READ:
        return indices.tolist()
    return np.sort(np.random.default_rng([run.options.seed, key]).choice(indices, MAX_SAMPLES_READ, False)).tolist()


def _strict(run: Run) -> bool:
    return run.config.data.strict_images


def _reasons(manifest: Manifest, indices: list[int]) -> Iterator[str | None]:
    """Yields why each sample is bad or damaged, None where it is neither, by reading it as training does."""
    from pretrain.data.images import decode  # imports torch, which takes a second: only where samples are read
    from pretrain.data.reader import BadSample, parse_labels, read_sample

    for index in indices:
        damage: list[str] = []
        try:
            source, own = source_of(manifest, index)
            raw = read_sample(source, own)
            decode(raw.image, damage.append)
            parse_labels(raw.label, source.num_classes, source.multi_label)
        except BadSample as bad:
            yield bad.reason
        else:
            yield "damaged" if damage else None
