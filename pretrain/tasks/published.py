"""The results that the papers publish, to stand beside ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pretrain.tasks.table import VTAB

_V1 = "arXiv 2010.11929 v1, as quoted elsewhere; not checked against its text"
_TABLE_2 = "arXiv 2010.11929 v2 (ICLR 2021), Table 2: means of 3 runs, Polyak averaging on ImageNet"
_TABLE_5 = "arXiv 2010.11929 v2 (ICLR 2021), Table 5"
_TABLE_9 = "arXiv 2010.11929 v2 (ICLR 2021), Table 9"


@dataclass(frozen=True)
class PaperRow:
    """Published results of one model: accuracy in percent by task, "vtab" being the mean over its 19."""

    model: str
    upstream: str  # what it was pretrained on; JFT-300M is private, so its rows cannot be reproduced
    source: str
    image_size: str  # of fine-tuning, in pixels; two: on ImageNet, and on all other tasks
    scores: Mapping[str, float]


_COLUMNS = ("imagenet", "real", "cifar10", "cifar100", "pets", "flowers")


def _rows(columns: Sequence[str], *rows: tuple[str, str, str, str, *tuple[float, ...]]) -> list[PaperRow]:
    return [PaperRow(*row[:4], dict(zip(columns, row[4:], strict=True))) for row in rows]


PAPER_ROWS = (
    *_rows(
        ("imagenet", "real", "cifar100", "vtab"),
        ("H/14", "JFT-300M", _V1, "518, 384", 88.36, 90.77, 94.55, 77.16),
    ),
    *_rows(
        (*_COLUMNS, "vtab"),
        ("H/14", "JFT-300M", _TABLE_2, "518, 384", 88.55, 90.72, 99.50, 94.55, 97.56, 99.68, 77.63),
        ("L/16", "JFT-300M", _TABLE_2, "512, 384", 87.76, 90.54, 99.42, 93.90, 97.32, 99.74, 76.28),
        ("L/16", "ImageNet-21k", _TABLE_2, "512, 384", 85.30, 88.62, 99.15, 93.25, 94.67, 99.61, 72.72),
    ),
    *_rows(
        _COLUMNS,
        ("B/16", "ImageNet", _TABLE_5, "384", 77.91, 83.57, 98.13, 87.13, 93.81, 89.49),
        ("B/32", "ImageNet", _TABLE_5, "384", 73.38, 79.56, 97.77, 86.31, 92.04, 85.43),
        ("L/16", "ImageNet", _TABLE_5, "384", 76.53, 82.19, 97.86, 86.35, 93.64, 89.66),
        ("L/32", "ImageNet", _TABLE_5, "384", 71.16, 77.83, 97.94, 87.07, 91.35, 86.36),
        ("B/16", "ImageNet-21k", _TABLE_5, "384", 83.97, 88.35, 98.95, 91.67, 94.43, 99.38),
        ("B/32", "ImageNet-21k", _TABLE_5, "384", 81.28, 86.63, 98.79, 91.97, 93.02, 99.11),
        ("L/16", "ImageNet-21k", _TABLE_5, "384", 85.15, 88.40, 99.16, 93.44, 94.73, 99.61),
        ("L/32", "ImageNet-21k", _TABLE_5, "384", 80.99, 85.65, 99.13, 93.04, 93.09, 99.19),
        ("H/14", "ImageNet-21k", _TABLE_5, "384", 85.13, 88.70, 99.27, 93.82, 94.82, 99.51),
    ),
    *_rows(
        VTAB,
        (  # natural and specialised sets, then structured ones
            *("H/14", "JFT-300M", _TABLE_9, "384"),
            *(95.3, 85.5, 75.2, 99.7, 97.2, 65.0, 88.9, 83.3, 96.7, 91.4, 76.6),
            *(91.7, 63.8, 53.1, 79.4, 63.3, 84.5, 33.2, 51.2),
        ),
        (
            *("L/16", "JFT-300M", _TABLE_9, "384"),
            *(95.4, 81.9, 74.3, 99.7, 96.7, 63.5, 87.4, 83.6, 96.5, 89.7, 77.1),
            *(86.4, 63.1, 49.7, 74.5, 60.5, 82.2, 36.2, 51.1),
        ),
        (
            *("L/16", "ImageNet-21k", _TABLE_9, "384"),
            *(90.8, 84.1, 74.1, 99.3, 92.7, 61.0, 80.9, 82.5, 95.6, 85.2, 75.3),
            *(70.3, 56.1, 41.9, 74.7, 64.9, 79.9, 30.5, 41.7),
        ),
    ),
)
