"""Ranks that would train with other settings, packages or code than rank 0 are refused before they do."""

import os
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny import changed, make_shards, tiny_config

from pretrain.config import Config
from pretrain.errors import UserError
from pretrain.train import alike
from pretrain.train.run import train


def start(config: Config, node: str) -> tuple[str, int] | None:
    """Trains with rank 1 on what it takes for a node of its own, where `node` says what differs; returns the error."""
    on_another = os.environ["RANK"] == "1"
    os.environ["LOCAL_RANK"] = "0"
    if on_another and node == "code":
        alike._sha256_of_code = lambda: "0" * 64
    if on_another and node == "seed":
        config = changed(config, seed=7)
    if on_another and node == "workers":
        config = changed(config, data__workers=1)
    try:
        train(config)
    except UserError as error:
        return str(error), error.exit_code
    return None


@pytest.mark.parametrize(
    ("node", "told"), [("seed", "seed is 7, 0 on rank 0"), ("code", "SHA-256 of pretrain/ is 000")]
)
def test_a_rank_with_other_settings_or_code_is_refused(node: str, told: str, tmp_path: Path) -> None:
    """On all ranks, as when a config is edited while they start: with other seeds they would train to DONE.

    Where an earlier start came further the next one may get other nodes, or find all files changed: 75, not 2.
    """
    config = tiny_config(make_shards(tmp_path / "squares"), tmp_path, total_steps=4)
    for code in (2, 75):
        both = run_ranks(start, 2, config, node)
        assert both[0] == both[1] and both[0] is not None
        assert both[0][0].startswith("rank 1 on ") and told in both[0][0] and both[0][1] == code
        assert not (tmp_path / "tiny" / "DONE").exists()
        (tmp_path / "tiny").mkdir(exist_ok=True)
        (tmp_path / "tiny" / "starts.jsonl").touch()


def test_a_node_may_have_other_numbers_of_processes(tmp_path: Path) -> None:
    """Nothing that is trained depends on them."""
    config = tiny_config(make_shards(tmp_path / "squares"), tmp_path, total_steps=4)
    assert run_ranks(start, 2, config, "workers") == [None, None] and (tmp_path / "tiny" / "DONE").exists()
