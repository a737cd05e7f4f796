"""Pictures of what a ViT has learned and where it looks, figures 7 and 6 of the ViT paper, and the numbers they show.

`write_pictures` writes internals.png, rollout.png and numbers.json; tools/visualize.py calls it.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pretrain import cli
from pretrain.config import DataConfig, ModelConfig, model_name
from pretrain.data.images import decode_upright, eval_image
from pretrain.data.reader import BadSample
from pretrain.errors import UserError
from pretrain.escape import shown
from pretrain.json_files import Fields
from pretrain.log import warn
from pretrain.models.inspection import Filters, Look, Positions, mean_distance_px
from pretrain.models.positions import Grid
from pretrain.models.vit import grid_of
from pretrain.storage import replacing, write_text

INTERNALS, ROLLOUT, NUMBERS = "internals.png", "rollout.png", "numbers.json"
_LETTERS = 12  # of a digest, in a file's name
MAX_MAPS = 16  # per side: more similarity maps would be too small to read
# Suited to colour-blind readers: a perceptually uniform map, and two of Okabe and Ito's colours.
MAP_COLORS, HEAD_COLOR, MEAN_COLOR = "viridis", "#0072B2", "#D55E00"


class Photo(NamedTuple):
    """One photo, and where the model looks in it."""

    name: str
    pixels: np.ndarray  # uint8 [S, S, 3], as the model sees it
    look: Look


def read_photo(path: Path, size: int) -> torch.Tensor:
    """Returns the central square of a photo, turned as its EXIF says, uint8 [3, size, size].

    Raises UserError when it cannot be read.
    """

    def told(complaint: str) -> None:
        warn(f"--image {path}: is damaged ({complaint})")

    try:
        return eval_image(decode_upright(path.read_bytes(), told), size, DataConfig(eval_crop=1.0))
    except OSError as error:
        raise UserError(f"--image {path}: cannot be read ({error.strerror})") from None
    except BadSample as error:
        raise UserError(f"--image {path}: cannot be decoded ({error})") from None


def write_pictures(
    out: Path,
    title: str,
    config: ModelConfig,
    filters: Filters,
    positions: Positions,
    photos: Sequence[Photo],
    *,
    digest: str,
    tensorboard: bool,
) -> list[Path]:
    """Draws into `out`, and writes the numbers; returns the files. Raises UserError when `out` cannot be written.

    digest: of the weights; pictures of other weights are kept, renamed with their digest. tensorboard: also write an
    event file.
    """
    with cli.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        _keep_others(out, digest)
        pictures = {INTERNALS: _draw_internals(shown(title), config, filters, positions, photos)}
        if photos:
            pictures[ROLLOUT] = _draw_rollouts(shown(title), photos)
        for name, figure in pictures.items():
            with replacing(out / name) as temporary:
                figure.savefig(temporary, dpi=120, format="png")
        numbers = {"weights_sha256": digest, **_numbers(config, filters, positions, photos)}
        write_text(out / NUMBERS, json.dumps(numbers) + "\n")
        if tensorboard:
            _write_events(out, list(pictures))
    return [out / name for name in (*pictures, NUMBERS)]


def _keep_others(out: Path, digest: str) -> None:
    """Renames files of other weights by their digest, and removes such files of the weights `digest`, now outdated."""
    try:
        before = Fields.read(out / NUMBERS).text("weights_sha256")
    except (OSError, UserError):
        return  # unknown, whose files these are
    if before == digest or not re.fullmatch("[0-9a-f]{64}", before):
        return
    for name in map(Path, (INTERNALS, ROLLOUT, NUMBERS)):
        if (out / name).is_file():
            (out / name).replace(out / f"{name.stem}-{before[:_LETTERS]}{name.suffix}")
        (out / f"{name.stem}-{digest[:_LETTERS]}{name.suffix}").unlink(missing_ok=True)


def _write_events(out: Path, names: list[str]) -> None:
    from PIL import Image
    from torch.utils.tensorboard.writer import SummaryWriter  # 1 s to import: only where it writes

    with SummaryWriter(str(out)) as board:
        for name in names:
            with Image.open(out / name) as picture:
                board.add_image(name.removesuffix(".png"), np.asarray(picture.convert("RGB")), dataformats="HWC")


# --- numbers ---------------------------------------------------------------------------------------------------------


def mean_of_photos(photos: Sequence[Photo]) -> np.ndarray | None:
    """Returns the attention distances [depth, heads], averaged over photos; None without photos."""
    if not photos:
        return None
    return torch.stack([photo.look.distance_px for photo in photos]).mean(0).numpy()


def shown_places(grid: Grid) -> tuple[list[int], list[int]]:
    """Returns the rows and columns of the positions whose similarity maps are drawn: all, or evenly spaced ones."""
    rows, columns = (np.unique(np.linspace(0, side - 1, min(side, MAX_MAPS)).round().astype(int)) for side in grid)
    return rows.tolist(), columns.tolist()


def _numbers(config: ModelConfig, filters: Filters, positions: Positions, photos: Sequence[Photo]) -> dict[str, Any]:
    rows, columns = shown_places(grid_of(config))
    similarity, distance = positions.similarity, mean_of_photos(photos)
    return {
        "format": "pretrain-pictures",
        "version": 1,
        "model": model_name(config),
        "grid": list(grid_of(config)),
        "filters": {"of": filters.source, "share_of_variance": _rounded(filters.variance.numpy(), 6)},
        "positions": {
            "of": positions.source,
            "rows": rows,
            "columns": columns,
            "cosine": None if similarity is None else _rounded(similarity.numpy()[np.ix_(rows, columns)], 4),
        },
        "attention_distance_px": None if distance is None else _rounded(distance, 3),
        "photos": [
            {
                "name": photo.name,
                "attention_distance_px": _rounded(photo.look.distance_px.numpy(), 3),
                "rollout_of": photo.look.source,
                "rollout": _rounded(photo.look.rollout.numpy(), 7),
            }
            for photo in photos
        ],
    }


def _rounded(values: np.ndarray, decimals: int) -> Any:
    return np.round(values.astype(float), decimals).tolist()


# --- pictures --------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float, title: str) -> Any:
    """Returns a figure, its size in inches, without pyplot: no global state, no window."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    figure.suptitle(title, fontsize=11, color="#444444", parse_math=False)
    return figure


def _draw_internals(
    title: str, config: ModelConfig, filters: Filters, positions: Positions, photos: Sequence[Photo]
) -> Any:
    figure = _figure(14, 5.2, title)
    left, centre, right = figure.subplots(1, 3, width_ratios=(1, 1.15, 1))
    _draw_filters(left, filters)
    _draw_positions(figure, centre, positions, grid_of(config))
    _draw_distances(right, config, photos)
    return figure


def _draw_filters(axes: Any, filters: Filters) -> None:
    """Draws components as RGB: gray is zero, and each has its own scale."""
    count, _, height, width = filters.components.shape
    columns = 7
    scale = filters.components.abs().amax((1, 2, 3), keepdim=True)
    tiles = (0.5 + 0.5 * filters.components / scale).permute(0, 2, 3, 1).numpy()  # [count, height, width, 3] in [0, 1]
    axes.imshow(_mosaic(tiles, columns, 1.0), interpolation="nearest")
    axes.set_title("Patch filters (RGB)", fontweight="bold")
    axes.set_xlabel(
        f"first {count} principal components of the\n{filters.source}, {height} x {width} px each;\n"
        f"they hold {filters.variance.sum():.0%} of the variance"
    )
    axes.set_anchor("N")
    _bare(axes)


def _draw_positions(figure: Any, axes: Any, positions: Positions, grid: Grid) -> None:
    axes.set_title("Similarity of position embeddings", fontweight="bold")
    if positions.similarity is None:
        _say_nothing(axes, positions.source)
        return
    rows, columns = shown_places(grid)
    maps = positions.similarity.numpy()[np.ix_(rows, columns)]  # [rows, columns, grid rows, grid columns]
    tiles = maps.reshape(-1, *grid, 1)
    low = math.floor(10 * maps.min()) / 10
    mosaic = _mosaic(tiles, len(columns), np.nan)[..., 0]
    picture = axes.imshow(mosaic, cmap=MAP_COLORS, vmin=low, vmax=1.0, interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="cosine similarity", shrink=0.8)
    _number_tiles(axes.set_xticks, columns, grid.width)
    _number_tiles(axes.set_yticks, rows, grid.height)
    axes.tick_params(length=0)
    axes.set_ylabel("row of the patch")
    some = "" if len(rows) == grid.height else f"; {len(rows)} of {grid.height} rows and columns shown"
    axes.set_xlabel(f"column of the patch\n(positions: {positions.source}{some})")
    axes.spines[:].set_visible(False)


def _number_tiles(set_ticks: Any, places: list[int], side: int) -> None:
    """Labels at most 8 maps with their numbers, which count from 1."""
    every = -(-len(places) // 8)
    shown = range(0, len(places), every)
    set_ticks([number * (side + _gap(side)) + side / 2 - 0.5 for number in shown], [places[n] + 1 for n in shown])


def _draw_distances(axes: Any, config: ModelConfig, photos: Sequence[Photo]) -> None:
    axes.set_title("Mean attention distance", fontweight="bold")
    distance = mean_of_photos(photos)
    if distance is None:
        _say_nothing(axes, "needs photos: --image PHOTO ...")
        return
    depth, heads = distance.shape
    blocks = np.arange(1, depth + 1)
    axes.scatter(
        blocks.repeat(heads), distance.ravel(), s=30, color=HEAD_COLOR, alpha=0.65, lw=0, label=f"each of {heads} heads"
    )
    axes.plot(blocks, distance.mean(1), color=MEAN_COLOR, lw=2, label="mean of heads")
    axes.set_xlabel(f"block\n(mean over {len(photos)} photo{'s' * (len(photos) > 1)})")
    axes.set_ylabel(f"distance [px of {config.image_size}]")
    grid = grid_of(config)
    uniform = torch.ones(1, 1, math.prod(grid), math.prod(grid))
    level = float(mean_distance_px(uniform, grid, config.patch_size))
    axes.axhline(level, color="black", ls="--", lw=1, label="uniform attention")
    axes.set_ylim(0, 1.06 * max(level, float(distance.max())))
    axes.set_xlim(0.5, depth + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")


def _draw_rollouts(title: str, photos: Sequence[Photo]) -> Any:
    """Draws a row per photo: the photo, the rollout scaled from minimum to maximum, the photo with that as brightness.

    The scale makes differences visible in a flat rollout too; the figures below it tell how small they are.
    """
    figure = _figure(9.5, 0.9 + 2.7 * len(photos), f"{title}\nAttention rollout, {photos[0].look.source}")
    maps = [photo.look.rollout.numpy() * photo.look.rollout.numel() for photo in photos]  # 1: uniform attention
    for row, photo, values in zip(figure.subplots(len(photos), 3, squeeze=False), photos, maps):
        size = photo.pixels.shape[0]
        row[0].imshow(photo.pixels)
        name = shown(photo.name)
        row[0].set_ylabel(name if len(name) <= 28 else f"{name[:25]}...", fontsize=8, parse_math=False)
        extent = (-0.5, size - 0.5, size - 0.5, -0.5)
        heat = row[1].imshow(values, cmap=MAP_COLORS, extent=extent, interpolation="nearest")
        row[1].set_xlabel(f"{values.min():.2f} to {values.max():.2f} of uniform", fontsize=8)
        figure.colorbar(heat, ax=row[1], shrink=0.85, label="attention, uniform = 1")
        fine = torch.from_numpy(values)[None, None]
        fine = torch.nn.functional.interpolate(fine, size=(size, size), mode="bilinear")[0, 0].numpy()
        light = (fine - fine.min()) / max(np.ptp(fine), 1e-12)
        # Pixel values are gamma-encoded: the exponent makes the light proportional to the rollout.
        row[2].imshow((photo.pixels * light[..., None] ** (1 / 2.2)).astype(np.uint8))
        for axes in row:
            _bare(axes)
    for axes, name in zip(figure.axes, ("Photo", "Rollout", "Photo, lit by it")):
        axes.set_title(name, fontweight="bold")
    return figure


def _gap(side: int) -> int:
    """Returns the pixels between tiles."""
    return max(1, side // 8)


def _mosaic(tiles: np.ndarray, columns: int, fill: float) -> np.ndarray:
    """Returns tiles [count, height, width, channels] side by side, with gaps of `fill`."""
    count, height, width, channels = tiles.shape
    rows, down, across = -(-count // columns), height + _gap(height), width + _gap(width)
    canvas = np.full((rows * down - _gap(height), columns * across - _gap(width), channels), fill)
    for number, tile in enumerate(tiles):
        top, left = number // columns * down, number % columns * across
        canvas[top : top + height, left : left + width] = tile
    return canvas


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _say_nothing(axes: Any, reason: str) -> None:
    axes.text(0.5, 0.5, reason, ha="center", va="center", transform=axes.transAxes, color="gray", wrap=True)
    _bare(axes)
