"""ddpm/data/celeba.py: which faces are trained on, in which split, with which label, follows from the lists alone."""

import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm.config.data import Data
from ddpm.data.packed import open_source, pack
from ddpm.errors import EnvironmentLacks, RequestError
from ddpm.run.files import read_signed
from tests.celeba import NAMES, NUM_IMAGES, is_male, is_smiling, jpeg, which, write_celeba

TRAIN, VALID, TEST = range(40), range(40, 50), range(50, 60)
FILES = {"list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba.zip"}


def at(path: Path | None, **fields: Any) -> Data:
    return Data(**{"name": "celeba", "path": path and str(path), "image_size": 8, **fields})


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests leave it as it is."""
    return write_celeba(tmp_path_factory.mktemp("data") / "celeba")


@pytest.fixture
def copy(mini: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mini, tmp_path / "celeba"))


# ---------------------------------------------------------------- choice


@pytest.mark.parametrize("split, ids", [("train", TRAIN), ("valid", VALID), ("test", TEST)])
def test_splits_are_those_of_the_partition(mini: Path, tmp_path: Path, split: str, ids: range) -> None:
    _, packed = pack(at(mini), split, tmp_path)
    assert which(packed.images) == list(ids)
    assert packed.labels.tolist() == [0] * len(ids)


def test_without_a_partition_everything_is_for_training_and_the_log_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_celeba(tmp_path / "celeba", partition=False)
    _, packed = pack(at(folder), "train", tmp_path / "cache")
    assert len(packed) == NUM_IMAGES
    assert "no list_eval_partition.txt: every image is for training" in capsys.readouterr().out
    with pytest.raises(RequestError, match=r"no 'test' split: name one that it has: train"):
        pack(at(folder), "test", tmp_path / "cache")


def test_a_filter_keeps_the_images_that_have_and_lack_what_was_asked(mini: Path, tmp_path: Path) -> None:
    for male in (False, True):
        for smiling in (False, True):
            _, packed = pack(at(mini, attributes={"Male": male, "Smiling": smiling}), "train", tmp_path)
            assert which(packed.images) == [i for i in TRAIN if is_male(i) == male and is_smiling(i) == smiling]
    _, packed = pack(at(mini, attributes={"Smiling": True}), "test", tmp_path)
    assert which(packed.images) == [i for i in TEST if is_smiling(i)]


def test_labels_are_made_of_the_attributes_in_the_order_given(mini: Path, tmp_path: Path) -> None:
    chosen = at(mini, label_attributes=("Smiling", "Male"))
    key, packed = pack(chosen, "train", tmp_path)
    assert packed.labels.tolist() == [is_smiling(i) + 2 * is_male(i) for i in TRAIN]
    classes = ["Smiling=0,Male=0", "Smiling=1,Male=0", "Smiling=0,Male=1", "Smiling=1,Male=1"]
    assert open_source(chosen).classes == classes
    assert read_signed(tmp_path / key / "meta.json")["classes"] == classes


def test_a_filter_and_labels_go_together(mini: Path, tmp_path: Path) -> None:
    _, packed = pack(at(mini, attributes={"Male": True}, label_attributes=("Smiling",)), "train", tmp_path)
    assert which(packed.images) == [i for i in TRAIN if is_male(i)]
    assert packed.labels.tolist() == [is_smiling(i) for i in TRAIN if is_male(i)]


def test_every_choice_is_packed_apart(copy: Path, tmp_path: Path) -> None:
    choices = [
        at(copy),
        at(copy, attributes={"Male": False}),
        at(copy, attributes={"Male": True}),
        at(copy, label_attributes=("Male",)),
        at(copy, label_attributes=("Male", "Smiling")),
        at(copy, label_attributes=("Smiling", "Male")),
    ]
    keys = [pack(choice, "train", tmp_path / "cache")[0] for choice in choices]
    assert len(set(keys)) == len(choices)
    assert [pack(choice, "train", tmp_path / "cache")[0] for choice in choices] == keys
    one_way, other_way = (at(copy, attributes=a) for a in ({"Male": True, "Bald": True}, {"Bald": True, "Male": True}))
    assert pack(one_way, "train", tmp_path / "cache")[0] == pack(other_way, "train", tmp_path / "cache")[0]


def test_a_changed_list_is_packed_anew(tmp_path: Path) -> None:
    folder, cache = write_celeba(tmp_path / "celeba", zipped=True), tmp_path / "cache"
    chosen = at(folder, label_attributes=("Male",))
    keys = [pack(chosen, "train", cache)[0]]
    attributes, partition = folder / "list_attr_celeba.txt", folder / "list_eval_partition.txt"
    lines = attributes.read_text().splitlines()
    name, *bits = lines[2].split()
    bits[NAMES.index("Male")] = "1"
    attributes.write_text("\n".join([*lines[:2], " ".join([name, *bits]), *lines[3:]]))
    key, packed = pack(chosen, "train", cache)
    assert packed.labels.tolist() == [1, *(is_male(i) for i in TRAIN[1:])]
    keys.append(key)
    partition.write_text(partition.read_text().replace("000001.jpg 0", "000001.jpg 2"))
    key, packed = pack(chosen, "train", cache)
    assert which(packed.images) == list(TRAIN)[1:]
    assert len({*keys, key}) == 3


# ---------------------------------------------------------------- places and pixels


def as_kaggle_has_it(folder: Path) -> None:
    """Lists as .csv, images in a folder of the same name in their folder."""
    _, names, *rows = (folder / "list_attr_celeba.txt").read_text().splitlines()
    lines = [["image_id", *names.split()], *(row.split() for row in rows)]
    (folder / "list_attr_celeba.csv").write_text("".join(",".join(fields) + "\n" for fields in lines))
    rows = (folder / "list_eval_partition.txt").read_text().splitlines()
    lines = [["image_id", "partition"], *(row.split() for row in rows)]
    (folder / "list_eval_partition.csv").write_text("".join(",".join(fields) + "\n" for fields in lines))
    for name in ("list_attr_celeba.txt", "list_eval_partition.txt"):
        (folder / name).unlink()
    (folder / "img_align_celeba").rename(folder / "images")
    (folder / "img_align_celeba").mkdir()
    (folder / "images").rename(folder / "img_align_celeba" / "img_align_celeba")


def as_windows_has_it(folder: Path) -> None:
    """A BOM, and lines that end in CRLF."""
    for path in folder.glob("list_*"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


def with_spaces(folder: Path) -> None:
    """In the names of the files; in the headings of a .csv too."""
    for path in (folder / "img_align_celeba").rglob("*.jpg"):
        path.rename(path.with_name(f"face  {path.name}"))
    for path in folder.glob("list_*"):
        text = re.sub(r"(?m)^(\d+\.jpg)", r"face  \1", path.read_text())
        path.write_text(text.replace(",", ", ") if path.suffix == ".csv" else text)


@pytest.mark.parametrize(
    "changes",
    [[as_kaggle_has_it], [as_windows_has_it], [with_spaces], [as_kaggle_has_it, with_spaces, as_windows_has_it]],
)
def test_celeba_as_people_have_it_is_the_same_data(mini: Path, copy: Path, tmp_path: Path, changes: list[Any]) -> None:
    for change in changes:
        change(copy)
    for split in ("train", "test"):
        there, here = (pack(at(f, label_attributes=("Male",)), split, tmp_path / "c")[1] for f in (mini, copy))
        assert here.digest == there.digest and here.labels.tolist() == there.labels.tolist()


def test_kaggles_one_zip_is_the_same_data(mini: Path, copy: Path, tmp_path: Path) -> None:
    as_kaggle_has_it(copy)
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for path in sorted(p for p in copy.rglob("*") if p.is_file()):
            made.write(path, path.relative_to(copy))
            made.writestr(f"__MACOSX/{path.relative_to(copy)}", b"of no use")
    for split in ("train", "test"):
        there, here = (pack(at(f, label_attributes=("Male",)), split, tmp_path / "c")[1] for f in (mini, archive))
        assert here.digest == there.digest and here.labels.tolist() == there.labels.tolist()
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as made:
        made.writestr("img_align_celeba/000001.jpg", jpeg(0))
    with pytest.raises(RequestError, match=r"other\.zip: no list_attr_celeba\.txt in it; .*Kaggle's archive\.zip"):
        open_source(at(tmp_path / "other.zip"))
    with zipfile.ZipFile(tmp_path / "lacks.zip", "w") as made:
        made.writestr("all/list_attr_celeba.csv", (copy / "list_attr_celeba.csv").read_bytes())
        made.writestr("all/img_align_celeba/000001.jpg", jpeg(0))
    with pytest.raises(RequestError, match=r"lacks\.zip lacks 59 of the images in list_attr_celeba\.txt \(000002\.jpg"):
        open_source(at(tmp_path / "lacks.zip"))
    with zipfile.ZipFile(tmp_path / "lines.zip", "w") as made:
        made.writestr("list_attr_celeba.csv", "image_id,Male\n000001.jpg,2\n")
    with pytest.raises(RequestError, match=r"lines\.zip/list_attr_celeba\.csv, line 2: expected a file name and 1"):
        open_source(at(tmp_path / "lines.zip"))


def test_a_damaged_csv_is_named_with_its_line(copy: Path) -> None:
    as_kaggle_has_it(copy)
    attributes, partition = copy / "list_attr_celeba.csv", copy / "list_eval_partition.csv"
    whole = partition.read_text()
    partition.write_text(whole.replace("000003.jpg,0", "000003.jpg,3"))
    with pytest.raises(RequestError, match=r"list_eval_partition\.csv, line 4: expected a file name and 0, 1 or 2"):
        open_source(at(copy))
    partition.write_text(whole)
    attributes.write_text(attributes.read_text().replace("000002.jpg,", "000002.jpg,1,"))
    with pytest.raises(RequestError, match=r"list_attr_celeba\.csv, line 3: expected a file name and 40 times 1 or -1"):
        open_source(at(copy))
    attributes.write_text("")
    with pytest.raises(RequestError, match=r"list_attr_celeba\.csv, line 1: expected the names of the attributes"):
        open_source(at(copy))


def test_a_folder_a_zip_and_the_root_of_torchvision_are_the_same_data(mini: Path, tmp_path: Path) -> None:
    archive = write_celeba(tmp_path / "zipped", zipped=True)
    packed = [pack(at(p), "train", tmp_path / "cache")[1] for p in (mini, mini.parent, archive)]
    assert len({p.digest for p in packed}) == 1 and which(packed[0].images) == list(TRAIN)


def test_a_folder_that_is_half_unpacked_beside_its_zip_is_not_used(tmp_path: Path) -> None:
    folder = write_celeba(tmp_path / "celeba", zipped=True)
    (folder / "img_align_celeba").mkdir()
    (folder / "img_align_celeba" / "000001.jpg").write_bytes(jpeg(0))
    assert len(pack(at(folder), "train", tmp_path / "cache")[1]) == 40


def test_the_crop_is_the_largest_square_in_the_middle(copy: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (218, 178, 3), np.uint8)
    Image.fromarray(noise).save(copy / "img_align_celeba" / "000001.jpg")
    _, packed = pack(at(copy, image_size=178), "train", tmp_path / "cache")
    with Image.open(copy / "img_align_celeba" / "000001.jpg") as image:
        assert np.array_equal(packed.images[0], np.asarray(image)[20:198])


def test_the_crop_leaves_nothing_of_a_border(mini: Path, tmp_path: Path) -> None:
    key, small = pack(at(mini, image_size=16), "train", tmp_path)
    assert (small.images == small.images[:, :1, :1]).all(), "the outer rows would show it"
    meta = read_signed(tmp_path / key / "meta.json")
    assert (meta["crop"], meta["filter"], meta["shape"]) == ("centre square", "lanczos", [40, 16, 16, 3])


# ---------------------------------------------------------------- what cannot serve


def refusal(chosen: Data) -> str:
    with pytest.raises(RequestError) as refused:
        open_source(chosen)
    return str(refused.value)


@pytest.mark.parametrize("key, value", [("attributes", {"Smilling": True}), ("label_attributes", ("Male", "smilling"))])
def test_an_unknown_attribute_is_named_with_its_nearest_and_with_all_there_are_before_any_list_is_read(
    key: str, value: Any
) -> None:
    with pytest.raises(ValueError) as refused:
        at(None, **{key: value})
    wanted = rf"data\.{key}: unknown attribute '[Ss]milling'; did you mean Smiling\? The 40 are: {', '.join(NAMES)} "
    assert re.search(wanted, str(refused.value))


def test_an_attribute_that_this_list_does_not_have_is_refused_with_those_it_has(copy: Path) -> None:
    attributes = copy / "list_attr_celeba.txt"
    attributes.write_text(attributes.read_text().replace(" Young ", " Old ", 1))
    message = refusal(at(copy, attributes={"Young": True}))
    assert message.startswith("data.attributes: unknown attribute 'Young'; ") and str(attributes) in message


def test_a_filter_that_leaves_no_image_counts_what_each_attribute_leaves(copy: Path) -> None:
    attributes = copy / "list_attr_celeba.txt"
    lines = attributes.read_text().splitlines()
    for i in range(NUM_IMAGES):  # only number 4 is bald
        name, *bits = lines[2 + i].split()
        bits[NAMES.index("Bald")] = "1" if i == 4 else "-1"
        lines[2 + i] = " ".join([name, *bits])
    attributes.write_text("\n".join(lines))
    message = refusal(at(copy, attributes={"Male": True, "Bald": True}))
    assert "of 60 images 0 are left" in message and "(Male=true: 30, Bald=true: 1)" in message
    assert which(pack(at(copy, attributes={"Bald": True}), "train", copy / "cache")[1].images) == [4]
    assert refusal(at(copy, label_attributes=("Male", "Bald"))).startswith(
        "data.label_attributes = ['Male', 'Bald']: no training image is left for Male=1,Bald=1;"
    )


def test_labels_of_what_the_filter_fixes_are_refused(mini: Path) -> None:
    message = refusal(at(mini, attributes={"Male": True}, label_attributes=("Male",)))
    assert "no training image is left for Male=0;" in message and "filter by fewer" in message


DAMAGED = {
    "no count": ("list_attr_celeba.txt", 1, lambda line: "000001.jpg", "the number of images"),
    "wrong count": ("list_attr_celeba.txt", 1, lambda line: "61", "announces 61 images, and 60 follow"),
    "no names": ("list_attr_celeba.txt", 2, lambda line: "", "names of the attributes"),
    "short line": ("list_attr_celeba.txt", 7, lambda line: line[:70], "40 times 1 or -1, found '000005.jpg"),
    "other value": ("list_attr_celeba.txt", 62, lambda line: line[:-2] + " 0", "40 times 1 or -1"),
    "no text": ("list_attr_celeba.txt", 30, lambda line: "\x00" + line[:3], "40 times 1 or -1"),
    "twice": ("list_attr_celeba.txt", 4, lambda line: line.replace("000002", "000001"), "000001.jpg stands twice"),
    "other split": ("list_eval_partition.txt", 41, lambda line: "000041.jpg 3", "0, 1 or 2, found '000041.jpg 3'"),
    "no split": ("list_eval_partition.txt", 1, lambda line: "000001.jpg", "0, 1 or 2"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_list_is_refused_with_the_line(copy: Path, case: str) -> None:
    file, number, damage, wanted = DAMAGED[case]
    lines = (copy / file).read_text().splitlines()
    lines[number - 1] = damage(lines[number - 1])
    (copy / file).write_text("\n".join(lines) + "\n")
    message = refusal(at(copy))
    assert f"{file}, line {number}: " in message and wanted in message and "copy it again" in message


def test_a_list_that_was_cut_short_is_refused(copy: Path) -> None:
    attributes, partition = copy / "list_attr_celeba.txt", copy / "list_eval_partition.txt"
    whole = attributes.read_bytes()
    attributes.write_bytes(b"".join(whole.splitlines(keepends=True)[:50]))
    assert "line 1: it announces 60 images, and 48 follow" in refusal(at(copy))
    attributes.write_bytes(b"")
    assert "line 1: expected the number of images, found ''" in refusal(at(copy))
    attributes.write_bytes(whole)
    partition.write_text("\n".join(partition.read_text().splitlines()[:-7]))
    assert "list_eval_partition.txt lacks 7 of 60 images (000054.jpg, …)" in refusal(at(copy))


def test_what_lacks_is_named(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refusal(at(tmp_path / "empty"))
    assert "no list_attr_celeba.txt here nor in" in message and "leave data.path out to download" in message
    (copy / "img_align_celeba" / "000007.jpg").unlink()
    assert "lacks 1 of the images in list_attr_celeba.txt (000007.jpg, …)" in refusal(at(copy))
    shutil.rmtree(copy / "img_align_celeba")
    assert "no img_align_celeba.zip nor img_align_celeba/" in refusal(at(copy))
    assert "nowhere: does not exist" in refusal(at(tmp_path / "nowhere"))
    (copy / "img_align_celeba.zip").write_bytes(b"PK and then nothing")
    assert "img_align_celeba.zip: not a readable zip" in refusal(at(copy))


def test_a_damaged_face_is_named_and_nothing_is_packed(copy: Path, tmp_path: Path) -> None:
    (copy / "img_align_celeba" / "000003.jpg").write_bytes(jpeg(2)[:400])
    with pytest.raises(RequestError, match=r"000003\.jpg cannot be decoded .*replace or remove it"):
        pack(at(copy), "train", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# ---------------------------------------------------------------- download


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was fetched from a Google Drive that holds CelebA in miniature."""
    there, fetched = write_celeba(tmp_path / "drive", zipped=True), []

    def fetch(file_id: str, root: str, filename: str, md5: str) -> None:
        assert len(file_id) > 20 and len(md5) == 32
        Path(root).mkdir(parents=True)
        shutil.copy(there / filename, root)
        fetched.append(filename)

    monkeypatch.setattr("torchvision.datasets.utils.download_file_from_google_drive", fetch)
    return fetched


def test_without_a_path_it_is_downloaded_once_and_stays_zipped(drive: list[str], tmp_path: Path) -> None:
    chosen = at(None, attributes={"Male": True}, label_attributes=("Smiling",))
    source = open_source(chosen)
    assert source.classes == ["Smiling=0", "Smiling=1"] and {"train", "test"} < set(source.members) and drive == []
    key, packed = pack(chosen, "train", tmp_path / "cache")
    assert set(drive) == FILES and which(packed.images) == [i for i in TRAIN if is_male(i)]
    assert {p.name for p in (tmp_path / "cache" / "celeba").iterdir()} == FILES
    assert pack(chosen, "train", tmp_path / "cache")[0] == key and len(drive) == 3


def test_a_download_that_fails_says_what_to_fetch_by_hand_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file_id: str, root: str, filename: str, md5: str) -> None:
        Path(root).mkdir(parents=True)
        (Path(root) / filename).write_text("Quota exceeded")
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.utils.download_file_from_google_drive", fail)
    with pytest.raises(EnvironmentLacks) as lacks:
        pack(at(None), "train", tmp_path / "cache")
    message = str(lacks.value)
    assert "corrupted" in message and str(tmp_path / "cache" / "celeba") in message and "data.path=FOLDER" in message
    assert all(file in message for file in FILES)
    assert not (tmp_path / "cache" / "celeba").exists()
