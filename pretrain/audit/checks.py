"""The checks of an audit, in the order of the table, and their verdict."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pretrain.audit import data, records, samples
from pretrain.audit.folder import LeftOut, Options, Run
from pretrain.audit.records import Outcome
from pretrain.errors import UserError

CHECKS: dict[str, Callable[[Run], Outcome | list[Outcome]]] = {
    "starts": records.check_starts,
    "history": records.check_history,
    "files": records.check_files,
    "config": records.check_config,
    "receipts": records.check_receipts,
    "DONE": records.check_done,
    "counts": records.check_counts,
    "curves": records.check_metrics,
    "scores": records.check_scores,
    "skipped steps": samples.check_skipped,
    "listed samples": samples.check_listed,
    "every epoch": samples.check_every_epoch,
    "epochs": samples.check_epochs,
    "sample logs": samples.check_sample_logs,
    "manifest": data.check_manifest,
    "classes": data.check_classes,
    "shards": data.check_shard_bytes,
    "listed again": data.check_listed_again,
    "steps again": data.check_steps_again,
}


class Finding(NamedTuple):
    """A row of the table."""

    check: str
    compared: str
    count: int | None
    left_out: str  # "" when everything was checked
    wrong: str  # "" when nothing is wrong


def audit(folder: Path, options: Options) -> list[Finding]:
    """Runs all checks on a run's folder, without writing. A failed check is shown by its docstring's first line.

    Raises UserError when it is not a run's folder, StorageError or OSError when the disk cannot be read for now.
    """
    run, found = Run(folder, options), []
    for name, check in CHECKS.items():
        try:
            outcomes = check(run)
        except LeftOut as reason:
            found.append(Finding(name, "", None, str(reason), ""))
        except UserError as error:
            compared = (check.__doc__ or "").partition("\n")[0].rstrip(".")
            found.append(Finding(name, compared, None, "", str(error)))
        else:
            for outcome in outcomes if isinstance(outcomes, list) else [outcomes]:
                found.append(Finding(name, *outcome, ""))
    return found
