"""The file map of docs/architecture.md is true: every file of the program, each once, and nothing that is not there."""

import re
from pathlib import Path

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
