"""Measures one cell in this process, which cells.py has started; prints a line of JSON per row.

python -m pretrain.benchmark train|bottleneck|model|save|data|device CELL     CELL: arguments of `measure` as JSON
"""

import json
import sys
from importlib import import_module

from pretrain import cli


def main() -> None:
    what, cell = sys.argv[1:]
    module = import_module(f"pretrain.benchmark.{what}")  # only this one: each imports large libraries
    for row in module.measure(**json.loads(cell)):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    cli.run(main)
