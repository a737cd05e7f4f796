"""Real photos, where PRETRAIN_TEST_DATA names a folder of them: from archives through an epoch to its receipt."""

from pathlib import Path

import pytest
from ranks import run_ranks
from tiny import tiny_config

from pretrain.audit.checks import audit
from pretrain.audit.folder import Options as AuditOptions
from pretrain.config import Config
from pretrain.data.manifest import load_manifest
from pretrain.shards.class_list import read_class_list
from pretrain.shards.make import Options, make_shards
from pretrain.shards.verify import verify
from pretrain.train.run import train

# Archive, the list of its classes where it has none, samples, samples of a step.
SETS = {
    "tiny-imagenet": ("tiny_imagenet_val_dev-000000.tar.gz", "tiny_imagenet_classes.json", 2000, 100),
    "imagenet": ("imagenet_train_photos_dev-000000.tar", "imagenet1k_classes.json", 150, 50),
    "cifar-100": ("cifar100_vtab1k_style_val200.npz", None, 200, 50),
}


def finish(config: Config) -> None:
    train(config)


@pytest.mark.slow
def test_from_archives_to_a_receipt(test_data: Path, tmp_path: Path) -> None:
    """Shards, --verify, an epoch of a tiny model, the audit of every step: nothing is wrong, and nothing is lost."""
    for name, (archive, classes, number, batch) in SETS.items():
        listed = read_class_list(test_data / classes) if classes else None
        path, _ = make_shards([test_data / archive], listed, tmp_path / name, Options(samples_per_shard=70))
        told: list[str] = []
        assert list(verify(load_manifest(path), told=told.append)) == told == []
        changes = {"data__global_batch": batch, "total_steps": number // batch, "checkpoint__every_steps": number}
        run_ranks(finish, 1, tiny_config(tmp_path / name, tmp_path / "runs", name=name, **changes))
        found = audit(tmp_path / "runs" / name, AuditOptions(full=True, data=None, no_data=False, seed=0))
        assert [finding.wrong for finding in found if finding.wrong] == []
        epochs = next(finding for finding in found if finding.check == "epochs")
        assert f"{number:,} used + 0 bad" in f"{epochs}", epochs
