"""Reads Matlab files of version 5 (arrays and records of numbers and text) in a separate process.

scipy's reader is compiled code that a damaged file can crash: one flipped byte was enough.
"""

import json
import subprocess
import sys
from typing import Any

MAX_MATLAB_BYTES = 64 << 20  # of a file; ImageNet's meta.mat has 1 MB
_TIMEOUT_S = 120
_MAX_MEMORY_BYTES = 4 << 30  # of address space: a damaged size must not fill the machine
_MAX_VALUES = 1 << 20  # of a file; imagelabels.mat has 8189
_MAX_OUTPUT_BYTES = 64 << 20


def read_matlab(data: bytes) -> dict[str, list[Any]]:
    """Returns a file's arrays by name, flattened; a record becomes a dictionary of its fields.

    Raises ValueError when it cannot be read.
    """
    from pretrain.json_files import parse_json  # not above: the process below may not find the package `pretrain`

    # -P: this file's folder is not searched for modules.
    command = [sys.executable, "-P", "-W", "ignore", __file__]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"reading it took more than {_TIMEOUT_S} s") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines() or [""]
        raise ValueError(lines[-1][:200] if done.returncode > 0 else f"the reader crashed, signal {-done.returncode}")
    if len(done.stdout) > _MAX_OUTPUT_BYTES:
        raise ValueError(f"more than {_MAX_OUTPUT_BYTES} bytes as text")
    return parse_json(done.stdout, "its arrays")


def whole(value: object) -> int:
    """Returns a number of a Matlab file, where most are floating point, as an integer. Raises ValueError."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -(10**9) <= value <= 10**9:
        raise ValueError(f"{value!r:.40} is not a whole number")
    if value != int(value):
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)


def _main() -> None:
    import io
    import resource

    from scipy.io import loadmat

    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    arrays = loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True)
    arrays = {name: array for name, array in arrays.items() if not name.startswith("__")}
    if sum(getattr(array, "size", 1) for array in arrays.values()) > _MAX_VALUES:
        raise ValueError(f"more than {_MAX_VALUES} values")
    values = {name: _plain(array) for name, array in arrays.items()}
    print(json.dumps(values, default=str))  # what is neither number nor text is not needed


def _plain(array: Any) -> list[Any]:
    import numpy as np

    flat = np.asarray(array).ravel()
    if flat.dtype.names is None:
        return flat.tolist()
    return [dict(zip(flat.dtype.names, row.item())) for row in flat]


if __name__ == "__main__":
    _main()
