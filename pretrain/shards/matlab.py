"""Reads Matlab files of version 5 (arrays and records of numbers and text) in a process of its own.

scipy's reader is compiled code that a damaged file can crash: one flipped byte was enough. It must not take us with it.
"""

import json
import subprocess
import sys
from typing import Any

_TIMEOUT_S = 120
_MAX_MEMORY_BYTES = 4 << 30  # of address space: a damaged size must not fill the machine


def read_matlab(data: bytes) -> dict[str, list[Any]]:
    """Returns a file's arrays by name, flattened; a record becomes a dictionary of its fields.

    Raises ValueError when it cannot be read.
    """
    # -P: this file's folder is not searched for modules.
    command = [sys.executable, "-P", "-W", "ignore", __file__]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"reading it took more than {_TIMEOUT_S} s") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines() or [""]
        raise ValueError(lines[-1] if done.returncode > 0 else f"the reader crashed, signal {-done.returncode}")
    return json.loads(done.stdout)


def _main() -> None:
    import io
    import resource

    from scipy.io import loadmat

    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    arrays = loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True)
    values = {name: _plain(array) for name, array in arrays.items() if not name.startswith("__")}
    print(json.dumps(values, default=str))  # what is neither number nor text is not needed


def _plain(array: Any) -> list[Any]:
    import numpy as np

    flat = np.asarray(array).ravel()
    if flat.dtype.names is None:
        return flat.tolist()
    return [dict(zip(flat.dtype.names, row.item())) for row in flat]


if __name__ == "__main__":
    _main()
