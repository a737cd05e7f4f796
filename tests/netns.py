"""Machines of a small network on this one: network, host name, processes and mounts of their own, one wire between.

No packet, process or signal leaves them: `pkill` by name, as DeepSpeed's launcher does, finds only what runs there.
"""

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

NODES = ("n1", "n2")
PROGRAMS = ("unshare", "nsenter", "ip")
_NEW = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
_BEGIN = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf  # nobody is asked for names
ip link set lo up
touch "$3"
exec sleep infinity
"""

_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GLOO_SOCKET_IFNAME")


class Node:
    """A machine of the network."""

    def __init__(self, name: str, inside: int, folder: Path) -> None:
        self.name, self.inside, self.folder = name, inside, folder
        self.started: list[subprocess.Popen[bytes]] = []

    def command(self, *words: object) -> list[str]:
        """Returns the words that run a command there."""
        enter = ["nsenter", "--target", str(self.inside), "--net", "--uts", "--ipc", "--mount", "--pid"]
        return [*enter, "env", "-C", str(self.folder), *map(str, words)]

    def start(self, *words: object, log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Starts a command there; what it prints goes into a file."""
        with log.open("wb") as file:
            options: Any = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            # What an earlier test has made of this process, a world of one rank on the loopback, is not the node's.
            own = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_RANK)}
            self.started.append(subprocess.Popen(self.command(*words), env=own | variables, **options))
        return self.started[-1]

    def run(self, *words: object, timeout_s: float = 60) -> str:
        """Returns what a command prints there. Fails with it unless it ends well."""
        done = subprocess.run(self.command(*words), capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()


def enter(inside: int) -> None:
    """Gives this process a node's network and host name; its files and its number stay those of this machine."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("net", "uts"):
        with open(f"/proc/{inside}/ns/{kind}", "rb") as space:
            if libc.setns(space.fileno(), 0):  # os.setns is there from Python 3.12 on
                raise OSError(ctypes.get_errno(), f"setns {kind}")


def why_not(*more_programs: str) -> str | None:
    """Why there can be no nodes here: a program is missing, or namespaces may not be made."""
    if absent := [name for name in (*PROGRAMS, *more_programs) if shutil.which(name) is None]:
        return f"not installed: {', '.join(absent)}"
    wire = ["ip", "link", "add", "eth0", "type", "veth"]  # some sandboxes have namespaces and no wires
    if os.geteuid() != 0 or subprocess.run([*_NEW, *wire], capture_output=True).returncode:
        return "namespaces, and wires between them, need root and leave to make them"
    return None


@contextmanager
def two_nodes(folder: Path, *more_programs: str) -> Iterator[tuple[Node, Node]]:
    """Yields n1 (10.77.0.1) and n2 (10.77.0.2), which see this machine's files; all in them ends with the block.

    Skips the test where a program is missing or namespaces cannot be made.
    """
    if reason := why_not(*more_programs):
        pytest.skip(reason)
    folder.mkdir(exist_ok=True)
    lines = ["127.0.0.1 localhost", *(f"10.77.0.{number} {name}" for number, name in enumerate(NODES, 1))]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
    with ExitStack() as stack:
        nodes = [stack.enter_context(_node(folder, name)) for name in NODES]
        # Only its network is entered: process numbers are those of this machine.
        wire = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(nodes[1].inside)]
        subprocess.run(["nsenter", "--target", str(nodes[0].inside), "--net", *wire], check=True)
        for number, node in enumerate(nodes, 1):
            node.run("ip", "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            node.run("ip", "link", "set", "eth0", "up")
        yield nodes[0], nodes[1]


@contextmanager
def _node(folder: Path, name: str) -> Iterator[Node]:
    ready = folder / f"{name}.ready"
    words = [*_NEW, "bash", "-c", _BEGIN, "bash", name, str(folder), str(ready)]
    holder = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    node = None
    try:
        until = time.monotonic() + 60
        while not ready.exists():
            assert holder.poll() is None and time.monotonic() < until, f"{name} does not come up"
            time.sleep(0.02)
        inside = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()[0])
        node = Node(name, inside, folder)
        yield node
    finally:
        holder.kill()  # with it its child, and with that, the first process there, all others
        holder.wait()
        for process in node.started if node else []:
            process.kill()
            process.wait()


_SSH = """
Host *
    IdentityFile {folder}/key
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking no
    LogLevel ERROR
"""
_SSHD = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
"""
_SERVE = """
mkdir -p "$1" && mount --bind "$1" /etc/ssh
if [ -d ~/.ssh ]; then mount -t tmpfs tmpfs ~/.ssh; fi
mount -t tmpfs tmpfs /run && mkdir /run/sshd
exec "$2" -D -e
"""


def serve_ssh(nodes: tuple[Node, ...], folder: Path) -> None:
    """Starts a real sshd on each node, which lets in who has the key that `ssh` there uses: from n1, say, to n2.

    The files of this machine's ssh are covered, on the nodes, by others; nothing is written into them.
    """
    folder.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    (folder / "ssh_config").write_text(_SSH.format(folder=folder))
    (folder / "sshd_config").write_text(_SSHD.format(folder=folder))
    sshd = shutil.which("sshd") or "/usr/sbin/sshd"
    for node in nodes:
        node.start("bash", "-ec", _SERVE, "bash", folder, sshd, log=folder / f"{node.name}.log")
    until = time.monotonic() + 60
    for node in nodes:
        while True:
            done = subprocess.run(nodes[0].command("ssh", node.name, "hostname"), capture_output=True, text=True)
            if done.stdout.strip() == node.name:
                break
            assert time.monotonic() < until, done.stderr + (folder / f"{node.name}.log").read_text()
            time.sleep(0.1)
