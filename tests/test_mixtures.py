"""Mixtures: shares exact at every slot, each source's passes complete, whatever the ranks, workers and restarts."""

import io
import json
import random
import re
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CLASSES
from PIL import Image
from ranks import run_ranks, start_ranks
from test_audit import edit_config, edit_states, look, seal, wrong
from test_loader import needs_shared_memory, pixels, targets
from tiny import changed, tiny_config
from web import Site, every, served

from pretrain.config import Config, config_to_dict
from pretrain.data import manifest as manifest_module
from pretrain.data.images import decode, train_image
from pretrain.data.lanes import Lanes, fits
from pretrain.data.loader import Batch, train_batches
from pretrain.data.manifest import BLOCK, load_index, load_manifest
from pretrain.data.mixture import (
    MAX_CYCLE,
    Mixture,
    Phase,
    SourceLanes,
    choose_source_lanes,
    joined,
    quotas_of,
    schedule,
    shard_name,
    source_of,
)
from pretrain.data.order import Order, plan_batch, share
from pretrain.data.reader import read_sample
from pretrain.errors import ConfigError, UserError
from pretrain.shards.build import build
from pretrain.shards.elsewhere import index_urls
from pretrain.shards.sources import Item
from pretrain.train.datasets import open_data
from pretrain.train.resuming import fingerprint, refuse_changes, resumed_order
from pretrain.train.run import train

BATCH, STEPS = 12, 16


# --- shares ----------------------------------------------------------------------------------------------------------


def weight_lists() -> list[list[float]]:
    chance = random.Random(0)
    some = [
        [chance.choice((0.01, 0.1, 1, 2, chance.randint(1, 60))) for _ in range(chance.randint(2, 9))]
        for _ in "x" * 150
    ]
    return [
        [0.6, 0.3, 0.1],
        [0.007, 0.993],
        [1, 1],
        [1, 1, 1],
        [1281167, 13153500],
        [1, 0, 3],
        [5, 0],
        [1 / 3, 2 / 3],
        *some,
    ]


def test_each_source_is_within_one_sample_of_its_share_at_every_slot() -> None:
    """Of 158 lists of weights; and each cycle has the quotas exactly."""
    for weights in weight_lists():
        quotas = np.array(quotas_of(weights)[0])
        chosen = schedule(quotas.tolist())
        given = np.cumsum(chosen[:, None] == np.arange(len(quotas)), axis=0)
        due = np.arange(1, len(chosen) + 1)[:, None] * quotas
        assert (np.abs(given * len(chosen) - due) < len(chosen)).all(), weights
        assert (given[-1] == quotas).all()


@pytest.mark.parametrize(
    ("weights", "quotas", "exact"),
    [
        ([0.6, 0.3, 0.1], (6, 3, 1), True),
        ([0.1, 0.2], (1, 2), True),
        ([3, 3.0, 6], (1, 1, 2), True),
        ([1e-3, 0.999], (1, 999), True),
        ([7, 0], (1, 0), True),
        ([1, 65535], (1, 65535), True),
        ([1281167, 13153500], (5817, 59719), False),
        ([1, 65536], (1, 65535), False),
    ],
)
def test_weights_become_integers(weights: list[float], quotas: tuple[int, ...], exact: bool) -> None:
    """Exactly where a cycle has them, a decimal number as it is written; else to the nearest."""
    assert quotas_of(weights) == (quotas, exact)


def test_a_weight_without_a_slot_is_refused() -> None:
    """Less than one slot of the longest cycle."""
    with pytest.raises(ConfigError, match=f"weight 1e-09 is less than one of {MAX_CYCLE:,} samples"):
        quotas_of([1, 1e-9])


# --- the order -------------------------------------------------------------------------------------------------------


def orders() -> list[Order]:
    """Two to five sources, batches that fit nothing, weights that change and sources that come and go."""
    found, chance = [], random.Random(1)
    for _ in range(12):
        count, batch, phases, step = chance.randint(2, 5), chance.randint(8, 29), [], 0
        for _ in range(chance.randint(1, 3)):
            quotas = [chance.randint(0, 9) for _ in range(count)]
            phases.append(Phase(step * batch, tuple(quotas) if sum(quotas) else (1,) * count))
            step += chance.randint(1, 20)
        mixture = Mixture(tuple(chance.randint(1, 60) for _ in range(count)), tuple(phases))
        found.append(Order(sum(mixture.sizes), 0, batch, chance.randint(0, 9), mixture=mixture))
        if len(found) % 3 == 0:
            lanes = tuple(source_lanes(size, batch, chance) for size in mixture.sizes)
            found.append(replace(found[-1], mixture=replace(mixture, lanes=lanes)))
    return found


def source_lanes(size: int, batch: int, chance: random.Random) -> SourceLanes:
    """Rounds, blocks and lanes that a source of so many samples can have, however odd."""
    while True:
        samples = chance.randint(1, batch)
        own = SourceLanes(samples, Lanes(chance.randint(1, 9), chance.randint(1, samples), chance.randint(1, 2)))
        if fits(own.lanes, size, samples, 70):
            return own


def test_each_pass_of_each_source_has_each_sample_once() -> None:
    """Passes follow each other without a gap, also where weights change; counts and the inverse are in closed form."""
    for order in orders():
        steps = 70
        epochs, indices = (part.ravel() for part in order.samples(range(steps)))
        sources = order.sources_of(indices)
        assert (order.steps_of(epochs, indices) == np.repeat(np.arange(steps), order.global_batch)).all()
        for source, size in enumerate(order.sizes):
            own = sources == source
            assert own.sum() == order.given(steps)[source]
            for epoch in range(int(epochs[own].max(initial=0)) + 2):
                seen = np.unique(indices[own & (epochs == epoch)])
                assert len(seen) == (own & (epochs == epoch)).sum() == order.seen_in(steps)(epoch)[source]
                if order.name == "permuted":
                    assert len(seen) == min(size, max(0, own.sum() - epoch * size))
                elif (rest := own.sum() - epoch * size) > size + 2 * order.global_batch:  # a round may begin several
                    assert len(seen) == size
                elif rest < -2 * order.global_batch:
                    assert not len(seen)
            if order.name == "permuted":
                assert (np.diff(epochs[own]) >= 0).all()
        assert len(set(zip(epochs.tolist(), indices.tolist()))) == len(indices)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
def test_ranks_and_restarts_change_no_step(world_size: int) -> None:
    """Shares of 1 to 8 ranks, asked for at any step without the ones before, put together are the global batch."""
    for order in orders()[::2]:
        whole = order.samples(range(70))
        for step in (0, 7, 69):
            parts = [order.samples(step, share(order.global_batch, rank, world_size)) for rank in range(world_size)]
            for mine, expected in zip(zip(*parts), whole):
                assert (np.concatenate(mine) == expected[step]).all()


@pytest.mark.parametrize("lanes", [(), (SourceLanes(50, Lanes(4, 6)),) * 2], ids=["permuted", "lanes"])
def test_sources_have_permutations_of_their_own(lanes: tuple[SourceLanes, ...]) -> None:
    """Two sets of one size are not visited in the same order, and each pass has another."""
    order = Order(2000, 0, 100, 0, mixture=Mixture((1000, 1000), (Phase(0, (1, 1)),), lanes))
    _, indices = (part.ravel() for part in order.samples(range(40)))
    first, second = (indices[indices // 1000 == source] % 1000 for source in (0, 1))
    for one, other in ((first[:1000], second[:1000]), (first[:1000], first[1000:])):
        assert (one == other).sum() < 10  # 1 is expected


def test_epochs_are_those_of_the_slowest_source_that_has_begun() -> None:
    """One whose weight is 0 until step 5 counts from its first sample on."""
    order = Order(160, 0, 10, 0, mixture=Mixture((40, 120), (Phase(0, (1, 0)), Phase(50, (1, 1)))))
    assert [order.epochs(steps) for steps in (0, 4, 5, 29)] == [0.0, 1.0, 1.25, 1.0]


def test_a_round_is_what_a_step_has_of_a_source(sets: dict[str, Path]) -> None:
    """When its weight begins, however many later; at most a quarter of the source, and one sample at least."""
    sources = [load_manifest(sets[name]) for name in ("trees", "few", "others")]
    phases = [Phase(0, (1, 3, 0)), Phase(40, (8, 1, 1))]
    chosen = choose_source_lanes(sources, phases, 40, 100)
    assert [own.round_samples for own in chosen] == [10, 31 // 4, 9 // 4]
    assert [own.round_samples for own in choose_source_lanes(sources, [Phase(0, (9, 9, 1))], 4, 100)] == [1, 1, 1]


# --- sets ------------------------------------------------------------------------------------------------------------


def make_set(folder: Path, classes: list[str], num_samples: int, *, several: bool = False) -> Path:
    """JPEG images of noise; with several labels each image has one or two."""
    chance, items = np.random.default_rng(num_samples), []
    for number in range(num_samples):
        file = io.BytesIO()
        Image.fromarray(chance.integers(0, 256, (26, 24 + number % 5, 3)).astype(np.uint8)).save(file, "jpeg")
        label = number % len(classes)
        labels = sorted({label, (label + 1 + number % 2) % len(classes)})
        items.append(Item(file.getvalue, "jpg", labels if several else label, f"noise {number}"))
    build(items, classes, folder, samples_per_shard=20, seed=0)
    return folder


@pytest.fixture(scope="module")
def sets(shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """trees: five classes. few: two of them, in another order. several: with one or two labels."""
    folder = tmp_path_factory.mktemp("sets")
    return {
        "trees": shard_folder,
        "few": make_set(folder / "few", ["fir", "birch"], 31),
        "several": make_set(folder / "several", CLASSES, 17, several=True),
        "others": make_set(folder / "others", ["ash", "oak"], 9),
        "unnamed": make_set(folder / "sub" / "few", CLASSES, 23),
    }


def of(sets: dict[str, Path], **weights: float) -> list[dict[str, Any]]:
    return [{"path": str(sets[name]), "weight": weight} for name, weight in weights.items()]


def settings(sets: dict[str, Path], output: Path, **changes: Any) -> Config:
    """A run of 16 steps on three sets, whose weights change at step 8."""
    data = {"train": of(sets, trees=0.5, few=0.3, several=0.2), "reweight": [{"step": 8, "weights": [0.25, 0, 0.75]}]}
    data |= {"global_batch": BATCH, "workers": 0}
    own = {"data": data, "loss": "sigmoid", "total_steps": STEPS, "checkpoint__every_steps": 4, **changes}
    return tiny_config(sets["trees"], output, **own)


def step_slots(config: Config, monkeypatch: pytest.MonkeyPatch, world_size: int) -> list[list[tuple]]:
    """(epoch, index, labels, pixels) of each slot of each step, put together from all ranks."""
    of_ranks: list[list[Batch]] = []
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        data = open_data(config)
        of_ranks.append(list(train_batches(data.train, data.order, plan_batch(BATCH, world_size, 4), config, 0)))
    return [
        [
            (int(batch.epoch[i]), int(batch.index[i]), targets(batch, i), pixels(batch, i))
            for rank, batch in enumerate(batches)
            for i in range(len(share(BATCH, rank, world_size)))
        ]
        for batches in zip(*of_ranks)
    ]


KINDS = ("one set", "a mixture")
EVERY_ORDER = [(kind, order) for kind in KINDS for order in ("permuted", "lanes")]
_SAMPLE = {  # of all ways of reading; the others are long
    *((kind, order, 3, 0) for kind, order in EVERY_ORDER),
    *[("a mixture", "permuted", 1, 3), ("a mixture", "lanes", 2, 1), ("one set", "lanes", 8, 0)],
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 samples, so that small sets have several lanes."""
    monkeypatch.setattr(manifest_module, "MIN_BLOCK_SAMPLES", 4)
    monkeypatch.setattr(manifest_module, "BLOCK_BYTES", 1)


def of_kind(kind: str, order: str, sets: dict[str, Path], output: Path, workers: int = 0) -> Config:
    """Two whole epochs of a set, or three sets whose weights change, with augmentation."""
    changes: dict[str, Any] = {"data__order": order, "data__workers": workers, "data__randaugment_layers": 2}
    if kind == "one set":
        changes |= {"data__train": str(sets["trees"]), "data__reweight": [], "total_steps": 18}
    return changed(settings(sets, output), **changes)


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], list[list[tuple]]]:
    """The steps of each kind and order as one rank without workers reads them, once that was done."""
    return {}


def all_ways() -> list[Any]:
    ways = product(KINDS, ("permuted", "lanes"), (1, 2, 3, 4, 6, 8), (0, 1, 2, 3))
    return [way if way in _SAMPLE else pytest.param(*way, marks=pytest.mark.long) for way in ways]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("kind", "order", "world_size", "workers"), all_ways())
def test_ranks_and_workers_change_no_pixel(
    kind: str,
    order: str,
    world_size: int,
    workers: int,
    alone: dict[tuple[str, str], list[list[tuple]]],
    sets: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Epochs, indices, labels and augmented pixels of every step are those of one rank without workers.

    They are the order's, and within each pass of each set every sample comes once.
    """
    if workers:
        needs_shared_memory()
    if (kind, order) not in alone:
        alone[kind, order] = step_slots(of_kind(kind, order, sets, tmp_path), monkeypatch, 1)
    found = step_slots(of_kind(kind, order, sets, tmp_path, workers), monkeypatch, world_size)
    assert found == alone[kind, order]
    own = open_data(of_kind(kind, order, sets, tmp_path)).order
    assert own.name == order and own.samples(0)[0].shape == (BATCH,)
    seen = np.array([slot[:2] for step in found for slot in step])  # (epoch, index)
    assert (seen == np.stack(own.samples(range(len(found))), axis=-1).reshape(-1, 2)).all()
    assert len(np.unique(seen, axis=0)) == len(seen)
    sources, whole = own.sources_of(seen[:, 1]), 0
    for source, size in enumerate(own.sizes):
        epochs = seen[sources == source, 0]
        counts = np.bincount(epochs)
        assert counts.tolist() == [own.seen_in(len(found))(epoch)[source] for epoch in range(len(counts))]
        whole += (counts == size).sum()
    assert whole >= 1


def test_labels_are_read_by_name_and_may_be_several(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`few` has its classes in another order; single labels lie beside several ones. What was mapped is told."""
    data = open_data(settings(sets, tmp_path))
    assert "few/manifest.json has 2 of the 5 classes of" in capsys.readouterr().out
    assert data.train.class_names == tuple(CLASSES) and data.train.num_samples == 103 + 31 + 17
    by_source: dict[str, set[tuple[int, ...]]] = {}
    for slots in step_slots(settings(sets, tmp_path), monkeypatch, 1):
        for _, index, labels, _ in slots:
            name = source_of(data.train, index)[0].name
            by_source.setdefault(name, set()).add(tuple(label for label, weight in labels if weight == 1))
    assert by_source["trees"] == {(label,) for label in range(5)}
    assert by_source["few"] == {(CLASSES.index("fir"),), (CLASSES.index("birch"),)}
    assert {len(labels) for labels in by_source["several"]} == {2}


def test_the_classes_of_all_sets_together(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`others` has one class of `trees` and one of its own, which comes behind them; a set for validation is mapped."""
    of_sets = {"data__train": of(sets, trees=1, others=1), "data__reweight": [], "data__join_classes": True}
    own = {**of_sets, "data__val": str(sets["others"]), "evaluation__every_steps": 1}
    config = changed(settings(sets, tmp_path), **own)
    data = open_data(config)
    together = f"data.train: 6 classes together: 5 of {sets['trees']} (5), 1 of {sets['others']} (2)"
    assert together in capsys.readouterr().out
    assert data.num_classes == 6 and data.train.class_names == (*CLASSES, "oak")
    assert data.val is not None and data.val.meant([0, 1]) == [CLASSES.index("ash"), 5]
    by_source: dict[str, set[int]] = {}
    for slots in step_slots(config, monkeypatch, 1):
        for _, index, labels, _ in slots:
            by_source.setdefault(source_of(data.train, index)[0].name, set()).update(label for label, _ in labels)
    assert by_source == {"trees": set(range(5)), "others": {CLASSES.index("ash"), 5}}


def test_a_samples_pixels_are_those_of_its_own_set(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their randomness has the key (seed, source, epoch, index in that source): not what stands beside it."""
    config = settings(sets, tmp_path)
    train = open_data(config).train
    for epoch, index, _, shown in sum(step_slots(config, monkeypatch, 1), []):
        source, own = source_of(train, index)
        image = decode(read_sample(source, own).image)
        expected = train_image(image, config.model.image_size, config.data, config.seed, source.name, epoch, own)
        assert shown == expected.numpy().tobytes()


def test_sources_of_one_name_are_told_apart(sets: dict[str, Path]) -> None:
    """The second gets a number, which is what bad samples and augmentations name."""
    both = joined([load_manifest(sets["few"]), load_manifest(sets["unnamed"])])[0]
    assert [source.name for source in both.sources] == ["few", "few#2"]
    assert shard_name(both, 30).startswith("few/few-") and shard_name(both, 31).startswith("few#2/few-")
    assert both.path.parent == sets["unnamed"]  # whose classes are all


REFUSED: dict[str, tuple[dict[str, float], dict[str, Any], str]] = {
    "another class": ({"trees": 1, "others": 1}, {}, "class 1 is 'oak', which .* does not have.*join_classes=true"),
    "the same set twice": ({"trees": 1, "again": 1}, {}, "are the same set; give it once"),
    "softmax": ({"trees": 1, "several": 1}, {"loss": "softmax"}, "several labels, .* one, .*set loss=sigmoid"),
    "no weight": ({"trees": 1, "few": 1e-9}, {}, "weight 1e-09 is less than one of"),
    "held out": ({"trees": 1, "few": 1}, {"data__held_out": 3}, "data.train names several: set data.val"),
    "subset": ({"trees": 1, "few": 1}, {"data__subset": 3}, "data.train names several: lower their weights"),
    "copies": ({"trees": 1, "few": 1}, {"data__repeats": 2}, "data.train names several: set it to 1"),
    "one set": ({"trees": 1}, {}, "expected the path of one set, or 2 to 64 sets"),
    "epochs": (
        {"trees": 1, "few": 1},
        {"total_steps": 0, "total_epochs": 2},
        "total_epochs needs a single set, .* total_steps",
    ),
    "0 in all steps": ({"trees": 1, "few": 0}, {}, r"data.train\[1\] .* has weight 0 in all steps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_mixture_is_refused_in_one_line(case: str, sets: dict[str, Path], tmp_path: Path) -> None:
    """With what is wrong, and a way out."""
    weights, changes, message = REFUSED[case]
    own = {**sets, "again": Path(shutil.copytree(sets["trees"], tmp_path / "again"))}
    with pytest.raises(UserError, match=message) as error:
        open_data(
            tiny_config(sets["trees"], tmp_path, **{"data__train": of(own, **weights), "loss": "sigmoid"} | changes)
        )
    assert "\n" not in str(error.value)


# --- resuming --------------------------------------------------------------------------------------------------------


RESUMED: dict[str, tuple[dict[str, Any], str | None]] = {
    "the same": ({}, None),
    "the same shares": ({"weights": {"trees": 5, "few": 3, "several": 2}}, None),
    "a later weight": ({"reweight": [(8, [1, 0, 3]), (10, [1, 1, 1])]}, None),
    "a later set": ({"weights": {"trees": 5, "few": 3, "several": 2, "unnamed": 0}, "late": True}, None),
    "more classes": (
        {"weights": {"trees": 5, "few": 3, "several": 2, "more": 0}, "late": True},
        "number of classes: was 5, is 6",
    ),
    "a weight": (
        {"weights": {"trees": 4, "few": 3, "several": 3}},
        r"before step 10 were \[5, 3, 2\] from step 0 on, .*",
    ),
    "an earlier step": (
        {"reweight": [(9, [1, 0, 3])]},
        "from step 8 on, are .* from step 9 on .*data.reweight gives others",
    ),
    "fewer sets": (
        {"weights": {"trees": 5, "few": 3}, "reweight": []},
        "was a mixture of 3 sets, is a mixture of 2 sets",
    ),
    "one set": ({"weights": {}, "reweight": []}, "was a mixture of 3 sets, is one set"),
    "another set": (
        {"weights": {"trees": 5, "other": 3, "several": 2}},
        r"data.train\[1\] \(other\): manifest_sha256 was",
    ),
    "another order": (
        {"weights": {"few": 3, "trees": 5, "several": 2}},
        r"data.train\[0\] \(few\): manifest_sha256 was",
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resume_keeps_sources_and_earlier_weights(case: str, sets: dict[str, Path], tmp_path: Path) -> None:
    """From a checkpoint at step 10: what changed is named; later weights, and sets that had none before, may come."""
    change, message = RESUMED[case]
    began = settings(sets, tmp_path)
    data = open_data(began)
    state = {"step": 10, "data": fingerprint(data.train, data.order)}
    state |= {"class_names": CLASSES, "num_classes": data.num_classes}
    (tmp_path / "state.json").write_text(json.dumps(state | {"config": config_to_dict(began)}))
    own = {**sets, "other": make_set(tmp_path / "other", ["fir", "birch"], 30)}
    own["more"] = make_set(tmp_path / "more", [*CLASSES, "oak"], 12)
    train_sets = of(own, **change.get("weights", {"trees": 5, "few": 3, "several": 2})) or str(sets["trees"])
    phases = change.get("reweight", [(8, [1, 0, 3])])
    if change.get("late"):
        phases = [(8, [1, 0, 3, 0]), (10, [1, 0, 3, 4])]
    reweight = [{"step": step, "weights": weights} for step, weights in phases]
    now = changed(began, data__train=train_sets, data__reweight=reweight)
    if message is None:
        refuse_changes(tmp_path, now, open_data(now).train)
    else:
        with pytest.raises(ConfigError, match=message):
            refuse_changes(tmp_path, now, open_data(now).train)


@pytest.mark.usefixtures("small_blocks")
def test_a_resumed_mixture_keeps_its_lanes(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever would be chosen today; a set that is added has today's. Numbers that cannot be lanes are refused."""
    began = open_data(of_kind("a mixture", "lanes", sets, tmp_path))
    state = {"data": fingerprint(began.train, began.order)}
    (tmp_path / "state.json").write_text(json.dumps(state))
    monkeypatch.setattr(manifest_module, "MIN_BLOCK_SAMPLES", 2)
    more = of(sets, trees=0.5, few=0.3, several=0.2, unnamed=0)
    later = [{"step": 8, "weights": [0.25, 0, 0.75, 0]}, {"step": 10, "weights": [1, 1, 1, 1]}]
    now = changed(of_kind("a mixture", "lanes", sets, tmp_path), data__train=more, data__reweight=later)
    today = open_data(now).order
    assert began.order.mixture and today.mixture and today.mixture.lanes[:3] != began.order.mixture.lanes
    resumed = resumed_order(tmp_path, today, STEPS)
    assert resumed.mixture and resumed.mixture.lanes == (*began.order.mixture.lanes, today.mixture.lanes[3])
    without = replace(today, mixture=replace(today.mixture, lanes=()))  # data.order=auto of sets on this disk
    with pytest.raises(UserError, match="began in the order lanes, and a set was added; set data.order=lanes"):
        resumed_order(tmp_path, without, STEPS)
    for key, wrong_one in (("num_lanes", 12), ("round_samples", 0), ("block_samples", "8")):
        broken = json.loads(json.dumps(state))
        broken["data"]["order"]["sources"][1][key] = wrong_one
        (tmp_path / "state.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=key):
            resumed_order(tmp_path, today, STEPS)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("workers", [0, 2])
def test_sources_may_lie_elsewhere(
    workers: int, sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture of remote and local sets, one of them in both places, is read in lanes: the batches of local sets."""
    if workers:
        needs_shared_memory()
    local = step_slots(of_kind("a mixture", "lanes", sets, tmp_path), monkeypatch, 1)
    with ExitStack() as stack:
        own = dict(sets)
        for name in ("trees", "several"):
            site = stack.enter_context(served(Site(sets[name], fault=every(7, "503"))))
            shards = sorted(sets[name].glob("*.tar"))
            own[name] = tmp_path / "far" / name
            index_urls([f"{site.url}/{path.name}" for path in shards], CLASSES, own[name])
        config = changed(of_kind("a mixture", "auto", own, tmp_path, workers), data__store=str(tmp_path / "store"))
        assert step_slots(config, monkeypatch, 1) == local
        assert site.sent and list((tmp_path / "store").iterdir())


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """2 ranks, killed after step 6 with step 4 saved, then 3 to the end with a set more and other weights from step 12.

    One image of `few` cannot be decoded.
    """
    return killed_run(sets, tmp_path_factory.mktemp("run"), "permuted")


def killed_run(sets: dict[str, Path], folder: Path, order: str) -> tuple[Config, Path]:
    own = {name: Path(shutil.copytree(path, folder / path.name)) for name, path in sets.items() if name != "unnamed"}
    break_image(own["few"], 7)
    late = make_set(folder / "late", ["elm", "ash"], 13)
    config = settings(own, folder, checkpoint__keep_last=5, data__order=order)
    processes, log = start_ranks(train, 2, config), folder / "tiny" / "samples-00000.jsonl"
    saved, deadline = folder / "tiny" / "checkpoints" / "step-0000000004", time.monotonic() + 240
    while not saved.exists() or not log.exists() or log.read_text().count("\n") < 6:
        assert any(process.is_alive() for process in processes) and time.monotonic() < deadline
        time.sleep(0.002)
    for process in processes:
        process.kill()
        process.join()
    assert not (folder / "tiny" / "DONE").exists(), "killed too late"
    more = [*config_to_dict(config)["data"]["train"], {"path": str(late), "weight": 0}]
    later = [{"step": 8, "weights": [0.25, 0, 0.75, 0]}, {"step": 12, "weights": [3, 0, 1, 2]}]
    config = changed(config, data__train=more, data__reweight=later)
    run_ranks(finish, 3, config)
    return config, folder


def finish(config: Config) -> None:
    train(config)


def break_image(shards: Path, number: int) -> None:
    shard, at = load_manifest(shards).locate(number)
    begin, end = load_index(shard).byte_range(at)
    tar = bytearray(shard.path.read_bytes())
    image = tar.index(b".jpg\0", begin, end) // BLOCK * BLOCK + BLOCK
    tar[image : image + 8] = b"nothing!"
    shard.path.write_bytes(tar)
    seal(shards)


def check_log(config: Config, folder: Path, order: Order) -> None:
    """The logs of samples, put together over ranks, are the order's."""
    logs = [(folder / "tiny" / f"samples-{rank:05d}.jsonl").read_text().splitlines() for rank in range(3)]
    steps: dict[int, list[list[int]]] = {}
    for row in (json.loads(line) for log in logs for line in log):
        steps.setdefault(row["step"], []).extend(row["samples"])
    assert sorted(steps) == list(range(1, STEPS + 1))
    for step, pairs in steps.items():
        assert pairs == np.stack(order.samples(step - 1), axis=1).tolist(), step


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_run_in_lanes_sees_the_same_samples(sets: dict[str, Path], tmp_path: Path) -> None:
    """The same of each source's lanes: killed, resumed on other ranks with a set more; the audit adds up."""
    config, folder = killed_run(sets, tmp_path, "lanes")
    check_log(config, folder, open_data(config).order)
    found = look(folder / "tiny", full=True)
    assert not wrong(found) and not [finding.left_out for finding in found if finding.left_out]
    state = json.loads((folder / "tiny/checkpoints" / f"step-{STEPS:010d}" / "state.json").read_text())
    assert all(source["num_lanes"] >= 1 for source in state["data"]["order"]["sources"])
    assert state["data"]["order"]["name"] == "lanes"


@pytest.mark.slow
def test_a_killed_run_on_other_ranks_sees_the_same_samples(killed: tuple[Config, Path], sets: dict[str, Path]) -> None:
    """The logs of samples, put together over ranks, are the order's; the audit adds up every source's passes."""
    config, folder = killed
    order = open_data(config).order
    check_log(config, folder, order)
    undisturbed = open_data(settings(sets, folder)).order  # the same until the weights change at step 12
    assert all((undisturbed.samples(step)[1] == order.samples(step)[1]).all() for step in range(12))
    bad = [json.loads(line) for line in (folder / "tiny" / "bad_samples.jsonl").read_text().splitlines()]
    assert bad and {(row["index"], row["shard"].partition("/")[0]) for row in bad} == {(103 + 7, "few")}
    found = look(folder / "tiny", full=True)
    assert not wrong(found) and not [finding.left_out for finding in found if finding.left_out]
    told = [finding.compared for finding in found if finding.check == "epochs"]
    assert any(line.startswith("trees, epoch 0, under way: ") for line in told), told
    assert any(line.startswith("several, epoch 2: 17 used + 0 bad + 0 skipped = 17") for line in told), told
    receipt = json.loads((folder / "tiny/checkpoints" / f"step-{STEPS:010d}" / "state.json").read_text())["receipt"]
    assert [source["samples_seen"] for source in receipt["sources"]] == order.given(STEPS).tolist()
    assert [source["name"] for source in receipt["sources"]] == ["trees", "few", "several", "late"]
    first = json.loads((folder / "tiny/checkpoints" / f"step-{4:010d}" / "state.json").read_text())["receipt"]
    assert [source["samples_seen"] for source in first["sources"]] == [24, 14, 10]


@pytest.mark.slow
def test_a_run_whose_weights_have_just_changed_adds_up(killed: tuple[Config, Path], tmp_path: Path) -> None:
    """Lines of steps after the newest checkpoint, which knows the old weights, are not held against these."""
    run = Path(shutil.copytree(killed[1] / "tiny", tmp_path / "tiny"))
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if checkpoint.name != f"step-{4:010d}":
            shutil.rmtree(checkpoint)
    (run / "DONE").unlink()
    found = {finding.check: finding for finding in look(run, no_data=True)}
    for check in ("curves", "listed samples", "skipped steps"):
        assert not found[check].wrong and not found[check].left_out, found[check]


def swap(folder: Path) -> None:
    """Another set of the same name and size in the place of `few`."""
    shutil.rmtree(folder / "few")
    shutil.copytree(make_set(folder / "swapped" / "few", ["fir", "birch"], 31), folder / "few")


def in_states(part: str, place: int, **values: Any) -> Callable[[Path], None]:
    """Changes a source or a phase that the checkpoints name, in fingerprint and receipt alike."""

    def edit(state: dict[str, Any]) -> None:
        for section in (state["data"]["order"], state["receipt"]):
            count = len(section["sources"])  # one more in later checkpoints
            section[part][place] |= {key: v[:count] if key == "quotas" else v for key, v in values.items()}

    return lambda folder: edit_states(folder / "tiny", edit)


LIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a set swapped": (swap, "few/manifest.json: manifest_sha256 '.*expected '.*sources"),
    "a weight in the config": (
        lambda f: edit_config(f / "tiny", "weight: 0.3}", "weight: 0.4}"),
        r"config.yaml: weights: ",
    ),
    "a later weight in the config": (
        lambda f: edit_config(f / "tiny", "[0.25, 0.0, 0.75, 0.0]", "[0.25, 0.25, 0.5, 0.0]"),
        "weights: ",
    ),
    "weights in all checkpoints": (
        in_states("phases", 0, quotas=[4, 4, 2, 0]),
        r"weights: \[5, 3, 2, 0\].*expected \[4, 4, 2, 0\]",
    ),
    "a size": (in_states("sources", 1, num_samples=32), "sources of .* samples; expected .*164 samples together"),
    "a digest": (in_states("sources", 1, manifest_sha256="0" * 64), "few/manifest.json: manifest_sha256"),
    "samples seen": (
        lambda f: edit_states(f / "tiny", lambda s: s["receipt"]["sources"][0].update(samples_seen=9), "step-*16"),
        "receipt: sources is",
    ),
    "one checkpoint's source": (
        lambda f: edit_states(f / "tiny", lambda s: s["data"]["order"]["sources"][2].update(name="x"), "step-*08"),
        "name is 'x'; expected 'several'",
    ),
    "quotas that are none": (in_states("phases", 0, quotas=[0, 0, 0, 0]), "quotas is .*expected 4 integers from 0 on"),
    "a shard's source": (
        lambda f: _replace(f / "tiny" / "bad_samples.jsonl", '"few/', '"trees/'),
        "index 110 is in trees/.*; expected few/",
    ),
}


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.slow
@pytest.mark.parametrize("case", LIES)
def test_a_lie_about_sources_or_weights_is_found(case: str, killed: tuple[Config, Path], tmp_path: Path) -> None:
    """One of a set, a weight, a size, a count: the audit names it."""
    plant, message = LIES[case]
    shutil.copytree(killed[1], tmp_path, dirs_exist_ok=True)
    _replace(tmp_path / "tiny" / "config.yaml", str(killed[1]), str(tmp_path))
    assert not wrong(look(tmp_path / "tiny"))
    plant(tmp_path)
    found = wrong(look(tmp_path / "tiny"))
    assert any(re.search(message, line) for line in found), found


@pytest.mark.slow
def test_the_data_of_a_mixture_may_lie_elsewhere(killed: tuple[Config, Path], tmp_path: Path) -> None:
    """--data names the folder that holds the folders of its sets."""
    shutil.copytree(killed[1] / "tiny", tmp_path / "tiny")
    for name in ("trees", "few", "several", "late"):
        shutil.copytree(killed[1] / name, tmp_path / "data" / name)
    _replace(tmp_path / "tiny" / "config.yaml", f"{killed[1]}/", "/nowhere/")
    assert any("is not here" in finding.left_out for finding in look(tmp_path / "tiny"))
    found = look(tmp_path / "tiny", data=tmp_path / "data")
    assert not wrong(found) and not any("is not here" in finding.left_out for finding in found)
