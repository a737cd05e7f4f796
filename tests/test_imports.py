"""Imports point one way: each module knows only what lies below it, so that it can be read and tested on its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up. A module imports from lower rows; modules of one folder may import each other.
LAYERS = (
    {"escape"},
    {"errors"},
    {"config", "cluster", "storage", "provenance", "json_files", "gpus"},
    {"log"},
    {"cli", "losses", "optim", "checkpoint", "sizes"},
    {"data"},
    {"models"},  # weights by name are fetched by the stream loop of remote shards
    {"shards"},
    {"tasks"},
    {"engine"},
    {"evaluation"},
    {"plan"},
    {"train"},
    {"finetune", "report", "benchmark", "audit", "doctor"},
    {"launch", "tools"},
)


def group(path: Path) -> str:
    """The module's name in LAYERS: its folder inside the package, launch, tools, or its own name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "pretrain" else parts[0]


def imported_groups(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields the groups of this project that a module imports, at its top or inside a function, with line numbers."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            # `from pretrain import log` names the module behind the import, `from pretrain.log import x` before it.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "pretrain" and len(parts) > 1 and parts[1] != "__version__":
                yield parts[1], node.lineno
            elif parts[0] in ("launch", "tools"):
                yield parts[0], node.lineno


def layer(name: str) -> int:
    """The row of LAYERS."""
    rows = [row for row, names in enumerate(LAYERS) if name in names]
    assert rows, f"{name} is not in LAYERS; say there what it may know"
    return rows[0]


def offences(path: Path, source: str) -> list[str]:
    """The imports of a module that do not point downwards."""
    own = group(path)
    return [
        f"{path.relative_to(ROOT)}:{line}: {own} must not import {other}"
        for other, line in imported_groups(ast.parse(source))
        if not (layer(other) < layer(own) or (other == own and (ROOT / "pretrain" / own).is_dir()))
    ]


def modules() -> list[Path]:
    """Every Python file of the package and of the command lines."""
    found = [path for folder in ("pretrain", "launch", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if path != ROOT / "pretrain" / "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    """No module imports what lies above or beside it; imports inside functions count too."""
    assert offences(path, path.read_text()) == []


def test_an_import_upwards_is_found() -> None:
    """The check itself: each kind of import statement that points up or sideways is named with its line."""
    config, optim = ROOT / "pretrain" / "config" / "reading.py", ROOT / "pretrain" / "optim.py"
    for text in (
        "import pretrain.log",
        "from pretrain import log",
        "from pretrain.log import warn",
        "def f():\n    from pretrain.log import warn",
        "if x:\n    import pretrain.log as log",
    ):
        assert offences(config, text) == [
            f"pretrain/config/reading.py:{1 + text.count(chr(10))}: config must not import log"
        ]
    assert offences(optim, "from pretrain.log import warn\nfrom pretrain.config import OptimConfig") == []
    assert offences(optim, "import pretrain.losses") == ["pretrain/optim.py:1: optim must not import losses"]
    loader = ROOT / "pretrain" / "data" / "loader.py"
    assert offences(loader, "from pretrain.data.order import share\nimport torch") == []
    assert offences(loader, "from pretrain.models.vit import x") == [
        "pretrain/data/loader.py:1: data must not import models"
    ]


def test_the_package_itself_imports_nothing() -> None:
    """`import pretrain` costs nothing and cannot be part of a circle."""
    tree = ast.parse((ROOT / "pretrain" / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def package_graph() -> dict[str, list[str]]:
    """Which rooms each room imports, in the order of LAYERS."""
    found: dict[str, set[str]] = {}
    for path in modules():
        tree = ast.parse(path.read_text())
        found.setdefault(group(path), set()).update(other for other, _ in imported_groups(tree) if other != group(path))
    return {name: sorted(found[name], key=layer) for name in sorted(found, key=layer)}


def test_the_graph_of_rooms_is_printed_and_has_no_circle() -> None:
    """`pytest -s` shows it. LAYERS alone forbids circles between rooms; modules inside a room must have none either."""
    for name, others in package_graph().items():
        print(f"{name:12} -> {', '.join(others) or '-'}")
    imports = {path: set(imported_modules(path)) for path in modules()}
    while leaves := [path for path, others in imports.items() if not others & imports.keys()]:
        for path in leaves:
            del imports[path]
    assert not imports, f"circles among {sorted(str(path.relative_to(ROOT)) for path in imports)}"


def imported_modules(path: Path) -> Iterator[Path]:
    """The files of this project that a module imports when it is loaded: not those inside functions."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            for end in (".py", "/__init__.py"):
                if (found := ROOT / (name.replace(".", "/") + end)).is_file() and found != path:
                    yield found


TABLES = ("pretrain/tasks/table.py",)  # a row per line of knowledge: longer than a file of code may be


def test_files_and_functions_are_short() -> None:
    """No file above 400 lines but tables, no function above 60: what is longer holds two topics."""
    for path in modules():
        text = path.read_text()
        name = str(path.relative_to(ROOT))
        assert name in TABLES or len(text.splitlines()) <= 400, f"{name}: {len(text.splitlines())} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 60, f"{name}:{node.lineno}: {node.name} has {lines} lines"
