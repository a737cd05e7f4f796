"""Draws the curves of runs and writes their figures as one page, as Markdown and as JSON.

python tools/report.py RUN [RUN ...] [--out DIR]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.errors import UserError
from pretrain.report.places import check_any


def main() -> None:
    parser = cli.parser(
        "Writes report.html (one file, several runs overlaid: results beside the paper's, curves, losses, pictures,\n"
        "configs), and its numbers as report.md with curves.png and as report.json. Also of runs that still train.\n"
        "Of one folder that tools/finetune.py --train has written: the page of that, as it makes it itself.",
        "python tools/report.py runs/NAME runs/OTHER --out report",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: report in the first RUN)")
    arguments = parser.parse_args()
    for run in arguments.runs:
        cli.check_found(run, "the folder of a run, such as runs/NAME")
        check_any(run)
    with cli.loading():
        from pretrain.report.own_page import is_own, write_page
        from pretrain.report.page import write_report
        from pretrain.report.runs import read_runs

    if own := [run for run in arguments.runs if is_own(run)]:
        if len(arguments.runs) > 1:
            raise UserError(
                f"{own[0]}: tools/finetune.py --train has written it, and it has a page of its own; give it alone"
            )
        return cli.tell(write_page(own[0], arguments.out))
    out = arguments.out or arguments.runs[0] / "report"
    for path in write_report(read_runs(arguments.runs), out):
        cli.tell(path)
    cli.tell_next(f"open {out / 'report.html'} in a browser")


if __name__ == "__main__":
    cli.run(main)
