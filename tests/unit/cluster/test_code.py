"""The code that is kept with a run."""

import marshal
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ddpm.errors import EnvironmentLacks, RequestError
from ddpm.run.events import EventLog
from ddpm.run.files import DamagedFile
from ddpm.run.paths import RunDir
from launch.cluster import code


def test_what_is_kept_is_what_jobs_find_unpacked_and_runs_of_the_same_code_share_it(run: RunDir) -> None:
    home = code.unpack(run)
    assert code.of_run(run) == code.of_checkout()
    assert {name: (home / name).read_bytes() for name in code.of_checkout()} == code.of_checkout()
    other = RunDir(run.path.with_name("s"))
    other.path.mkdir()
    assert code.unpack(other) == home and len(list(home.parent.iterdir())) == 1


def test_it_runs_without_the_checkout(run: RunDir, tmp_path: Path) -> None:
    home = code.unpack(run)
    words = [sys.executable, "-S", "-c", "import launch, ddpm; print(launch.__file__, ddpm.__file__)"]
    done = subprocess.run(words, cwd=tmp_path, env={"PYTHONPATH": str(home)}, capture_output=True, text=True)
    assert done.stdout.split() == [str(home / top / "__init__.py") for top in ("launch", "ddpm")], done.stderr


def test_two_runs_of_the_same_code_keep_the_same_bytes(run: RunDir) -> None:
    code.keep(run, code.of_checkout())
    first = run.code.read_bytes()
    code.keep(run, dict(reversed(code.of_checkout().items())))
    assert run.code.read_bytes() == first


def test_what_was_changed_or_purged_where_it_is_unpacked_is_put_back(run: RunDir) -> None:
    home = code.unpack(run)
    for name, change in (("ddpm/errors.py", "print('edited')"), ("launch/jobs.py", None)):
        (home / name).unlink()
        if change:
            (home / name).write_text(change)
    assert code.unpack(run) == home
    assert {name: (home / name).read_bytes() for name in code.of_checkout()} == code.of_checkout()


def test_a_difference_names_files_and_counts_lines() -> None:
    old = {f"ddpm/{n}.py": b"a\nb\nc\n" for n in range(7)}
    new = {**{name: b"a\nB\nc\nd\n" for name in old}, "launch/x.py": b"1\n2\n"}
    assert code.differences(old, old) == ""
    assert code.differences(old, {**old, "launch/x.py": b"1\n2\n"}) == "launch/x.py +2 -0"
    assert code.differences(old, new).startswith("ddpm/0.py +2 -1, ddpm/1.py +2 -1")
    assert code.differences(old, new).endswith(", and 3 files more")


def test_code_that_is_no_python_is_refused_by_its_line(run: RunDir) -> None:
    with pytest.raises(RequestError, match=r"launch/jobs.py, line 2: no job could run this code"):
        code.check({"launch/jobs.py": b"import os\nif\n"})
    code.check(code.of_checkout())


def test_a_run_never_gets_code_that_is_no_python(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "of_checkout", lambda: {"launch/jobs.py": b"if\n"})
    with pytest.raises(RequestError, match="no job could run this code"):
        code.unpack(run)
    assert not run.code.exists()


def test_an_archive_that_would_fill_the_disk_is_not_unpacked(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    code.keep(run, {"ddpm/x.py": bytes(1 << 20)})
    monkeypatch.setattr(code, "MAX_BYTES", 1 << 19)
    assert run.code.stat().st_size < code.MAX_BYTES
    with pytest.raises(DamagedFile, match="no code of ours"):
        code.of_run(run)


def test_a_kill_while_it_is_laid_out_leaves_none_of_it(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out = code.mend

    def killed(archive: zipfile.ZipFile, place: Path) -> None:
        lay_out(archive, place)
        raise KeyboardInterrupt

    monkeypatch.setattr(code, "mend", killed)
    with pytest.raises(KeyboardInterrupt):
        code.unpack(run)
    assert not code.home(run).exists()


def test_code_that_is_replaced_stays_beside_the_run_once(run: RunDir) -> None:
    old, new = {"ddpm/a.py": b"1\n"}, {"ddpm/a.py": b"2\n"}
    for kept in (old, old, new, old):
        code.keep(run, kept)
    assert code.of_run(run) == old and code.earlier(run, code.digest(new)) == new
    assert code.earlier(run, code.digest(old)) == old and code.earlier(run, "0" * 16) is None
    assert len(list(run.path.iterdir())) == 3
    run.code.write_bytes(b"damaged")
    code.keep(run, new)
    assert code.of_run(run) == new


@pytest.mark.parametrize(
    "line", ["import research", "from research.losses import snr", "import os, research as r", "import scratch"]
)
def test_an_import_of_what_lies_in_the_checkout_and_is_not_kept_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str
) -> None:
    for place in ("PROJECT", "SHIPPED"):
        monkeypatch.setattr(code, place, tmp_path)
    fine = {"ddpm/a.py": b"import os, json\nfrom ddpm import b\ndef f():\n    import research\n"}
    (tmp_path / "wandb").mkdir()
    code.check({**fine, "ddpm/b.py": f"{line}\nimport wandb\n".encode()})
    (tmp_path / "research").mkdir()
    for name in ("research/__init__.py", "scratch.py"):
        (tmp_path / name).touch()
    code.check(fine)
    with pytest.raises(RequestError, match=r"ddpm/b\.py imports (research|scratch), .* move it into ddpm/"):
        code.check({**fine, "ddpm/b.py": f"{line}\n".encode()})


def test_other_packages_beside_an_installation_are_no_modules_of_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(code, "PROJECT", tmp_path)
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").touch()
    code.check({"ddpm/a.py": b"import numpy\n"})


def test_the_code_of_a_job_that_was_queued_by_hand_is_known_from_its_start(run: RunDir) -> None:
    for job, event, digest in (("1", "submitted", "aa"), ("2", "allocated", "bb"), ("2", "started", None)):
        EventLog(run, job, 0, "n1").append(event, code=digest)
    assert code.last_run(run) == "bb"


def test_tables_beside_the_code_are_kept_and_hidden_copies_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for place in ("PROJECT", "SHIPPED"):
        monkeypatch.setattr(code, place, tmp_path)
    names = ("ddpm/a.py", "ddpm/x/weights.json", "ddpm/x/kernel.cu")
    for name in (*names, "ddpm/.ipynb_checkpoints/a-checkpoint.py", "ddpm/.#a.py", "ddpm/big.npy", "notes/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert code.of_checkout.__wrapped__().keys() == set(names)


@pytest.mark.parametrize("name", ["../../etc/x.py", "ddpm/../../x.py", "/etc/x.py", "ddpm/x.so", "tests/x.py"])
def test_an_archive_with_other_names_than_ours_is_not_unpacked(run: RunDir, name: str) -> None:
    with zipfile.ZipFile(run.code, "w") as archive:
        archive.writestr(name, "")
    with pytest.raises(DamagedFile, match="no code of ours"):
        code.unpack(run)


def test_a_damaged_archive_is_named_with_what_to_do(run: RunDir) -> None:
    code.keep(run, code.of_checkout())
    packed = bytearray(run.code.read_bytes())
    with zipfile.ZipFile(run.code) as archive:
        largest = max(archive.infolist(), key=lambda member: member.compress_size)
    packed[largest.header_offset + largest.compress_size // 2] ^= 1  # not where nothing of a file is
    for data in (bytes(packed), bytes(packed[:1000]), b""):
        run.code.write_bytes(data)
        with pytest.raises(DamagedFile, match=r"code\.zip .*--code new"):
            code.unpack(run)


def test_no_flipped_bit_of_it_changes_what_is_run(run: RunDir) -> None:
    small = {"ddpm/a.py": b"x = 1\n" * 9, "slurm/b.sh": b""}
    code.keep(run, small)
    whole, noticed = run.code.read_bytes(), 0
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        run.code.write_bytes(data)
        try:
            assert code.of_run(run) == small
        except DamagedFile:
            noticed += 1
    assert noticed > 4 * len(whole)


def test_where_it_cannot_be_laid_out_the_place_is_named(run: RunDir) -> None:
    (run.path.parent / ".cache").write_text("in the way")
    with pytest.raises(EnvironmentLacks, match=r"\.cache/code"):
        code.unpack(run)


def test_damaged_bytecode_and_what_could_be_imported_instead_are_put_right(run: RunDir) -> None:
    home = code.unpack(run)
    compiled = home / "ddpm" / "__pycache__" / f"errors.{sys.implementation.cache_tag}.pyc"
    whole, mended = compiled.read_bytes(), set()
    for damage in (whole.replace(b"\x00", b"\x01", 3), whole[:100], b""):
        compiled.chmod(0o644)
        compiled.write_bytes(damage)
        (home / "numpy.py").write_text("raise SystemExit")
        (home / "ddpm" / "zlib.py").write_text("")
        assert code.unpack(run) == home
        mended.add(compiled.read_bytes()[16:])
        assert not (home / "numpy.py").exists() and not (home / "ddpm" / "zlib.py").exists()
    (good,) = mended
    assert marshal.loads(good).co_names == marshal.loads(whole[16:]).co_names


def test_the_archive_mends_what_was_purged_with_nothing_but_python(run: RunDir, tmp_path: Path) -> None:
    """As a job does before its first line that needs any of it."""
    home = code.unpack(run)
    words = [sys.executable, "-S", str(run.code), str(home)]
    for purge in (lambda: shutil.rmtree(home), (home / "slurm" / "supervise.sh").unlink):
        purge()
        assert subprocess.run(words, cwd=tmp_path, env={}).returncode == 0
        assert {name: (home / name).read_bytes() for name in code.of_checkout()} == code.of_checkout()
    code.keep(run, {**code.of_checkout(), "ddpm/new.py": b""})  # as --code new would
    (home / "launch" / "jobs.py").unlink()
    assert subprocess.run(words, cwd=tmp_path, env={}).returncode == 0
    assert not (home / "ddpm" / "new.py").exists()  # it is what jobs of before run
