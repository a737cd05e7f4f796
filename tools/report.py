"""Draws the curves of runs and writes their figures as Markdown and JSON.

python tools/report.py RUN [RUN ...] [--out DIR]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.report import read_runs, write_report


def main() -> None:
    parser = cli.parser(
        "Writes curves.png (several runs overlaid), report.md and report.json. Also of runs that are still training.",
        "python tools/report.py runs/NAME runs/OTHER --out report",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: report in the first RUN)")
    arguments = parser.parse_args()
    out = arguments.out or arguments.runs[0] / "report"
    for path in write_report(read_runs(arguments.runs), out):
        print(path)


if __name__ == "__main__":
    cli.run(main)
