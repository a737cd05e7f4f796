"""Starting ranks on this machine."""

import socket


def free_port() -> int:
    """Returns a TCP port that nobody on this machine listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
