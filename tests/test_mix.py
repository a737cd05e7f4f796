"""Mixup and CutMix: the distribution of the draw, the box, and the pixels, by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta

from pretrain.config import DataConfig
from pretrain.data.mix import Mix, draw_mix, mixed, partner


def draw(step: int, size: int = 224, seed: int = 0, **options: Any) -> Mix:
    """The mix of a step."""
    mix = draw_mix(DataConfig(train=Path("unused"), global_batch=2, **options), size, seed, step)
    assert mix is not None
    return mix


@pytest.mark.parametrize("p", [0.2, 0.8, 1.0])
def test_the_share_is_the_larger_of_a_beta_draw(p: float) -> None:
    """4,000 steps against the distribution of max(a, 1 - a), within 4 standard deviations; not of another p."""
    shares = np.array([draw(step, mixup=p).own_share for step in range(4000)])
    assert shares.min() >= 0.5 and shares.max() <= 1
    x = np.array([0.55, 0.6, 0.75, 0.9, 0.99, 0.9999])
    found = (shares[:, None] <= x).mean(0)
    for other, fits in ((p, True), (2 * p, False)):
        expected = beta.cdf(x, other, other) - beta.cdf(1 - x, other, other)
        within = np.abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000) + 1e-9
        assert within.all() == fits


def test_the_step_and_the_seed_decide() -> None:
    """The same step gives the same mix whatever the global generators say; other steps and seeds give others."""
    first = draw(7, mixup=0.2, cutmix=1.0)
    torch.manual_seed(3)
    np.random.seed(3)
    assert draw(7, mixup=0.2, cutmix=1.0) == first
    assert len({draw(step, seed=seed, mixup=0.2) for step in range(10) for seed in range(3)}) > 25
    assert draw_mix(DataConfig(train=Path("unused"), global_batch=2), 224, 0, 7) is None


def test_a_coin_chooses_between_both() -> None:
    """Half of the steps are mixup's, with the draw that mixup alone has; the others CutMix's, likewise."""
    both = [draw(step, mixup=0.4, cutmix=1.0) for step in range(1000)]
    assert 420 < sum(mix.box is None for mix in both) < 580
    for step, mix in enumerate(both):
        assert mix == (draw(step, mixup=0.4) if mix.box is None else draw(step, cutmix=1.0))


def test_the_box_lies_inside_and_is_counted_in_pixels() -> None:
    """Of any size of image; the share kept is the pixels outside the box; centres are spread over the whole image."""
    centres = []
    for size in (1, 2, 17, 224):
        for step in range(500):
            mix = draw(step, size=size, cutmix=1.0)
            assert mix.box is not None
            top, left, height, width = mix.box
            assert 0 <= top <= top + height <= size and 0 <= left <= left + width <= size
            own = torch.zeros(3, size, size, dtype=torch.uint8)
            result = mixed(own, own + 255, mix)
            assert int((result[0] == 0).sum()) == round(mix.own_share * size * size)
            assert mix.own_share >= 0.5 - 1e-6
            if size == 224 and height < 20 and width < 20:
                centres.append((top + height / 2, left + width / 2))
    spread = np.array(centres)
    assert spread.min() < 40 and spread.max() > 184 and abs(np.corrcoef(spread.T)[0, 1]) < 0.5


def test_pixels_by_hand() -> None:
    """Mixup: rounded to the nearest value, not truncated. CutMix: the partner's pixels inside the box alone."""
    own = torch.tensor([10, 0, 255, 3], dtype=torch.uint8).expand(3, 2, 4)
    other = torch.tensor([20, 255, 255, 4], dtype=torch.uint8).expand(3, 2, 4)
    assert mixed(own, other, Mix(0.75, None))[0, 0].tolist() == [12, 64, 255, 3]  # 12.5, 63.75, 255, 3.25
    assert mixed(own, other, Mix(1.0, None)).equal(own)
    result = mixed(own, other, Mix(0.75, (1, 1, 1, 2)))
    assert result[0].tolist() == [[10, 0, 255, 3], [10, 255, 255, 3]]
    assert own[0, 1, 1] == 0  # the samples stay as they are: their partners need them


def test_partners_are_mutual() -> None:
    """0 with 1, 2 with 3: each slot is its partner's partner and never its own."""
    assert [partner(slot) for slot in range(6)] == [1, 0, 3, 2, 5, 4]
