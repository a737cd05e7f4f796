"""Reads damaged and hostile files by the thousand and reports whatever is neither used nor refused in one line.

python tests/fuzz/run.py --seconds 600                        all targets, the time shared among them
python tests/fuzz/run.py --inputs 5000 --targets npz tar      some of them
python tests/fuzz/run.py --replay FOUND/npz-TypeError.bin --targets npz
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT / "tests")  # instead of this folder, whose files are modules of `fuzz`
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch: a forked worker must not wait for threads that are gone

MAX_SHRUNK = 20  # findings of one target whose input is made smaller


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", metavar="NAME", help="of the table in targets.py (default: all)")
    parser.add_argument("--seconds", type=float, default=1e9, help="of wall time for all targets together")
    parser.add_argument("--inputs", type=int, default=10**9, help="of each target")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other inputs")
    parser.add_argument("--first", type=int, default=0, help="number of the first input: to repeat a finding")
    parser.add_argument("--quick", action="store_true", help="without slow inputs, nothing made smaller")
    parser.add_argument("--shrink-seconds", type=float, default=20, help="to make one finding's input smaller")
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="folder for inputs of findings")
    parser.add_argument("--replay", type=Path, help="read this one file by the one target")
    arguments = parser.parse_args()
    if arguments.seconds == 1e9 and arguments.inputs == 10**9 and not arguments.replay:
        parser.error("give --seconds or --inputs")

    from fuzz import harness
    from fuzz.targets import TARGETS, broken

    known = {**TARGETS, "broken": broken}  # which tries the harness itself
    names = arguments.targets or list(TARGETS)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no target {', '.join(unknown)}; known are {', '.join(TARGETS)}")
    reports = []
    print("| target | inputs | used | refused | faults | slowest | most memory | inputs/s |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    for name in names:
        with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as folder:
            target = known[name](Path(folder))
            if arguments.replay:
                print(harness.verdict(target, arguments.replay.read_bytes()))
                continue
            limits = {"seed": arguments.seed, "first": arguments.first, "quick": arguments.quick}
            report = harness.fuzz(
                name, target, inputs=arguments.inputs, seconds=arguments.seconds / len(names), **limits
            )
            print(_row(report), flush=True)
            for finding in list(report.findings.values())[:MAX_SHRUNK]:
                finding.data = target.input(name, arguments.seed, finding.number, arguments.quick)
                if not arguments.quick:
                    finding.data = harness.smallest(target, finding, finding.data, arguments.shrink_seconds)
            reports.append(report)
    return _tell_findings(reports, arguments.found)


def _row(report) -> str:
    faults, used = report.outcomes["FAULT"], report.outcomes["accepted"]
    cells = [report.name, report.inputs, used, report.inputs - used - faults, faults]
    cells += [f"{report.slowest_s:.2f} s", f"{report.most_bytes >> 20} MB", f"{report.inputs / report.seconds:.0f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def _brief(data: bytes) -> str:
    """The beginning of an input, without its zeros."""
    return repr(re.sub(rb"\0{4,}", b"...", data[:600])[:160])


def _tell_findings(reports, folder: Path) -> int:
    """Prints what was found and saves its inputs; returns the exit code."""
    for report in reports:
        for number, finding in enumerate(report.findings.values()):
            times = f"{finding.count} times, first input {finding.number}"
            print(f"\n{report.name}: {finding.kind} at {finding.place}, {times}")
            print("    " + finding.text.strip().replace("\n", "\n    "))
            if number < MAX_SHRUNK:
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"{report.name}-{number:02d}-{finding.kind.replace(' ', '-')}.bin"
                path.write_bytes(finding.data)
                print(f"    {path}: {len(finding.data)} bytes: {_brief(finding.data)}")
    return int(any(report.findings for report in reports))


if __name__ == "__main__":
    sys.exit(main())
