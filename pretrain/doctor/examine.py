"""The examination: which ranks take part, what each finds, their clocks, the network; then one table."""

import signal
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from pretrain import cli
from pretrain.checkpoint.layout import MAX_RANKS
from pretrain.cluster import ranks
from pretrain.config import Config
from pretrain.data.loader import room_needed
from pretrain.data.manifest import load_manifest
from pretrain.doctor import disks, machine
from pretrain.doctor.findings import AWAY, RED, Finding, as_json, from_json, lines, merged
from pretrain.doctor.meeting import Meeting, all_reduce, answer_clock, ask_clock, within
from pretrain.errors import StorageError, UserError, first_line
from pretrain.json_files import Fields

MARGIN_S = 5.0  # how late a rank's answer may be after its own time limit
_LOOK = "look at that node: is it up, is the network between, does the process stand still?"
_NETWORK = "a firewall, or the wrong interface: GLOO_SOCKET_IFNAME=, NCCL_SOCKET_IFNAME=; NCCL_DEBUG=INFO tells more"
Check = tuple[str, Callable[[], Iterator[Finding]]]


def examine(config: Config | None, wait_s: float) -> int:
    """Examines this machine, or all that the launcher has started ranks on, and prints the table on rank 0.

    config: of the run whose disks and needs are checked too. wait_s: a rank or a check that does not answer in this
    time is named, and the rest reported. Returns the exit code: 0, 2 when something is red, 75 when only storage is
    away. Raises UserError on a rank that cannot reach rank 0.
    """
    ranks.complete_environment()
    meeting = Meeting(wait_s)
    meeting.tell(f"here/{ranks.rank()}", {"host": socket.gethostname(), "cores": ranks.own_cores()})
    code = _lead(config, meeting) if ranks.is_main() else _follow(config, meeting)
    if code == 0:  # otherwise a collective may hang, and this call with it
        ranks.stop()
    return code


def _lead(config: Config | None, meeting: Meeting) -> int:
    made: list[disks.Probe] = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the default would leave the probe behind
    try:
        return _round(config, meeting, made)
    finally:
        for probe in made:
            probe.remove()
        signal.signal(signal.SIGTERM, before)


def _round(config: Config | None, meeting: Meeting, made: list[disks.Probe]) -> int:
    """Leads the other ranks through the examination. made: receives the probe, which the caller removes."""
    everyone = range(ranks.world_size())
    here = meeting.collect("here", everyone, meeting.wait_s)
    hosts = {rank: fields.text("host") for rank, fields in here.items()}
    leaders = list({host: rank for rank, host in reversed(hosts.items())}.values())  # the first rank of each node
    met: list[Finding] = []
    if config is not None:
        met += _carried_out([("run's folder", partial(_make_probe, config, made))], meeting.wait_s)
    shares = ranks.cores_of_ranks((hosts[rank], fields.texts("cores")) for rank, fields in here.items())
    cores = dict(zip(here, shares))
    probe = {"path": str(made[0].path), "token": made[0].token, "locks": not made[0].no_locks} if made else {}
    meeting.tell("plan", {"leaders": leaders, "num_hosts": len(leaders), "cores": cores, **probe})
    checks = _checks(config, len(leaders), cores[0], is_leader=True)
    if made:
        checks.append(("locks", partial(disks.check_own_probe, made[0])))
    if config is not None:
        checks.append(("room on disk", partial(_free_disk, config)))
    found = {0: met + _carried_out(checks, meeting.wait_s)}
    heard = meeting.collect("found", (rank for rank in hosts if rank), meeting.wait_s + MARGIN_S)
    found |= {rank: from_json(fields.parts("findings")) for rank, fields in heard.items()}
    for rank in leaders:
        if rank and rank in found and (clock := ask_clock(meeting, rank)):
            found[rank].append(clock)
    found |= _network(meeting, found, len(found) == len(everyone))
    silent = [rank for rank in everyone if rank not in found]
    found[0] = [*_silence(silent, hosts, meeting.wait_s), *found[0]]
    return _end(meeting, found, hosts, len(everyone))


def _network(meeting: Meeting, found: dict[int, list[Finding]], complete: bool) -> dict[int, list[Finding]]:
    """Adds an all_reduce to what ranks have found, if every rank takes part."""
    meeting.tell("go", {"complete": complete})
    if not complete:
        return {0: [*found[0], Finding("all_reduce", RED, "not tried, as ranks are missing", "start all of them")]}
    mine = _reduced(meeting)
    told = meeting.collect("sum", (rank for rank in found if rank), MARGIN_S)
    heard = {rank: fields.part("sum") for rank, fields in told.items()}
    silent = [rank for rank in found if rank and rank not in heard]
    others = {rank: [*found[rank], *from_json([fields])] for rank, fields in heard.items()}
    late = [Finding("silent", RED, f"rank {rank} did not come back from the all_reduce", _LOOK) for rank in silent]
    return others | {0: [*late, *found[0], mine]}


def _silence(silent: list[int], hosts: dict[int, str], wait_s: float) -> Iterator[Finding]:
    for rank in silent:
        where = f" on {hosts[rank]} did not end its checks" if rank in hosts else " did not come"
        yield Finding("silent", RED, f"rank {rank}{where} within {wait_s:g} s", _LOOK)


def _end(meeting: Meeting, found: dict[int, list[Finding]], hosts: dict[int, str], world: int) -> int:
    rows = merged(found, hosts)
    nodes = list(dict.fromkeys(hosts.values()))
    names = ", ".join(nodes[:4]) + (f" and {len(nodes) - 4:,} more" if len(nodes) > 4 else "")
    cli.tell(f"doctor: {world} rank{'s' * (world > 1)} on {len(nodes)} node{'s' * (len(nodes) > 1)} ({names})")
    for line in lines(rows):
        cli.tell(line)
    red, away = (sum(row.state == state for row in rows) for state in (RED, AWAY))
    code = UserError.exit_code if red else StorageError.exit_code if away else 0
    cli.tell(f"{red + away} of {len(rows)} checks say that the run would fail" if code else "nothing is red")
    sys.stdout.flush()
    meeting.tell("end", {"code": code})
    meeting.collect("bye", (rank for rank in found if rank), MARGIN_S)  # the store ends with this process
    return code


def _follow(config: Config | None, meeting: Meeting) -> int:
    plan = _heard(meeting, "plan")
    leaders = plan.values.get("leaders")
    is_leader = isinstance(leaders, list) and ranks.rank() in leaders
    cores = plan.part("cores").integer(str(ranks.rank()), 1, 1 << 20, len(ranks.own_cores()))  # absent: it came late
    checks = _checks(config, plan.integer("num_hosts", 1, MAX_RANKS), cores, is_leader=is_leader)
    if is_leader and (path := plan.text("path", "")):
        token, locks = plan.text("token"), plan.flag("locks")
        checks.append(("shared disk", partial(disks.check_seen_probe, Path(path), token, locks)))
    meeting.tell(f"found/{ranks.rank()}", {"findings": as_json(_carried_out(checks, meeting.wait_s))})
    if is_leader:
        answer_clock(meeting)
    if _heard(meeting, "go").flag("complete"):
        meeting.tell(f"sum/{ranks.rank()}", {"sum": as_json([_reduced(meeting)])[0]})
    code = _heard(meeting, "end").integer("code", 0, 255)
    meeting.tell(f"bye/{ranks.rank()}", {})
    return code


def _heard(meeting: Meeting, key: str) -> Fields:
    if (told := meeting.hear(key, meeting.patience_s)) is None:
        raise UserError(f"rank {ranks.rank()}: rank 0 says nothing for {meeting.patience_s:g} s; {_LOOK}")
    return told


def _reduced(meeting: Meeting) -> Finding:
    """Returns the finding of the all_reduce; this rank does not wait for one that hangs in it."""
    result: list[Finding] = []

    def work() -> None:
        try:
            result.append(all_reduce(meeting))
        except Exception as error:  # torch's own, of many types
            result.append(Finding("all_reduce", RED, first_line(error)[:400], _NETWORK))

    if within(meeting.wait_s, work) and result:
        return result[0]
    return Finding("all_reduce", RED, f"did not end within {meeting.wait_s:g} s", _NETWORK)


def _make_probe(config: Config, made: list[disks.Probe]) -> Iterator[Finding]:
    run = config.output / config.name
    try:
        made.append(disks.Probe(run, uuid.uuid4().hex))
    except OSError as error:
        yield disks.told_of(error, "run's folder", "make room, or give another output=")


def _checks(config: Config | None, num_hosts: int, cores: int, *, is_leader: bool) -> list[Check]:
    """Returns this rank's checks; disks are checked by one rank per node."""
    room, why, workers = machine.USUAL, "8 loader processes", 8
    checks: list[Check] = [("versions", machine.check_versions), ("GPU", machine.check_gpu)]
    if config is not None:
        slots, workers = -(-config.data.global_batch // ranks.world_size()), config.data.workers
        room = room_needed(slots, config.total_steps, config.model.image_size, config.data)
        why = f"{workers} loader processes"
        checks.append(("precision", partial(machine.check_precision, config)))
    checks += [
        ("limits", partial(machine.check_limits, room, why)),
        ("cores", partial(machine.check_cores, workers, cores)),
        ("own name", partial(machine.check_host_name, num_hosts)),
    ]
    if is_leader:
        wanted = config is not None and config.engine.compile in (True, "max-autotune")
        checks.append(("compiler", partial(machine.check_compiler, wanted)))
    if is_leader and config is not None:
        for key, path in disks.sets_of(config).items():
            checks.append((key, partial(disks.check_set, key, path, config)))
    return checks


def _carried_out(checks: list[Check], seconds: float) -> list[Finding]:
    """Runs checks in turn; one that hangs, as on a dead disk, is named and the rest not waited for."""
    found: list[Finding] = []
    stuck = [name for name, _ in checks[:1]]  # the check in progress; written by the thread below

    def work() -> None:
        for name, check in checks:
            stuck[:] = [name]
            try:
                found.extend(check())
            except (UserError, OSError) as error:
                found.append(disks.told_of(error, name))
            except Exception as error:  # an error on an unusual machine must not hide the other findings
                found.append(Finding(name, RED, f"the check itself failed: {type(error).__name__}: {error}"))
        stuck.clear()

    within(seconds, work)
    late = f"did not end within {seconds:g} s", "a disk or a driver hangs: see dmesg"
    hangs = [Finding(name, RED, *late) for name in stuck]  # before `found` is copied: no check is lost in between
    return [*found, *hangs]


def _free_disk(config: Config) -> Iterator[Finding]:
    num_classes = config.model.num_classes
    if not num_classes:
        with suppress(UserError, OSError):  # the set's own row reports it
            num_classes = max(load_manifest(source.path).num_classes for source in config.data.sources)
    return disks.check_free_disk(config, num_classes)
