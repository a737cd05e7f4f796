"""Times that the documentation promises: other tests shorten these limits, here they are what a run has."""

from pathlib import Path

from pretrain import cli
from pretrain.cluster import monitor, restarts, signals, watchdog
from pretrain.config.sections import EngineConfig
from pretrain.data import reader, remote
from pretrain.train import ending, incoming, save

DOCS = Path(__file__).resolve().parents[1] / "docs"
KILLED_S = 30  # after they have asked to stop, DeepSpeed's launcher and SLURM (KillWait) kill
NAMED_S = 30  # beyond its limit: a rank that hangs has been told of, and the others have named it
BACK_S = 10  # after a rank was lost: the next step
REFUSED_S = 30  # at most, until a server that refuses at once is given up


def documented(page: str, *sentences: str) -> None:
    text = " ".join((DOCS / page).read_text().split())
    for sentence in sentences:
        assert sentence in text, f"docs/{page} does not say: {sentence}"


def test_documents_name_the_limits() -> None:
    """The number in a sentence is the one in the code."""
    documented(
        "reliability.md",
        f"A stopped process has {monitor.STOPPED_S:g} s to continue.",
        f"| {save.COPIED_AFTER_STOP_S:g} s for a copy under way, else the next start makes it",
        f"the next step after {BACK_S} s on 2 cores",
        f"within the limit + {NAMED_S} s",
        f"before it meets the others | the others are ended after {restarts.AGREED_S:g} s",
        f"the monitor process does the same {monitor.BLOCKED_S:g} s later",
        "tried again after {:g}, {:g}, {:g} and {:g} s, the shard reopened".format(*reader.RETRY_AFTER_S),
    )
    documented("cluster.md", f"kills its ranks {KILLED_S} s after it was asked to stop", f"KillWait ({KILLED_S} s")
    documented("data.md", f"silence of {remote.SILENCE_S:g} s", f"{remote.MAX_TRIES} times in a row without news")


def test_a_stop_has_half_of_its_time_for_steps_and_a_save() -> None:
    """What it waits for in turn: the loss of a launcher is seen, a batch may still come, a last copy is made."""
    waits_s = signals._LOOK_EVERY_S + incoming.GIVEN_S + incoming._LOOK_EVERY_S + save.COPIED_AFTER_STOP_S
    assert waits_s <= KILLED_S / 2


def test_a_lost_rank_is_named_in_time() -> None:
    """In the order in which they speak: itself, the process beside it, those that wait for it."""
    looks_s = monitor.LOOK_EVERY_S
    by_monitor_s = monitor.BLOCKED_S + looks_s + monitor.STACKS_S
    assert by_monitor_s < watchdog.WAITING_S  # or who waits would be ended before the cause is known
    assert by_monitor_s + watchdog.LOOK_AROUND_S <= NAMED_S
    assert monitor.STOPPED_S + looks_s + watchdog.LOOK_AROUND_S <= 60  # a stopped rank within a minute
    assert monitor.STOPPED_S < EngineConfig().watchdog_s < EngineConfig().timeout_s


def test_restarts_leave_time_to_tell() -> None:
    """Ranks are ended when what they can tell has been told, and soon enough for what is promised of the next start."""
    assert monitor.LOOK_EVERY_S < restarts.LOST_S  # the process beside a killed rank has told of it
    assert cli._WAIT_FOR_RANK_0_S < restarts.AGREED_S  # the others wait for rank 0's line
    assert ending._WAIT_FOR_REPORT_S < restarts.AGREED_S  # and for the name of who was lost
    assert restarts.LOST_S + restarts._MONITORS_END_S < BACK_S


def test_patience_with_data_is_no_hanging() -> None:
    """A disk, or a server, is given up, with exit code 75, before the watchdog takes the rank for one that hangs."""
    disk_s = reader.MAX_TRYING_S + max(reader.RETRY_AFTER_S)
    waits_s = sum(min(remote.MAX_WAIT_S, remote.FIRST_WAIT_S * 2**number) for number in range(remote.MAX_TRIES - 1))
    server_s = waits_s + remote.MAX_TRIES * remote.SILENCE_S
    assert waits_s <= REFUSED_S
    assert sum(reader.RETRY_AFTER_S) < reader.MAX_TRYING_S  # all tries are made where none lasts
    assert max(disk_s, server_s) < EngineConfig().watchdog_s / 2  # a last try may itself last for a minute or two
    assert remote.SILENCE_S < KILLED_S / 2  # within which a download hears a stop
