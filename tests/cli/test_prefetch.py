"""tools/prefetch.py: what jobs read is brought to one folder, and then no job needs a network."""

import hashlib
import http.server
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm.errors import EnvironmentLacks, RequestError
from launch.checkup import files
from tests.cli.harness import Shell, read
from tests.conftest import PROJECT, requires
from tests.images import write_zip
from tools import prefetch
from tools.download import download


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


CONTENT = bytes(range(256)) * 4000


class Archive(http.server.BaseHTTPRequestHandler):
    """/cut/…: half of what is asked for, and no more; /whole/…: it, from where it is asked for; /odd/…: no HTTP; else
    nothing."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range")))  # type: ignore[attr-defined]
        begin = int(re.findall(r"\d+", self.headers.get("Range", "0"))[0])
        kind = self.path.split("/")[1]
        if kind == "odd":
            self.wfile.write(b"SSH-2.0-x\r\n")
            return
        if kind not in ("cut", "whole", "other"):
            self.send_error(404)
            return
        data = CONTENT[begin:] if kind != "other" else b"a login page"
        self.send_response(206 if begin and kind != "other" else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if kind == "cut" else data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Archive) as server:
        server.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_download_that_is_cut_short_goes_on_at_the_next_address_and_is_checked_as_a_whole(
    tmp_path: Path, site: http.server.ThreadingHTTPServer
) -> None:
    at, target = f"http://127.0.0.1:{site.server_port}", tmp_path / "data" / "x.tar.gz"
    sha256, half = hashlib.sha256(CONTENT).hexdigest(), len(CONTENT) // 2
    urls = [f"{at}/{kind}/x.tar.gz" for kind in ("nowhere", "cut")]
    with pytest.raises(EnvironmentLacks, match=r"x\.tar\.gz could not .* answered 404.*cut short after 512,000"):
        download(urls, target, "sha256", sha256)
    assert not target.exists()
    download([f"{at}/whole/x.tar.gz"], target, "sha256", sha256)
    assert target.read_bytes() == CONTENT and [p.name for p in target.parent.iterdir()] == ["x.tar.gz"]
    asked = site.asked  # type: ignore[attr-defined]
    assert asked[-1] == ("/whole/x.tar.gz", f"bytes={half}-") and len(asked) == 3


def test_what_is_not_the_published_file_is_thrown_away_and_the_next_address_asked(
    tmp_path: Path, site: http.server.ThreadingHTTPServer
) -> None:
    at, target = f"http://127.0.0.1:{site.server_port}", tmp_path / "x.tar.gz"
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(EnvironmentLacks, match=r"/other/x: its sha256 is .* not that of the published file"):
        download([f"{at}/other/x"], target, "sha256", sha256)
    with pytest.raises(EnvironmentLacks, match=r"InvalidURL: nonnumeric port: 'port'; .*BadStatusLine: SSH-2.0-x"):
        download(["http://no:port/x", f"{at}/odd/x"], target, "sha256", sha256)
    download([f"{at}/odd/x", f"{at}/other/x", f"{at}/whole/x"], target, "sha256", sha256)
    assert target.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [target]


def test_a_mirror_is_asked_first_for_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(prefetch, "download", lambda urls, *_: asked.append(urls))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    for _ in range(2):
        prefetch.fetch("inception", tmp_path, ["https://a.example/files/", "https://b.example"])
        there = tmp_path / "weights" / files.FETCHED["inception"]
        there.parent.mkdir(exist_ok=True)
        there.touch()
    ((first, second, published),) = asked
    assert first == f"https://a.example/files/{there.name}" and second == f"https://b.example/{there.name}"
    assert published.startswith("https://github.com/")
    prefetch.fetch("digits", tmp_path, [])
    assert len(asked) == 1


def test_the_files_that_it_knows_are_those_that_a_submission_fetches() -> None:
    known = prefetch.known_files()
    assert {name: str(place.where) for name, place in known.items()} == {
        "cifar-10-python.tar.gz": "data/cifar10",
        "pt_inception-2015-12-05-6726825d.pth": "weights",
        "dinov2_vitl14_pretrain.pth": "weights",
    }
    assert set(known) == set(files.FETCHED.values())


def test_a_profile_with_a_key_that_there_is_not_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = tmp_path / "site.yaml"
    profile.write_text("partitoin: gpu\n")
    monkeypatch.setattr(sys, "argv", ["prefetch.py", "--root", str(tmp_path), "--profile", str(profile)])
    with pytest.raises(RequestError, match="did you mean 'partition'"):
        prefetch.main()


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
