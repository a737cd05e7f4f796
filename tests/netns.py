"""Machines of a small network on this one: network, host name, processes and mounts of their own, one wire between.

No packet, process or signal leaves them: `pkill` by name, as DeepSpeed's launcher does, finds only what runs there.
"""

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


class Node:
    """A machine of the network."""

    def __init__(self, name: str, inside: int, folder: Path) -> None:
        self.name, self.inside, self.folder = name, inside, folder

    def command(self, *words: object) -> list[str]:
        """Returns the words that run a command there."""
        enter = ["nsenter", "--target", str(self.inside), "--net", "--uts", "--ipc", "--mount", "--pid"]
        return [*enter, "env", "-C", str(self.folder), *map(str, words)]

    def start(self, *words: object, log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Starts a command there; what it prints goes into a file."""
        with log.open("wb") as file:
            options: Any = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            return subprocess.Popen(self.command(*words), env=os.environ | variables, **options)

    def run(self, *words: object, timeout_s: float = 60) -> str:
        """Returns what a command prints there. Fails with it unless it ends well."""
        done = subprocess.run(self.command(*words), capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()


@contextmanager
def two_nodes(folder: Path, *more_programs: str) -> Iterator[tuple[Node, Node]]:
    """Yields n1 (10.77.0.1) and n2 (10.77.0.2), which see this machine's files; all in them ends with the block.

    Skips the test where a program is missing or namespaces cannot be made.
    """
    if absent := [name for name in (*PROGRAMS, *more_programs) if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(absent)}")
    if os.geteuid() != 0 or subprocess.run([*_NEW, "true"], capture_output=True).returncode:
        pytest.skip("namespaces need root, and leave to make them")
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
    try:
        until = time.monotonic() + 60
        while not ready.exists():
            assert holder.poll() is None and time.monotonic() < until, f"{name} does not come up"
            time.sleep(0.02)
        inside = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()[0])
        yield Node(name, inside, folder)
    finally:
        holder.kill()  # with it its child, and with that, the first process there, all others
        holder.wait()
