"""Labels and classes are a part of the data: their digest notices what the pixels' does not, and says what it was."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
import pytest

from ddpm.data.labels import class_index, labels_changed, labels_digest, labels_record, told_of_classes
from ddpm.data.packed import PackedImages
from ddpm.errors import RequestError


def packed(labels: list[int], classes: list[str]) -> PackedImages:
    images = np.zeros((len(labels), 4, 4, 3), np.uint8)
    return PackedImages(images, np.array(labels, np.int64), "n", "train", "pixels", classes)


def record(labels: list[int], classes: list[str]) -> dict[str, Any]:
    return labels_record(packed(labels, classes))


def test_the_digest_covers_every_label_its_place_and_the_names_of_the_classes_in_their_order() -> None:
    there = [
        ([0, 0, 1], ["cat", "dog"]),
        ([0, 1, 0], ["cat", "dog"]),
        ([0, 0, 0], ["cat", "dog"]),
        ([0, 0, 1], ["dog", "cat"]),
        ([0, 0, 1], ["cat", "dog", "eel"]),
        ([0, 0, -1], ["cat", "dog"]),
    ]
    assert len({labels_digest(np.array(labels), classes) for labels, classes in there}) == len(there)
    assert labels_digest(np.array([0, 1], "<i8"), ["a", "b"]) == labels_digest(np.array([0, 1], ">i8"), ("a", "b"))


CHANGES = {
    "renamed": ([0, 0, 1], ["cat", "hound"], "class 1 was 'dog' and is 'hound' now"),
    "in another order": ([0, 0, 1], ["dog", "cat"], "class 0 was 'cat' and is 'dog' now, class 1 was 'dog' and is"),
    "one more": ([0, 0, 1], ["cat", "dog", "eel"], "class 2 was none and is 'eel' now"),
    "one less": ([0, 0, 0], ["cat"], "class 1 was 'dog' and is none now"),
    "moved": ([0, 1, 1], ["cat", "dog"], "'cat' had 2 images and has 1, 'dog' had 1 image and has 2"),
    "swapped": ([1, 0, 0], ["cat", "dog"], "images changed their class, and no class its number of images"),
    "many": ([0, 1, 2], list("abcdefgh"), r"class 3 was none and is 'd' now \(and 4 more\)"),
}


def test_a_class_is_found_by_its_name_however_its_umlaut_is_composed_and_else_by_its_number() -> None:
    names = ["Mo\u0308wen", "1", "zebra"]
    assert [class_index(word, names, "--class") for word in ("M\u00f6wen", "Mo\u0308wen", "1", "2")] == [0, 0, 1, 2]
    assert class_index("Mo\u0308wen", ["M\u00f6wen"], "--class") == 0
    assert class_index("M\u00f6wen", ["Mo\u0308wen", "M\u00f6wen"], "--class") == 1
    with pytest.raises(RequestError, match="did you mean 'M"):
        class_index("M\u00f6we", names, "--class")


def test_a_class_whose_name_cannot_be_printed_is_found_by_its_bytes_and_as_messages_write_it() -> None:
    names = ["caf\\xe9", "new\nline", "red\x1b"]  # the first is a folder's whose name is no UTF-8
    words = (os.fsdecode(b"caf\xe9"), "caf\\xe9", "new\nline", "new\\nline", "red\\x1b")
    assert [class_index(word, names, "--class") for word in words] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("case", CHANGES)
def test_what_changed_is_said(case: str) -> None:
    labels, classes, wanted = CHANGES[case]
    told = labels_changed(record([0, 0, 1], ["cat", "dog"]), record(labels, classes))
    assert told is not None and "\n" not in told
    assert re.search(wanted, told), told


def test_the_same_labels_are_no_change_and_neither_is_a_run_that_kept_none() -> None:
    here = record([0, 0, 1], ["cat", "dog"])
    assert labels_changed(record([0, 0, 1], ["cat", "dog"]), here) is None
    assert labels_changed(None, here) is None


def test_the_record_counts_the_images_of_each_class_by_its_index() -> None:
    assert list(record([2, 0, 2, -1], ["b", "c", "a"])["classes"].items()) == [("b", 1), ("c", 0), ("a", 2)]
    assert record([0, 0], [""])["classes"] == {"": 2}


def test_classes_are_told_with_index_and_number_where_there_are_several() -> None:
    assert told_of_classes(record([0, 0, 1, 1, 1], ["", "d\x1bog"])) == "classes: 0 = no folder (2), 1 = d\\x1bog (3)"
    assert told_of_classes(record([0, 0], ["cat"])) == ""
    many = told_of_classes(record(list(range(50)), list(map(str, range(50)))))
    assert many.endswith("39 = 39 (1), and 10 more")
