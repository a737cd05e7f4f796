"""The audit of a run: an honest folder adds up, and each of many lies in it is found and named."""

import hashlib
import io
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pytest
from ranks import run_ranks, start_ranks
from tiny import changed, tiny_config

from pretrain import json_files
from pretrain.audit import data as audit_data
from pretrain.audit import folder as audit_folder
from pretrain.audit import records, samples
from pretrain.audit.checks import Finding, audit
from pretrain.audit.folder import LeftOut, Options, Run
from pretrain.audit.logs import Lie, open_log
from pretrain.checkpoint.layout import manifest_text
from pretrain.config import Config, config_from_dict, config_to_dict, config_to_yaml
from pretrain.data.manifest import BLOCK, Shard, load_index, load_manifest, write_manifest
from pretrain.data.order import Order
from pretrain.errors import UserError
from pretrain.json_files import Fields
from pretrain.models import card
from pretrain.models.card import model_card
from pretrain.models.weights import read_weights
from pretrain.storage import crc32c
from pretrain.train.resuming import receipt
from pretrain.train.run import train
from pretrain.train.save import Saver
from pretrain.train.state import TrainState

STEPS, BATCH, HELD_OUT = 20, 12, 7


class Case(NamedTuple):
    """A run that was killed and went on with other ranks, and its data set."""

    run: Path
    shards: Path


def finish(config: Config) -> None:
    train(config)


def hang_at_8(config: Config) -> None:
    """Trains until step 8 is to be saved, when step 4 has been, and waits there to be killed."""
    save = Saver.save

    def hanging(self: Saver, state: TrainState, *args: Any, **options: Any) -> None:
        if state.step == 8:
            self.finish()
            time.sleep(600)
        save(self, state, *args, **options)

    Saver.save = hanging
    train(config)


@pytest.fixture(scope="module")
def case(shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """2 ranks, killed after step 8 with step 4 saved, then 3 to the end: 2.5 epochs of 96, bad and damaged samples."""
    folder = tmp_path_factory.mktemp("audit")
    shards = Path(shutil.copytree(shard_folder, folder / "trees"))
    plant_damage(shards)
    every = {"evaluation__every_steps": 10, "checkpoint__every_steps": 4, "total_steps": STEPS}
    config = tiny_config(shards, folder, data__global_batch=BATCH, data__held_out=HELD_OUT, **every)
    processes = start_ranks(hang_at_8, 2, config)
    logs, deadline = [folder / "tiny" / f"samples-0000{rank}.jsonl" for rank in (0, 1)], time.monotonic() + 240
    saved = folder / "tiny" / "checkpoints" / "step-0000000004"
    while not saved.exists() or any(log.read_text().count("\n") < 8 for log in logs):
        assert any(process.is_alive() for process in processes) and time.monotonic() < deadline
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    shutil.copytree(folder / "tiny", folder / "killed")
    run_ranks(finish, 3, changed(config, log__every_steps=2))
    return Case(folder / "tiny", shards)


def plant_damage(shards: Path) -> None:
    """Makes samples that fail each in its own way, and seals the set again as if it had come so."""
    manifest = load_manifest(shards)
    for number in range(manifest.num_samples):
        shard, at = manifest.locate(number)
        begin, end = load_index(shard).byte_range(at)
        tar = bytearray(shard.path.read_bytes())
        label, image = (tar.index(ending, begin, end) // BLOCK * BLOCK for ending in (b".cls\0", b".jpg\0"))
        size = int(tar[image + 124 : image + 135], 8)
        if number in (3, 50):  # no decoder takes it
            tar[image + BLOCK : image + BLOCK + 8] = b"nothing!"
        elif number == 20:  # no header
            tar[begin + 148] ^= 1
        elif number == 90:
            tar[label + BLOCK] = ord("x")
        elif number in (33, 60):  # of a piece; libjpeg warns
            tar[image + BLOCK + size - 40 : image + BLOCK + size - 38] = b"\xff\xd0"
        shard.path.write_bytes(tar)
    seal(shards)


def seal(shards: Path) -> None:
    """Writes the digests of the shards as they are now into indexes and manifest."""
    path = shards / "manifest.json"
    values = json.loads(path.read_text())
    for entry in values["shards"]:
        tar = shards / entry["path"]
        entry["sha256"] = hashlib.sha256(tar.read_bytes()).hexdigest()
        line, _, payload = tar.with_suffix(".idx").read_bytes().partition(b"\n")
        header = json.loads(line) | {"shard_sha256": entry["sha256"]}
        tar.with_suffix(".idx").write_bytes(json.dumps(header).encode() + b"\n" + payload)
    path.write_text(json.dumps(values))


def look(run: Path, *, data: Path | None = None, no_data: bool = False, full: bool = False) -> list[Finding]:
    return audit(run, Options(full, data, no_data, seed=0))


def wrong(found: list[Finding]) -> list[str]:
    return [finding.wrong for finding in found if finding.wrong]


# --- honest runs -----------------------------------------------------------------------------------------------------


def test_an_honest_run_adds_up(case: Case) -> None:
    """Killed, resumed on other ranks, with samples of each kind of damage: nothing is found or left out."""
    found = look(case.run, full=True)
    assert not wrong(found)
    assert not [finding.left_out for finding in found if finding.left_out]
    told = {finding.compared: finding.count for finding in found}
    assert told["lines of samples-RANK.jsonl, of 20 steps, against the order"] == 4 * 2 + 16 * 3
    assert told["samples of 20 steps, read again"] == STEPS * BATCH
    assert "epoch 0: 92 used + 4 bad (2 decode, 1 label, 1 tar) + 0 skipped + 7 held out = 103" in told
    assert "epoch 2, under way: 44 used + 4 bad (2 decode, 1 label, 1 tar) + 0 skipped = 48 of 96" in told
    assert (case.run / "damaged_samples.jsonl").stat().st_size


def forget(run: Path) -> None:
    """Leaves out what earlier versions did not write."""
    (run / "damaged_samples.jsonl").unlink()
    edit_states(run, lambda state: state["train"].pop("damaged_samples"))
    edit_lines(run / "metrics.jsonl", lambda rows: [row.pop("train/damaged_samples", None) for row in rows] and None)
    for key in ("receipt", "starts_sha256"):
        edit_states(run, lambda state, key=key: state.pop(key))
    new = ("seed", "global_batch", "held_out", "samples_logged", "starts_before")
    edit_lines(run / "starts.jsonl", lambda rows: [row.pop(key) for row in rows for key in new] and None)


def tear(run: Path) -> None:
    """The next line of each log is half written."""
    for path in run.glob("*s*.jsonl"):
        path.write_text(path.read_text() + '{"step": 21, "sam')


def add_start(run: Path, **values: Any) -> None:
    """Appends a start like the last one, chained to the lines before it."""
    text = (run / "starts.jsonl").read_bytes()
    row = json.loads(text.splitlines()[-1]) | {"starts_before": hashlib.sha256(text).hexdigest()} | values
    (run / "starts.jsonl").write_bytes(text + json.dumps(row).encode() + b"\n")


def branch(run: Path) -> None:
    """Makes it a run that branched off at step 2 of another, was killed in its first save, and branched off at 4."""
    for path in run.glob("*s*.jsonl"):
        if path.name != "starts.jsonl":
            edit_lines(path, lambda rows: [row for row in rows if row["step"] > 4])
    edit_lines(
        run / "starts.jsonl", lambda r: [r[0] | {"step": 2, "branched": True}, r[1] | {"step": 4, "branched": True}]
    )
    edit_config(run, "branch_from: null", "branch_from: other")
    edit_states(run, put("config", branch_from="other"))
    chain_starts(run)


def without_logs(run: Path) -> None:
    for path in run.glob("samples-*.jsonl"):
        path.unlink()


def without_shards(shards: Path) -> None:
    for path in shards.glob("*.tar"):
        path.unlink()


HONEST: dict[str, tuple[Callable[[Path, Path], Any], dict[str, str]]] = {
    "no sample logs": (
        lambda run, _: without_logs(run),
        {"sample logs": "no samples-RANK.jsonl here, though they were written"},
    ),
    "a file that is no rank's log": (lambda run, _: (run / "samples-00abc.jsonl").touch(), {}),
    "a torn last line": (lambda run, _: tear(run), {}),
    "of an earlier version": (
        lambda run, _: forget(run),
        {
            "starts": "2 of an earlier version",
            "history": "name no start",
            "receipts": "3 checkpoints of an earlier version",
            "steps again": "damage was not listed",
        },
    ),
    "killed twice between the last save and DONE": (lambda run, _: [add_start(run, step=20) for _ in "ab"], {}),
    "branched off, killed in its first save, branched off again": (
        lambda run, _: branch(run),
        {"counts": "what the run that it branched from left out", "epochs": "up to step 4, of the other run"},
    ),
    "another place of the data": (
        lambda _, shards: shutil.rmtree(shards),
        dict.fromkeys(
            ("manifest", "classes", "shards", "steps again"), "trees is not here; give its place with --data"
        ),
    ),
    "a manifest without its shards": (
        lambda _, shards: without_shards(shards),
        dict.fromkeys(("shards", "listed again", "steps again"), "3 of 6 shards and indexes are not here"),
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_what_cannot_be_checked_is_told(name: str, case: Case, tmp_path: Path) -> None:
    """A folder that lacks something passes, and each check that could not be made says why."""
    change, expected = HONEST[name]
    run, shards = (Path(shutil.copytree(path, tmp_path / path.name)) for path in case)
    change(run, shards)
    found = look(run, data=shards)
    assert not wrong(found)
    for check, reason in expected.items():
        assert reason in next(finding.left_out for finding in found if finding.check == check)


def test_a_run_under_way_adds_up_as_far_as_it_is_saved(case: Case, tmp_path: Path) -> None:
    """As the kill left it, with lines beyond its checkpoint; and with no checkpoint yet."""
    run = Path(shutil.copytree(case.run.parent / "killed", tmp_path / "killed"))
    found = look(run)
    assert not wrong(found)
    assert "the run is not done" in [finding.left_out for finding in found]
    assert "epoch 0, under way: 46 used + 2 bad (1 decode, 1 label) + 0 skipped = 48 of 96" in [
        f.compared for f in found
    ]
    shutil.rmtree(run / "checkpoints")
    found = look(run)
    assert not wrong(found)
    assert next(finding.left_out for finding in found if finding.check == "epochs") == "no checkpoint yet"


def test_a_model_card_carries_the_receipt(case: Case) -> None:
    """In words, with what was left out by reason."""
    checkpoint = case.run / "checkpoints" / "step-0000000020"
    text = model_card(read_weights(checkpoint), "npz", title="", command="", versions={}, loading="", proof="")
    assert (
        "Receipt: order permuted v1, seed 0, global batch 12, steps 20, samples seen 240, steps skipped 0; held out 7, "
        "bad 12 (6 decode, 3 label, 3 tar), used though damaged 4. `tools/audit.py RUN` adds it up again."
    ) in text


@pytest.mark.parametrize("reading", ["read_manifest", "crc32c"])
def test_a_checkpoint_that_is_deleted_meanwhile_is_left_out(
    reading: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a training does with old ones, between their listing and their reading."""
    run, read = Path(shutil.copytree(case.run, tmp_path / "run")), getattr(records, reading)

    def after_deletion(path: Path) -> Any:
        shutil.rmtree(run / "checkpoints" / "step-0000000012", ignore_errors=True)
        return read(path)

    monkeypatch.setattr(records, reading, after_deletion)
    found = look(run, no_data=True, full=True)
    assert not wrong(found)
    assert next(f.left_out for f in found if f.check == "files") == "1 checkpoints, deleted meanwhile"


def test_a_checkpoint_that_cannot_be_read_is_tried_once(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly every check asks for it, and it may be large."""
    run, read, tried = Path(shutil.copytree(case.run, tmp_path / "run")), json_files.read_json, []
    state = run / "checkpoints" / NEWEST / "state.json"
    state.write_text(f"[{state.read_text()}]")
    seal_checkpoint(state.parent)

    def counted(path: Path, **limits: int) -> Any:
        tried.append(path)
        return read(path, **limits)

    monkeypatch.setattr(json_files, "read_json", counted)
    told = [message for message in wrong(look(run, no_data=True)) if "state.json" in message]
    assert len(told) > 5 and tried.count(state) == 1


def test_a_start_that_is_added_meanwhile_changes_nothing(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines are those of one reading."""
    run, opened = Path(shutil.copytree(case.run, tmp_path / "run")), audit_folder.open_log

    def open_and_add(path: Path) -> BinaryIO:
        with opened(path) as file:
            text = file.read()
        add_start(run, step=20)
        return io.BytesIO(text)

    monkeypatch.setattr(audit_folder, "open_log", open_and_add)
    assert len(Run(run, Options(False, None, True, 0)).starts) == 2


@pytest.mark.parametrize(
    "about, expected",
    [
        ({"bad_samples": {"tar": 2, "decode": 1}}, "bad 3 (2 tar, 1 decode)"),
        ({"bad_samples": {"tar": "x"}}, None),
        ({"bad_samples": {"tar": 1, "x\n# y": 3}}, "bad 4 (1 tar, 3 x # y)"),
        ({"name": "x\n# y"}, "order x # y v1"),
        ({"version": "v1\n# y"}, "v1 # y"),
    ],
)
def test_a_strangers_receipt_does_nothing_to_a_card(about: dict[str, Any], expected: str | None) -> None:
    """Counts are counts, and all of it is one line of plain text."""
    values = receipt(TrainState(), Order(103, 7, 12, 0), {"name": "permuted", "version": "v1"})
    state = Fields({"receipt": values | about}, "state.json")
    if expected is None:
        with pytest.raises(UserError, match="state.json: receipt: bad_samples: tar is 'x', expected an integer"):
            card._receipt(state)
    else:
        assert expected in (told := card._receipt(state)) and "\n" not in told.strip()


@pytest.mark.slow
def test_a_run_that_branched_off_adds_up(case: Case, tmp_path: Path) -> None:
    """From step 16 of the other run, whose bad samples it counts and does not list; two more steps on one rank."""
    state = json.loads((case.run / "checkpoints" / "step-0000000016" / "state.json").read_text())
    origin = case.run / "checkpoints" / "step-0000000016"
    more = {"branch_from": origin, "output": tmp_path, "total_steps": 22}
    config = config_from_dict(state["config"], "branch")
    config = changed(config, **{key: str(v) if isinstance(v, Path) else v for key, v in more.items()})
    run_ranks(finish, 1, config)
    assert json.loads((tmp_path / "tiny" / "starts.jsonl").read_text())["branched"] is True
    found = look(tmp_path / "tiny", full=True)
    assert not wrong(found)
    assert "bad and skipped ones up to step 16, of the other run" in [finding.left_out for finding in found]
    edit_lines(tmp_path / "tiny" / "bad_samples.jsonl", lambda rows: rows[1:])
    assert wrong(look(tmp_path / "tiny", no_data=True))


@pytest.mark.slow
def test_a_run_on_a_subset_adds_up(case: Case, tmp_path: Path) -> None:
    """Each epoch's sum names what is held out and what is not in the subset; another subset is a lie."""
    run_ranks(finish, 1, tiny_config(case.shards, tmp_path, data__held_out=HELD_OUT, data__subset=37))
    run = tmp_path / "tiny"
    found = look(run, full=True)
    assert not wrong(found)
    told = next(finding.compared for finding in found if finding.compared.startswith("epoch 5: "))
    assert told.endswith(f" + {HELD_OUT} held out + {103 - HELD_OUT - 37} not in data.subset = 103")
    weights = read_weights(run / "checkpoints" / f"step-{STEPS:010d}")
    card = model_card(weights, "npz", title="", command="", versions={}, loading="", proof="")
    assert "; a subset of 37, held out 7, bad " in card
    edit_states(run, put("receipt", subset=38))
    assert "receipt: subset is 38; expected 37" in wrong(look(run, no_data=True))[-1]
    edit_config(run, "subset: 37", "subset: 97")
    assert "data.subset is 97; expected at most 96, what is not held out" in wrong(look(run, no_data=True))[-1]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["permuted", "lanes"])
def test_a_run_on_copies_adds_up(case: Case, tmp_path: Path, order: str) -> None:
    """Three epochs side by side, of which each lists a bad sample; a sample of a later epoch is a lie."""
    copied = {"data__repeats": 3, "data__held_out": HELD_OUT, "data__order": order, "log__samples": True}
    run_ranks(finish, 2, tiny_config(case.shards, tmp_path, **copied))
    run = tmp_path / "tiny"
    found = look(run, full=True)
    assert not wrong(found)
    told = [finding.compared for finding in found if "under way: " in finding.compared]
    assert [line.split(",")[0] for line in told] == ["epoch 0", "epoch 1", "epoch 2"]
    assert all(line.endswith(f" = {STEPS * BATCH // 3} of {103 - HELD_OUT}") for line in told)
    bad = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert bad and all({row["epoch"] for row in bad if row["index"] == one["index"]} == {0, 1, 2} for one in bad)
    weights = read_weights(run / "checkpoints" / f"step-{STEPS:010d}")
    card = model_card(weights, "npz", title="", command="", versions={}, loading="", proof="")
    assert "; each image 3 times in its step, held out 7, bad " in card
    edit_lines(run / "bad_samples.jsonl", lambda rows: rows[0].update(epoch=rows[0]["epoch"] + 3))
    assert any(line.endswith(", by the order") for line in wrong(look(run, no_data=True)))


@pytest.mark.slow
def test_a_run_in_lanes_adds_up(case: Case, tmp_path: Path) -> None:
    """The other order has closed forms too: epochs under way side by side, each listed sample at its step."""
    more = {
        "data__order": "lanes",
        "data__global_batch": BATCH,
        "data__held_out": HELD_OUT,
        "checkpoint__every_steps": 9,
    }
    run_ranks(finish, 1, tiny_config(case.shards, tmp_path, **more))
    run = tmp_path / "tiny"
    found = look(run, full=True)
    assert not wrong(found)
    assert sum(f.count or 0 for f in found if f.compared.startswith("epoch ")) == STEPS * BATCH
    changed_rows = listed(run)
    recount(run, changed_rows[1:])
    assert "does not list it" in wrong(look(run))[-1]
    recount(run, [changed_rows[0] | {"step": changed_rows[0]["step"] + 1}, *changed_rows[1:]])
    assert "by the order" in wrong(look(run, no_data=True))[-1]
    edit_states(run, put("data.order", num_lanes=2))
    edit_states(run, put("receipt", num_lanes=2))
    assert "samples-00000.jsonl: step 1, sample" in wrong(look(run, no_data=True))[-1]


def test_the_command_tells_and_exits(case: Case, tmp_path: Path) -> None:
    """0 and what was left out; 2 and one line for the first lie. It reads only, and imports no torch for it."""
    run = Path(shutil.copytree(case.run, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = command(run, "--no-data")
    assert done.returncode == 0, done.stderr
    assert "adds up; not all was checked: 6 rows of the table say what not" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    edit_json(run / "DONE", put("", step=24))
    done = command(run, "--no-data")
    assert done.returncode == 2 and "WRONG" in done.stdout
    step = f"that of {run}/checkpoints/step-0000000020"
    assert done.stderr.splitlines() == [f"error: {run}/DONE: step is 24; expected 20, {step}"]
    done = command(tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "expected the folder of a run" in done.stderr


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--seed", "-1"), "error: --seed is -1, expected at least 0"),
        (("--data", "TYPO"), "error: TYPO: not found; expected the data set's folder or manifest"),
    ],
)
def test_wrong_arguments_are_told(
    arguments: tuple[str, str],
    expected: str,
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one line, and nothing is called right."""
    monkeypatch.setattr(sys, "argv", ["audit.py", str(case.run), *arguments])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert left.value.code == 2
    told = capsys.readouterr()
    assert told.err.splitlines() == [expected] and not told.out


TOOL = Path(__file__).parents[1] / "tools" / "audit.py"


def command(*arguments: object) -> subprocess.CompletedProcess:
    """Runs tools/audit.py in a process in which torch cannot be imported."""
    blocked = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    run = f"{blocked}runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run([sys.executable, "-c", run, str(TOOL), *map(str, arguments)], capture_output=True, text=True)


# --- lies ------------------------------------------------------------------------------------------------------------


def edit_lines(path: Path, edit: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Rewrites a log with its rows changed in place, or replaced by what `edit` returns."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = edit(rows) or rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values) + "\n")


def edit_states(run: Path, edit: Callable[[dict[str, Any]], Any], only: str = "step-*") -> None:
    """Changes state.json of checkpoints, their checksums too."""
    for folder in sorted((run / "checkpoints").glob(only)):
        edit_json(folder / "state.json", edit)
        seal_checkpoint(folder)


def seal_checkpoint(folder: Path) -> None:
    values = json.loads((folder / "MANIFEST.json").read_text())
    del values["crc32c"]
    for entry in values["files"]:
        path = folder / entry["path"]
        entry |= {"bytes": path.stat().st_size, "crc32c": crc32c(path)}
    (folder / "MANIFEST.json").write_text(manifest_text(values))


def edit_config(run: Path, old: str, new: str) -> None:
    text = (run / "config.yaml").read_text()
    assert text.count(old) == 1, old
    (run / "config.yaml").write_text(text.replace(old, new))


def chain_starts(run: Path) -> None:
    """Makes the starts, and the checkpoints that know of them, fit each other again."""
    before, text, digests = b"", b"", []
    for line in (run / "starts.jsonl").read_bytes().splitlines():
        row = json.loads(line) | {"starts_before": hashlib.sha256(before).hexdigest()}
        text = before + json.dumps(row).encode() + b"\n"
        before = text
        digests.append(hashlib.sha256(text).hexdigest())
    (run / "starts.jsonl").write_bytes(text)
    edit_states(run, lambda state: state.update(starts_sha256=digests[-1]))


def put(section: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    """Returns what sets values in a section, "a.b" or "", of an object."""

    def edit(row: dict[str, Any]) -> None:
        for key in filter(None, section.split(".")):
            row = row[key]
        row.update(values)

    return edit


def everywhere(run: Path, seed: int) -> None:
    """Says another seed in every place that names one."""
    edit_config(run, "seed: 0", f"seed: {seed}")
    edit_lines(run / "starts.jsonl", lambda rows: [row.update(seed=seed) for row in rows] and None)
    edit_states(run, put("config", seed=seed))
    edit_states(run, put("receipt", seed=seed))
    chain_starts(run)


def hide(run: Path, of: Callable[[dict[str, Any]], bool]) -> None:
    """Removes bad samples from the list, and from every count of them."""
    path = run / "bad_samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    recount(run, [row for row in rows if not of(row)])


def recount(run: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the list of bad samples, and makes all counts of it those of the list."""
    edit_lines(run / "bad_samples.jsonl", lambda _: rows)

    def count(state: dict[str, Any]) -> None:
        for part in (state["train"], state["receipt"]):
            for reason in part["bad_samples"]:
                part["bad_samples"][reason] = sum(r["reason"] == reason and r["step"] <= state["step"] for r in rows)

    edit_states(run, count)

    def curves(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if "train/bad_samples" in line:
                line["train/bad_samples"] = sum(row["step"] <= line["step"] for row in rows)

    edit_lines(run / "metrics.jsonl", curves)


def skip(run: Path, row: dict[str, Any]) -> None:
    """Lists a step as skipped, with all counts."""
    (run / "skipped_steps.jsonl").write_text(json.dumps(row) + "\n")
    edit_states(run, put("train", skipped_steps=1))
    edit_states(run, put("receipt", skipped_steps=1))
    edit_lines(run / "metrics.jsonl", lambda rows: [r.update({"train/skipped_steps": 1}) for r in rows] and None)


def listed(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]


def changed_first(run: Path, **values: Any) -> list[dict[str, Any]]:
    rows = listed(run)
    return [rows[0] | values, *rows[1:]]


def invented(run: Path) -> list[dict[str, Any]]:
    """A good sample of step 1 said to be bad, in each epoch."""
    order, known, rows = Order(103, HELD_OUT, BATCH, 0), listed(run), []
    index = next(i for i in order.samples(0)[1].tolist() if i not in {row["index"] for row in known} | {33, 60})
    for epoch in range(3):
        step = int(order.steps_of(np.array([epoch]), np.array([index]))[0]) + 1
        shard = f"trees-{index // 40:06d}.tar"
        rows.append({"step": step, "epoch": epoch, "index": index, "shard": shard, "reason": "decode", "detail": ""})
    return sorted([*known, *(row for row in rows if row["step"] <= STEPS)], key=lambda row: row["step"])


def swap(run: Path) -> None:
    """The first samples of step 9 change places between two ranks."""
    logs = [run / f"samples-0000{rank}.jsonl" for rank in (0, 1)]
    rows = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    rows[0][8]["samples"][0], rows[1][8]["samples"][0] = rows[1][8]["samples"][0], rows[0][8]["samples"][0]
    for log, own in zip(logs, rows):
        edit_lines(log, lambda _, own=own: own)


def of_step(step: int, edit: Callable[[dict[str, Any]], Any], rank: int = 0) -> Callable[[Path, Path], None]:
    """Returns what edits a rank's samples of a step."""

    def lie(run: Path, _: Path) -> None:
        edit_lines(
            run / f"samples-{rank:05d}.jsonl", lambda rows: [edit(r) for r in rows if r["step"] == step] and None
        )

    return lie


def lines_of(name: str, edit: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Path, Path], None]:
    return lambda run, _: edit_lines(run / name, edit)


def states(edit: Callable[[dict[str, Any]], Any], only: str = "step-*") -> Callable[[Path, Path], None]:
    return lambda run, _: edit_states(run, edit, only)


def in_bytes(pattern: str, place: int) -> Callable[[Path, Path], None]:
    """Returns what flips a bit of a file of the run's folder, its checksum as it was."""

    def lie(run: Path, _: Path) -> None:
        path = sorted(run.glob(pattern))[-1]
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    return lie


def swap_shards(_: Path, shards: Path) -> None:
    """Another photo in the place of one: the same key, the same size."""
    tar = shards / "trees-000001.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(b".jpg\0") // BLOCK * BLOCK + 2 * BLOCK - 10] ^= 1
    tar.write_bytes(content)


def other_manifest(_: Path, shards: Path) -> None:
    edit_json(shards / "manifest.json", lambda values: values.update(name="oaks"))


def other_classes(_: Path, shards: Path) -> None:
    names = json.loads((shards / "classes.json").read_text())
    (shards / "classes.json").write_text(json.dumps([*names[1:], names[0]]))


def drop_metric(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["step"] != 14]


def moved(name: str) -> Callable[[Path, Path], None]:
    """Returns what puts a link in the place of a log."""

    def lie(run: Path, shards: Path) -> None:
        (run / name).rename(shards.parent / name)
        (run / name).symlink_to(shards.parent / name)

    return lie


NEWEST = "step-0000000020"
IN_LOG = r"samples-0000\d.jsonl: step"
LIES: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    # sample logs
    "a sample is another": (of_step(3, lambda row: row["samples"][0].__setitem__(1, 0)), IN_LOG + r" 3, sample 0"),
    "a sample is left out": (of_step(9, lambda row: row["samples"].pop()), IN_LOG + r" 9 has 3 samples; expected 4"),
    "a sample comes twice": (of_step(9, lambda row: row["samples"].append([1, 2])), IN_LOG + r" 9 has 5 samples"),
    "samples in another order": (of_step(2, lambda row: row["samples"].reverse()), IN_LOG + " 2, sample 0"),
    "samples swapped between ranks": (lambda run, _: swap(run), "samples-00000.jsonl: step 9, sample 0"),
    "a step removed": (lines_of("samples-00001.jsonl", lambda rows: rows[:9] + rows[10:]), "has no line of step 10"),
    "a step repeated": (lines_of("samples-00000.jsonl", lambda r: r[:9] + r[8:]), "step 9 has two lines"),
    "a step behind the end": (lines_of("samples-00002.jsonl", lambda r: [*r, r[-1] | {"step": 21}]), "line of step 21"),
    "steps renumbered": (lines_of("samples-00002.jsonl", lambda r: [x | {"step": x["step"] - 1} for x in r]), "step 4"),
    "a rank's log removed": (lambda run, _: (run / "samples-00002.jsonl").unlink(), "samples-00002.jsonl: has no line"),
    # settings
    "seed in the config": (lambda run, _: edit_config(run, "seed: 0", "seed: 1"), "starts.jsonl: line 1: seed is 0"),
    "seed everywhere": (
        lambda run, _: everywhere(run, 5),
        r"bad_samples.jsonl: line 1: epoch 0, index .* by the order",
    ),
    "held_out": (lambda run, _: edit_config(run, "held_out: 7", "held_out: 8"), "held_out is 7; expected 8"),
    "subset": (lambda run, _: edit_config(run, "subset: null", "subset: 90"), "subset is None; expected 90"),
    "copies": (lambda run, _: edit_config(run, "repeats: 1", "repeats: 3"), "repeats is 1; expected 3"),
    "global batch": (lambda run, _: edit_config(run, "batch: 12", "batch: 6"), "global_batch is 12; expected 6"),
    "more steps": (lambda run, _: edit_config(run, "total_steps: 20", "total_steps: 30"), "total_steps: was 20, is 30"),
    "learning rate": (lambda run, _: edit_config(run, "lr: 0.002", "lr: 0.003"), "optim.lr: was 0.002, is 0.003"),
    # starts
    "the first start removed": (lines_of("starts.jsonl", lambda rows: rows[1:]), "the first start is at step 4"),
    "the last start removed": (lines_of("starts.jsonl", lambda rows: rows[:1]), "do not begin as they did"),
    "a start made up": (lines_of("starts.jsonl", lambda r: [*r, r[-1] | {"step": 20}]), "line 3: the lines before it"),
    "another seed at a start": (
        lines_of("starts.jsonl", lambda r: r[0].update(seed=3)),
        "line 1: seed is 3; expected 0",
    ),
    "ranks of a start": (lines_of("starts.jsonl", lambda r: r[1].update(world_size=2)), "do not begin as they did"),
    "ranks, chained again": (
        lambda run, _: (edit_lines(run / "starts.jsonl", lambda r: r[1].update(world_size=2)), chain_starts(run)),
        "saved by 3 ranks; expected 2",
    ),
    "a start's step, chained again": (
        lambda run, _: (edit_lines(run / "starts.jsonl", lambda r: r[1].update(step=8)), chain_starts(run)),
        r"samples-0000\d.jsonl: ",
    ),
    "starts behind the end": (
        lambda run, _: [add_start(run, step=step) for step in (24, 20)],
        "line 3: a start at step 24 behind the end of the run",
    ),
    "a branch made up": (
        lambda run, _: (edit_lines(run / "starts.jsonl", lambda r: r[1].update(branched=True)), chain_starts(run)),
        "line 2: a start that branched off; expected none, for config.yaml names no branch_from",
    ),
    "a branch behind a checkpoint": (
        lambda run, _: (branch(run), add_start(run, step=20, branched=True)),
        "line 3: branched off at step 20; expected nothing saved before, but step-0000000012 was there",
    ),
    "starts that are a link": (moved("starts.jsonl"), "starts.jsonl: is not a plain file"),
    # bad samples
    "bad samples that are a link": (moved("bad_samples.jsonl"), "bad_samples.jsonl: is not a plain file"),
    "an epoch beyond 64 bits": (
        lines_of("bad_samples.jsonl", lambda r: r[0].update(epoch=2**62)),
        "line 1: epoch is 4611686018427387904, expected an integer from 0 to 9999999999",
    ),
    "an epoch far away, in a large set": (
        lambda run, _: (
            edit_states(run, put("receipt", num_samples=2**48)),
            edit_lines(run / "bad_samples.jsonl", lambda r: r[0].update(epoch=10**10 - 1)),
        ),
        r"line 1: epoch 9999999999, index \d+ at step \d; expected an epoch that was begun",
    ),
    "a bad sample hidden": (lines_of("bad_samples.jsonl", lambda r: r[1:]), "lines up to step 12; expected the"),
    "hidden in an epoch, all counts lowered": (
        lambda run, _: hide(run, lambda row: row["index"] == 3 and row["epoch"] == 1),
        r"has no line for epoch 1, index 3 \(step 1\d\); expected one: it is decode in another epoch \(a file repaired",
    ),
    "hidden in all epochs, all counts lowered": (
        lambda run, _: hide(run, lambda row: row["index"] == 3),
        r"index 3 \(step \d+\): does not list it; expected decode, as it is when read again \(a file repaired",
    ),
    "a bad sample invented, all counts raised": (
        lambda run, _: recount(run, invented(run)),
        r"is decode; expected good, as it is when read again",
    ),
    "another reason": (
        lambda run, _: edit_lines(run / "bad_samples.jsonl", lambda r: r[0].update(reason="tar")),
        "lines",
    ),
    "another reason, all counts changed": (
        lambda run, _: recount(run, [r | {"reason": "tar"} if r["index"] == 3 else r for r in listed(run)]),
        r"index 3 is tar; expected decode, as it is when read again \(a file repaired",
    ),
    "another epoch": (lines_of("bad_samples.jsonl", lambda r: r[0].update(epoch=1)), "by the order"),
    "another index": (lines_of("bad_samples.jsonl", lambda r: r[0].update(index=11)), "by the order"),
    "an index beyond the set": (
        lines_of("bad_samples.jsonl", lambda r: r[0].update(index=10**6)),
        "line 1: index 1000000; expected less than the",
    ),
    "another step": (lines_of("bad_samples.jsonl", lambda r: r[-1].update(step=20)), "at step 20; expected step 1"),
    "another shard": (lines_of("bad_samples.jsonl", lambda r: r[0].update(shard="x.tar")), r"in x.tar; expected trees"),
    "a bad sample twice": (lambda run, _: recount(run, [listed(run)[0], *listed(run)]), "line 2: .* is listed twice"),
    "a bad sample behind the end": (
        lines_of("bad_samples.jsonl", lambda r: [*r, r[-1] | {"step": 99}]),
        "at step 99; expected step",
    ),
    "a line that is none": (
        lambda run, _: (run / "bad_samples.jsonl").write_text("what?\n"),
        "bad_samples.jsonl: line 1: is not JSON",
    ),
    "a damaged sample hidden": (lines_of("damaged_samples.jsonl", lambda r: r[:-1]), "damaged: . lines up to step"),
    "a skipped step invented": (
        lambda run, _: (run / "skipped_steps.jsonl").write_text('{"step": 2, "loss": "nan", "indices": [1]}\n'),
        "skipped steps: 1 lines up to step 12; expected the 0",
    ),
    "a skipped step with other samples, all counts raised": (
        lambda run, _: skip(run, {"step": 2, "loss": "nan", "indices": list(range(12))}),
        r"skipped_steps.jsonl: line 1: indices .*; expected those of step 2 by the order",
    ),
    # the data set
    "another manifest": (other_manifest, r"manifest.json: SHA-256 .*; expected .* as .*state.json says"),
    "another photo": (swap_shards, r"trees-000001.tar: SHA-256 .*; expected .* says"),
    "another list of classes": (other_classes, "classes.json: class 0 is 'birch'; expected 'ash'"),
    "another manifest's digest": (states(put("data.order", manifest_sha256="0" * 64)), "receipt: manifest_sha256 is"),
    # checkpoints
    "bad samples counted down": (states(put("train.bad_samples", decode=0)), "receipt: bad_samples is"),
    "skipped steps counted up": (states(put("train", skipped_steps=1)), "receipt: skipped_steps is 0; expected 1"),
    "counts and receipt": (
        lambda run, _: (
            edit_states(run, put("train", damaged_samples=0)),
            edit_states(run, put("receipt", damaged_samples=0)),
        ),
        "damaged: . lines up to step 12; expected the 0",
    ),
    "samples seen": (states(put("receipt", samples_seen=1000)), "receipt: samples_seen is 1000; expected 144"),
    "number of samples": (states(put("receipt", num_samples=200), NEWEST), "expected 200"),
    "number of samples everywhere": (
        states(put("receipt", num_samples=10**6)),
        r"manifest.json: \d+ samples; expected 1000000, as .*state.json says",
    ),
    "version of the order": (states(put("receipt", version="v2")), "receipt: version is 'v2'; expected 'v1'"),
    "version of the order everywhere": (
        lambda run, _: (
            edit_states(run, put("receipt", version="v2")),
            edit_states(run, put("data.order", version="v2")),
        ),
        "order 'permuted' version 'v2'; expected permuted v1 or lanes v1",
    ),
    "step of a state": (states(put("train", step=19), NEWEST), "train: step is 19; expected 20"),
    "seed of a state": (states(put("config", seed=3), NEWEST), "seed: was 3, is 0"),
    "classes of a state": (states(put("", class_names=["a", "b", "c", "d", "e"]), NEWEST), "its class_names"),
    "ranks of a state": (states(put("", world_size=2), NEWEST), "saved by 2 ranks; expected 3"),
    "scores of a state": (states(put("metrics", **{"val/top1": 0.99}), NEWEST), "DONE: scores"),
    "scores of a state and at the end": (
        lambda run, _: (
            edit_states(run, put("metrics", **{"val/top1": 0.99}), NEWEST),
            edit_json(run / "DONE", put("", **{"val/top1": 0.99})),
        ),
        "as metrics.jsonl has them",
    ),
    "a state without its checksum": (
        lambda run, _: edit_json(run / "checkpoints" / NEWEST / "state.json", put("train", step=19)),
        "state.json: has [0-9]+ bytes; expected",
    ),
    "a checkpoint renamed": (
        lambda run, _: (run / "checkpoints" / NEWEST).rename(run / "checkpoints/step-0000000019"),
        "step is 20; expected 19",
    ),
    "the last checkpoint removed": (
        lambda run, _: shutil.rmtree(run / "checkpoints" / NEWEST),
        "DONE: step is 20; expected 16",
    ),
    "a bit of the weights": (in_bytes("checkpoints/*/weights-00001*", -5), "weights-00001.* has CRC-32C"),
    # curves and the end
    "epoch of a line": (lines_of("metrics.jsonl", lambda r: r[2].update({"train/epoch": 0.5})), "train/epoch is 0.5"),
    "counts of a line": (
        lines_of("metrics.jsonl", lambda r: r[2].update({"train/bad_samples": 0})),
        "bad, damaged, skipped",
    ),
    "a line of the curves removed": (lines_of("metrics.jsonl", drop_metric), "has no line of step 14; expected one"),
    "a line of the curves twice": (lines_of("metrics.jsonl", lambda r: r[:2] + r[1:]), r"step (\d+) after step \1"),
    "the end at another step": (
        lambda run, _: edit_json(run / "DONE", put("", step=24)),
        "DONE: step is 24; expected 20",
    ),
    "the end is a link": (moved("DONE"), "DONE: is not a plain file"),
    "another score at the end": (lambda run, _: edit_json(run / "DONE", put("", **{"val/top1": 0.99})), "DONE: scores"),
}
NEED_DATA = ("read again", "SHA-256", "classes", "x.tar", "manifest.json: ")


# Each of them runs in `make test-all`; half of them take long enough.
SOME = [pytest.param(name, marks=pytest.mark.slow) if number % 2 else name for number, name in enumerate(LIES)]


@pytest.mark.parametrize("name", SOME)
def test_lies_are_found(name: str, case: Case, tmp_path: Path) -> None:
    """Each is found and named with its file, what is wrong, and what is expected; an untouched folder passes."""
    tell, expected = LIES[name]
    run = Path(shutil.copytree(case.run, tmp_path / "run"))
    reads = any(word in expected for word in NEED_DATA)
    shards = Path(shutil.copytree(case.shards, tmp_path / "trees")) if reads else case.shards
    tell(run, shards)
    found = wrong(look(run, data=shards, no_data=not reads, full="CRC-32C" in expected))
    assert any(re.search(expected, message) for message in found), found
    assert all("\n" not in message for message in found)


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.mkdir(),
        os.mkfifo,
        bind,
    ],
    ids=["link", "folder", "pipe", "socket"],
)
def test_a_log_that_is_no_file_is_told(
    make: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, neither a traceback nor a wait."""
    monkeypatch.chdir(tmp_path)
    make(Path("log"))
    with pytest.raises(Lie, match="^log: is not a plain file$"):
        open_log(Path("log"))


def test_sample_logs_that_cannot_be_listed_are_heard(tmp_path: Path, no_listing: None) -> None:
    """Else they would count as not written."""
    run: Any = SimpleNamespace(folder=tmp_path, segments=[], trained=1)
    with pytest.raises(PermissionError):
        samples.check_sample_logs(run)


def test_epochs_without_number_are_left_out() -> None:
    """A receipt may claim a data set with one sample."""
    run: Any = SimpleNamespace(order=Order(8, 7, 4096, 0), trained=10**9)
    with pytest.raises(LeftOut, match="more than 100,000 epochs"):
        samples._epochs_begun(run)


def test_lines_are_due_at_the_interval_and_at_the_end(tmp_path: Path) -> None:
    """By multiples of it: a checkpoint may claim 10^10 steps."""

    def check(every: int, begun: int, trained: int, total: int, seen: set[int]) -> None:
        config = SimpleNamespace(log=SimpleNamespace(every_steps=every), total_steps=total)
        run: Any = SimpleNamespace(
            folder=tmp_path, starts=[SimpleNamespace(step=begun)], config=config, trained=trained
        )
        records._check_due(run, seen)

    for every, begun, trained, total, due in [(4, 4, 13, 13, {8, 12, 13}), (5, 0, 12, 30, {5, 10}), (0, 0, 9, 9, {9})]:
        check(every, begun, trained, total, due)
        for step in due:
            with pytest.raises(Lie, match=f"has no line of step {step};"):
                check(every, begun, trained, total, due - {step})
    check(10**9, 0, 10**10, 10**10, {*range(10**9, 10**10 + 1, 10**9)})


@pytest.mark.parametrize("full", [False, True])
def test_steps_are_chosen_without_an_array_of_all(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint may claim any number; 2^50 would have 9 petabytes."""
    order = Order(num_samples=50, held_out=0, global_batch=2048, seed=0)
    empty = np.empty(0, np.int64)
    none = audit_folder.Listed(Path("a"), empty, empty, empty, [], [])
    run: Any = SimpleNamespace(order=order, own_data=None, first_step=4, bad=none, damaged=none, folder=Path("a"))
    run.trained, run.options = 7 if full else 1 << 50, Options(full, None, False, 0)
    run.config = SimpleNamespace(data=SimpleNamespace(strict_images=True))
    monkeypatch.setattr(audit_data, "_reasons", lambda _, indices: [None] * len(indices))
    outcome = audit_data.check_steps_again(run)
    assert outcome.count == (3 if full else 2) * 2048
    assert outcome.left_out == ("" if full else f"{(1 << 50) - 6:,} more steps: --full")


def test_starts_are_summed_once(tmp_path: Path) -> None:
    """Each knows the digest of the lines before it, without reading them again: 10,000 lines are 2 MB."""
    (tmp_path / "config.yaml").touch()
    line = json.dumps({"step": 0, "world_size": 1, "more": "a" * 150}).encode() + b"\n"
    (tmp_path / "starts.jsonl").write_bytes(line * 10_000)
    began = os.times().user
    starts = Run(tmp_path, Options(False, None, True, 0)).starts
    assert os.times().user - began < 3 and len(starts) == 10_000
    assert [starts[2].before, starts[2].until] == [hashlib.sha256(line * n).hexdigest() for n in (2, 3)]


# --- a long run ------------------------------------------------------------------------------------------------------

LONG = Order(num_samples=14_197_122, held_out=51_200, global_batch=4096, seed=0)
LONG_STEPS, LONG_BAD = 1_000_000, 50


def write_long_run(folder: Path) -> Path:
    """The folder of a million steps over ImageNet-21k, as training would have left it; a manifest without shards."""
    run, path = folder / "tiny", folder / "in21k" / "manifest.json"
    path.parent.mkdir()
    sizes = [10_000] * 1419 + [LONG.num_samples - 14_190_000]
    shards = [Shard(f"{n:06d}.tar", size, 10**9, "0" * 64) for n, size in enumerate(sizes)]
    write_manifest(path.parent, "in21k", shards, 21_843, has_names=False, shuffle=None)
    data = {"data__global_batch": LONG.global_batch, "data__held_out": LONG.held_out, "log__every_steps": 50}
    config = tiny_config(path.parent, folder, **data, total_steps=LONG_STEPS, log__samples=False)
    run.mkdir()
    (run / "config.yaml").write_text(config_to_yaml(config))
    bad = long_list(np.arange(LONG_BAD) * 1000)
    (run / "bad_samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    counted = np.searchsorted([row["step"] for row in bad], np.arange(LONG_STEPS + 1), side="right").tolist()
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(50, LONG_STEPS + 1, 50):
            counts = {"train/bad_samples": counted[step], "train/damaged_samples": 0, "train/skipped_steps": 0}
            epoch = step * LONG.global_batch / LONG.num_train
            file.write(json.dumps({"step": step, "train/loss": 1.0, "train/epoch": epoch, **counts}) + "\n")
    steps = range(0, LONG_STEPS, 50_000)
    (run / "starts.jsonl").write_text("".join(json.dumps({"step": step, "world_size": 512}) + "\n" for step in steps))
    state = TrainState(step=LONG_STEPS, bad_samples={"decode": len(bad)})
    identity = {"name": "permuted", "version": "v1", "manifest_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    values: dict[str, Any] = {"step": LONG_STEPS, "metrics": {}, "world_size": 512, "class_names": []}
    values |= {"train": asdict(state), "config": config_to_dict(config)}
    checkpoint = run / "checkpoints" / f"step-{LONG_STEPS:010d}"
    checkpoint.mkdir(parents=True)
    values |= {"data": {"order": identity}, "receipt": receipt(state, LONG, identity)}
    (checkpoint / "state.json").write_text(json.dumps(values))
    header = {"format": "pretrain-checkpoint", "version": 1, "files": [{"path": "state.json"}]}
    (checkpoint / "MANIFEST.json").write_text(manifest_text(header | {"crc32c": ""}))
    seal_checkpoint(checkpoint)
    return run


def long_list(indices: np.ndarray) -> list[dict[str, Any]]:
    """Lines for bad samples in every epoch that came to them, in the order of their steps."""
    epochs = -(-LONG_STEPS * LONG.global_batch // LONG.num_train)
    rows = [(step + 1, epoch, index) for epoch in range(epochs) for step, index in steps_in(epoch, indices)]
    told = {"shard": "", "reason": "decode", "detail": ""}
    return [dict(zip(("step", "epoch", "index"), row)) | told for row in sorted(rows) if row[0] <= LONG_STEPS]


def steps_in(epoch: int, indices: np.ndarray) -> list[tuple[int, int]]:
    steps = LONG.steps_of(np.full(len(indices), epoch), indices)
    return [(step, index) for step, index in zip(steps.tolist(), indices.tolist()) if step >= 0]


@pytest.mark.slow
def test_a_million_steps_take_less_than_a_minute(tmp_path: Path) -> None:
    """With 14,000 bad samples in 289 epochs, all recomputed; one that is hidden is missed."""
    run = write_long_run(tmp_path)
    began = time.process_time()
    assert not wrong(look(run))
    assert time.process_time() - began < 60
    edit_lines(run / "bad_samples.jsonl", lambda rows: rows[:7000] + rows[7001:])
    assert any("expected one: it is decode in another epoch" in message for message in wrong(look(run)))
