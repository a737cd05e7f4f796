"""The file map of docs/architecture.md is true: every file of the program, each once, and nothing that is not there.

And the README's `make` calls install what they say.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_file_map_is_complete() -> None:
    """Each Python file, job script and config has its line; package markers do not count."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    listed = re.findall(r"^((?:launch|pretrain|tools|configs)/\S+)  *\S", text, flags=re.MULTILINE)
    found = [path for folder in ("launch", "pretrain", "tools") for path in (ROOT / folder).rglob("*.py")]
    found += [path for kind in ("configs/*.yaml", "launch/*.sbatch", "launch/*.sh") for path in ROOT.glob(kind)]
    expected = {str(path.relative_to(ROOT)) for path in found if path.name != "__init__.py"}
    assert sorted(listed) == sorted(expected)


def test_every_room_is_on_both_maps() -> None:
    """Each folder of the package stands in the README's map and among the rooms of docs/architecture.md."""
    rooms = {path.parent.name for path in (ROOT / "pretrain").glob("*/__init__.py")}
    assert rooms == set(re.findall(r"pretrain/(\w+)/  +\S", (ROOT / "README.md").read_text()))
    rows = re.findall(r"^\| `(\w+)/` \|", (ROOT / "docs" / "architecture.md").read_text(), flags=re.MULTILINE)
    assert rooms == set(rows)


def test_links_lead_somewhere() -> None:
    """Every relative link of README and docs names a file that exists, and a heading that the file has."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target, heading in re.findall(r"\]\(([^)#:]+)(?:#([^)]*))?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
            found = re.findall(r"^#+ (.*)$", (page.parent / target).read_text(), flags=re.MULTILINE)
            assert not heading or heading in {name.lower().replace(" ", "-") for name in found}, (
                f"{page.name}: {heading}"
            )


def test_configs_have_their_first_page() -> None:
    """Each config's header tells command, hardware, time and score."""
    for path in (ROOT / "configs").glob("*.yaml"):
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        for word in ("command:", "hardware:", "time:", "score:"):
            assert any(word in line for line in header), f"{path.name}: no {word}"


def test_the_walk_names_functions_that_exist() -> None:
    """Each `room.file.name` in the walk of a batch is there, so that a reader who looks for it finds it."""
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## Rooms")[0]
    rooms = {path.name for path in (ROOT / "pretrain").iterdir() if path.is_dir()} | {"losses", "optim", "log"}
    named = [name for name in re.findall(r"`([a-z_.A-Z0-9]+)", text) if name.partition(".")[0] in rooms and "." in name]
    assert len(named) > 30
    for name in named:
        assert _exists(name.split(".")), name


def _exists(parts: list[str]) -> bool:
    """Whether parts name a module of the package, or what it defines or hands on."""
    for depth in range(len(parts), 0, -1):
        place = ROOT.joinpath("pretrain", *parts[:depth])
        source = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
        if source.is_file():
            rest, text = parts[depth:], source.read_text()
            return all(re.search(rf"\b(def|class) {name}\b|^    {name},$", text, re.M) for name in rest)
    return len(parts) == 1 and (ROOT / "pretrain" / parts[0]).is_dir()


# An environment is a link to this Python: a real one takes seconds.
PYTHON = """#!/bin/sh
[ "$2" = venv ] || exec {python} "$@"
[ "$3" = --clear ] && shift && rm -r "$3"
mkdir -p "$3/bin" && ln -sf {python} "$3/bin/python"
"""


def made(*words: str, venv: Path) -> str:
    """What `make` says with these words, where pip and pytest only say that they were called."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    python = venv.with_name("python")
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    tools = f"VENV={venv}", f"PYTHON={python}", "PIP=echo pip:", "PYTEST=@echo pytest", "NEEDED_KB=0"
    # Not what an outer make was told; and without a GPU to look for: this Python has none of our packages.
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "SLURM_"))}
    environment = others | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["make", *tools, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 or "expected 12 or 13" in done.stderr, done.stderr
    return done.stdout + done.stderr


def test_make_installs_what_is_asked_for(tmp_path: Path) -> None:
    """Not the tests' packages with `install`, those once with `test`; torch of the CUDA that was chosen, also later."""
    venv = tmp_path / "venv"
    told = made("install", venv=venv)
    assert "--editable ." in told and "[dev]" not in told and "Traceback" not in told
    assert (venv / "constraints.txt").read_text() == (ROOT / "requirements.lock").read_text()
    assert "pip:" not in made("install", venv=venv)
    assert "--editable .[dev]" in made("test", venv=venv) and "pip:" not in made("install", "test", venv=venv)
    (venv / "of CUDA 13").touch()
    assert "pip:" in made("install", "CUDA=12", venv=venv) and not (venv / "of CUDA 13").exists()
    versions = dict(line.split("==") for line in (venv / "constraints.txt").read_text().splitlines())
    assert versions["torch"] == "2.9.1" and "numpy" in versions
    assert not [name for name in versions if re.match("torchvision|triton|nvidia-|cuda-", name)]
    assert "pip:" not in made("install", venv=venv) and "--editable .[dev]" in made("test", venv=venv)
    assert (venv / "constraints.txt").read_text().endswith("torch==2.9.1\n")
    assert "expected 12 or 13" in made("install", "CUDA=11", venv=venv)
