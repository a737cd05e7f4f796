"""The doctor: what is wrong with a machine, a disk, a rank or the network is told in red, with its remedy."""

import contextlib
import errno
import fcntl
import io
import os
import resource
import shutil
import signal
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import CLASSES
from ranks import run_ranks, start_ranks
from slurm import cluster, wait_for
from tiny import changed, tiny_config
from web import Site, served

from pretrain.cluster import ranks
from pretrain.cluster.local import on_cpu
from pretrain.config import Config
from pretrain.data.loader import Room
from pretrain.doctor import disks, examine, findings, machine, meeting
from pretrain.doctor.findings import AWAY, OK, RED, WARN, Finding
from pretrain.json_files import Fields
from pretrain.shards.elsewhere import index_urls

ROOT = Path(__file__).resolve().parents[1]
WAIT_S = 60.0
DISK = namedtuple("DISK", "total used free")


def test_all_ranks_make_one_table() -> None:
    """The worst first; who differs is named by node where that is whole, else by rank; of quantities the least."""
    hosts = {0: "a", 1: "a", 2: "b", 3: "b"}
    found = {
        rank: [
            Finding("torch", OK, "2.15" if hosts[rank] == "a" else "2.14", differs=RED),
            Finding("memory", OK, f"{10 - rank} GB", value=10.0 - rank),
            Finding(
                "GPU", RED if rank == 3 else OK, "none" if rank == 3 else "one", "look at nvidia-smi" * (rank == 3)
            ),
            Finding("python", OK, "3.11", differs=RED),
            Finding("files", WARN if rank else OK, "64", "ulimit -n 4096", value=64.0),
        ]
        for rank in hosts
    }
    rows = findings.merged(found, hosts)
    assert rows == [
        Finding("torch", RED, "2.15 (a); 2.14 (b)", "give all nodes the same"),
        Finding("GPU", RED, "none (rank 3 on b)", "look at nvidia-smi"),
        Finding("files", WARN, "64 (rank 1 on a, rank 2 on b, rank 3 on b)", "ulimit -n 4096"),
        Finding("memory", OK, "7 GB (rank 3 on b, the least)", ""),
        Finding("python", OK, "3.11", ""),
    ]
    long = [*rows, Finding("x", RED, "many words " * 40, "and a remedy " * 20)]
    assert max(map(len, findings.lines(long))) <= findings.WIDTH
    assert findings.place([4, 5, 6, 7], range(8), {rank: f"n{rank}" for rank in range(8)}) == "n4, n5, n6 and 1 more"


def test_a_long_text_does_not_cost_the_table() -> None:
    """An error may hold a whole file; rank 0 reads the beginning."""
    long = Finding("disk", RED, "x" * 100_000, "y" * 100_000)
    (read,) = findings.from_json(Fields.of(part, "finding") for part in findings.as_json([long]))
    assert read.state == RED and long.found.startswith(read.found) and len(read.found) == len(read.remedy) > 1000


@pytest.mark.parametrize("wrong", ["open files", "/dev/shm", "memory"])
def test_limits_below_what_loaders_need(wrong: str) -> None:
    """Each is compared with what the config's loader processes take."""
    names = {"open files": "open_files", "/dev/shm": "shared_bytes", "memory": "memory_bytes"}
    room = Room(**{"open_files": 1, "memory_bytes": 1, "shared_bytes": 1} | {names[wrong]: 1 << 60})
    told = {finding.check: finding for finding in machine.check_limits(room, "4 loader processes")}
    assert [check for check, finding in told.items() if finding.state == RED] == [wrong]
    assert "4 loader processes" in told[wrong].found and "lower data.workers" in told[wrong].remedy


Patch = Callable[[pytest.MonkeyPatch, Path], object]
ANY_SHELL = "/bin/sh"
MACHINES: list[tuple[str, Patch, Callable[[], Any], str, str]] = [
    (
        "GPUs that are not there",
        lambda m, _: (m.setenv("CUDA_VISIBLE_DEVICES", "0,1"), m.delenv("DS_ACCELERATOR", False)),
        machine.check_gpu,
        RED,
        "CUDA_VISIBLE_DEVICES=0,1 asks for GPUs",
    ),
    (
        "no GPU, and nobody asked",
        lambda m, _: (m.delenv("CUDA_VISIBLE_DEVICES", False), m.delenv("DS_ACCELERATOR", False)),
        machine.check_gpu,
        WARN,
        "the CPU would train",
    ),
    ("no compiler", lambda m, p: m.setenv("PATH", str(p)), lambda: machine.check_compiler(True), RED, "none (gcc"),
    ("not needed", lambda m, p: m.setenv("PATH", str(p)), lambda: machine.check_compiler(False), WARN, "none (gcc"),
    ("broken", lambda m, _: m.setenv("CC", "false"), lambda: machine.check_compiler(True), RED, "cannot build"),
    (
        "absent",
        lambda m, _: m.setenv("CC", "nosuchcc"),
        lambda: machine.check_compiler(True),
        RED,
        "CC=nosuchcc is not there",
    ),
    ("cc only", lambda m, p: only(m, p, "cc"), lambda: machine.check_compiler(True), RED, "none (gcc"),
    ("unfit", lambda m, p: only(m, p, "gcc"), lambda: machine.check_compiler(True), RED, "does not run"),
    ("loopback", lambda m, _: named(m, "127.0.1.1"), lambda: machine.check_host_name(2), RED, "no other node"),
    ("one node", lambda m, _: named(m, "127.0.1.1"), lambda: machine.check_host_name(1), OK, "127.0.1.1"),
    ("InfiniBand", lambda m, p: locked(m, p, 1000), lambda: machine.check_limits(Room(0, 0, 0), ""), RED, "locks its"),
    ("enough", lambda m, p: locked(m, p, 1000), lambda: machine.check_limits(Room(0, 0, 0), ""), RED, "0.1 MB at most"),
    ("too few cores", lambda m, _: None, lambda: machine.check_cores(8, 8), WARN, "8 for a rank with 8 loader"),
]


def only(patch: pytest.MonkeyPatch, folder: Path, compiler: str) -> None:
    """A machine whose programs are one compiler, an empty file."""
    patch.setenv("PATH", str(folder))
    patch.delenv("CC", raising=False)
    (folder / compiler).touch(mode=0o755)


def named(patch: pytest.MonkeyPatch, address: str) -> None:
    patch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    patch.setattr("socket.gethostbyname", lambda name: address)


def locked(patch: pytest.MonkeyPatch, folder: Path, limit_kb: int) -> None:
    """A machine with InfiniBand, for a user who may lock so much."""
    (folder / "mlx5_0").mkdir()
    patch.setattr(machine, "_INFINIBAND", folder)
    patch.setattr("os.geteuid", lambda: 1000)
    real = resource.getrlimit
    patch.setattr(
        "resource.getrlimit", lambda which: (0, limit_kb * 100) if which == resource.RLIMIT_MEMLOCK else real(which)
    )


@pytest.mark.parametrize(("name", "patch", "check", "state", "told"), MACHINES, ids=[row[0] for row in MACHINES])
def test_a_machine_with_a_fault(
    name: str, patch: Patch, check: Any, state: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each fault has its state and its words; what would end a run has a remedy."""
    monkeypatch.setattr(ranks, "gpu_is_here", lambda: False)
    patch(monkeypatch, tmp_path)
    found = [finding for finding in check() if finding.state == state and told in finding.found]
    assert len(found) == 1 and bool(found[0].remedy) == (state != OK)


def test_tasks_with_a_gpu_of_their_own_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is told another one by CUDA_VISIBLE_DEVICES, as with --gpus-per-task: no difference worth a word."""
    gpu = SimpleNamespace(name="H100", total_memory=80e9)
    monkeypatch.setattr(ranks, "choose_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(machine.nccl, "version", lambda: (2, 27, 5))
    found = {}
    for rank in (0, 1):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", str(rank))
        found[rank] = list(machine.check_gpu())
    rows = findings.merged(found, {0: "a", 1: "a"})
    assert rows[0] == Finding("GPU", OK, "H100, 80 GB; 1 seen, asked for by CUDA_VISIBLE_DEVICES", "")


def test_locks_and_renames_of_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process is refused; where it is not, and where there are no locks, it is told. Nothing stays."""
    probe = disks.Probe(tmp_path / "runs" / "one", "token")
    assert probe.path.parent == tmp_path
    assert [finding.state for finding in disks.check_own_probe(probe)] == [OK, OK]
    seen = list(disks.check_seen_probe(probe.path, "another", True))
    assert [(f.check, f.state) for f in seen] == [("shared disk", RED)]
    monkeypatch.setattr(disks, "_TRY", "pass  # {}")
    assert next(iter(disks.check_own_probe(probe))).state == RED
    probe.remove()

    def no_locks(file: object, flags: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    probe = disks.Probe(tmp_path, "token")
    first = next(iter(disks.check_own_probe(probe)))
    assert first.state == WARN and "No locks available" in first.found
    assert [f.state for f in disks.check_seen_probe(probe.path, "token", True)] == [OK, WARN]

    def held(file: object, flags: int) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(fcntl, "lockf", held)
    assert [f.state for f in disks.check_seen_probe(probe.path, "token", True)] == [OK, OK]
    monkeypatch.setattr(fcntl, "lockf", lambda file, flags: None)  # gives the lock of rank 0 to another node too
    seen = list(disks.check_seen_probe(probe.path, "token", True))
    assert [(f.check, f.state) for f in seen] == [("shared disk", OK), ("locks over nodes", RED)]
    probe.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_probe(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a full disk, on which the probe's folder can be made and its files cannot."""

    def interrupted(config: Any, meeting: Any, made: list[disks.Probe]) -> int:
        made.append(disks.Probe(tmp_path, "token"))
        os.kill(os.getpid(), number)
        time.sleep(100)
        return 0

    monkeypatch.setattr(examine, "_round", interrupted)
    lead: Any = examine._lead
    with pytest.raises(KeyboardInterrupt):
        lead(None, None)

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disks, "write_text", full)
    with pytest.raises(OSError):
        disks.Probe(tmp_path, "another")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "state"),
    [(errno.EROFS, RED), (errno.EACCES, RED), (errno.ENOSPC, AWAY), (errno.EIO, AWAY), (errno.ESTALE, AWAY)],
)
def test_what_a_disk_says(error: int, state: str) -> None:
    """A disk that is full or away is storage, which may be better later; one that is forbidden is not."""
    assert disks.told_of(OSError(error, os.strerror(error), "/x"), "disk").state == state


def test_data_sets_and_room(own_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of a good set; a damaged sample, a missing shard, a full disk."""
    config = tiny_config(own_shards, tmp_path / "runs")
    assert disks.sets_of(config) == {"data.train": own_shards}
    with monkeypatch.context() as patch:  # no whole index is read for a sample
        patch.setattr(disks, "load_index", lambda shard: pytest.fail("whole"))
        (good,) = disks.check_set("data.train", own_shards, config)
    assert good.state == OK and good.value and "103 images in 3 shards" in good.found
    assert [f.state for f in disks.check_free_disk(config, 5)] == [OK]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DISK(1, 1, 1000))
    (full,) = disks.check_free_disk(config, 5)
    assert full.state == AWAY and "4 checkpoints of" in full.found and "keep_last" in full.remedy
    shards = sorted(own_shards.glob("*.tar"))
    indexes = {shard.with_suffix(".idx"): shard.with_suffix(".idx").read_bytes() for shard in shards}
    for path, content in indexes.items():
        path.write_bytes(content[:-4])
    (cut,) = disks.check_set("data.train", own_shards, config)
    assert cut.state == RED and "does not fit its shard" in cut.found
    for path, content in indexes.items():
        path.write_bytes(content)
    for shard in shards:
        shard.write_bytes(bytes(shard.stat().st_size))
    (damaged,) = disks.check_set("data.train", own_shards, config)
    assert damaged.state == RED and "is not what was indexed" in damaged.found
    shards[0].unlink()
    (missing,) = disks.check_set("data.train", own_shards, config)
    assert missing.state == RED and "not found" in missing.found


def test_reading_too_slow_for_image_by_image(own_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slower than the GPU with all loader processes, or over a network where nobody has chosen; lanes read blocks."""

    def found(**changes: Any) -> list[tuple[str, bool]]:
        config = tiny_config(own_shards, tmp_path / "runs", data__workers=3, **changes)
        findings = list(disks.check_set("data.train", own_shards, config))
        return [(f.state, "data.order=lanes" in f.remedy) for f in findings]

    monkeypatch.setattr(disks, "network_file_system", lambda path: None)  # whatever the tests lie on
    assert found() == [(OK, False)]
    monkeypatch.setattr(disks, "images_per_s", lambda config, num_classes: 1e9)
    assert found() == found(data__order="permuted") == [(WARN, True)] and found(data__order="lanes") == [(OK, False)]
    monkeypatch.setattr(disks, "images_per_s", lambda config, num_classes: 1e-9)
    assert found() == [(OK, False)]
    monkeypatch.setattr(disks, "network_file_system", lambda path: "Lustre" if path == own_shards else None)
    assert found() == [(WARN, True)] and found(data__order="permuted") == found(data__order="lanes") == [(OK, False)]


def test_the_images_that_a_gpu_takes(shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By tools/plan.py's formulas; nothing is said of GPUs that are not known, nor of CPUs."""
    model = {"name": "L/16", "width": None, "depth": None, "mlp_dim": None, "heads": None, "image_size": 224}
    changes = {f"model__{key}": value for key, value in (model | {"patch_size": 16}).items()}
    config = tiny_config(shard_folder, tmp_path, engine__precision="bf16", **changes)
    assert machine.images_per_s(config, 1000) is None
    monkeypatch.setattr(machine.ranks, "has_gpu", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert machine.images_per_s(config, 1000) == pytest.approx(1_112, rel=0.05)  # measured: benchmarks/h100.jsonl
    in_fp32 = machine.images_per_s(changed(config, engine__precision="fp32"), 1000)
    assert in_fp32 == pytest.approx(41.5e12 / (3 * 123.1e9), rel=0.02)  # TFLOP/s of the plan, FLOPs of an image
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 PCIe")
    assert machine.images_per_s(config, 1000) is None


def test_what_is_deleted_while_it_is_counted_is_no_fault(
    own_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training deletes old checkpoints beside the doctor, between a listing and the look at what it names."""
    config = tiny_config(own_shards, tmp_path / "runs")
    steps = [config.output / config.name / "checkpoints" / f"step-000000000{number}" for number in (1, 2, 3)]
    for step in steps:
        step.mkdir(parents=True)
        (step / "state.json").write_bytes(bytes(1_000_000))
    list_it, look_at = os.scandir, os.lstat

    def listing(path: Any = ".") -> Any:
        if str(path) == str(steps[0]):
            shutil.rmtree(path)
        return list_it(path)

    def look(path: Any, **named: Any) -> os.stat_result:
        if str(path) == str(steps[1] / "state.json"):
            os.unlink(path)
        return look_at(path, **named)

    monkeypatch.setattr(os, "scandir", listing)
    monkeypatch.setattr(os, "lstat", look)
    (found,) = disks.check_free_disk(config, 5)
    assert found.state == OK and "1.0 MB there" in found.found, found
    assert not steps[0].exists() and not (steps[1] / "state.json").exists()


def test_remote_shards(shard_folder: Path, tmp_path: Path) -> None:
    """One range is read, and nothing kept; a server that is away is storage."""
    with served(Site(shard_folder)) as site:
        urls = [f"{site.url}/{path.name}" for path in sorted(shard_folder.glob("*.tar"))]
        index_urls(urls, CLASSES, tmp_path / "set")
        config = tiny_config(tmp_path / "set", tmp_path / "runs", data__store=tmp_path / "store")
        before = len(site.requests)
        found = list(disks.check_set("data.train", tmp_path / "set", config))
        assert [(f.check, f.state) for f in found] == [("train", OK), ("store", OK)]
        assert "one range" in found[0].found and len(site.requests) == before + 1
        assert list((tmp_path / "store").iterdir()) == []
        site.fault = lambda _: "404"
        assert [f.state for f in disks.check_set("data.train", tmp_path / "set", config)] == [RED]
        small = tiny_config(tmp_path / "set", tmp_path / "runs", data__store=tmp_path / "store", data__store_gb=1e6)
        site.fault = lambda _: ""
        assert [f.state for f in disks.check_set("data.train", tmp_path / "set", small)] == [OK, AWAY]


def test_a_check_that_hangs_or_fails_does_not_hide_the_others() -> None:
    """It is named after its time; what was found before is told."""

    def fails() -> Any:
        raise ZeroDivisionError("x")
        yield

    checks: list[Any] = [
        ("one", lambda: [Finding("one", OK, "fine")]),
        ("two", fails),
        ("three", lambda: time.sleep(300)),
    ]
    found = examine._carried_out(checks, 0.5)
    assert [(f.check, f.state) for f in found] == [("one", OK), ("two", RED), ("three", RED)]
    assert "ZeroDivisionError" in found[1].found and "did not end within 0.5 s" in found[2].found


def examined(fault: str, config: Config | None) -> tuple[int, str]:
    """What a rank ends with, and prints; rank 1 has the fault."""
    if ranks.rank() == 1 and fault == "stopped":
        signal.pause()
    if ranks.rank() == 1 and fault == "sum":
        real = meeting.dist.all_reduce

        def damaging(values: Any) -> None:
            real(values)
            values[7] += 1

        meeting.dist.all_reduce = damaging  # pyright: ignore
    if ranks.rank() == 1 and fault == "clock":
        now = time.time
        meeting.answer_clock.__defaults__ = (lambda: now() + 100,)
    if fault == "clock":
        examine.socket.gethostname = lambda: f"n{ranks.rank()}"  # clocks are of nodes
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = examine.examine(config, 5.0 if fault == "stopped" else WAIT_S)
    return code, printed.getvalue()


WORLDS = [("", 0, "is right"), ("sum", 2, "element 7 is"), ("clock", 2, "RED   clock")]


@pytest.mark.parametrize(("fault", "code", "told"), WORLDS)
def test_two_ranks(fault: str, code: int, told: str, shard_folder: Path, tmp_path: Path) -> None:
    """All ranks end with the same code, rank 0 alone prints; a wrong sum and a wrong clock are told with the rank."""
    config = tiny_config(shard_folder, tmp_path / "runs") if not fault else None
    results = run_ranks(examined, 2, fault, config)
    assert [result[0] for result in results] == [code, code] and results[1][1] == "", results
    table = results[0][1]
    assert told in table and ("bus " in table) == (fault != "sum"), table
    assert fault != "sum" or "(rank 1)" in table
    assert fault != "clock" or ("+100." in table and "2 ranks on 2 nodes (n0, n1)" in table)
    cores = len(os.sched_getaffinity(0))  # which the ranks of a node share
    assert f"{cores if fault == 'clock' else max(1, cores // 2)} for a rank with" in table
    assert fault or ("103 images" in table and "locks" in table and list(tmp_path.iterdir()) == [])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_under_plain_srun(tmp_path: Path) -> None:
    """Two tasks of srun are one world, as a run's are."""
    with cluster(tmp_path / "s") as run:
        (tmp_path / "doctor.sh").write_text(f"exec srun {sys.executable} {ROOT}/tools/doctor.py\n")
        sized = "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"
        environment = ",".join(f"{name}={value}" for name, value in on_cpu(1).items())
        words = f"--output={tmp_path}/out", f"--export=ALL,{environment}", f"--wrap=exec bash {tmp_path}/doctor.sh"
        run("sbatch", *sized, *words)
        wait_for(lambda: not run("squeue", "--noheader"), run, seconds=300)
    table = (tmp_path / "out").read_text()
    assert "doctor: 2 ranks on" in table and "the sum is right" in table and "nothing is red" in table


def test_a_silent_rank_is_named_and_not_waited_for() -> None:
    """One that never comes: rank 0 tells what it found itself, and ends with 2."""
    processes = start_ranks(examined, 2, "stopped", None)
    try:
        assert processes[0].results.poll(120)
        error, (code, table) = processes[0].results.recv()
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert error is None and code == 2
    assert "rank 1 did not come within 5 s" in table and "not tried, as ranks are missing" in table


def agrees(timeout_s: float) -> str:
    """What rank 0 meets where rank 1 does not come to the group of gloo, as behind a firewall."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    if ranks.rank() == 1:
        time.sleep(2 * timeout_s)
        return ""
    try:
        meeting._agree(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_ranks_on_gpus_meet_by_gloo_too() -> None:
    told = run_ranks(agrees, 2, 2.0)[0]
    assert told.startswith("gloo, by which ranks agree beside NCCL: ") and "\n" not in told, told


def test_lost_links_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 H100 by PCIe instead of NVLink, 64 by sockets; of GPUs that are not in the table nothing is expected."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    for here, seconds, told in ((8, 0.002, ""), (8, 0.03, "NVLink"), (2, 0.003, ""), (2, 0.1, "NET/IB")):
        monkeypatch.setenv("WORLD_SIZE", "8")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        found = meeting._told("nccl", meeting.GPU_BYTES, seconds, "")
        assert found.state == (WARN if told else OK) and told in found.remedy, (here, seconds, found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA RTX 4090")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert meeting._told("nccl", meeting.GPU_BYTES, 0.03, "").state == OK
