"""Command lines: what is wrong with the words is told before what takes seconds to import."""

import json
import os
import pty
import re
import resource
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image
from test_report import make_run
from tiny import NUM_CLASSES, make_shards, tiny_config
from weights_on_disk import ROOT, save_run

from pretrain import cli
from pretrain.cluster.jobs import PART_OF, start
from pretrain.evaluation.evaluators import EVALUATORS
from pretrain.evaluation.names import NEEDS
from pretrain.models.convert import TARGETS
from pretrain.models.formats import NPZ_NAMINGS, WRITABLE
from pretrain.models.google import NAMINGS

SLOW, LONG = pytest.mark.slow, pytest.mark.long
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
# Calls of each tool with a path, ABSENT, that is not there; HERE is one that is.
ABSENT, HERE = "absent", "here"
MISSING = {
    "audit": [[ABSENT]],
    "convert": [[ABSENT, "out", "--to", "timm"]],
    "doctor": [["--config", ABSENT]],
    "evaluate": [[ABSENT, "--val", "v"], [HERE, "--val", ABSENT], [HERE, "--fewshot", HERE, ABSENT]],
    "finetune": [[ABSENT, "--task", "pets"], [HERE, "--train", ABSENT], [HERE, "--train", HERE, "--test", ABSENT]],
    "make_shards": [
        [ABSENT, "out"],
        [HERE, "out", "--classes", ABSENT],
        [HERE, "out", "--away-from", ABSENT],
        ["--task", "pets", ABSENT, "out"],
        ["--verify", ABSENT],
    ],
    "plan": [["--config", ABSENT]],
    "predict": [[ABSENT, "x"], [HERE, ABSENT]],
    "pretrain": [["--config", ABSENT]],
    "report": [[ABSENT]],
    "visualize": [[ABSENT], [HERE, "--image", ABSENT]],
}
# Calls with names and folders of which there is nothing to use, and a part of what is told.
QUICK = {
    "evaluate": [
        ([HERE, "--tasks", "petz"], "'petz' is not a task"),
        ([HERE, "--tasks", "pets"], "no data: pets: no test in data/pets"),
        ([HERE, "--tasks", "near:pets"], "neither a task nor fewshot:NAME, knn:NAME or probe:NAME"),
        ([HERE, "--tasks", "knn:mine,pets", "--data", HERE], "none of 2 sets is in "),
    ],
    "finetune": [
        ([HERE, "--task", "petz"], "'petz' is not a task"),
        ([HERE, "--task", "pets"], "no data: pets: no train, test in data/pets"),
        ([HERE, "--task", "pets"], "(--download in place of SOURCE gets it)"),
        ([HERE, "--task", "vtab"], "none of 19 sets is in data"),
    ],
    "make_shards": [
        (["--task", "petz", HERE, "out"], "Did you mean: 'pets'?"),
        (["--index", "gone-{000..127}.tar", "out"], "gone-000.tar: not found; expected shards"),
        (["--index", "{a,b}/x.tar", "out"], "a/x.tar: not found; expected shards"),
    ],
    "report": [([HERE], "nothing to report")],
}
MAX_CPU_S = 0.5  # of any of these, beyond the interpreter's own
INTERPRETER_S = 0.02  # on a machine with nothing else to do; where it takes longer, so may they
IN_TURN = """
import json, os, runpy, sys
os._exit = sys.exit  # with which a command ends
_, tool, calls = sys.argv
for words in json.loads(calls):
    sys.argv = [tool, *words]
    try: runpy.run_path(tool, run_name="__main__")
    except SystemExit as end: print("exit", end.code, flush=True)
print("torch" in sys.modules)
"""


def script(name: str) -> Path:
    return ROOT / ("launch" if name == "pretrain" else "tools") / f"{name}.py"


def wrong_calls(name: str, folder: Path) -> list[list[str]]:
    """--help, an option that there is not, and paths that are not there."""
    (folder / HERE).mkdir(exist_ok=True)
    places = {word: str(folder / word) for word in (ABSENT, HERE)}
    calls = [*MISSING.get(name, ()), *(words for words, _ in QUICK.get(name, ()))]
    return [["--help"], ["--no-such-option"], *([places.get(w, w) for w in words] for words in calls)]


@pytest.mark.parametrize("name", ["pretrain", *TOOLS])
def test_help_and_wrong_words_need_no_torch(name: str, tmp_path: Path) -> None:
    """--help, an option that there is not, a path that is not there: a fraction of a second each, where torch takes
    seconds."""
    calls = wrong_calls(name, tmp_path)
    command = [sys.executable, "-c", IN_TURN, str(script(name)), json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    *ended, imported = [line for line in done.stdout.splitlines() if line.startswith(("exit ", "True", "False"))]
    assert ended == ["exit 0", *["exit 2"] * (len(calls) - 1)] and imported == "False", done.stdout + done.stderr
    assert "usage: " in done.stdout and "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    quick, num_missing = QUICK.get(name, ()), len(MISSING.get(name, ()))
    assert len(told) == num_missing + len(quick), done.stderr
    for line in told[:num_missing]:
        assert str(tmp_path / ABSENT) in line and ("expected " in line or "cannot be read" in line)
    for line, (_, said) in zip(told[num_missing:], quick):
        assert said in line


def test_a_python_without_our_packages_is_one_line() -> None:
    """A newcomer who has not activated .venv; met where a command begins, or in what it imports later."""
    bare = [sys.executable, "-E", "-S"]  # without site-packages
    late = "from pretrain import cli; cli.run(lambda: __import__('torch'))"
    for words in (["launch/pretrain.py"], ["tools/benchmark.py"], ["tools/demo.py"], ["-c", late]):
        done = subprocess.run([*bare, *words], capture_output=True, text=True, cwd=ROOT, check=False)
        told = done.stderr.splitlines()
        assert done.returncode == 2 and len(told) == 1, done.stderr
        assert told[0].endswith("source .venv/bin/activate, or make install first")


@pytest.mark.parametrize("name", ["pretrain.nosuch", "mpi4py", "torch._C"])
def test_another_module_that_is_missing_is_a_defect(name: str) -> None:
    """Ours, what a dependency imports beside, and a part of one: with traceback, before `run` and in it."""
    for how in (f"import {name}", f"cli.run(lambda: __import__({name!r}))"):
        code = f"import sys; from pretrain import cli; sys.modules[{name!r}] = None; {how}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 1 and "Traceback" in done.stderr and "activate" not in done.stderr, done.stderr


def test_the_dependencies_are_known_by_the_names_of_their_imports() -> None:
    """Those of pyproject.toml; and yaml, which omegaconf brings."""
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for line in required:
        files = metadata.distribution(re.split("[>=]", line)[0]).read_text("RECORD") or ""
        assert cli.DEPENDENCIES & set(re.findall(r"^(\w+)/", files, re.MULTILINE)), line
    assert len(cli.DEPENDENCIES) == len(required) + len(["yaml"])


def cpu_seconds(*command: str, cwd: Path) -> float:
    """User and system time of a process, the least of three tries: another program's work is none of it."""
    tries = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, cwd=cwd, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        tries.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(tries)


@pytest.mark.long
def test_help_and_wrong_words_take_half_a_second(tmp_path: Path) -> None:
    """Each command's dearest call, beyond the interpreter itself; `pytest -s` prints the table."""
    bare = cpu_seconds(sys.executable, "-c", "pass", cwd=tmp_path)
    found = {}
    for name in ("pretrain", *TOOLS):
        calls = wrong_calls(name, tmp_path)
        took = [cpu_seconds(sys.executable, str(script(name)), *words, cwd=tmp_path) - bare for words in calls]
        paths = f"{max(took[2:]):8.2f}" if took[2:] else 8 * " "
        print(f"{name:12} --help {took[0]:5.2f}   wrong option {took[1]:5.2f}   missing path {paths}")
        found[name] = max(took)
    assert max(found.values()) <= MAX_CPU_S * max(1, bare / INTERPRETER_S), found


# Ctrl-C, heard at the first import behind the command line's own, or in the moment before a result is published.
INTERRUPTED = """
import os, runpy, signal, sys
_, when, tool, *words = sys.argv
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if when == "import" and sys.excepthook is not sys.__excepthook__: os.kill(os.getpid(), signal.SIGINT)
replace = os.replace
def interrupted(*paths, **options):
    os.kill(os.getpid(), signal.SIGINT)
    return replace(*paths, **options)
if when == "replace": os.replace = interrupted
sys.meta_path.insert(0, Interrupt())
sys.argv = [tool, *words]
runpy.run_path(tool, run_name="__main__")
"""


@pytest.mark.parametrize("name", [n if n in ("plan", "report") else pytest.param(n, marks=LONG) for n in TOOLS])
def test_an_interrupt_of_imports_is_a_word(name: str, tmp_path: Path) -> None:
    """Ctrl-C in the first second, before a command has read its options or while it imports what it needs."""
    (tmp_path / HERE).mkdir()
    words = {"make_shards": [HERE, "out"], "report": [HERE]}.get(name, ["--help"])  # these import nothing before
    command = [sys.executable, "-c", INTERRUPTED, "import", str(script(name)), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == [HERE]


ODD_MOMENTS = """
import atexit, os, signal, sys, threading, time
from pretrain import cli
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
def interrupt_when_waited_for():
    while signal.getsignal(signal.SIGINT) is not cli._interrupted:
        time.sleep(0.01)
    interrupt()
class Odd:
    __del__ = lambda self: interrupt()
def main():
    if sys.argv[1] == "exit handler":
        atexit.register(interrupt)
    elif sys.argv[1] == "thread that is waited for":
        print("done", flush=True)
        return threading.Thread(target=interrupt_when_waited_for).start()
    elif sys.argv[1] == "destructor":
        Odd()
        time.sleep(60)
    elif sys.argv[1] == "import that catches all":
        with cli.loading():
            try: interrupt()
            except BaseException: pass
    print("done")
cli.run(main)
"""


@pytest.mark.parametrize(
    "moment", ["exit handler", "thread that is waited for", "destructor", "import that catches all"]
)
@pytest.mark.parametrize("started_by_another", [False, True])
def test_an_interrupt_is_one_word_at_odd_moments(moment: str, started_by_another: bool) -> None:
    """Where Python itself would print a traceback, go on, or end by the signal; who has started this one says it."""
    environment = {**os.environ, **({PART_OF: "1"} if started_by_another else {})}
    command = [sys.executable, "-c", ODD_MOMENTS, moment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=ROOT, env=environment)
    assert (done.returncode, done.stderr) == (130, "" if started_by_another else "interrupted\n")
    assert done.stdout == ("done\n" if moment in ("exit handler", "thread that is waited for") else "")


RESULTS = {
    "convert": ["runs/tiny", "out", "--to", "timm"],
    "evaluate": ["runs/tiny", "--val", "shards", "--workers", "0", "--out", "out"],
    "make_shards": ["photos", "out", "--workers", "1"],
    "report": ["reported/tiny", "--out", "out"],
    "visualize": ["runs/tiny", "--image", "photos/a/0.png", "--out", "out"],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=LONG if name in ("convert", "evaluate") else SLOW) for name in RESULTS]
)
def test_an_interrupt_leaves_nothing_half_written(name: str, tmp_path: Path) -> None:
    """Ctrl-C when the first result is complete but not yet in its place: one word, and neither it nor a part of it."""
    config = tiny_config(make_shards(tmp_path / "shards", num_samples=20), tmp_path / "runs")
    save_run(config, [f"shade {number}" for number in range(NUM_CLASSES)])
    make_run(tmp_path / "reported")
    for label, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / "photos" / label).mkdir(parents=True)
        Image.new("RGB", (16, 16), colour).save(tmp_path / "photos" / label / "0.png")
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-c", INTERRUPTED, "replace", str(script(name)), *RESULTS[name]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == "interrupted", done.stderr
    assert "Traceback" not in done.stderr
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.is_file()]
    assert not [path for path in left if ".tmp" in path.name or path.stat().st_size], left


def test_formats_are_named_once_for_all() -> None:
    """What a command line offers before torch is imported is what there is."""
    assert WRITABLE == tuple(TARGETS) and set(NPZ_NAMINGS) < NAMINGS.keys()
    assert list(NEEDS) == list(EVALUATORS)


@pytest.mark.parametrize("letters", [5, 60, 200])
def test_tables_fit_80_columns_and_lose_no_digit(letters: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Off a terminal: texts are folded, figures whole; where figures alone need more, the table is wider."""
    name = "".join(chr(ord("a") + place % 26) for place in range(letters))
    figure = "12.34% ± 5.67 of 1,234,567 rows"  # wider than what is left for each text
    header, row = ("name", "a first figure", "second", "what"), (name, figure, "1,234", name)
    cli.print_table("title", header, [row], text_columns=(0, 3))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and any(figure in line and "1,234 " in line for line in lines)
    first = [line.split("│")[1].strip() for line in lines if "│" in line]
    assert "".join(first) == name
    figures = [f"{place}.{place:08d}" for place in range(10, 22)]
    cli.print_table("title", ("name", *figures), [(name, *figures)])
    assert any(all(figure in line for figure in figures) for line in capsys.readouterr().out.splitlines())


def test_the_outermost_command_alone_says_what_is_next(capfd: pytest.CaptureFixture[str]) -> None:
    """A training that a sweep has started has no next command of its own."""
    cli.tell_next("this")
    nested = [sys.executable, "-c", "from pretrain import cli; cli.tell('here'); cli.tell_next('that')"]
    assert start(nested, {**os.environ, "PYTHONPATH": str(ROOT)}) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if not line.startswith("$ ")]
    assert lines == ["next: this", "here"]


def test_a_terminal_hears_that_it_takes_seconds() -> None:
    """Nothing within two seconds, and nothing where nobody watches."""
    program = "import time; from pretrain import cli\nwith cli.loading(): time.sleep(float({}))"
    for seconds, watched in ((0, True), (2.5, True), (2.5, False)):
        command = [sys.executable, "-c", program.format(seconds)]
        if not watched:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT)
            assert done.stderr == "" and done.returncode == 0
            continue
        ours, theirs = pty.openpty()
        process = subprocess.Popen(command, stderr=theirs, cwd=ROOT)
        os.close(theirs)
        said = b""
        try:
            while block := os.read(ours, 1000):
                said += block
        except OSError:  # how Linux says that the other side is closed
            pass
        os.close(ours)
        assert process.wait(timeout=60) == 0 and (b"loading torch" in said) == (seconds > 2), said


COMMAND = """
import sys
from pretrain import cli
from pretrain.errors import StorageError
def main():
    if sys.argv[1] == "fail":
        raise StorageError("the disk is away")
    print("done")
cli.run(main)
"""


@pytest.mark.parametrize(
    ("outputs", "ends", "code"),
    [
        (">&-", "well", 0),
        ("| (exec <&-; sleep 1)", "well", 0),
        (">/dev/full", "well", 75),
        (">&- 2>&-", "fail", 75),
        ("2>&1 | (exec <&-; sleep 1)", "fail", 75),
        ("2>/dev/full", "fail", 75),
    ],
)
def test_outputs_that_nobody_takes_change_no_exit_code(outputs: str, ends: str, code: int, tmp_path: Path) -> None:
    """Closed, gone, or on a full disk: only what a disk did not take of a result is a failure of its own."""
    command = f'( "$0" -c "$1" {ends}; echo $? >"$2" ) {outputs}'
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    subprocess.run(
        ["bash", "-c", command, sys.executable, COMMAND, tmp_path / "code"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert (tmp_path / "code").read_text() == f"{code}\n"
