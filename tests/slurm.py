"""A real SLURM cluster of three nodes in namespaces of its own: no packet, process or file leaves.

Its nodes, with two made-up GPUs each, are slurmds of one host name with an address of their own. slurmctld and slurmd
run as root; a requeued job starts again after seconds instead of minutes (cred_expire). Jobs of the partition `urgent`
preempt those of `main`, which is the default.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "unshare", "nsenter", "ip")
CONFIG = """
ClusterName=test
SlurmctldHost=node1
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/d/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
KillWait=5
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=2,bf_interval=2
GresTypes=gpu
NodeName=node1 NodeHostname=node1 NodeAddr=10.77.0.1 Port=17001 CPUs=16 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=node2 NodeHostname=node1 NodeAddr=10.77.0.2 Port=17002 CPUs=16 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=node3 NodeHostname=node1 NodeAddr=10.77.0.3 Port=17003 CPUs=16 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=node[1-3] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node[1-3] MaxTime=INFINITE State=UP PriorityTier=10
"""
NAMESPACES = """
set -e
hostname node1
mount --bind "$1" /etc/hosts
ip link set lo up
ip address add 10.77.0.1/32 dev lo  # getaddrinfo's AI_ADDRCONFIG wants one that is not 127.0.0.1
ip address add 10.77.0.2/32 dev lo
ip address add 10.77.0.3/32 dev lo
"""
START = """
cd "$(dirname "$1")"
slurmctld -D -c > slurmctld.out 2>&1 &
slurmd -D -N node1 > slurmd1.out 2>&1 &
slurmd -D -N node2 > slurmd2.out 2>&1 &
slurmd -D -N node3 > slurmd3.out 2>&1 &
wait
"""


@contextmanager
def cluster(folder: Path) -> Iterator[Callable[..., str]]:
    """Yields `run`: it runs a command beside the cluster and returns what it printed, or fails with that.

    Skips the test where SLURM is not installed or namespaces cannot be made.
    """
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(absent)}")
    namespaces = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    probe = [*namespaces, "bash", "-c", NAMESPACES, "bash", "/etc/hosts"]
    if os.geteuid() != 0 or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("namespaces need root, and leave to make them")
    for name in (
        "state",
        "d/node1",
        "d/node2",
        "d/node3",
    ):  # short: sockets lie in d, and their paths have at most 107 characters
        (folder / name).mkdir(parents=True)
    (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n10.77.0.3 node3\n")
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    binaries = Path(sys.executable).parent  # `python` of a job is this one
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{binaries}:{os.environ['PATH']}"}
    words = [*namespaces, "bash", "-c", NAMESPACES + START, "bash", str(folder / "hosts")]
    process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL)
    try:
        inside = _child(process.pid)

        def run(*words: object, cwd: Path | None = None, **variables: str) -> str:
            enter = ["nsenter", "--target", str(inside), "--net", "--uts", "--ipc", "--mount", "--pid"]
            there = ["env", "-C", str(cwd or folder)]
            command, options = [*enter, *there, *map(str, words)], {"env": environment | variables, "timeout": 60}
            done = subprocess.run(command, capture_output=True, text=True, **options)
            assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
            return done.stdout.strip()

        for _ in range(200):
            try:
                if run("sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D") == "3":
                    break
            except (AssertionError, subprocess.TimeoutExpired):
                time.sleep(0.1)
        else:
            pytest.fail("".join(path.read_text() for path in sorted(folder.glob("*.out"))))
        yield run
    finally:
        process.kill()
        process.wait()


def _child(pid: int) -> int:
    """Returns the process that unshare has started inside."""
    for _ in range(200):
        if found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            return int(found[0])
        time.sleep(0.02)
    raise AssertionError("unshare has started nothing")


def wait_for(condition: Callable[[], bool], run: Callable[..., str], seconds: float = 120) -> None:
    """Returns when the condition holds. Fails, with the queue, when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(run("squeue", "--all", "--states=all"))
        time.sleep(0.2)


def processes(*, environment: str = "", command: str = "") -> list[int]:
    """Returns the processes with this NAME=VALUE in their environment and this word in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables, words = ((path / name).read_bytes().split(b"\0") for name in ("environ", "cmdline"))
            if (not environment or environment.encode() in variables) and any(command.encode() in w for w in words):
                found.append(int(path.name))
    return found


def power_off(node: str, folder: Path) -> None:
    """Ends a node's slurmd and all that it has started, at once and without a word. folder: the cluster's."""
    own = f"SLURM_CONF={folder / 'slurm.conf'}"
    daemons = [pid for pid in processes(environment=own, command=node) if "slurmd" in _name(pid)]
    tasks = set(processes(environment=own)) & set(processes(environment=f"SLURMD_NODENAME={node}"))
    steps = {parent for pid in tasks if "slurmstepd" in _name(parent := _parent(pid))}
    assert len(daemons) == 1 and tasks and steps, (node, daemons, tasks, steps)
    for pid in (*daemons, *steps, *tasks):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
