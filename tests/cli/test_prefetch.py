"""tools/prefetch.py: what jobs read is brought to one folder, and then no job needs a network."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm.errors import EnvironmentLacks, RequestError
from launch.checkup import files
from tests.cli.harness import Shell, read
from tests.conftest import PROJECT, requires
from tests.images import write_zip
from tools import prefetch


def test_a_file_that_was_brought_by_hand_is_checked_and_put_where_a_download_would_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, cache = b"an archive" * 1000, tmp_path / "cache"
    place = prefetch.Known(Path("data") / "x", "sha256", hashlib.sha256(content).hexdigest()[:8])
    monkeypatch.setattr(prefetch, "known_files", lambda: {"x.tar.gz": place})
    given = tmp_path / "x.tar.gz"
    with pytest.raises(EnvironmentLacks, match=r"--from .*x\.tar\.gz"):
        prefetch.bring(given, cache)
    given.write_bytes(content[:-1])
    with pytest.raises(RequestError, match=r"its sha256 is .* not that of the published file"):
        prefetch.bring(given, cache)
    with pytest.raises(RequestError, match=r"other: .* known are cifar-10-python\.tar\.gz"):
        prefetch.check_names([tmp_path / "other"])
    assert not cache.exists()
    given.write_bytes(content)
    for _ in range(2):  # what is there is left alone
        prefetch.bring(given, cache)
        assert (cache / "data" / "x" / "x.tar.gz").read_bytes() == content


def test_the_files_that_it_knows_are_those_that_a_submission_fetches() -> None:
    known = prefetch.known_files()
    assert {name: str(place.where) for name, place in known.items()} == {
        "cifar-10-python.tar.gz": "data/cifar10",
        "pt_inception-2015-12-05-6726825d.pth": "weights",
        "dinov2_vitl14_pretrain.pth": "weights",
    }
    assert set(known) == set(files.FETCHED.values())


def test_what_was_prefetched_is_trained_sampled_and_scored_without_a_network(shell: Shell, tmp_path: Path) -> None:
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    able = subprocess.run([*alone, "true"], capture_output=True).returncode == 0
    requires(able, "no network namespaces here", "allow user namespaces, or run as root")
    images = write_zip(tmp_path / "images.zip")
    data = ["data.name=images", f"data.path={images}", "data.image_size=16", "evaluate.reference=train"]
    argv, options = shell.command("submit")
    fetch = [sys.executable, str(PROJECT / "tools" / "prefetch.py"), "tiny.yaml", *data, "--statistics"]
    done = subprocess.run(fetch, capture_output=True, text=True, timeout=240, **options)
    assert done.returncode == 0 and f"all that jobs read is in {shell.root / '.cache'}" in done.stdout, done.stderr
    (statistics,) = (shell.root / ".cache" / "data" / "reference").glob("*.npz")
    made_at = statistics.stat().st_mtime_ns
    words = ["tiny.yaml", *data, "train.total_steps=4", "sample.num_samples=16", "--cluster", "local"]
    words += ["--then", "sample,evaluate", "--wait"]
    options["env"]["PATH"] += ":/usr/bin:/bin"
    done = subprocess.run([*alone, *argv, *words], capture_output=True, text=True, timeout=240, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    (score,) = (shell.root / "tiny" / "eval").glob("*.json")
    assert read(score)["num_samples"] == 16 and statistics.stat().st_mtime_ns == made_at
