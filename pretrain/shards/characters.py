"""Printed characters for the demo, and the handwritten digits it transfers to.

The demo has no network and no data set, so it pretrains on what every installation has: the text fonts that matplotlib
ships. `render` returns one distorted character per index as a uint8 RGB image with its class; the caller decides how
many to write and in which form. `digits_task` returns scikit-learn's 8 x 8 handwritten digits, enlarged, as the
few-shot task. No handwriting is seen in pretraining: the link between the two is that about half of the printed
characters go through the same 8 px bottleneck that the handwriting went through.

Pixels are computed in integers (fixed point, tables, Pillow's integer resampling) from a few scalars per image, so the
bytes depend on (seed, index) and the installed fonts, not on the vector unit or the BLAS of the machine.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# One entry per class; all characters of an entry share the label and the first names it. Distortion removes the
# baseline and the size, so a pair that differs by size alone (c/C, o/O, ...) cannot be told apart and would only teach
# the model to guess. 0/O/o and 1/I/l go together for the same reason: many fonts draw them as the same ellipse and bar,
# and at 8 px all fonts do. Pairs with a different shape (a/A, g/G, ...) stay apart.
CLASS_CHARACTERS: tuple[str, ...] = (
    "0Oo", "1Il", "2", "3", "4", "5", "6", "7", "8", "9",
    "A", "B", "Cc", "D", "E", "F", "G", "H", "Jj", "Kk", "L", "M", "N", "Pp", "Q", "R", "Ss", "T", "Uu", "Vv", "Ww",
    "Xx", "Yy", "Zz",
    "a", "b", "d", "e", "f", "g", "h", "i", "m", "n", "q", "r", "t",
)  # fmt: skip
CLASS_NAMES: list[str] = [characters[0] for characters in CLASS_CHARACTERS]

# Text fonts only. The other files matplotlib ships hold symbols, size variants or placeholder boxes (LastResort), or
# private code points (STIXNonUni, cmsy10, cmex10), where the code of a letter is not drawn as that letter.
FONT_FILES: tuple[str, ...] = (
    "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSansMono-Oblique.ttf", "DejaVuSansMono-BoldOblique.ttf",
    "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSerif-BoldItalic.ttf",
    "STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf",
    "cmr10.ttf", "cmb10.ttf", "cmss10.ttf", "cmti10.ttf", "cmmi10.ttf", "cmtt10.ttf",
)  # fmt: skip

TRAIN_DIGITS = 797  # of scikit-learn's 1,797 digits; the other 1,000 are the test set

_GLYPH = 64  # side of a cached glyph, px
_GLYPH_EXTENT = 48  # the longer side of the character inside it; the margin holds the falling distance
_DISTANCE_STEPS = 8  # steps of the stored distance per glyph px: 128 is the outline, +-16 px the range
_ONE = 256  # fixed point: 1.0 of a glyph px
_KNOTS = 5  # elastic distortion: random displacements on 5 x 5 knots, smoothly interpolated
_LEAST_CONTRAST = 120  # between the brightness of ink and paper, of 255
_DRAWS = 32  # uniform draws per image, all taken at once; a few are spare


def render(index: int, *, seed: int, image_size: int = 32) -> tuple[np.ndarray, int]:
    """Character `index` of the endless set `seed`: a pure function of its arguments.

    Returns (uint8 [image_size, image_size, 3], label); the label indexes CLASS_NAMES and is uniform over the classes.
    """
    # A counter-based generator: one key per image, so images can be made in any order by any number of processes.
    generator = np.random.Generator(np.random.Philox(key=[seed, index]))
    draw = generator.random(_DRAWS).tolist()
    knots = generator.integers(-_ONE, _ONE + 1, size=(2, _KNOTS, _KNOTS))

    label = int(draw[0] * len(CLASS_CHARACTERS))
    characters = CLASS_CHARACTERS[label]
    character = characters[int(draw[1] * len(characters))]
    paths = _fonts_with(character)
    distance, width, half_stroke = _glyph(paths[int(draw[2] * len(paths))], character)

    rows, columns = _sample_positions(draw[3:11], knots, width, image_size)
    sampled = _bilinear(distance, rows, columns)
    mask = _ink_table(draw[11:13], half_stroke)[sampled]
    mask = _lose_resolution(mask, draw[13:18], image_size)
    return _colour(mask, draw[18:26]), label


def label_of(index: int, *, seed: int) -> int:
    """Returns the label that `render` gives, without rendering."""
    return int(np.random.Generator(np.random.Philox(key=[seed, index])).random() * len(CLASS_CHARACTERS))


def digits_task() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scikit-learn's handwritten digits as RGB, split once and for all.

    Returns (train images uint8 [797, 32, 32, 3], train labels int64 [797], test images [1000, 32, 32, 3], test labels
    [1000]); ink is white on black.
    """
    from sklearn.datasets import load_digits  # here, since `render` runs without scikit-learn

    counts, targets = load_digits(return_X_y=True)  # set pixels in 4 x 4 blocks: 0..16, [1797, 64]
    gray = np.minimum(np.asarray(counts).reshape(-1, 8, 8) * 16.0, 255.0).astype(np.uint8)
    enlarged = np.stack(
        [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in gray]
    )
    images = np.repeat(enlarged[..., None], 3, axis=-1)
    labels = np.asarray(targets).astype(np.int64)
    # The file lists digits writer by writer in runs 0..9; a permutation keeps every class in both parts.
    order = np.random.Generator(np.random.Philox(key=[0, 0])).permutation(len(labels))
    train, test = order[:TRAIN_DIGITS], order[TRAIN_DIGITS:]
    return images[train], labels[train], images[test], labels[test]


@functools.cache
def _fonts_with(character: str) -> tuple[str, ...]:
    """Paths of the text fonts that have a glyph for `character`."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = [str(folder / name) for name in FONT_FILES]
    found = tuple(path for path in paths if ord(character) in FT2Font(path).get_charmap())
    if not found:
        raise FileNotFoundError(f"none of matplotlib's text fonts in {folder} has a glyph for {character!r}")
    return found


@functools.cache
def _font(path: str) -> ImageFont.FreeTypeFont:
    # Basic layout: without it, a shaping library that only some machines have would place the glyphs.
    return ImageFont.truetype(path, size=128, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _glyph(path: str, character: str) -> tuple[np.ndarray, float, float]:
    """One character as a distance field: (uint8 [64, 64], width, half stroke), the last two in glyph px.

    A value is 128 + 8 x (px inside the outline), clipped. A field of distances, unlike a mask, can be cut at any level
    after the warp: the level sets the stroke width, and the edge is antialiased at the size it is drawn in.
    """
    from scipy.ndimage import distance_transform_edt

    ink = Image.new("L", (320, 320))  # room on every side: at 128 px the widest letter, W, takes about 160 px
    ImageDraw.Draw(ink).text((80, 80), character, font=_font(path), fill=255)
    ink = ink.crop(ink.getbbox())

    # Distances are measured at twice the stored size: between two pixel centres of the stored size they would be off
    # by half a glyph px, which shows in thin strokes.
    scale = 2 * _GLYPH_EXTENT / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    canvas = Image.new("L", (2 * _GLYPH, 2 * _GLYPH))
    canvas.paste(ink.resize((width, height), Image.Resampling.BICUBIC), (_GLYPH - width // 2, _GLYPH - height // 2))
    inside = np.asarray(canvas) >= 128
    inward = np.asarray(distance_transform_edt(inside))[::2, ::2] / 2.0
    outward = np.asarray(distance_transform_edt(~inside))[::2, ::2] / 2.0
    distance = np.clip(np.rint(128.0 + _DISTANCE_STEPS * (inward - outward)), 0, 255).astype(np.uint8)
    half_stroke = 2.0 * float(inward[inward > 0].mean())  # in a bar, distances run evenly from 0 to half its width
    return distance, width / 2.0, half_stroke


@functools.cache
def _spline(image_size: int) -> np.ndarray:
    """Cubic B-spline weights of the elastic knots at every pixel: int64 [image_size, knots], rows sum to about 256."""
    position = np.arange(image_size) / max(image_size - 1, 1) * (_KNOTS - 3) + 1.0
    away = np.abs(position[:, None] - np.arange(_KNOTS)[None, :])
    near = 2.0 / 3.0 - away**2 + away**3 / 2.0
    far = np.clip(2.0 - away, 0.0, None) ** 3 / 6.0
    return np.rint(_ONE * np.where(away < 1.0, near, far)).astype(np.int64)


def _sample_positions(
    draw: list[float], knots: np.ndarray, width: float, image_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where in the glyph each output pixel looks: (rows, columns), int64 [S, S] in 1/256 glyph px.

    Affine first (rotation, shear, size, aspect, shift), then the elastic displacement. `knots` is [2, knots, knots].
    """
    # One strength for all distortions of an image: a good share of nearly undistorted characters gets training off the
    # ground, and the strongly distorted ones then make it general. Drawn independently, hardly an image is easy.
    strength = draw[0]
    angle = strength * _between(-0.4, 0.4, draw[1])
    shear = strength * _between(-0.5, 0.5, draw[2])
    squeeze = math.exp(strength * _between(-0.4, 0.4, draw[3]))
    shift_x, shift_y = strength * _between(-0.12, 0.12, draw[4]), strength * _between(-0.12, 0.12, draw[5])
    elastic = int(strength * _between(0.0, 28.0, draw[6]))  # glyph px
    size = _between(0.75, 1.05, draw[7])  # share of the frame that the longer side covers
    # Glyph px per unit of the frame, which runs from -1 to 1.
    down = _GLYPH_EXTENT / 2.0 / size
    across = max(down / squeeze, width / 2.0 / 1.1)  # a wide letter is not pushed out of the frame

    cosine, sine = math.cos(angle), math.sin(angle)
    # Per output pixel and axis, in fixed point with 8 more bits than the result, so that rounding does not add up.
    unit = _ONE * 256
    row_per_y, row_per_x = round(down * cosine * unit), round(-down * sine * unit)
    column_per_y = round(across * (sine + shear * cosine) * unit)
    column_per_x = round(across * (cosine - shear * sine) * unit)
    frame = 2 * np.arange(image_size, dtype=np.int64) - (image_size - 1)  # pixel centres, in units of 1 / image_size
    x = frame[None, :] - round(shift_x * image_size)
    y = frame[:, None] - round(shift_y * image_size)
    centre = _GLYPH * _ONE // 2
    rows = (row_per_y * y + row_per_x * x) // (256 * image_size) + centre
    columns = (column_per_y * y + column_per_x * x) // (256 * image_size) + centre

    if elastic:
        spline = _spline(image_size)
        moved = (spline @ knots @ spline.T) * elastic >> 16  # [2, S, S]; integer products, so no BLAS and no rounding
        rows, columns = rows + moved[0], columns + moved[1]
    return rows, columns


def _bilinear(field: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`field` (uint8 [64, 64]) at fixed-point positions: int64 [S, S] in 0..255. Outside, the nearest edge value."""
    limit = (_GLYPH - 1) * _ONE - 1  # the last position that still has a right and a lower neighbour
    rows, columns = np.clip(rows, 0, limit), np.clip(columns, 0, limit)
    corner = (rows >> 8) * _GLYPH + (columns >> 8)
    down, right = rows & 255, columns & 255
    flat = field.reshape(-1)
    upper = flat[corner] * (_ONE - right) + flat[corner + 1] * right
    lower = flat[corner + _GLYPH] * (_ONE - right) + flat[corner + _GLYPH + 1] * right
    return (upper * (_ONE - down) + lower * down) >> 16


def _ink_table(draw: list[float], half_stroke: float) -> np.ndarray:
    """Ink per stored distance: uint8 [256]. Cuts the field at a random level, so the stroke is thinner or thicker.

    The wanted stroke does not depend on the font, or weight would tell the font; but a stroke is neither thinned by
    more than half (it would break) nor grown by more than 4 px (it would close its loops).
    """
    wanted = _between(2.0, 6.5, draw[0])
    grown = min(max(wanted - half_stroke, -0.5 * half_stroke), 4.0)
    softness = _between(1.5, 3.5, draw[1])  # width of the edge in glyph px; about 1.5 to an output px at 32 px
    inside = (np.arange(256) - 128.0) / _DISTANCE_STEPS + grown
    return np.rint(255.0 * np.clip(inside / softness + 0.5, 0.0, 1.0)).astype(np.uint8)


def _lose_resolution(mask: np.ndarray, draw: list[float], image_size: int) -> np.ndarray:
    """Two masks of three through a grid of 7 to 14 px and back (most through 8 px), some of the others blurred.

    The handwritten digits are counts over 4 x 4 blocks of a 32 x 32 bitmap; a box filter down to 8 px does the same.
    """
    size = (image_size, image_size)
    if draw[0] < 0.65:
        side = 8 if draw[1] < 0.7 else 7 + int(draw[2] * 8)
        small = Image.fromarray(mask).resize((side, side), Image.Resampling.BOX)
        back = Image.Resampling.BICUBIC if draw[3] < 0.7 else Image.Resampling.BILINEAR
        return np.asarray(small.resize(size, back))
    if draw[0] < 0.8:
        radius = _between(0.3, 1.3, draw[4]) * image_size / 32
        return np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(radius)))
    return mask


def _colour(mask: np.ndarray, draw: list[float]) -> np.ndarray:
    """Ink on paper in random colours of clearly different brightness: uint8 [S, S, 3]. Half of the images are gray.

    Four in five have light ink on dark paper, as the handwriting has. An even mix of both would average to no character
    at all: to first order nothing then links a pixel to a class, and training sits at chance for a thousand steps.
    """
    channels = 1 if draw[0] < 0.5 else 3
    # Squares: most pairs are near black and white, where the contrast is; every colour can still occur.
    dark = [int(255 * value * value) for value in draw[1 : 1 + channels]] * (3 // channels)
    light = [int(255 * (1 - value * value)) for value in draw[4 : 4 + channels]] * (3 // channels)
    if _brightness(light) < _brightness(dark):
        dark, light = light, dark
    if _brightness(light) - _brightness(dark) < _LEAST_CONTRAST:
        dark = [value // 2 for value in dark]
        light = [255 - (255 - value) // 2 for value in light]  # at least 127 apart
    paper, ink = (dark, light) if draw[7] < 0.8 else (light, dark)
    low = np.array(paper, dtype=np.int32)
    step = np.array(ink, dtype=np.int32) - low
    return (low + (mask[..., None] * step + 127) // 255).astype(np.uint8)


def _brightness(colour: list[int]) -> int:
    return (299 * colour[0] + 587 * colour[1] + 114 * colour[2]) // 1000


def _between(low: float, high: float, draw: float) -> float:
    return low + (high - low) * draw
