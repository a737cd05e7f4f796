"""Audits a run: adds up from its folder which samples it has seen, and refuses one that does not add up.

python tools/audit.py RUN [--full] [--data DIR | --no-data] [--seed N]
"""

import secrets
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.audit.checks import Finding, audit
from pretrain.audit.folder import Options


def main() -> int:
    parser = cli.parser(
        "Adds up every epoch of a run from its order, and compares what its folder says of samples: starts, receipts\n"
        "in checkpoints, curves, bad samples, sample logs, and the data set itself. Reads only, also of a run that\n"
        "still trains. The exit code is 0 when it adds up, 2 when it does not; the first lie is told.",
        "python tools/audit.py runs/NAME",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--full", action="store_true", help="every step, sample and byte, not a choice of them")
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--data", type=Path, metavar="DIR", help="where the data set lies (default: as config.yaml says)"
    )
    place.add_argument("--no-data", action="store_true", help="leave out the checks that read the data set")
    parser.add_argument("--seed", type=int, metavar="N", help="of the choice (default: another one each time)")
    arguments = parser.parse_args()

    if arguments.data is not None:
        cli.check_found(arguments.data, "the data set's folder or manifest")
    cli.check_least(arguments, seed=0)
    seed = secrets.randbelow(1 << 32) if arguments.seed is None else arguments.seed
    found = audit(arguments.run, Options(arguments.full, arguments.data, arguments.no_data, seed))
    rows = [(f.check, f.compared, "" if f.count is None else f"{f.count:,}", _result(f)) for f in found]
    title = f"{arguments.run}: audit, choice by --seed {seed}"
    cli.print_table(title, ("check", "compared", "number", "result"), rows, text_columns=(0, 1, 3))
    if wrong := [finding for finding in found if finding.wrong]:
        cli.tell(f"error: {wrong[0].wrong}", sys.stderr)
        if len(wrong) > 1:
            cli.tell(f"error: {len(wrong)} of {len(found)} checks found something, the first is told", sys.stderr)
        return 2
    left = sum(bool(finding.left_out) for finding in found)
    cli.tell(
        f"{arguments.run}: adds up" + (f"; not all was checked: {left} rows of the table say what not" if left else "")
    )
    return 0


def _result(finding: Finding) -> str:
    if finding.wrong:
        return "WRONG"
    if finding.count is None:
        return f"not checked: {finding.left_out}"
    return "agrees" + (f"; not checked: {finding.left_out}" if finding.left_out else "")


if __name__ == "__main__":
    cli.run(main)
