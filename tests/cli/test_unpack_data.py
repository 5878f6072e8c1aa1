"""`tools/unpack_data.py`: the real images in files, as training sees them; and CelebA by the scripts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ddpm.data.packed import open_packed
from tests.celeba import is_male, is_smiling, which, write_celeba
from tests.cli.harness import Shell, png, read, snapshot, write_zip
from tests.cli.test_dry_run import imports

TOOL = "../tools/unpack_data"  # seen from the scripts of launch/


def unpack(shell: Shell, *args: str) -> Path:
    """Run it for tiny.yaml with `args`, the last of which is the folder; returns the folder."""
    done = shell(TOOL, "tiny.yaml", *args)
    assert done.returncode == 0, done.stderr
    assert list(shell.cwd.glob(".tmp-*")) == []
    return shell.cwd / args[-1]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def images(shell: Shell) -> list[str]:
    """The words that make tiny.yaml train on a zip: 6 dogs and 3 cats of 16x16, and 2 dogs to test."""
    dogs = {f"train/dog/{i}.png": png(16, i) for i in range(6)}
    cats = {f"train/cat/{i}.png": png(16, 10 + i) for i in range(3)}
    write_zip(shell.cwd / "a.zip", {**dogs, **cats, **{f"test/dog/{i}.png": png(16, 20 + i) for i in range(2)}})
    return ["data.name=images", "data.path=a.zip"]


def test_every_image_comes_out_as_it_is_trained_on(shell: Shell, images: list[str]) -> None:
    folder = unpack(shell, *images, "real")
    (key,) = [p.parent.name for p in shell.root.glob(".cache/data/*/meta.json")]
    packed = open_packed(shell.root / ".cache" / "data", key)
    assert [p.name for p in sorted(folder.iterdir())] == [f"{i:06d}.png" for i in range(9)]
    assert packed.images.shape == (9, 8, 8, 3)
    assert all(np.array_equal(pixels(folder / f"{i:06d}.png"), packed.images[i]) for i in range(9))


@pytest.mark.parametrize("words", [["--by-class"], ["model.num_classes=2"]])
def test_classes_become_folders_where_the_model_has_them_or_when_asked_for(
    shell: Shell, images: list[str], words: list[str]
) -> None:
    flat = unpack(shell, *images, "flat")
    folder = unpack(shell, *images, *words, "by-class")
    names = {str(p.relative_to(folder)) for p in folder.rglob("*.png")}
    assert names == {f"{'cat' if i < 3 else 'dog'}/{i:06d}.png" for i in range(9)}
    assert all((flat / Path(name).name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_another_split_and_a_number_of_images_spread_over_the_split(shell: Shell, images: list[str]) -> None:
    assert len(list(unpack(shell, *images, "--split", "test", "test").iterdir())) == 2
    some = unpack(shell, *images, "--num", "3", "some")
    assert {p.name for p in some.iterdir()} == {"000000.png", "000003.png", "000006.png"}  # a cat and two dogs


def test_what_cannot_be_unpacked_is_refused_and_nothing_is_left(shell: Shell, images: list[str]) -> None:
    (shell.cwd / "there").mkdir()
    before = snapshot(shell.cwd)
    assert "there exists: name another folder" in shell.refused(TOOL, "tiny.yaml", *images, "there")
    assert "no 'valid' split: name one that it has: test, train" in shell.refused(
        TOOL, "tiny.yaml", *images, "--split", "valid", "x"
    )
    assert "give one CONFIG and one DIR" in shell.refused(TOOL, "tiny.yaml", "x", "y")
    assert "give one CONFIG and one DIR" in shell.refused(TOOL, "tiny.yaml", "data.image_size=8")
    assert "tiny.yaml" in shell.refused(TOOL, "tyni.yaml", "x")
    assert snapshot(shell.cwd) == before
    unpack(shell, *images, "packed")
    for num in ("0", "10"):
        assert f"--num {num}: the train split has 9 images" in shell.refused(
            TOOL, "tiny.yaml", *images, "--num", num, "x"
        )
    assert not (shell.cwd / "x").exists()


def test_a_disk_that_is_full_leaves_no_folder(shell: Shell, images: list[str]) -> None:
    unpack(shell, *images, "packed")
    argv, options = shell.command(TOOL, "tiny.yaml", *images, "x")
    full = "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); sys.argv = sys.argv[1:]\n"
    full += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([argv[0], "-c", full, *argv[1:]], capture_output=True, text=True, **options)
    assert done.returncode == 3 and done.stderr.startswith("error: File too large"), done.stderr
    assert list(shell.cwd.glob("x")) == list(shell.cwd.glob(".tmp-*")) == []


def test_help_shows_examples_and_loads_no_torch(shell: Shell) -> None:
    text, loaded = imports(shell, TOOL, "--help")
    assert "python tools/unpack_data.py configs/cifar10.yaml" in text and loaded.isdisjoint({"torch", "PIL"})


# ---------------------------------------------------------------- CelebA


CELEBA = ["data.name=celeba", "data.path=celeba", "data.attributes={Smiling: true}", "data.label_attributes=[Male]"]


def test_celeba_is_prepared_with_a_filter_and_labels_and_unpacked_by_class(shell: Shell) -> None:
    write_celeba(shell.cwd / "celeba", zipped=True)
    done = shell.submit("--prepare", *CELEBA, "model.num_classes=2")
    assert done.returncode == 0, done.stderr
    smiling = [i for i in range(40) if is_smiling(i)]
    assert f"data: celeba 8x8, {len(smiling)} images" in done.stdout
    run = shell.root / "tiny"
    config, record = yaml.safe_load((run / "config.yaml").read_text()), read(run / "run.json")["data"]
    assert (config["data"]["attributes"], config["data"]["label_attributes"]) == ({"Smiling": True}, ["Male"])
    packed = open_packed(Path(record["cache"]), record["key"])
    assert which(packed.images) == smiling and packed.labels.tolist() == [is_male(i) for i in smiling]

    folder = unpack(shell, *CELEBA, "model.num_classes=2", "--by-class", "faces")
    for name in ("Male=0", "Male=1"):
        men = [smiling[int(p.stem)] for p in sorted((folder / name).iterdir())]
        assert men == [i for i in smiling if is_male(i) == (name == "Male=1")]


def test_celeba_that_cannot_serve_is_refused_and_nothing_is_written(shell: Shell) -> None:
    write_celeba(shell.cwd / "celeba")

    def refused(*words: str) -> str:
        message = shell.refused("submit", "tiny.yaml", "--cluster", "local", *CELEBA[:2], *words)
        assert not shell.root.exists()
        return message

    assert "unknown attribute 'Smilin'; did you mean Smiling?" in refused("data.attributes={Smilin: true}")
    (shell.cwd / "celeba" / "list_attr_celeba.txt").write_text("60\nMale\n000001.jpg yes\n")
    assert "list_attr_celeba.txt, line 3: expected" in refused()
