"""Batches: the same samples and pixels for every number of ranks and workers, and each loss of a sample is told."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.config import Config, config_from_dict
from pretrain.data import loader, reader
from pretrain.data.images import decode, eval_image, train_image
from pretrain.data.lanes import Lanes
from pretrain.data.loader import (
    REASONS,
    BadRecord,
    Batch,
    check_bad_fraction,
    count_reasons,
    count_recent,
    eval_batches,
    train_batches,
)
from pretrain.data.manifest import Manifest, load_index, load_manifest, write_manifest
from pretrain.data.mix import draw_mix, mixed
from pretrain.data.order import Order, order_of, plan_batch, share
from pretrain.data.reader import parse_label, read_sample
from pretrain.errors import BadSamplesError, StorageError, UserError
from pretrain.shards.build import build, write_samples
from pretrain.shards.sources import Item

ROOT = Path(__file__).resolve().parents[1]
STEPS, GLOBAL_BATCH, IMAGE_SIZE = 13, 17, 16  # 221 slots: two borders of epochs with 103 samples


def config(shards: Path, **data: Any) -> Config:
    """The settings of a short run over the shards."""
    if data.get("workers"):
        needs_shared_memory()
    values = {
        "name": "trial",
        "total_steps": STEPS,
        "model": {"name": "Ti", "image_size": IMAGE_SIZE},
        "data": {"train": str(shards), "global_batch": GLOBAL_BATCH, "workers": 0} | data,
        "optim": {"lr": 1e-3},
    }
    return config_from_dict(values, "trial")


def needs_shared_memory() -> None:
    """Skips where loader processes cannot hand over their batches: a container without /dev/shm, or a tiny one."""
    room = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    if room is None or room.f_bavail * room.f_frsize < 8 << 20 or not os.access("/dev/shm", os.W_OK):
        pytest.skip("loader processes need 8 MB of shared memory in /dev/shm")


def rank_batches(
    shards: Path, monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int, start: int = 0, **data: Any
) -> list[Batch]:
    """All batches that one of several ranks gets, read in this process."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    settings, manifest = config(shards, **data), load_manifest(shards)
    lanes = Lanes(block_samples=8, num_lanes=3) if settings.data.order == "lanes" else None
    order = replace(order_of(settings, manifest.num_samples), lanes=lanes)
    plan = plan_batch(order.global_batch, world_size, 4)
    batches = list(train_batches(manifest, order, plan, settings, start))
    for batch in batches:
        assert batch.images.shape == (plan.accumulation * plan.micro_batch, 3, IMAGE_SIZE, IMAGE_SIZE)
        types = [torch.uint8, torch.int64, torch.float32, torch.bool, torch.int64, torch.int64]
        assert [t.dtype for t in batch[:6]] == types
    return batches


def global_steps(shards: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, **options: Any) -> list[list[tuple]]:
    """(epoch, index, (label, weight) pairs, valid, pixels) of each slot of each step, put together from all ranks."""
    ranks = [rank_batches(shards, monkeypatch, rank, world_size, **options) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    steps = []
    for step_batches in zip(*ranks):
        slots = []
        for rank, batch in enumerate(step_batches):
            own = len(share(options.get("global_batch", GLOBAL_BATCH), rank, world_size))
            slots += [
                (int(batch.epoch[i]), int(batch.index[i]), targets(batch, i), bool(batch.valid[i]), pixels(batch, i))
                for i in range(own)
            ]
            assert not batch.valid[own:].any() and not batch.images[own:].any()
            assert (batch.index[own:] == -1).all() and (batch.labels[own:] == -1).all()
            assert ((batch.label_weights == 0) == (batch.labels == -1)).all()
        steps.append(slots)
    return steps


def pixels(batch: Batch, slot: int) -> bytes:
    """The slot's image as bytes."""
    return batch.images[slot].numpy().tobytes()


def targets(batch: Batch, slot: int) -> list[tuple[int, float]]:
    """The slot's labels with their weights."""
    pairs = zip(batch.labels[slot].tolist(), batch.label_weights[slot].tolist())
    return [(label, weight) for label, weight in pairs if label >= 0]


def stored(manifest: Manifest, index: int) -> tuple[torch.Tensor, int]:
    """A sample's decoded image and its label."""
    sample = read_sample(manifest, index)
    return decode(sample.image), parse_label(sample.label, manifest.num_classes)


@pytest.fixture(scope="module")
def alone(shard_folder: Path) -> list[list[tuple]]:
    """The steps as one rank without workers reads them."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return global_steps(shard_folder, monkeypatch, 1)


def test_a_batch_holds_the_samples_of_the_order(alone: list[list[tuple]], shard_folder: Path) -> None:
    """Each slot has the order's sample, its label, and the augmentation of (seed, set, epoch, index)."""
    manifest, settings = load_manifest(shard_folder), config(shard_folder)
    order = Order(103, 0, GLOBAL_BATCH, 0)
    assert len(alone) == STEPS
    for step, slots in enumerate(alone):
        epochs, indices = order.samples(step)
        assert [(slot[0], slot[1]) for slot in slots] == list(zip(epochs.tolist(), indices.tolist()))
        for epoch, index, label, valid, image_bytes in slots[::5]:
            image, expected_label = stored(manifest, index)
            expected = train_image(image, IMAGE_SIZE, settings.data, 0, "trees", epoch, index)
            assert valid and label == [(expected_label, 1.0)]
            assert image_bytes == expected.numpy().tobytes()


@pytest.mark.parametrize("world_size", [2, 3, 5, 17])
def test_the_global_batch_does_not_depend_on_the_ranks(
    world_size: int, alone: list[list[tuple]], shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epoch, index, label and every pixel of each slot are those of one rank; the filling beyond is masked zeros."""
    assert global_steps(shard_folder, monkeypatch, world_size) == alone


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_global_batch_does_not_depend_on_the_workers(
    world_size: int, alone: list[list[tuple]], shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two worker processes deliver the steps in order, with the pixels of no workers."""
    assert global_steps(shard_folder, monkeypatch, world_size, workers=2, prefetch=3) == alone


@pytest.mark.parametrize("start", [1, 6, 12, 13])
def test_a_restart_continues_where_the_run_was(
    start: int, alone: list[list[tuple]], shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starting at step k gives the steps k, k+1, ... of the uninterrupted run, on another number of ranks too."""
    assert global_steps(shard_folder, monkeypatch, 1, start=start) == alone[start:]
    assert global_steps(shard_folder, monkeypatch, 3, start=start, workers=1 if start == 6 else 0) == alone[start:]


@pytest.fixture(scope="module")
def lanes_alone(shard_folder: Path) -> list[list[tuple]]:
    """The steps of the order lanes as one rank without workers reads them, mixed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return global_steps(shard_folder, monkeypatch, 1, order="lanes", held_out=9, mixup=0.8)


@pytest.mark.parametrize(
    ("world_size", "workers", "start"), [(1, 3, 0), (2, 2, 0), (3, 1, 5), (4, 0, 0), (6, 0, 11), (8, 0, 0)]
)
def test_lanes_give_the_same_batches_to_any_ranks_and_workers(
    world_size: int,
    workers: int,
    start: int,
    lanes_alone: list[list[tuple]],
    alone: list[list[tuple]],
    shard_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Samples, labels and mixed pixels of every slot, from any step on; each sample once per epoch; another order."""
    options = {"order": "lanes", "held_out": 9, "mixup": 0.8, "workers": workers, "start": start}
    assert global_steps(shard_folder, monkeypatch, world_size, **options) == lanes_alone[start:]
    first = [slot[1] for step in lanes_alone for slot in step if slot[0] == 0]
    assert len(first) == len(set(first)) == 103 - 9
    assert first != [slot[1] for step in alone for slot in step][: len(first)]


def test_held_out_samples_are_not_trained_on(shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader delivers the 93 others only."""
    seen = {slot[1] for step in global_steps(shard_folder, monkeypatch, 1, held_out=10) for slot in step}
    assert seen == set(range(103)) - set(Order(103, 10, GLOBAL_BATCH, 0).held_out_indices().tolist())


def test_global_generators_are_neither_used_nor_moved(alone: list[list[tuple]], shard_folder: Path) -> None:
    """Another seed of torch's generator changes nothing, and reading leaves it where it was: dropout uses it."""
    torch.manual_seed(12345)
    state = torch.random.get_rng_state()
    batches = train_batches(
        load_manifest(shard_folder), Order(103, 0, GLOBAL_BATCH, 0), plan_batch(17, 1, 4), config(shard_folder), 0
    )
    batch = next(batches)
    assert [pixels(batch, i) for i in range(GLOBAL_BATCH)] == [slot[4] for slot in alone[0]]
    next(batches)
    assert torch.equal(torch.random.get_rng_state(), state)


def damaged_set(folder: Path) -> tuple[Manifest, dict[int, str]]:
    """A set of 20 samples of which 4 are bad, and the reasons by index."""
    file = io.BytesIO()
    Image.fromarray(np.full((20, 24, 3), 90, dtype=np.uint8)).save(file, "jpeg")
    good = file.getvalue()
    samples = [(good, number % 5) for number in range(20)]
    samples[3], samples[11] = (good[: len(good) // 2], 3), (good, 5)  # half an image; a label out of range
    shard = write_samples(samples, "jpg", folder / "a-000000.tar", 0)
    index = load_index(shard)
    with shard.path.open("r+b") as tar:
        tar.seek(index.byte_range(6)[0])
        tar.write(b"\xaa" * 512)  # the header of sample 6's image
        tar.seek(index.byte_range(16)[0])
        sample = tar.read(index.byte_range(16)[1] - index.byte_range(16)[0])
        name = sample.index(b".cls")
        assert sample.index(b".jpg") > name  # the label comes first
        tar.seek(index.byte_range(16)[0] + name)
        tar.write(b".clx")
        tar.seek(index.byte_range(16)[0] + 148)
        tar.write(_checksum(sample[:512].replace(b".cls", b".clx")))  # a sample whose label has another name
    write_manifest(folder, "damaged", [shard], 5, has_names=False, shuffle=None)
    return load_manifest(folder), {3: "decode", 6: "tar", 11: "label", 16: "missing"}


def _checksum(header: bytes) -> bytes:
    return b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_masked_and_told(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sample becomes a masked slot of zeros that keeps its epoch and index; one record has the right reason."""
    manifest, reasons = damaged_set(tmp_path)
    seen: list[BadRecord] = []
    slots = 0
    for batch in rank_batches(tmp_path, monkeypatch, 0, 1, workers=workers):
        own = slice(0, GLOBAL_BATCH)
        bad = [i for i in range(GLOBAL_BATCH) if int(batch.index[i]) in reasons]
        assert (~batch.valid[own]).nonzero().flatten().tolist() == bad
        assert not batch.images[bad].any() and (batch.labels[bad] == -1).all()
        assert batch.images[own][batch.valid[own]].flatten(1).any(1).all()
        assert [(r.epoch, r.index) for r in batch.bad] == [(int(batch.epoch[i]), int(batch.index[i])) for i in bad]
        seen += batch.bad
        slots += GLOBAL_BATCH
    assert {record.index for record in seen} == set(reasons)
    assert all(record.reason == reasons[record.index] for record in seen)
    assert all(record.shard == "a-000000.tar" and record.detail.startswith(record.reason) for record in seen)
    expected = [sum(record.reason == reason for record in seen) for reason in REASONS]
    assert min(expected[:4]) >= 10  # eleven epochs; the fifth reason comes with strict_images
    counts = count_reasons(seen)
    assert counts.dtype == torch.float64 and counts.tolist() == expected
    json.dumps([record._asdict() for record in seen])  # what bad_samples.jsonl holds


def test_count_reasons_of_nothing() -> None:
    """No bad samples are zeros, so that ranks without one take part in the sum."""
    assert count_reasons([]).tolist() == [0.0] * len(REASONS)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_that_end_the_run_arrive_with_their_batch(workers: int, own_shards: Path) -> None:
    """A shard that vanishes or an index that does not fit comes as `Batch.error`, with its one line and its type.

    Raised in a worker it would arrive with a traceback in its message; raised on one rank it would leave the others.
    """
    reader._open_shard.cache_clear()
    manifest, settings = load_manifest(own_shards), config(own_shards, workers=workers)
    order, plan = Order(103, 0, GLOBAL_BATCH, 0), plan_batch(GLOBAL_BATCH, 1, 4)
    for shard in manifest.shards:
        shard.path.unlink()
    batch = next(train_batches(manifest, order, plan, settings, 0))
    assert type(batch.error) is StorageError and not batch.valid.any() and batch.bad == []
    assert ".tar: cannot be opened" in str(batch.error) and "\n" not in str(batch.error)
    for shard in manifest.shards:
        shard.path.touch()
        shard.path.with_suffix(".idx").write_bytes(b"{}")
    options: dict[str, Any] = {"batch_size": 8, "image_size": IMAGE_SIZE, "config": settings.data}
    batch = next(eval_batches(manifest, np.arange(103), **options))
    assert type(batch.error) is UserError and "index the shard again" in str(batch.error)


def test_a_program_that_reads_no_further_ends(shard_folder: Path) -> None:
    """Workers ignore SIGTERM; still the program ends when batches are left over, also where only a cycle holds them, or
    where a worker hangs.

    Without care it would wait for its workers for ever.
    """
    needs_shared_memory()
    program = (
        "import os, signal, sys, numpy as np, pathlib\n"
        "from pretrain.config import DataConfig\n"
        "from pretrain.data.loader import eval_batches\n"
        "from pretrain.data.manifest import load_manifest\n"
        "manifest = load_manifest(pathlib.Path(sys.argv[1]))\n"
        "config = DataConfig(train=manifest.path, global_batch=1, workers=1)\n"
        "options = dict(batch_size=2, image_size=8, config=config)\n"
        "unfinished = eval_batches(manifest, np.arange(100), **options)\n"
        "next(unfinished)\n"
        "cycle = [eval_batches(manifest, np.arange(100), **options)]\n"
        "cycle.append(cycle)\n"
        "del cycle\n"
        "os.kill(unfinished._workers[0].pid, signal.SIGSTOP)\n"
        "print('end')\n"
    )
    command = [sys.executable, "-c", program, str(shard_folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size, count", [(8, 103), (20, 103), (200, 103), (5, 7), (4, 2), (8, 48), (3, 0)])
def test_evaluation_sees_each_sample_exactly_once(
    world_size: int, batch_size: int, count: int, shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every rank the same number of equally large batches, every sample valid in exactly one of them."""
    manifest, settings = load_manifest(shard_folder), config(shard_folder).data
    indices = Order(103, 0, 1, 0).samples(5)[1] if count == 1 else np.arange(103)[::-1][:count].copy()
    seen, num_batches = [], set()
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        batches = list(eval_batches(manifest, indices, batch_size=batch_size, image_size=8, config=settings))
        num_batches.add(len(batches))
        for batch in batches:
            assert batch.images.shape == (batch_size, 3, 8, 8)
            assert torch.equal(batch.index >= 0, batch.valid)
            assert not batch.images[~batch.valid].any() and (batch.labels[~batch.valid] == -1).all()
            seen += [(int(batch.index[i]), pixels(batch, i)) for i in batch.valid.nonzero().flatten()]
    assert len(num_batches) == 1
    assert sorted(index for index, _ in seen) == sorted(indices.tolist())
    for index, image_bytes in seen[::7]:
        expected = eval_image(stored(manifest, index)[0], 8, settings)
        assert image_bytes == expected.numpy().tobytes()


def test_evaluation_tells_bad_samples(tmp_path: Path) -> None:
    """Bad validation samples are masked and recorded too, with workers as without."""
    manifest, reasons = damaged_set(tmp_path)
    for workers in (0, 1):
        settings = config(tmp_path, workers=workers).data
        batches = list(eval_batches(manifest, np.arange(20), batch_size=6, image_size=8, config=settings))
        assert {record.index: record.reason for batch in batches for record in batch.bad} == reasons
        assert sum(int(batch.valid.sum()) for batch in batches) == 16


MIXING = {"mixup": 0.8, "cutmix": 1.0, "randaugment_layers": 2, "crop": "inception"}


@pytest.fixture(scope="module")
def mixed_alone(shard_folder: Path) -> list[list[tuple]]:
    """The mixed steps as one rank without workers reads them."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return global_steps(shard_folder, monkeypatch, 1, **MIXING)


@pytest.mark.parametrize("world_size, workers", [(1, 2), (2, 0), (3, 0), (3, 1), (5, 0), (17, 0)])
def test_mixing_does_not_depend_on_ranks_and_workers(
    world_size: int,
    workers: int,
    mixed_alone: list[list[tuple]],
    shard_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pixels, labels and weights of each slot are those of one rank, bit for bit, also where a pair is cut apart."""
    assert global_steps(shard_folder, monkeypatch, world_size, workers=workers, **MIXING) == mixed_alone


def test_mixing_does_not_depend_on_a_restart(
    mixed_alone: list[list[tuple]], shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 6 of a run that starts there is step 6 of the uninterrupted one."""
    assert global_steps(shard_folder, monkeypatch, 2, start=6, **MIXING) == mixed_alone[6:]


def test_a_mixed_batch_is_its_samples_mixed(
    mixed_alone: list[list[tuple]], shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each slot from the unmixed batch by hand: slot s with s XOR 1, both kinds; the last of 17 has no partner."""
    plain = global_steps(shard_folder, monkeypatch, 1, **MIXING | {"mixup": 0.0, "cutmix": 0.0})
    settings, kinds = config(shard_folder, **MIXING).data, set()
    for step, (slots, sources) in enumerate(zip(mixed_alone, plain)):
        mix = draw_mix(settings, IMAGE_SIZE, 0, step)
        assert mix is not None
        kinds.add("mixup" if mix.box is None else "cutmix")
        assert slots[16] == sources[16] and slots[16][2][0][1] == 1.0
        for slot in range(16):
            own, other = sources[slot], sources[slot ^ 1]
            expected = mixed(image_of(own), image_of(other), mix)
            assert slots[slot][4] == expected.numpy().tobytes()
            shares = [(own[2][0][0], mix.own_share), (other[2][0][0], 1 - mix.own_share)]
            assert slots[slot][2] == [(label, float(np.float32(share))) for label, share in shares if share]
            assert slots[slot][:2] == own[:2]
    assert kinds == {"mixup", "cutmix"}


@pytest.mark.parametrize("order", ["permuted", "lanes"])
def test_copies_of_an_image_are_decoded_once_and_augmented_anew(
    shard_folder: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """Three copies side by side, each with the pixels of its own epoch; as many images read as are different."""
    copied = {"repeats": 3, "global_batch": 18, "order": order}
    decoded: list[bytes] = []

    def counted(data: bytes, *given: Any) -> torch.Tensor:
        decoded.append(data)
        return decode(data, *given)

    monkeypatch.setattr(loader, "decode", counted)
    steps = global_steps(shard_folder, monkeypatch, 1, **copied)
    assert len(decoded) == 6 * len(steps)
    once = global_steps(shard_folder, monkeypatch, 1, global_batch=6, order=order)
    settings, manifest = config(shard_folder, **copied), load_manifest(shard_folder)
    for slots, images in zip(steps, once):
        for number, image in enumerate(images):
            copies = slots[3 * number : 3 * number + 3]
            assert [copy[:3] for copy in copies] == [(3 * image[0] + place, *image[1:3]) for place in range(3)]
            for epoch, index, _, _, found in copies:
                whole = decode(read_sample(manifest, index).image, lambda _: None)
                key = settings.seed, manifest.name, epoch, index
                assert found == train_image(whole, IMAGE_SIZE, settings.data, *key).numpy().tobytes()
            assert len({copy[4] for copy in copies}) == 3


@pytest.mark.parametrize("repeats", [2, 3, 6])
def test_copies_are_mixed_with_those_of_another_image(
    repeats: int, shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The k-th with the k-th, of images 0 and 1, 2 and 3 ...: the same on 1, 2 and 5 ranks, which cut copies apart."""
    copied = {"repeats": repeats, "global_batch": 18}
    alone = global_steps(shard_folder, monkeypatch, 1, **MIXING | copied)
    plain = global_steps(shard_folder, monkeypatch, 1, **MIXING | copied | {"mixup": 0.0, "cutmix": 0.0})
    settings = config(shard_folder, **MIXING | copied).data
    for step, (slots, sources) in enumerate(zip(alone, plain)):
        mix = draw_mix(settings, IMAGE_SIZE, 0, step)
        assert mix is not None
        for slot, source in enumerate(sources):
            image, copy = divmod(slot, repeats)
            if (other := (image ^ 1) * repeats + copy) >= 18:
                assert slots[slot] == source  # the last of an odd number of images
                continue
            expected = mixed(image_of(source), image_of(sources[other]), mix)
            assert slots[slot][4] == expected.numpy().tobytes()
    for world_size in (2, 5):
        assert global_steps(shard_folder, monkeypatch, world_size, **MIXING | copied) == alone


def image_of(slot: tuple) -> torch.Tensor:
    """The pixels of a slot of `global_steps`."""
    return torch.frombuffer(bytearray(slot[4]), dtype=torch.uint8).reshape(3, IMAGE_SIZE, IMAGE_SIZE)


def test_a_bad_partner_leaves_the_sample_unmixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pixels and its label of weight 1 stay, on any number of ranks, and each loss is told once."""
    _, reasons = damaged_set(tmp_path)
    plain = global_steps(tmp_path, monkeypatch, 1)
    told, seen = [], 0
    for world_size in (1, 3):
        steps = global_steps(tmp_path, monkeypatch, world_size, mixup=0.8)
        for slots, sources in zip(steps, plain):
            for slot in range(16):
                if sources[slot][3] and not sources[slot ^ 1][3]:
                    assert slots[slot] == sources[slot]
                    seen += 1
                assert slots[slot][3] == sources[slot][3] and (slots[slot][3] or not any(slots[slot][4]))
        batches = [b for r in range(world_size) for b in rank_batches(tmp_path, monkeypatch, r, world_size, mixup=0.8)]
        told.append(sorted((r.epoch, r.index) for batch in batches for r in batch.bad))
    assert seen > 20 and told[0] == told[1] and {index for _, index in told[0]} == set(reasons)


def test_a_partner_that_cannot_be_read_ends_the_run(own_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where this rank's own samples can be, and the rank that has the partner may have read it: left unmixed, the
    step would be another one.
    """
    manifest, order = load_manifest(own_shards), Order(103, 0, GLOBAL_BATCH, 0)

    def shards_of(step: int, slots: list[int]) -> set[Path]:
        return {manifest.locate(index)[0].path for index in order.samples(step, slots)[1].tolist()}

    mine, other = [*share(GLOBAL_BATCH, 0, 3)], [5]
    step = next(step for step in range(STEPS) if not shards_of(step, mine) & shards_of(step, other))
    reader._open_shard.cache_clear()
    shards_of(step, other).pop().unlink()
    batch = rank_batches(own_shards, monkeypatch, 0, 3, start=step, mixup=0.8)[0]
    assert mine[-1] == 4 and type(batch.error) is StorageError


def test_several_labels_per_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of classes arrive whole and filled up with -1, mixed ones with their shares; evaluation has them too."""
    random, items, wanted = np.random.default_rng(0), [], []
    for number in range(30):
        classes = [number % 5] if number % 3 else [number % 5, 5, 6 + number % 2]
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (20, 20, 3)).astype(np.uint8)).save(file, "png")
        items.append(Item(file.getvalue, "png", classes, f"picture {number}"))
        wanted.append(classes)
    manifest = load_manifest(build(items, [], tmp_path / "several", samples_per_shard=12, seed=0))
    assert manifest.multi_label and manifest.num_classes == 8
    settings = config(tmp_path / "several").data
    batch = next(eval_batches(manifest, np.arange(30), batch_size=30, image_size=8, config=settings))
    assert batch.labels.shape == batch.label_weights.shape == (30, 3)
    found = [[label for label, weight in targets(batch, slot) if weight == 1.0] for slot in range(30)]
    assert sorted(found) == sorted(wanted)
    plain = global_steps(tmp_path / "several", monkeypatch, 1)
    for world_size in (1, 2):
        for step, slots in enumerate(global_steps(tmp_path / "several", monkeypatch, world_size, mixup=0.8)):
            for slot in range(16):
                mix = draw_mix(config(tmp_path, mixup=0.8).data, IMAGE_SIZE, 0, step)
                assert mix is not None
                shares = [np.float32(mix.own_share)] * len(plain[step][slot][2])
                shares += [np.float32(1 - mix.own_share)] * len(plain[step][slot ^ 1][2])
                classes = [label for label, _ in plain[step][slot][2] + plain[step][slot ^ 1][2]]
                assert slots[slot][2] == [(label, float(share)) for label, share in zip(classes, shares)]


def test_split_cuts_a_batch_into_its_micro_batches(shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All micro-batches have the same size, and together they are the batch in its order."""
    batch = rank_batches(shard_folder, monkeypatch, 0, 1)[0]
    parts = list(batch.split(4))
    assert len(batch.valid) == 20 and [len(part.valid) for part in parts] == [4] * 5
    for number in range(6):
        assert torch.equal(torch.cat([part[number] for part in parts]), batch[number])
    assert all(part.bad == [] for part in parts)


def test_to_moves_what_the_model_needs(shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images, labels and mask go to the device; epochs and indices stay where they are logged from."""
    batch = rank_batches(shard_folder, monkeypatch, 0, 1)[0]._replace(bad=[])
    moved = batch.to(torch.device("meta"))
    assert [tensor.device.type for tensor in moved[:6]] == ["meta"] * 4 + ["cpu"] * 2


BATCH = 4096


def test_the_limit_of_bad_samples() -> None:
    """Above max_bad_fraction the run stops, but not before 10,000 samples were seen and 100 were bad."""
    check_bad_fraction({"tar": 0}, [], 0, BATCH, 0.0)
    check_bad_fraction({"tar": 5000}, [[0, 5000]], 9_999, BATCH, 0.001)
    check_bad_fraction({"tar": 99}, [[0, 99]], 10_000, BATCH, 0.001)
    check_bad_fraction({"tar": 100}, [[0, 100]], 100_000, BATCH, 0.001)
    for bad, seen, limit in [({"tar": 60, "decode": 41, "label": 0}, 100_000, 0.001), ({"tar": 100}, 10_000, 0.0)]:
        with pytest.raises(BadSamplesError) as error:
            check_bad_fraction(bad, [], seen, BATCH, limit)
        assert error.value.exit_code == 78
        told = str(error.value)
        assert f"{sum(bad.values())} of the {seen:,} samples" in told and "data.max_bad_fraction" in told
    with pytest.raises(BadSamplesError, match=r"\(since the start 60 tar, 41 decode\)"):
        check_bad_fraction({"tar": 60, "decode": 41, "label": 0}, [], 100_000, BATCH, 0.001)


def test_what_becomes_bad_after_weeks_is_noticed() -> None:
    """300 million good samples hide a lost shard from a fraction of all; the last 100,000 to 200,000 do not."""
    before, recent, seen = 300_000_000, [[17, 5]], 0
    while True:
        seen += 4096
        recent = count_recent(recent, before + seen, 1024)  # a quarter of the shards is empty since
        bad = 5 + seen // 4
        try:
            check_bad_fraction({"tar": bad}, recent, before + seen, BATCH, 0.1)
        except BadSamplesError as error:
            assert f"{seen // 4} of the last " in str(error) and f"(since the start {bad} tar)" in str(error)
            break
    assert seen < 100_000  # 0.1 of the stretch before, good as a whole, and of what came since
    recent = []
    for step in range(1, 2000):  # one in 4,096 all along is no news, whatever the border of stretches
        recent = count_recent(recent, step * 4096, 1)
        assert len(recent) <= 2
        check_bad_fraction({"tar": step}, recent, step * 4096, BATCH, 0.001)


def test_stretches_of_late_are_of_100_000_samples() -> None:
    """The sample after the 100,000th begins another one; the latest and the one before are kept, and judged."""
    assert [count_recent([], seen, 1) for seen in (1, 100_000, 100_001)] == [[[0, 1]], [[0, 1]], [[1, 1]]]
    recent = count_recent([[8, 900], [9, 290]], 1_000_001, 10)
    assert recent == [[9, 290], [10, 10]]
    with pytest.raises(BadSamplesError, match="^300 of the last 144,096 samples"):
        check_bad_fraction({"tar": 300}, recent, 1_040_000, BATCH, 0.001)


def test_a_full_shared_memory_is_called_that(shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before loader processes start, in training and evaluation: they would wait for ever. Without them none is needed.

    Room for all but one byte of what they need is not enough.
    """
    settings, manifest = config(shard_folder, workers=2, prefetch=3), load_manifest(shard_folder)
    order = Order(manifest.num_samples, 0, GLOBAL_BATCH, 0)
    plan = plan_batch(GLOBAL_BATCH, 1, 17)
    needed = (2 * 3 + 2) * (17 * 3 * IMAGE_SIZE**2 + (256 << 10))
    for free in (4096, 64 << 10, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with pytest.raises(
            StorageError, match="/dev/shm: the shared memory has .* MB free; 2 loader processes .*shm-size"
        ):
            train_batches(manifest, order, plan, settings, 0)
        with pytest.raises(StorageError, match="shared memory"):
            eval_batches(manifest, np.arange(103), batch_size=17, image_size=IMAGE_SIZE, config=settings.data)
    alone = config(shard_folder, workers=0)
    assert next(train_batches(manifest, order, plan, alone, 0)).valid.any()
