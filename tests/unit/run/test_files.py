"""ddpm/run/files.py: a name appears whole or not at all, and what was published stays as it is."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import pytest

from ddpm.errors import RequestError, RunBusy
from ddpm.run import files, paths
from ddpm.run.files import DamagedFile, publishing, read_bytes, read_json, read_signed, sign, write_bytes
from ddpm.run.paths import RunDir


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_publishing_does_not_replace(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        write_bytes(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first" and names(tmp_path) == ["a"]


def test_publishing_without_hard_links_does_not_replace_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    write_bytes(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        write_bytes(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first" and names(tmp_path) == ["a"]


def test_a_link_that_a_server_makes_and_denies_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked_twice(tmp: Path, path: Path, link: Callable[[Path, Path], None] = os.link) -> None:
        link(tmp, path)
        raise FileExistsError(17, "File exists")  # of NFS, where its first answer was lost

    monkeypatch.setattr(os, "link", asked_twice)
    write_bytes(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        write_bytes(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first" and names(tmp_path) == ["a"]


def test_a_link_to_what_was_removed_at_once_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(FileExistsError):
        write_bytes(tmp_path / "a", b"first")
    assert names(tmp_path) == []


@pytest.mark.parametrize(("times", "read"), [(3, True), (1000, False)])
def test_what_another_host_replaces_while_it_is_read_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, read: bool
) -> None:
    write_bytes(tmp_path / "a", b"second")
    stale = iter(range(times))

    def of_nfs(path: Path, opened: Callable[[Path], BinaryIO] = files.open_file) -> BinaryIO:
        if next(stale, None) is not None:
            raise OSError(errno.ESTALE, "Stale file handle")
        return opened(path)

    monkeypatch.setattr(files, "open_file", of_nfs)
    with nullcontext() if read else pytest.raises(OSError, match="Stale"):
        assert read_bytes(tmp_path / "a") == b"second"


def test_replace_is_for_those_who_ask(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"first")
    write_bytes(tmp_path / "a", b"second", replace=True)
    assert (tmp_path / "a").read_bytes() == b"second" and names(tmp_path) == ["a"]


def test_an_exception_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), publishing(tmp_path / "a") as f:
        f.write(b"half")
        assert names(tmp_path)[0].startswith(files.TMP_PREFIX)
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_withheld_publication_leaves_nothing(tmp_path: Path) -> None:
    def refuse() -> None:
        raise RunBusy("taken over")

    with pytest.raises(RunBusy):
        write_bytes(tmp_path / "a", b"x", may_publish=refuse)
    assert names(tmp_path) == []


def test_a_kill_in_the_middle_leaves_a_temporary_and_no_final_file(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from ddpm.run.files import publishing\n"
        "with publishing(Path(sys.argv[1]) / 'a', token='7') as f:\n"
        "    f.write(b'half'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[3])
    assert done.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".tmp-a.7.")


def test_a_folder_appears_with_all_that_is_in_it_or_not_at_all(tmp_path: Path) -> None:
    with files.publishing_folder(tmp_path / "made") as folder:
        (folder / "one").touch()
        assert not (tmp_path / "made").exists()
    with pytest.raises(KeyError), files.publishing_folder(tmp_path / "broken") as folder:
        (folder / "one").touch()
        raise KeyError
    with pytest.raises(OSError, match=r"No space left .*/full'"), files.publishing_folder(tmp_path / "full"):
        raise OSError(errno.ENOSPC, "No space left on device")  # as write(2) says it, without a name
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["made", "made/one"]


def test_everything_is_durable_before_its_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, link = os.fsync, os.link

    def spy_fsync(fd: int) -> None:
        order.append("fsync " + ("dir" if os.path.isdir(f"/proc/self/fd/{fd}") else "file"))  # noqa: PTH112
        fsync(fd)

    def spy_link(a: Path, b: Path) -> None:
        order.append("name")
        link(a, b)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "link", spy_link)
    write_bytes(tmp_path / "a", b"x", may_publish=lambda: order.append("may I"))
    assert order == ["fsync file", "may I", "name", "fsync dir"]


def test_the_hash_taken_while_writing_is_that_of_the_file(tmp_path: Path) -> None:
    with publishing(tmp_path / "a") as f:
        f.write(b"one")
        f.write(memoryview(b"two"))
    assert (f.sha256, f.size) == (files.sha256_file(tmp_path / "a"), 6)


def test_a_signed_record_notices_any_change(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    files.write_json(path, sign({"step": 3, "file": "ü"}))
    assert read_signed(path)["step"] == 3
    for damage in (lambda s: s.replace("3", "4", 1), lambda s: s[:-4], lambda s: "[]", lambda s: '{"step": 3}'):
        path.write_text(damage(json.dumps(sign({"step": 3}))))
        with pytest.raises(DamagedFile, match=r"r\.json"):
            read_signed(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedFile, match="not JSON"):
        read_signed(path)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "a\n", "ä", "x" * 101, "$(id)", "a;b"])
def test_names_that_would_be_paths_or_commands_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="is not allowed"):
        paths.check_name(name)


@pytest.mark.parametrize("name", ["a", "1e-4", "A-Z_0.9", "x" * 100, "-a"])
def test_other_names_are_fine(name: str) -> None:
    assert paths.check_name(name) == name


def test_only_steps_with_a_manifest_count_as_saved_newest_first(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.latest_step() == 0
    run.checkpoints.mkdir()
    for name in ("step-000000003.pt", "step-000000002.json", "step-1000000000.json", ".tmp-step-000000009.json.1.2"):
        (run.checkpoints / name).touch()
    assert run.steps_saved() == [1_000_000_000, 2] and run.latest_step() == 1_000_000_000


def test_sample_sets_are_directories_with_a_request_or_shards_that_are_not_hidden(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.sample_sets() == []
    for name in ("b", "a", ".tmp-c"):
        run.sample_set(name).path.mkdir(parents=True)
        (run.sample_set(name).request if name != "b" else run.sample_set(name).shard(0, 1)).touch()
    (run.samples / "lost+found").mkdir()
    (run.samples / "notes.txt").touch()
    assert [s.name for s in run.sample_sets()] == ["a", "b"]


def test_brackets_without_end_are_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" * 100_000)
    with pytest.raises(DamagedFile, match="not JSON"):
        files.read_signed(path)
    assert files.read_json(path) is None
    path.write_text('{"a": 1}\n3\n' + "[" * 100_000 + '\n{"b": 2}\n{"half')
    assert files.read_jsonl(path) == [{"a": 1}, {"b": 2}]


def test_what_is_no_file_is_damaged_by_name_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(str(tmp_path / "socket.json"))
    (tmp_path / "lfs.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    reasons = {
        "fifo.json": "a FIFO",
        "zero.json": "a device",
        "socket.json": "a socket",
        "lfs.json": "a pointer of Git LFS",
    }
    for name, why in reasons.items():
        for read in (read_bytes, read_signed, files.sha256_file):
            with pytest.raises(DamagedFile, match=f"{name}: {why}"):
                read(tmp_path / name)
        assert read_json(tmp_path / name) is None
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        read_bytes(tmp_path)


def test_a_file_beyond_the_bound_of_its_kind_is_damaged_by_name_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b"x" * 8)
    assert read_bytes(path, 8) == b"x" * 8
    with pytest.raises(DamagedFile, match=r"run\.json: more than 7 bytes"):
        read_bytes(path, 7)
    os.truncate(path, 6 << 30)
    with pytest.raises(DamagedFile, match=r"run\.json: more than 8,388,608 bytes"):
        read_signed(path)
    with pytest.raises(DamagedFile, match=r"stat: more than 3 bytes"):
        read_bytes(Path("/proc/self/stat"), 3)  # it does not say its size


# ---------------------------------------------------------------- links


def test_a_link_to_nothing_is_told_from_what_is_there_and_from_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, there = tmp_path / "link", tmp_path / "there"
    link.symlink_to(there)
    told = f"a link to {there}, where nothing is"
    assert [files.link_to_nothing(p) for p in (link, there)] == [told, ""]
    there.touch()
    assert files.link_to_nothing(link) == ""
    there.unlink()
    monkeypatch.setattr(Path, "readlink", lambda path: path.with_name("gone").stat())
    assert files.link_to_nothing(link) == ""  # it went meanwhile


def test_an_error_of_reading_names_the_file_as_one_of_opening_does(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"a")
    with pytest.raises(OSError, match=r"Bad file descriptor: '.*/a'"), files.open_file(path) as f:
        os.dup2(os.open(tmp_path, os.O_PATH), f.fileno())  # of which read(2) reads nothing
        f.read(2)  # the first byte is known by then
    with pytest.raises(OSError, match=r"Input/output error: '/proc/self/mem'"):  # nothing is mapped at its beginning
        files.open_file(Path("/proc/self/mem"))
