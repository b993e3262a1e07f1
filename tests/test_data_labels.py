"""What a sample says of its class, by each rule, how that becomes a number, and how `data index` chooses a rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.foreign_shards import tar_bytes
from vqscale.data import tar
from vqscale.data.bad import BadSample
from vqscale.data.indexing import label_rules
from vqscale.data.indexing.label_rules import Tally, check_rule, count, decide
from vqscale.data.labels import NO_LABEL, label_number, stored_label
from vqscale.errors import UserError


def said(rule: str, key: str = "a/b/1", **fields: bytes) -> int | str | None:
    """The stored label of one sample."""
    buffer = tar_bytes([(key, {"jpg": b"x", **fields})])
    return stored_label(buffer, tar.samples(buffer)[0], rule)


def as_json(**values: Any) -> bytes:
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("rule", "fields", "expected"),
    [
        ("cls", {"cls": b"7"}, 7),
        ("cls", {"cls": b" 7\n"}, 7),
        ("cls", {"cls": b"tabby cat\n"}, "tabby cat"),
        ("cls", {"cls": "Müsli".encode()}, "Müsli"),
        ("cls", {"cls": b"-1"}, None),  # as many data sets have it where there is no label
        ("cls", {"json": as_json(label=3)}, None),
        ("txt", {"txt": b"dog\n"}, "dog"),
        ("txt", {"cls": b"3"}, None),
        ("json:label", {"json": as_json(label=3)}, 3),
        ("json:label", {"json": as_json(label="dog")}, "dog"),
        ("json:label", {"json": as_json(label=-1)}, None),
        ("json:label", {"json": as_json(label=None)}, None),
        ("json:label", {"json": as_json(other=3)}, None),
        ("json:label", {"cls": b"3"}, None),
        ("json:my:key", {"json": json.dumps({"my:key": 4}).encode()}, 4),
        ("folder", {}, "a"),
        ("folder:1", {}, "b"),
        ("folder:2", {}, None),
        ("none", {"cls": b"7", "json": as_json(label=3)}, None),
        ("", {"cls": b"7", "json": as_json(label=3)}, 7),
        ("", {"json": as_json(label=3)}, 3),
        ("", {"txt": b"dog"}, None),
    ],
)
def test_each_rule_reads_its_own_place(rule: str, fields: dict[str, bytes], expected: int | str | None):
    assert said(rule, **fields) == expected


def test_folders_begin_behind_the_dot_of_tar():
    assert said("folder", "./cats/1") == "cats"
    assert said("folder", "cats/old/1") == "cats"
    assert said("folder", "./1") is None
    assert said("folder", "1") is None


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("cls", {"cls": b"\xff\xfe"}),
        ("txt", {"txt": b"\xff\xfe"}),
        ("json:label", {"json": b"{"}),
        ("json:label", {"json": b"[1]"}),
        ("json:label", {"json": b"\xff"}),
        ("json:label", {"json": as_json(label=1.5)}),
        ("json:label", {"json": as_json(label=True)}),
        ("json:label", {"json": as_json(label=[1])}),
        ("json:label", {"json": as_json(label={"id": 1})}),
    ],
)
def test_what_is_neither_number_nor_word_is_a_bad_sample(rule: str, fields: dict[str, bytes]):
    with pytest.raises(BadSample) as caught:
        said(rule, **fields)
    assert caught.value.kind == "label"


def test_labels_become_numbers():
    classes = ("cat", "dog", "7")
    numbers = {name: number for number, name in enumerate(classes)}
    assert label_number(None, classes, numbers) == NO_LABEL
    assert label_number(1, classes, numbers) == 1
    assert label_number("dog", classes, numbers) == 1
    assert label_number("7", classes, numbers) == 2  # the name of a class before it is a number
    assert label_number("1", classes, numbers) == 1
    assert label_number(12_345, (), {}) == 12_345
    for value in (3, -1, "cow", ""):
        with pytest.raises(BadSample, match="label"):
            label_number(value, classes, numbers)
    with pytest.raises(BadSample, match="label"):
        label_number("cat", (), {})


def tally(*values: int | str | None, bad: int = 0) -> Tally:
    made = Tally(bad=bad)
    for value in values:
        made.add(value)
    return made


CAPTIONS = tally(*(f"photograph {number}" for number in range(100)))
NAMES = tally(*(["cat", "dog"] * 50))


@pytest.mark.parametrize(
    ("tallies", "rule"),
    [
        ({"cls": tally(3, None), "json:label": NAMES, "folder": NAMES}, "cls"),
        ({"json:target": NAMES, "json:class": tally(1, 2), "txt": NAMES}, "json:class"),
        ({"json:label": tally(bad=100), "json:target": NAMES}, "json:target"),
        ({"txt": NAMES, "folder": NAMES}, "txt"),
        ({"txt": CAPTIONS, "folder": NAMES}, "folder"),
        ({"txt": tally(*["the same"] * 100)}, "none"),
        ({"txt": CAPTIONS}, "none"),
        ({"folder": tally(*(f"f{number}" for number in range(100)))}, "none"),
        ({"folder": tally(*["one"] * 100)}, "none"),
        ({"folder": tally(*(["cat", "dog"] * 49))}, "none"),  # two samples lie in no folder
        ({"folder": tally(*(["data/train/cat", "data/train/dog"] * 50))}, "folder:2"),
        ({"folder": tally(*(["cat/old", "cat/new", "dog/new"] * 33), "dog/old")}, "folder"),
        ({}, "none"),
    ],
)
def test_auto_takes_the_first_place_that_holds_labels(tallies: dict[str, Tally], rule: str):
    assert decide("auto", tallies, 100).rule == rule


def test_texts_are_names_when_each_is_frequent_enough():
    just = {"txt": tally(*(["a", "b", "c"] * 10))}
    assert decide("auto", just, 30).classes == ("a", "b", "c")
    just["txt"].add("d")
    assert decide("auto", just, 31).rule == "none"
    assert "captions: 4 different ones in 31 samples" in decide("auto", just, 31).why


def test_given_classes_tell_names_from_captions():
    few = {"txt": tally("cat", "dog", "cow"), "folder": tally("x/val/cat", "x/val/cat", "x/val/cat")}
    assert decide("auto", few, 3).rule == "none"
    assert decide("auto", few, 3, ("dog", "cat")).rule == "txt"
    assert decide("auto", {"folder": few["folder"]}, 3, ("dog", "cat")) == ("folder:2", ("dog", "cat"), "1 folders")
    assert decide("auto", few, 3, ("horse", "cow")).rule == "none"


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (["dog", "cat"], ("cat", "dog")),
        ([0, 2, 1], ("0", "1", "2")),
        (["0", "2", "1"], ("0", "1", "2")),
        ([0, 2, 5], ("0", "1", "2", "3", "4", "5")),  # half of them occur
        ([0, 1, 900], ()),  # identifiers of something, but not of classes
        (["1997", "2003"], ("1997", "2003")),
        (["10", "9", "a"], ("10", "9", "a")),
    ],
)
def test_classes_are_sorted_words_or_the_numbers_up_to_the_largest(values: list[int | str], classes: tuple[str, ...]):
    tallies = {"cls": tally(*values)}
    decision = decide("cls", tallies, len(values))
    assert decision.classes == classes
    assert count(decision, tallies) == (len(values), 0, ())


def test_numbers_among_words_are_refused_unless_classes_are_given():
    mixed = {"cls": tally(1, "cat")}
    with pytest.raises(UserError, match=r"numbers and words, such as 1 and 'cat'.*--classes"):
        decide("auto", mixed, 2)
    assert count(decide("auto", mixed, 2, ("cat", "dog")), mixed) == (2, 0, ())


def test_labels_that_are_no_class_are_counted_and_named():
    tallies = {"cls": tally("cat", "cat", "cow", "", "ewe", bad=1)}
    decision = decide("auto", tallies, 6, ("cat", "dog"))
    assert count(decision, tallies) == (2, 4, ("cow", "ewe"))
    with pytest.raises(UserError, match=r"no label by cls is among the 1 classes, such as 'cat'"):
        decide("auto", tallies, 6, ("horse",))


def test_too_many_values_are_no_classes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(label_rules, "MOST_CLASSES", 3)
    one, other = tally(1, 2), tally(3, 4)
    one.merge(other)
    assert one.many
    assert decide("auto", {"cls": one}, 4) == ("none", (), "cls has more than 3 different values")
    with pytest.raises(UserError, match=r"--label: cls has more than 3 different values"):
        decide("cls", {"cls": one}, 4)


def test_a_name_that_is_no_utf8_is_a_bad_label():
    tallies = {"folder": tally("caf\udce9", "bar", "bar")}
    decision = decide("folder", tallies, 3)
    assert decision.classes == ("bar",)
    assert count(decision, tallies) == (2, 1, ())


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda: check_rule("class"),
            r"--label: unknown rule 'class'; did you mean 'cls'\? use auto, cls, txt, folder",
        ),
        (lambda: check_rule("json:"), "unknown rule"),
        (lambda: decide("json:breed", {"json:breed": Tally()}, 9), "no sample has a label by json:breed"),
        (lambda: decide("txt", {}, 9), "no sample has a label by txt"),
    ],
)
def test_rules_that_do_not_work_are_refused(ask: Callable[[], object], message: str):
    with pytest.raises(UserError, match=message):
        ask()
