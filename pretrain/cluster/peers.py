"""The other nodes of a run: which of them do not answer when a collective does not return.

Each rank listens on a port of its own: the system answers for it as long as node, network and process are there, even
if the process is stopped. gloo and NCCL report that they waited, but not for whom. Imports no torch.
"""

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from typing import Any, NamedTuple

ANSWER_S = 1.5  # a node answers within milliseconds; where its queue is full, the system asks again after a second
_BACKLOG = 4096  # ranks that ask at the same time; Linux before 5.4 cuts it to 128


class _Node(NamedTuple):
    host: str
    address: str
    port: int
    first_rank: int
    last_rank: int


_others: list[_Node] = []  # set by `meet`
_listener: socket.socket | None = None


def meet(gather: Callable[[Any], list[Any]]) -> None:
    """Exchanges addresses with the other ranks. Called by all ranks.

    gather: agreement.gather, which this module does not import because it imports torch.
    """
    global _listener, _others
    leave()
    own = None
    with suppress(OSError, ValueError):
        _listener = _listening()
        threading.Thread(target=_take_away, args=(_listener,), name="peers", daemon=True).start()
        own = (socket.gethostname(), *_listener.getsockname()[:2])
    nodes: dict[str, _Node] = {}
    for rank, place in enumerate(gather(own)):
        # A node with a loopback address cannot be asked there: this node would answer.
        if place is not None and own is not None and place[1] != own[1] and not ip_address(place[1]).is_loopback:
            first = nodes.get(place[1], _Node(place[0], place[1], place[2], rank, rank))
            nodes[place[1]] = first._replace(last_rank=rank)
    _others = list(nodes.values())


def leave() -> None:
    """Stops answering."""
    global _listener, _others
    _others = []
    if _listener is not None:
        with suppress(OSError):
            _listener.shutdown(socket.SHUT_RDWR)  # closing alone does not wake a thread in accept
        _listener.close()
        _listener = None


def _listening() -> socket.socket:
    """Returns a listening socket at the address by which this node reaches rank 0's."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing
        address = probe.getsockname()[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(_BACKLOG)
    return listener


def _take_away(listener: socket.socket) -> None:
    """Accepts and closes connections: otherwise the queue would fill up when every rank of a large run asks."""
    with suppress(OSError):  # it was closed, or no file is left to open
        while True:
            listener.accept()[0].close()


def silent(seconds: float = ANSWER_S) -> list[str]:
    """Returns the other nodes, with their ranks, that do not answer within `seconds` or whose first rank is gone."""
    asked: dict[int, tuple[_Node, socket.socket]] = {}
    found: dict[_Node, str] = {}
    waiting, until = select.poll(), time.monotonic() + seconds
    for node in _others:
        question = socket.socket(socket.AF_INET6 if ":" in node.address else socket.AF_INET, socket.SOCK_STREAM)
        question.setblocking(False)
        asked[question.fileno()] = node, question
        state = question.connect_ex((node.address, node.port))
        if state in (0, errno.EINPROGRESS):
            waiting.register(question, select.POLLOUT)
            found[node] = "does not answer"
        else:
            found[node] = "cannot be reached"
    try:
        while any(told == "does not answer" for told in found.values()) and (left := until - time.monotonic()) > 0:
            for number, _ in waiting.poll(1000 * left):
                node, question = asked[number]
                waiting.unregister(number)
                state = question.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                found[node] = {0: "", errno.ECONNREFUSED: "is there, its first rank is gone"}.get(
                    state, "cannot be reached"
                )
    finally:
        for _, question in asked.values():
            question.close()
    return [f"{_named(node)} {told}" for node, told in found.items() if told]


def _named(node: _Node) -> str:
    if node.first_rank == node.last_rank:
        return f"{node.host} (rank {node.first_rank})"
    return f"{node.host} (ranks {node.first_rank} to {node.last_rank})"
