"""Files appear complete or not at all, whatever ends their writing."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import cli, storage
from pretrain.storage import crc32c, fsync_path, network_file_system, remove, replacing, sha256, write_text


def test_a_file_is_replaced_by_one_rename(tmp_path: Path) -> None:
    """The old text stands until the block has ended; nothing else is left in the folder."""
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    """Whatever is raised while writing, an interrupt too: the old file stays, the temporary one goes."""
    path = tmp_path / "file.txt"
    write_text(path, "old")
    for error in (OSError("full"), KeyboardInterrupt()):
        with pytest.raises(type(error)), replacing(path) as temporary:
            temporary.write_text("half")
            raise error
        assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    """The system call that finds the disk full has no name in its error, and the user has several disks."""
    with (
        pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/file.txt'"),
        replacing(tmp_path / "file.txt"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_file_and_folder_are_synced_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is on the disk before the name is, and the name before the call returns."""
    done: list[str] = []
    real = os.replace
    monkeypatch.setattr(storage, "fsync_path", lambda path: done.append(f"fsync {path.name}"))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), real(a, b)))
    write_text(tmp_path / "file.txt", "text")
    assert done == ["fsync .tmp-file.txt", "rename", f"fsync {tmp_path.name}"]


def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    """kill -9 in the midst of the writing."""
    path = tmp_path / "file.txt"
    write_text(path, "old")
    program = (
        "import os, sys; from pathlib import Path; from pretrain.storage import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, path], cwd=Path(__file__).parents[1]).returncode == -9
    assert path.read_text() == "old"
    write_text(path, "new")  # over what the kill has left
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_shared_files_have_temporaries_of_their_own(tmp_path: Path) -> None:
    """Two processes that write the same file do not write into each other's temporary."""
    with replacing(tmp_path / "file.txt", shared=True) as temporary:
        assert str(os.getpid()) in temporary.name
        temporary.write_text("text")
    fsync_path(tmp_path)


def test_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    """Of this machine, when it has ended; one that runs, another machine and other names are left alone."""
    program = (
        "import os, sys; from pathlib import Path; from pretrain.storage import replacing\n"
        "with replacing(Path(sys.argv[1]), shared=True) as temporary: temporary.touch(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "file.txt"], cwd=Path(__file__).parents[1])
    (left,) = (path.name for path in tmp_path.iterdir())
    host, start, numbering, process, _ = left.rsplit("-", 4)
    here = f"{host}-{start}-{numbering}"
    assert Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "").startswith(start)
    others = {left.replace(host, ".tmp-other"), left.replace(numbering, "1"), f"{here}-0{'9' * 30}-x"}
    others |= {f"{here}-\u0663-x", f"{here}--x", ".tmp-file.txt", f"x{left}"}
    others |= {left.replace(start, "0" * len(start))}  # a machine of the same name, made from the same image
    for name in others:
        (tmp_path / name).touch()
    with replacing(tmp_path / "file.txt", shared=True) as temporary:
        temporary.touch()
        storage.remove_left_over(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == others | {temporary.name}


def test_what_a_process_left_whose_end_nobody_noted_is_removed(tmp_path: Path) -> None:
    """A zombie, as killed processes stay in a container without an init."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # until it is one
    with replacing(tmp_path / "file.txt", shared=True) as temporary:
        temporary.touch()
        left = temporary.with_name(temporary.name.replace(f"-{os.getpid()}-", f"-{process.pid}-"))
        left.touch()
        storage.remove_left_over(tmp_path)
        assert temporary.exists() and not left.exists()
    process.wait()


def test_a_folder_that_cannot_be_listed_is_heard(tmp_path: Path, no_listing: None) -> None:
    """Its left-over files would stay for ever; a glob hides the error."""
    with pytest.raises(PermissionError):
        storage.remove_left_over(tmp_path)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("length", [200, 255])
def test_long_names_have_temporaries_too(shared: bool, length: int, tmp_path: Path) -> None:
    """A name as long as may be, in letters of two bytes too."""
    for name in ("a" * length, "\u00e4" * (length // 2)):
        write_text(tmp_path / name, "text", shared=shared)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()


def test_checksums(tmp_path: Path) -> None:
    """The published check values of both."""
    (tmp_path / "digits").write_bytes(b"123456789")
    assert crc32c(tmp_path / "digits") == "e3069283"
    assert sha256(tmp_path / "digits").startswith("15e2b0d3c33891ebb0f1ef609ec41942")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_folders_is_fine(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says of a folder is passed over; of a file, or a failing disk, it is an error."""

    def fsync(descriptor: int, number: int = number) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(os, "fsync", fsync)
    fsync_path(tmp_path)
    with pytest.raises(OSError):
        fsync_path(tmp_path / "file")
    monkeypatch.setattr(os, "fsync", lambda descriptor: fsync(descriptor, errno.EIO))
    with pytest.raises(OSError):
        fsync_path(tmp_path)


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    """Of links, dead ones too, the link goes; of folders all that is in them; nothing is no error."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    for target in ("folder", "folder/file", "nowhere"):
        (tmp_path / "link").symlink_to(target)
        remove(tmp_path / "link")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]
    remove(tmp_path / "folder")
    remove(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "told"), [(errno.ESTALE, "the disk may be away"), (errno.ENOSPC, "make room, or ")])
def test_an_error_of_the_disk_is_one_line(number: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever it comes from: 75, not a traceback and a defect of ours."""

    def fail() -> None:
        raise OSError(number, os.strerror(number), "runs/a/STOP.json")

    with pytest.raises(SystemExit) as end:
        cli.run(fail)
    assert end.value.code == 75
    assert capsys.readouterr().err.startswith(f"error: runs/a/STOP.json: {os.strerror(number)}; {told}")


MOUNTS = """/dev/vda / ext4 rw 0 0
systemd-1 {here}/data autofs rw 0 0
10.0.0.1@o2ib:/scratch {here}/data lustre rw,flock 0 0
/dev/nvme0n1 {here}/data/local xfs rw 0 0
server:/my {here}/my\\040set nfs4 rw 0 0
bucket {here}/data/bucket fuse.gcsfuse rw 0 0
fuse-overlayfs {here}/data/layers fuse.fuse-overlayfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("", None),
        ("data", "Lustre"),
        ("data/imagenet/train", "Lustre"),
        ("data/local/imagenet", None),
        ("database", None),
        ("my set/photos", "NFS"),
        ("data/bucket/train", "gcsfuse"),
        ("data/layers", None),
    ],
)
def test_network_file_systems(path: str, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deepest mount above a path counts, of two at one place the later; names may hold blanks."""
    here = tmp_path.resolve()
    (here / "mounts").write_text(MOUNTS.format(here=here))
    monkeypatch.setattr(storage, "_MOUNTS", here / "mounts")
    assert network_file_system(here / path) == name
    monkeypatch.setattr(storage, "_MOUNTS", here / "absent")  # not Linux
    assert network_file_system(here / path) is None
