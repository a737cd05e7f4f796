"""Validation scores: every image scored exactly once on any number of ranks, masked slots never, sums exact."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from scores import classification_scores
from tiny import NUM_CLASSES, make_shards

from pretrain.cluster import agreement, ranks
from pretrain.config import DataConfig
from pretrain.data.loader import Batch, eval_batches, single_labels
from pretrain.data.manifest import Manifest, load_manifest
from pretrain.errors import UserError
from pretrain.evaluation import evaluators
from pretrain.evaluation.classification import EvaluationStopped, Score
from pretrain.evaluation.features import Features, extract_features, raw_pixels
from pretrain.evaluation.subject import all_images

CPU = torch.device("cpu")
SIZE = 16
KERNEL = torch.randn(3 * SIZE * SIZE, NUM_CLASSES, generator=torch.Generator().manual_seed(0)) / 1000


torch.set_num_threads(1)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return load_manifest(make_shards(tmp_path_factory.mktemp("shards") / "squares"))


def batches_of(manifest: Manifest, batch_size: int) -> Iterator[Batch]:
    config = DataConfig(workers=0)
    indices = np.arange(manifest.num_samples)
    return eval_batches(manifest, indices, batch_size=batch_size, image_size=SIZE, config=config)


def predict(images: torch.Tensor) -> torch.Tensor:
    """A fixed linear classifier of the pixels, whose logits do not depend on the rest of the batch."""
    return torch.stack([image.flatten().float() @ KERNEL for image in images])


def scores_of(manifest: Manifest, batch_size: int, loss: str = "softmax") -> list[Score]:
    return classification_scores(predict, batches_of(manifest, batch_size), loss=loss, device=CPU)


def scores_of_rank(manifest: Manifest, batch_size: int) -> list[Score]:
    ranks.start(60)
    return scores_of(manifest, batch_size)


def assert_same(scores: list[Score], expected: list[Score]) -> None:
    """Counts must be equal; a sum of losses in another order rounds differently."""
    assert [(s.metric, s.n) for s in scores] == [(s.metric, s.n) for s in expected]
    assert scores[1:] == expected[1:]
    assert scores[0].value == pytest.approx(expected[0].value, rel=1e-6)


def synthetic(labels: list[int], valid: list[bool], best: list[list[int]]) -> tuple[Batch, torch.Tensor]:
    """A batch, and logits that rank classes in the given orders."""
    logits = torch.full((len(labels), 10), -9.0)
    for row, order in enumerate(best):
        logits[row, order] = torch.arange(len(order), 0, -1).float()
    slots = len(labels)
    images, ones = torch.zeros(slots, 3, 1, 1, dtype=torch.uint8), torch.zeros(slots, dtype=torch.int64)
    return Batch(images, *single_labels(torch.tensor(labels)), torch.tensor(valid), ones, ones, []), logits


def test_top1_and_top5_by_hand() -> None:
    """Label first, third, fifth and sixth: one counts for top-1, three for top-5; n counts them all."""
    batch, logits = synthetic([1, 2, 3, 4], [True] * 4, [[1], [8, 9, 2], [9, 8, 7, 6, 3], [9, 8, 7, 6, 5, 4]])
    loss, top1, top5 = classification_scores(lambda _: logits, [batch], loss="softmax", device=CPU)
    assert (top1, top5) == (Score("top1", 0.25, 4), Score("top5", 0.75, 4))
    assert loss.value == pytest.approx(F.cross_entropy(logits, batch.labels[:, 0]).item(), abs=1e-6)


def test_masked_slots_count_for_nothing() -> None:
    """A slot that only fills up the batch has label 0 and a finite or infinite loss: neither is added."""
    batch, logits = synthetic([1, 0, 0], [True, False, False], [[1], [0], [5]])
    logits[2] = torch.nan
    scores = classification_scores(lambda _: logits, [batch], loss="softmax", device=CPU)
    assert [s.n for s in scores] == [1, 1, 1] and scores[1].value == scores[2].value == 1.0
    assert scores[0].value == pytest.approx(F.cross_entropy(logits[:1], batch.labels[:1, 0]).item(), abs=1e-6)


def test_nothing_to_score_is_an_error() -> None:
    """Not a division by zero, and not a perfect score."""
    batch, logits = synthetic([1], [False], [[1]])
    with pytest.raises(UserError, match="none could be read, or none has a label"):
        classification_scores(lambda _: logits, [batch], loss="softmax", device=CPU)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_scores_do_not_depend_on_the_batch_size(manifest: Manifest, loss: str) -> None:
    """101 images in batches of 1, 7, 101 and 128 give the scores of one pass over all of them."""
    expected = scores_of(manifest, 101, loss)
    assert [score.n for score in expected] == [101] * 3
    for batch_size in (1, 7, 128):
        assert_same(scores_of(manifest, batch_size, loss), expected)


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_simulated_ranks_score_every_image_exactly_once(
    manifest: Manifest, world_size: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks' valid indices are 0..100 without a repeat, in the same number of batches, also where 101 = 5 * 20 + 1;
    and the sums over ranks are the scores of one rank.
    """
    seen, counts, sums = [], [], torch.zeros(3)
    for rank in range(world_size):
        monkeypatch.setitem(os.environ, "RANK", str(rank))
        monkeypatch.setitem(os.environ, "WORLD_SIZE", str(world_size))
        batches = list(batches_of(manifest, batch_size))
        counts.append(len(batches))
        seen += [i for batch in batches for i in batch.index[batch.valid].tolist()]
        scores = classification_scores(predict, batches, loss="softmax", device=CPU)
        sums += torch.tensor([score.value * score.n for score in scores])
    assert sorted(seen) == list(range(101))
    assert len(set(counts)) == 1
    monkeypatch.undo()
    expected = torch.tensor([score.value * 101 for score in scores_of(manifest, 101)])
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-3)


def test_two_real_ranks_agree_with_one(manifest: Manifest) -> None:
    """Over gloo, both ranks return the scores that one rank returns."""
    expected = scores_of(manifest, 16)
    for scores in run_ranks(scores_of_rank, 2, manifest, 16):
        assert_same(scores, expected)


def test_others_wait_for_rank_0_with_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """A regression takes longer than a collective may: the ranks agree again and again until rank 0 has solved it; what
    it raises is raised, and a wish to stop does not wait for it."""
    asked, real, given_up = [], agreement.any_rank, threading.Event()
    monkeypatch.setattr(evaluators.agreement, "any_rank", lambda flag: asked.append(flag) or real(flag))

    def solve() -> int:
        until = time.monotonic() + 60
        while len(asked) < 4:
            assert time.monotonic() < until, "nobody asked whether it is done"
            time.sleep(0.005)
        return 7

    def refuse() -> None:
        raise UserError("not finite")

    assert evaluators.on_main(solve, lambda: False) == 7
    with pytest.raises(UserError, match="not finite"):
        evaluators.on_main(refuse, lambda: False)
    with pytest.raises(EvaluationStopped):
        evaluators.on_main(lambda: given_up.wait(60), lambda: True)
    given_up.set()


def test_a_wish_to_stop_ends_the_evaluation(manifest: Manifest) -> None:
    """Between two batches, so that a preempted job does not lose its grace period to a long validation."""
    answers = iter([False, False, True])
    with pytest.raises(EvaluationStopped):
        options = {"loss": "softmax", "device": CPU, "stop_agreed": lambda: next(answers)}
        classification_scores(predict, batches_of(manifest, 4), **options)


def damaged_copy(folder: Path) -> Manifest:
    """A set in which image 3 of the first shard is not an image any more; sizes are as listed."""
    manifest = load_manifest(make_shards(folder))
    shard = manifest.shards[0].path
    data = bytearray(shard.read_bytes())
    positions = [i for i in range(0, len(data), 512) if data[i : i + 8] == b"\x89PNG\r\n\x1a\n"]
    data[positions[3] : positions[3] + 8] = b"notapng!"
    shard.write_bytes(bytes(data))
    return manifest


def test_unreadable_images_are_left_out_and_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """n says 100 of 101, for scores and for features, whose rows stay in order; the user is told."""
    manifest = damaged_copy(tmp_path / "squares")
    assert {score.n for score in scores_of(manifest, 16)} == {100}
    features = features_of(manifest, 16)
    assert features is not None
    assert features.values.shape == (100, 3 * SIZE * SIZE) and features.labels.shape == (100,)
    assert "1 of 101 images cannot be read and are left out" in capfd.readouterr().err


def features_of(manifest: Manifest, batch_size: int) -> Features | None:
    options = {"image_size": SIZE, "batch_size": batch_size, "config": DataConfig(workers=0), "device": CPU}
    return extract_features(raw_pixels, *all_images(manifest), **options)


def features_of_rank(manifest: Manifest, batch_size: int) -> Features | None:
    ranks.start(60)
    return features_of(manifest, batch_size)


def test_features_come_in_index_order_on_any_number_of_ranks(manifest: Manifest) -> None:
    """Row i is image i with its label, pixels in [0, 1]; 1 rank in batches of 7 = 3 ranks in batches of 16.

    Rank 0 alone has them.
    """
    batch = next(batches_of(manifest, 101))
    expected = Features((batch.images.flatten(1).float() / 255).numpy(), batch.labels[:, 0].numpy())
    of_three, *others = run_ranks(features_of_rank, 3, manifest, 16)
    assert others == [None, None]
    for found in (features_of(manifest, 7), of_three):
        assert found is not None
        np.testing.assert_array_equal(found.values, expected.values)
        np.testing.assert_array_equal(found.labels, expected.labels)
    assert expected.values.min() >= 0 and 0.5 < expected.values.max() <= 1
