"""Whether all ranks train the same: each reads the config, its packages and the code from what its own node sees."""

import hashlib
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.cluster import agreement, ranks
from pretrain.config import Config, config_to_dict
from pretrain.config.reading import flatten
from pretrain.errors import UserError
from pretrain.provenance import UNKNOWN, versions

# What a node may have otherwise: where it keeps remote blocks, and how many processes it has to prepare batches.
_OF_A_NODE = ("data.store", "data.store_gb", "data.workers", "data.prefetch")
_TOLD = 3  # differences that the message names


def refuse_other_ranks(config: Config) -> None:
    """Raises UserError, on all ranks, naming the first that differs from rank 0 in settings, packages or code.

    As when the config is edited while a job's ranks start, or a node has an old image. Otherwise ranks with other seeds
    would train to the end, on other samples than recorded; with other steps they would wait for each other in vain.
    """
    if ranks.world_size() == 1:
        return
    own = _own(config)
    of_main: dict[str, Any] = agreement.from_main(lambda: own)
    agreement.raise_together(_other(own, of_main))


def _own(config: Config) -> dict[str, Any]:
    """The settings of this rank; on the first rank of each node, which reads for all there, packages and code too."""
    of_config = {key: value for key, value in flatten(config_to_dict(config)) if key not in _OF_A_NODE}
    if ranks.local_rank():
        return of_config
    packages = {f"version of {name}": version for name, version in versions().items() if version != UNKNOWN}
    with suppress(OSError):  # it is imported already
        packages["SHA-256 of pretrain/"] = _sha256_of_code()
    return of_config | packages


def _sha256_of_code() -> str:
    """Of all Python files of the package, with their names."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _other(own: dict[str, Any], of_main: dict[str, Any]) -> UserError | None:
    keys = [key for key in own if key in of_main and own[key] != of_main[key]]
    if not keys:
        return None
    told = [f"{key} is {own[key]}, {of_main[key]} on rank 0" for key in keys[:_TOLD]]
    more = f" and {len(keys) - _TOLD} more" if len(keys) > _TOLD else ""
    return UserError(
        f"rank {ranks.rank()} on {socket.gethostname()} has other settings or code than rank 0: {'; '.join(told)}{more}"
        "; give all nodes the same files, and change none while a run starts"
    )
