"""What a checkpoint records of a run's data and settings, and what of it a resume or a branch may not change."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pretrain.checkpoint.read import read_state
from pretrain.config import (
    BRANCH_MAY_CHANGE,
    MAX_STEP,
    Config,
    config_from_dict,
    config_to_dict,
    resume_differences,
)
from pretrain.data.lanes import lanes_in
from pretrain.data.manifest import Manifest
from pretrain.data.mixture import begun, lanes_as_numbers, phases_in, phases_of, source_lanes_in, told_phases
from pretrain.data.order import Order
from pretrain.errors import ConfigError, UserError
from pretrain.json_files import Fields, brief
from pretrain.log import say
from pretrain.provenance import versions
from pretrain.train.state import TrainState


def fingerprint(train_set: Manifest, order: Order) -> dict[str, Any]:
    """Returns what decides the order of samples and their pixels, as a checkpoint's state.json holds it."""
    numbers: dict[str, Any] = asdict(order.lanes) if order.lanes else {}
    if order.mixture:
        numbers["sources"] = _sources(train_set)
        for source, lanes in zip(numbers["sources"], order.mixture.lanes):
            source |= lanes_as_numbers(lanes)
        numbers["phases"] = [
            {"step": phase.first_slot // order.global_batch, "quotas": list(phase.quotas)}
            for phase in order.mixture.phases
        ]
    return {
        "format": "pretrain-data-state",
        "version": 1,
        "order": {"name": order.name, "version": "v1", "manifest_sha256": train_set.sha256, **numbers},
        "pixels": _pixels(),
    }


def _sources(train_set: Manifest) -> list[dict[str, Any]]:
    return [
        {"name": source.name, "manifest_sha256": source.sha256, "num_samples": source.num_samples}
        for source in train_set.sources
    ]


def _other_mixture(order: Fields, step: int, config: Config, train_set: Manifest) -> list[str]:
    """Returns how a mixture differs from that of a checkpoint at `step`.

    From `step` on, its weights may change, and it may have new sets.
    """
    before, now = [source.values for source in order.parts("sources", ())], _sources(train_set)
    if not before or not now or len(before) > len(now):
        was, is_now = (f"a mixture of {len(some)} sets" if some else "one set" for some in (before, now))
        return [] if was == is_now else [f"data.train: was {was}, is {is_now}"]
    for place, (was, source) in enumerate(zip(before, now)):
        for key in ("manifest_sha256", "name", "num_samples"):
            if was.get(key) != source[key]:
                what = f"data.train[{place}] ({source['name']}): {key}"
                return [f"{what} was {brief(was.get(key))}, is {brief(source[key])}"]
    batch = config.data.global_batch
    were = begun(phases_in(order, len(before), batch), step * batch, len(now))
    if were == (are := begun(phases_of(config.data), step * batch, len(now))):
        return []
    what = f"data.train: weights before step {step} were {told_phases(were, batch)}, are {told_phases(are, batch)}"
    return [f"{what} (data.reweight gives others from step {step} on)"]


def receipt(state: TrainState, order: Order, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the receipt of samples seen, for checkpoints and model cards; tools/audit.py adds it up again.

    identity: name and version of the order, the manifest's SHA-256; for a mixture its sources and phases.
    """
    sources = [
        {**source, "samples_seen": given}
        for source, given in zip(identity.get("sources", ()), order.given(state.step).tolist())
    ]
    return {
        **identity,
        **({"sources": sources} if sources else {}),
        "seed": order.seed,
        "global_batch": order.global_batch,
        "num_samples": order.num_samples,
        "held_out": order.held_out,
        "subset": order.subset,
        "repeats": order.repeats,
        "steps": state.step,
        "samples_seen": state.step * order.global_batch,
        "bad_samples": dict(state.bad_samples),
        "damaged_samples": state.damaged_samples,
        "skipped_steps": state.skipped_steps,
    }


def refuse_changes(checkpoint: Path, config: Config, train_set: Manifest, *, branching: bool = False) -> None:
    """Raises ConfigError, naming each difference, when `checkpoint` belongs to a run with other settings or data.

    branching: `config` starts another run from it, in which the keys in BRANCH_MAY_CHANGE may differ too.
    """
    of_state = _state(checkpoint)
    before = config_to_dict(config_from_dict(of_state.part("config").values, of_state.source))  # with newer keys
    saved_order, pixels = of_state.part("data").part("order"), of_state.part("data").part("pixels").values
    order = saved_order.values
    of_config = resume_differences(before, config, BRANCH_MAY_CHANGE if branching else ())
    differences = list(of_config)
    if config.data.order not in ("auto", order.get("name")):
        differences.append(f"data.order: was {brief(order.get('name'))}, is {config.data.order!r}")
    expected = {"version": "v1"}
    if train_set.sources or order.get("sources"):
        differences += _other_mixture(saved_order, of_state.integer("step", 0, MAX_STEP), config, train_set)
    else:
        expected["manifest_sha256"] = train_set.sha256
    for key, value in expected.items():
        if order.get(key) != value:
            differences.append(f"data {key}: was {brief(order.get(key))}, is {value!r}")
    # Names lie beside the manifest, whose SHA-256 does not cover them.
    for number, (was, now) in enumerate(zip(of_state.texts("class_names", ()), train_set.class_names)):
        if was != now:
            differences.append(f"data class {number}: was {brief(was)}, is {brief(now)}")
            break
    num_classes = config.model.num_classes or train_set.num_classes
    if (was := of_state.values.get("num_classes", num_classes)) != num_classes:  # an added set may add classes
        differences.append(f"number of classes: was {brief(was)}, is {num_classes}")
    if differences:
        way_out = "start with init_from instead of branch_from" if branching else "start another run with name=..."
        # A branch would be refused for other data, too.
        if not branching and differences == of_config and not resume_differences(before, config, BRANCH_MAY_CHANGE):
            way_out += f" (and branch_from={checkpoint.parent.parent} to go on from here)"
        raise ConfigError(
            f"{checkpoint}: was written with other settings ({'; '.join(differences)}); "
            f"give them the old values, or {way_out}"
        )
    if pixels != (now := _pixels()):
        say(f"warning: decoders changed since the checkpoint, pixels may differ: {brief(pixels)} -> {now}")


def resumed_order(checkpoint: Path, order: Order, steps: int) -> Order:
    """Returns `order` with the parameters that the checkpoint's run began with, whatever would be chosen today.

    Raises UserError when they are not valid, or not for `steps` steps.
    """
    saved = _state(checkpoint).part("data").part("order")
    if (name := saved.text("name")) not in ("permuted", "lanes"):
        saved.wrong("name", "permuted or lanes")
    if mixture := order.mixture:  # sets added since get the lanes that are chosen for them today
        began = zip(saved.parts("sources"), mixture.sizes)
        began = began if name == "lanes" else ()
        known = [source_lanes_in(source, size, order.global_batch, steps) for source, size in began]
        if known and len(known) < len(mixture.sizes) and not mixture.lanes:
            raise UserError("data.order: the run began in the order lanes, and a set was added; set data.order=lanes")
        return replace(order, mixture=replace(mixture, lanes=(*known, *mixture.lanes[len(known) :]) if known else ()))
    if name == "permuted":
        return replace(order, lanes=None)
    return replace(order, lanes=lanes_in(saved, order.num_train, order.images_per_step, steps))


def _state(checkpoint: Path) -> Fields:
    return Fields.of(read_state(checkpoint), f"{checkpoint}/state.json")


def _pixels() -> dict[str, str]:
    return {name: versions()[name] for name in ("torchvision", "pillow")}
