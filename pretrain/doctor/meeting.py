"""Communication between ranks through a key-value store on rank 0, with time limits: no rank blocks another."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from pretrain.cluster import ranks
from pretrain.doctor.findings import OK, RED, WARN, Finding
from pretrain.errors import UserError, first_line
from pretrain.gpus import known_gpu
from pretrain.json_files import Fields

MAX_SKEW_S, RED_SKEW_S = 1.0, 60.0  # log lines get out of order; munge refuses at 300 s, S3 at 900 s
_CLOCK_ROUNDS = 8
GPU_BYTES, CPU_BYTES = 256 << 20, 16 << 20  # of an all_reduce
_REPEATS = 3
_PATTERN = 1009  # neighbouring elements differ, so that a misplaced piece is noticed
# Bus bandwidth below which something is amiss. Between nodes, InfiniBand is above it, sockets and a single card of
# 100 Gb/s are below; within a node, NVLink is far above, PCIe and host memory are below.
SLOW_BETWEEN_NODES_GB_S, SLOW_IN_NODE_GB_S = 20.0, 60.0


class Meeting:
    """The key-value store by which ranks exchange messages."""

    def __init__(self, wait_s: float) -> None:
        """Connects to the store. Raises UserError when rank 0 does not answer within wait_s."""
        self.wait_s = wait_s
        self.patience_s = 2 * wait_s + 15  # how long others wait for rank 0, which may wait twice for a silent rank
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise UserError(f"MASTER_PORT is {port!r}, expected a port")
        is_host = ranks.is_main() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun hosts it
        timeout = timedelta(seconds=wait_s)
        try:
            store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
                address, int(port), None, is_host, timeout, wait_for_workers=False
            )
        except dist.DistError as error:
            raise ranks.not_met(error) from None
        self.store = PrefixStore("doctor", store)

    def tell(self, key: str, value: object) -> None:
        """Publishes a value under a key. Raises UserError when rank 0 has gone."""
        with _asking_rank_0():
            self.store.set(key, json.dumps(value))

    def hear(self, key: str, seconds: float) -> Fields | None:
        """Returns a published value, None when it did not come in time. Raises UserError when rank 0 has gone."""
        with _asking_rank_0():
            try:
                self.store.wait([key], timedelta(seconds=max(seconds, 0.01)))
            except dist.DistStoreError:
                return None
            return Fields.parse(self.store.get(key), key)

    def collect(self, key: str, some: Iterable[int], seconds: float) -> dict[int, Fields]:
        """Returns what ranks published as key/RANK, by rank, for those that did so in time."""
        deadline, heard = time.monotonic() + seconds, {}
        for rank in some:
            if (value := self.hear(f"{key}/{rank}", deadline - time.monotonic())) is not None:
                heard[rank] = value
        return heard


@contextmanager
def _asking_rank_0() -> Iterator[None]:
    try:
        yield
    except dist.DistNetworkError:
        raise UserError(f"rank {ranks.rank()}: rank 0 has gone, or the network to it") from None


def within(seconds: float, work: Callable[[], None]) -> bool:
    """Returns whether `work` ended in time; if not, it continues in a daemon thread, which does not delay exit."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def answer_clock(meeting: Meeting, clock: Callable[[], float] = time.time) -> None:
    """Tells rank 0 this rank's time, whenever it asks."""
    for number in range(_CLOCK_ROUNDS):
        if meeting.hear(f"ask/{ranks.rank()}/{number}", meeting.patience_s) is None:
            return
        meeting.tell(f"time/{ranks.rank()}/{number}", {"s": clock()})


def ask_clock(meeting: Meeting, rank: int) -> Finding | None:
    """Returns how far a rank's clock is from this one, by the question answered fastest; None without an answer."""
    best = (float("inf"), 0.0)
    for number in range(_CLOCK_ROUNDS):
        before = time.time()
        meeting.tell(f"ask/{rank}/{number}", {})
        told = meeting.hear(f"time/{rank}/{number}", meeting.wait_s)
        if told is None:
            return None
        after = time.time()
        best = min(best, (after - before, told.number("s", -1e12, 1e12) - (before + after) / 2))
    took, skew = best
    state = OK if abs(skew) - took / 2 <= MAX_SKEW_S else WARN if abs(skew) - took / 2 <= RED_SKEW_S else RED
    told_text = f"{skew:+.3f} s from rank 0, within {1000 * took / 2:.1f} ms"
    return Finding("clock", state, told_text, "" if state == OK else "start chrony or ntpd there", value=-abs(skew))


def all_reduce(meeting: Meeting) -> Finding:
    """All-reduces a tensor, by NCCL on GPUs, else by gloo; returns bandwidth and whether the sum is right.

    The process group is not destroyed, since other ranks may still be using it.
    """
    device = torch.device("cpu")
    if ranks.has_gpu():
        device = ranks.choose_device()
        torch.cuda.set_device(device)
    on_gpu = device.type == "cuda"
    backend, num_bytes, world = "nccl" if on_gpu else "gloo", GPU_BYTES if on_gpu else CPU_BYTES, ranks.world_size()
    store, timeout = PrefixStore("group", meeting.store), timedelta(seconds=2 * meeting.wait_s)
    options = {"store": store, "rank": ranks.rank(), "world_size": world, "timeout": timeout}
    dist.init_process_group(backend, **options)
    if on_gpu:
        _agree(timedelta(seconds=meeting.wait_s / 2))  # times out before this rank does, with a message that names gloo
    pattern = torch.arange(num_bytes // 4, dtype=torch.float32, device=device) % _PATTERN
    expected = pattern * world + world * (world - 1) // 2  # whole numbers far below 2^24: exact, in any order
    seconds, wrong = float("inf"), ""
    for _ in range(1 + _REPEATS):  # the first one sets up connections
        values = pattern + ranks.rank()
        _settled(on_gpu)
        started = time.monotonic()
        dist.all_reduce(values)
        _settled(on_gpu)
        seconds = min(seconds, time.monotonic() - started)
        if not wrong and len(differing := torch.nonzero(values != expected)):  # no early exit: others wait for it
            first = int(differing[0])
            wrong = (
                f"element {first} is {values[first]:g}, expected {expected[first]:g}, and {len(differing) - 1:,} more"
            )
    return _told(backend, num_bytes, seconds, wrong)


def _agree(timeout: timedelta) -> None:
    """Tests gloo, by which a run's ranks agree on GPUs too: all-to-all TCP, on ports that a firewall may close."""
    try:
        group: Any = dist.new_group(backend="gloo", timeout=timeout)
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        raise RuntimeError(f"gloo, by which ranks agree beside NCCL: {first_line(error)}") from error


def _settled(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def _told(backend: str, num_bytes: int, seconds: float, wrong: str) -> Finding:
    world = ranks.world_size()
    if wrong:
        remedy = (
            "a GPU, its link or the network damages data: try with fewer ranks, look at dmesg (Xid), NCCL_DEBUG=INFO"
        )
        return Finding("all_reduce", RED, f"{backend}: the sum is wrong: {wrong}", remedy)
    if world == 1:
        return Finding("all_reduce", OK, f"{backend}: the sum is right; one rank, so no traffic")
    bus = num_bytes / seconds * 2 * (world - 1) / world / 1e9
    told = (
        f"{backend}, {world} ranks, {num_bytes >> 20} MiB in {1000 * seconds:.1f} ms: "
        f"{num_bytes / seconds / 1e9:.2f} GB/s, bus {bus:.2f} GB/s (x 2 (n - 1) / n, as nccl-tests); the sum is right"
    )
    if backend == "nccl" and (remedy := _faster(bus, in_node=ranks.ranks_here() == world)):
        return Finding("all_reduce", WARN, told, remedy, value=bus)
    return Finding("all_reduce", OK, told, value=bus)


def _faster(bus_gb_s: float, *, in_node: bool) -> str:
    """Returns what to check when the bandwidth between GPUs is so low; "" where it is high enough."""
    if not in_node and bus_gb_s < SLOW_BETWEEN_NODES_GB_S:
        return (
            "NCCL_DEBUG=INFO shows the way it takes: NET/IB over all cards, not NET/Socket; NCCL_SOCKET_IFNAME, "
            "NCCL_IB_HCA"
        )
    if in_node and bus_gb_s < SLOW_IN_NODE_GB_S and known_gpu(torch.cuda.get_device_name()):
        return (
            "slower than NVLink, if these GPUs have it (nvidia-smi topo -m): each task has to see all GPUs of its node "
            "(--gpus-per-node, not --gpus-per-task)"
        )
    return ""
