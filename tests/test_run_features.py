"""Few-shot accuracy, nearest neighbours and mean average precision inside a training run, on any ZeRO stage.

None of them leaves a trace in it.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from tiny import changed, make_shards, tiny_config

from pretrain.checkpoint.find import newest_valid
from pretrain.checkpoint.layout import step_folders
from pretrain.checkpoint.read import read_state
from pretrain.cluster import agreement, ranks, watchdog
from pretrain.config import Config, DataConfig, config_to_dict
from pretrain.data.images import to_float
from pretrain.data.loader import eval_batches
from pretrain.data.manifest import load_manifest
from pretrain.errors import ConfigError, UserError
from pretrain.evaluation.features import pre_logits
from pretrain.evaluation.fewshot import fewshot
from pretrain.evaluation.knn import knn
from pretrain.models import load_model
from pretrain.models.build import build_model
from pretrain.report.curves import draw_panels
from pretrain.report.runs import read_runs
from pretrain.shards.build import build
from pretrain.shards.sources import Item
from pretrain.train.announce import warn_of_settings
from pretrain.train.building import build_engine
from pretrain.train.datasets import open_data
from pretrain.train.run import train

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sets: train, few and test, below one folder."""
    folder = tmp_path_factory.mktemp("shards")
    for seed, (name, count) in enumerate([("train", 101), ("few", 61), ("test", 47)]):
        make_shards(folder / name, num_samples=count, seed=seed)
    return folder


def with_features(shards: Path, output: Path, **changes: Any) -> Config:
    few = {"evaluation__fewshot_train": shards / "few", "evaluation__fewshot_test": shards / "test"}
    options: dict[str, Any] = {"evaluation__fewshot_shots": [1, 5], "evaluation__knn": True, **few}
    return tiny_config(shards / "train", output, **{"evaluation__fewshot_every_steps": 10, **options, **changes})


def finish(config: Config) -> None:
    train(config)


def rows_of(config: Config) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.output / "tiny" / "metrics.jsonl").read_text().splitlines()]


def features_by_hand(config: Config) -> dict[str, float]:
    """The figures of the run's last weights, from all images in one batch."""
    extract, arrays = pre_logits(load_model(config.output / "tiny")), []
    for name in ("few", "test"):
        manifest = load_manifest(config.data.train.parent / name)
        options = {"batch_size": 128, "image_size": 16, "config": DataConfig(workers=0, eval_transform="fewshot")}
        batch = next(eval_batches(manifest, np.arange(manifest.num_samples), **options))
        with torch.no_grad():
            arrays += [extract(batch.images[batch.valid]).numpy(), batch.labels[batch.valid, 0].numpy()]
    few = {f"val/fewshot_{k}": row.value for k, row in zip((1, 5), fewshot(*arrays, shots=(1, 5))[::2])}
    near = {f"val/knn_{k}": row.value for k, row in zip((1, 20), knn(*arrays, device=torch.device("cpu")))}
    return few | near


@pytest.mark.parametrize("stage, ranks, average", [(1, 1, 0.0), (2, 2, 0.9), (3, 3, 0.9)])
def test_the_run_logs_what_its_weights_reach(
    stage: int, ranks: int, average: float, shards: Path, tmp_path: Path
) -> None:
    """ZeRO 1 to 3, uneven ranks, with averages and without: the last line is that of the weights load_model returns.

    The report has a panel for each figure.
    """
    config = with_features(shards, tmp_path, engine__zero_stage=stage, optim__average_decay=average)
    run_ranks(finish, ranks, config)
    rows = [row for row in rows_of(config) if "val/fewshot_5" in row]
    assert [row["step"] for row in rows] == [10, 20]
    found = {key: value for key, value in rows[-1].items() if key.startswith("val/")}
    assert found == pytest.approx(features_by_hand(config), abs=1e-6)
    assert {"val/fewshot_5": found["val/fewshot_5"]}.items() <= json.loads(
        (tmp_path / "tiny" / "DONE").read_text()
    ).items()
    titles = [panel.title for panel in draw_panels(read_runs([tmp_path / "tiny"]))]
    assert titles[-4:] == ["fewshot_1", "fewshot_5", "knn_1", "knn_20"]


def test_training_is_the_same_with_and_without(shards: Path, tmp_path: Path) -> None:
    """Bit for bit, with dropout: features draw no random number and leave no trace in the weights."""
    dropout = {"model__dropout": 0.1, "data__held_out": 23, "evaluation__every_steps": 5}
    with_them = with_features(shards, tmp_path / "with", engine__zero_stage=3, **dropout)
    without = tiny_config(shards / "train", tmp_path / "without", engine__zero_stage=3, **dropout)
    for config in (with_them, without):
        run_ranks(finish, 2, config)
    folders = [newest_valid(config.output / "tiny" / "checkpoints") for config in (with_them, without)]
    assert folders[0] and folders[1]
    for path in folders[0].glob("*.safetensors"):
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name
    lines = {row["step"]: row for row in rows_of(with_them) if "val/top1" in row}
    assert sorted(lines) == [5, 10, 15, 20]
    assert [step for step, row in lines.items() if "val/knn_20" in row] == [10, 20]  # one line, both


def stop_in_features(config: Config) -> None:
    """Is asked to stop while the test features of step 20 are extracted."""
    import os
    import signal

    import pretrain.evaluation.subject

    real = pretrain.evaluation.subject.extract_features

    def extract(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    pretrain.evaluation.subject.extract_features = extract
    train(config)


def test_features_cut_short_are_made_up_for(shards: Path, tmp_path: Path) -> None:
    """SIGTERM during them: no DONE; the next start measures both, once, and is done."""
    config = with_features(
        shards,
        tmp_path,
        evaluation__fewshot_every_steps=0,
        evaluation__every_steps=20,
        data__held_out=23,
        engine__zero_stage=3,
        optim__average_decay=0.9,
    )
    run_ranks(stop_in_features, 2, config)
    assert not (tmp_path / "tiny" / "DONE").exists()
    assert not [row for row in rows_of(config) if "val/top1" in row]
    run_ranks(finish, 1, changed(config, engine__zero_stage=1))
    (row,) = [row for row in rows_of(config) if "val/top1" in row]
    found = {key: value for key, value in row.items() if "shot" in key or "knn" in key}
    assert row["step"] == 20 and found == pytest.approx(features_by_hand(config), abs=1e-6)


# --- several labels per image ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """47 coloured squares of one to three of 8 classes."""
    random, items = np.random.default_rng(0), []
    for number in range(47):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (24, 24, 3)).astype(np.uint8)).save(file, "png")
        classes = random.permutation(8)[: 1 + number % 3].tolist()
        items.append(Item(file.getvalue, "png", classes, f"square {number}"))
    return build(items, [], tmp_path_factory.mktemp("several") / "set", samples_per_shard=20, seed=0)


def precision_by_hand(folder: Path, shards: Path) -> float:
    """Over the classes and their images: the share of the class among the images ranked as high or higher."""
    manifest = load_manifest(shards)
    options = {"batch_size": 47, "image_size": 16, "config": DataConfig(workers=0)}
    batch = next(eval_batches(manifest, np.arange(47), **options))
    with torch.no_grad():
        logits = load_model(folder)(to_float(batch.images, torch.float32))
    found = []
    for k in range(8):
        own = (batch.labels == k).any(dim=1)
        shares = [own[logits[:, k] >= logit].float().mean() for logit in logits[own, k]]
        found.append(torch.stack(shares).mean().item())
    return float(np.mean(found))


def finish_without_room(config: Config) -> None:
    import pretrain.evaluation.classification

    pretrain.evaluation.classification.MAX_LOGIT_BYTES_IN_TRAINING = 4 * 47 * 8 - 1
    train(config)


def test_several_labels_have_mean_average_precision(several: Path, tmp_path: Path) -> None:
    """On 3 uneven ranks of ZeRO-3, as by a slow loop over the weights that load_model returns; drawn in the report.

    Without room for the logits the other figures are measured all the same.
    """
    options = {"loss": "sigmoid", "evaluation__every_steps": 20, "data__val": several, "engine__zero_stage": 3}
    config = tiny_config(several, tmp_path, **options)
    run_ranks(finish, 3, config)
    (row,) = [row for row in rows_of(config) if "val/top1" in row]
    expected = precision_by_hand(tmp_path / "tiny", several)
    assert row["val/mean_average_precision"] == pytest.approx(expected, abs=1e-6)
    assert row["val/images"] == 47 and 0.1 < expected < 0.9
    assert draw_panels(read_runs([tmp_path / "tiny"]))[-1].title == "mean_average_precision"
    config = changed(config, output=str(tmp_path / "without"))
    run_ranks(finish_without_room, 1, config)
    (other,) = [row for row in rows_of(config) if "val/top1" in row]
    assert row.keys() - other.keys() == {"val/mean_average_precision"}


# --- the features ----------------------------------------------------------------------------------------------------

IMAGES = torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def features_of_rank(config: Config) -> np.ndarray:
    """Of ten images, by an engine that has not trained yet."""
    engine = build_engine(config, open_data(config), ranks.start(60), from_scratch=True)
    return engine.features(IMAGES).float().numpy()


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"representation_size": 24},
        {"pooling": "map"},
        {"name": "timm:vit_tiny_patch16_224"},
        {"name": "timm:resnetv2_50x1_bit"},
    ],
    ids=str,
)
def test_features_are_the_heads_input(model: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    """Of the whole model on one rank, and of ZeRO-3's on each of 2 ranks: what timm's forward_head calls pre-logits."""
    config = tiny_config(shards / "train", tmp_path)
    values = {"image_size": 16, **model} if "name" in model else {**config_to_dict(config)["model"], **model}
    config = changed(config, model=values)
    with torch.no_grad():
        expected = pre_logits(build_model(config.model, 7, config.seed).eval())(IMAGES).numpy()
    for num_ranks, stage in ((1, 1), (2, 3)):
        for found in run_ranks(features_of_rank, num_ranks, changed(config, engine__zero_stage=stage)):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "train alone": ({"evaluation__fewshot_test": None}, "fewshot_train is set but fewshot_test is null"),
    "nothing for knn": (
        {"evaluation__fewshot_test": None, "evaluation__fewshot_train": None, "evaluation__fewshot_every_steps": 0},
        "evaluation.knn needs images",
    ),
    "never": ({"evaluation__fewshot_every_steps": 0}, "would never be used"),
    "shots fall": ({"evaluation__fewshot_shots": [5, 1]}, r"fewshot_shots is \[5, 1\]"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_measured_is_refused(mistake: str, shards: Path, tmp_path: Path) -> None:
    """Before the run, in one line with the key; nothing is left out silently."""
    change, message = REFUSED[mistake]
    with pytest.raises(ConfigError, match=message):
        changed(with_features(shards, tmp_path), **change)


def test_other_classes_are_refused_at_the_start(shards: Path, tmp_path: Path) -> None:
    """Not after the first thousand steps: shots of 7 classes, test images that say 8."""
    other = make_shards(tmp_path / "other", num_samples=9)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["label"] |= {"num_classes": 8, "names": None}
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="7 classes.* and .*8 classes.* must have the same classes"):
        open_data(with_features(shards, tmp_path, evaluation__fewshot_test=other))


@pytest.mark.parametrize(
    ("decay", "steps", "told"),
    [
        (0.9999, 40, "kept, still hold 99.6% of the initial weights; 0.89125 would leave 1 %"),
        (0.9999, 20_000, None),  # the paper's
        (0.0, 5, None),
    ],
)
def test_averages_that_are_the_initial_weights_are_told(
    decay: float, steps: int, told: str | None, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are what is validated and kept: a run too short for its decay would be scored on where it began."""
    config = tiny_config(shards / "train", tmp_path, optim__average_decay=decay, total_steps=steps)
    warn_of_settings(config, open_data(config))
    said = "".join(capsys.readouterr())
    assert (told in said and "optim.average_decay (0.9999): after 40 steps" in said) if told else not said


def finish_noting_reads(config: Config) -> set[str]:
    """The functions that the watchdog knows to wait for the device in."""
    callers, real = set[str](), watchdog.from_device

    def noted(read: Any) -> Any:
        callers.add(sys._getframe(1).f_code.co_name)
        return real(read)

    watchdog.from_device = agreement.from_device = noted
    train(config)
    return callers


def test_the_watchdog_knows_where_a_run_waits_for_its_gpu(tmp_path: Path) -> None:
    """In agreements, log lines, validations, norms of layers and saves: there the GPU may wait for another rank. And a
    save has the score of its own step alone."""
    options: dict[str, Any] = {"log__layers_every_steps": 4, "evaluation__every_steps": 4, "checkpoint__every_steps": 3}
    shards = make_shards(tmp_path / "squares")
    config = tiny_config(shards, tmp_path, total_steps=8, data__val=str(shards), **options)
    found = run_ranks(finish_noting_reads, 1, config)[0]
    last, between = (read_state(folder)["metrics"] for folder in step_folders(tmp_path / "tiny" / "checkpoints")[:2])
    assert last and not between
    assert found >= {"begin_add_up", "_gathered", "check", "_answered", "layer_numbers"}, found


@pytest.mark.parametrize(
    ("loss", "labels", "warned"), [("softmax", "several", 1), ("sigmoid", "several", 0), ("softmax", "one", 0)]
)
def test_several_labels_under_softmax_are_told(
    several: Path, shards: Path, loss: str, labels: str, warned: int, tmp_path: Path, capsys: Any
) -> None:
    """A default that nobody chose would add up the losses of an image's labels: told by rank 0, with the other loss."""
    config = tiny_config(several if labels == "several" else shards / "train", tmp_path, loss=loss)
    data = open_data(config)
    for is_main in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranks, "is_main", lambda is_main=is_main: is_main)
            warn_of_settings(config, data)
    assert "".join(capsys.readouterr()).count("; loss=sigmoid decides on every class") == warned


@pytest.mark.parametrize(
    ("batch", "repeats", "told"),
    [(100, 1, None), (101, 1, "(101) is larger than the 100 images"), (200, 1, "2.0 times"), (200, 2, None)],
)
def test_a_batch_of_more_images_than_there_are_is_told(
    batch: int, repeats: int, told: str | None, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of those that are left to train on; copies are meant to come in one step."""
    sizes = {"data__global_batch": batch, "data__repeats": repeats, "data__held_out": 1}
    config = tiny_config(shards / "train", tmp_path, **sizes)
    warn_of_settings(config, open_data(config))
    said = "".join(capsys.readouterr())
    assert told in said if told else not said


@pytest.mark.parametrize(("held_out", "told"), [(0, 1), (5, 0)])
def test_a_best_checkpoint_of_nothing_validated_is_told(
    held_out: int, told: int, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each would be as good as any other."""
    options = {"checkpoint__keep_best": True, "data__held_out": held_out, "evaluation__every_steps": 2}
    config = tiny_config(shards / "train", tmp_path, **options)
    warn_of_settings(config, open_data(config))
    assert "".join(capsys.readouterr()).count("checkpoint.keep_best has nothing to choose by") == told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"optim__name": "lamb"}, 1),
        ({"optim__name": "lamb", "model__init": "deit"}, 0),
        ({"optim__name": "lamb", "init_from": "there"}, 0),
        ({"optim__name": "lamb", "init_from": "there", "init_new_head": True}, 1),
        ({}, 0),
    ],
)
def test_a_head_that_lamb_leaves_at_zero_is_told(
    settings: dict[str, Any], told: int, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its steps are relative to the weights (tests/test_models.py shows it)."""
    config = tiny_config(shards / "train", tmp_path, optim__weight_decay=0.1, **settings)
    warn_of_settings(config, open_data(config))
    assert "".join(capsys.readouterr()).count("the head starts from zeros") == told
