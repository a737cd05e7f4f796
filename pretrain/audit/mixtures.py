"""Checks what a run on a mixture says about its sources and weights.

A resume may add sets and change weights, but not for the steps before its checkpoint.
"""

from typing import Any

from pretrain.audit.folder import Run, Saved
from pretrain.audit.logs import lie
from pretrain.config import Config
from pretrain.data.mixture import begun, phases_in, phases_of, told_phases
from pretrain.json_files import Fields, brief


def check_identity(run: Run, saved: Saved) -> set[str]:
    """Compares a checkpoint's sources and weights with those of the newest; returns the keys that may differ."""
    sources = _sources(saved)
    if run.order.mixture is None or not 2 <= len(sources) <= len(run.sources):
        return set()
    for source, newest in zip(sources, run.sources):
        for key in {**source.values, **newest.values}:
            if (found := source.values.get(key)) != (expected := newest.values.get(key)):
                lie(source.source, f"{key} is {brief(found)}", f"{brief(expected)}, as {newest.source} says")
    batch, count = run.order.global_batch, len(run.sources)
    found = begun(phases_in(saved.said_order, len(sources), batch), saved.step * batch, count)
    if found != (expected := begun(run.order.mixture.phases, saved.step * batch, count)):
        of_newest = f"{told_phases(expected, batch)}, as {run.identity[0]} says"
        lie(saved.place, f"data phases: {told_phases(found, batch)}", of_newest)
    return {"sources", "phases"} | ({"manifest_sha256"} if len(sources) < count else set())


def check_weights(run: Run, config: Config, place: object, step: int) -> None:
    """Checks that the weights of a config are, for the steps before `step`, those of the newest checkpoint."""
    if config.data.is_mixture != bool(run.sources):
        found = f"a mixture of {len(config.data.sources)} sets" if config.data.is_mixture else "one set"
        lie(place, f"data.train is {found}", f"what {run.identity[0]} says")
    if run.order.mixture is None:
        return
    batch, count = run.order.global_batch, max(len(config.data.sources), len(run.sources))
    found, expected = (begun(p, step * batch, count) for p in (phases_of(config.data), run.order.mixture.phases))
    if found != expected:
        of_newest = f"{told_phases(expected, batch)}, as {run.identity[0]} says"
        lie(place, f"weights: {told_phases(found, batch)}", of_newest)


def num_samples(run: Run, saved: Saved) -> int:
    """Returns the number of samples of a run's data; of a mixture, those of the sources that a checkpoint knew."""
    return sum(run.order.sizes[: len(_sources(saved))]) if run.sources else run.order.num_samples


def expected_receipt(run: Run, saved: Saved) -> dict[str, Any]:
    """Returns what a checkpoint's receipt must say about a mixture's sources; {} for a single set."""
    given = zip(_sources(saved), run.order.given(saved.step).tolist())
    sources = [{**source.values, "samples_seen": count} for source, count in given]
    return {"sources": sources} if sources else {}


def _sources(saved: Saved) -> list[Fields]:
    return saved.said_order.parts("sources", ())
