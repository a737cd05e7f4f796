"""One cell, measured in this process, which cells.py has started; a line of JSON per row.

python -m pretrain.benchmark train|bottleneck|model|save|data|device CELL     CELL: arguments of `measure` as JSON
"""

import json
import sys

from pretrain import cli


def main() -> None:
    what, cell = sys.argv[1:]
    if what == "train":
        from pretrain.benchmark.train import measure
    elif what == "bottleneck":
        from pretrain.benchmark.bottleneck import measure
    elif what == "save":
        from pretrain.benchmark.save import measure
    elif what == "device":
        from pretrain.benchmark.device import measure
    elif what == "data":
        from pretrain.benchmark.data import measure
    else:
        from pretrain.benchmark.models import measure
    for row in measure(**json.loads(cell)):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    cli.run(main)
