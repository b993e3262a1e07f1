"""Where the labels of foreign shards are: what samples say by each rule is counted, then one rule is chosen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vqscale.arguments import did_you_mean
from vqscale.data.bad import BadSample
from vqscale.data.labels import label_number
from vqscale.errors import UserError

JSON_KEYS = ("label", "cls", "class", "class_id", "target")
"""Keys of a sample's JSON that may hold its label, in the order in which they are looked for."""
MOST_CLASSES = 65_536
"""More different values are no classes."""
_RULES = ("cls", "txt", "folder", "none")
_RULE = re.compile(r"auto|none|cls|txt|folder(:[0-9])?|json:.+")
SAMPLES_A_TEXT = 10
"""Texts are names of classes where there are so many samples for each, on the average; captions are not."""
SAMPLES_A_FOLDER = 2
"""Folders are classes where there are so many samples for each, on the average."""


@dataclass
class Tally:
    """The values that samples have by one rule, and how often."""

    values: Counter[int | str] = field(default_factory=Counter)
    """Numbers and words; emptied when there are too many."""
    bad: int = 0
    """Samples whose label cannot be read."""
    many: bool = False
    """There are more different values than there can be classes."""

    def add(self, value: int | str | None, count: int = 1) -> None:
        """Count a value; None is none."""
        if value is None:
            return
        if value == "" or (isinstance(value, str) and not _encodable(value)):
            self.bad += count
            return
        self.values[value] += count
        self._bound()

    def merge(self, other: Tally) -> None:
        """Add what was counted elsewhere."""
        self.values.update(other.values)
        self.bad += other.bad
        self.many |= other.many
        self._bound()

    @property
    def words(self) -> list[str]:
        """The different values that are words."""
        return [value for value in self.values if isinstance(value, str)]

    @property
    def numbers(self) -> list[int]:
        """The different values that are numbers."""
        return [value for value in self.values if isinstance(value, int)]

    def _bound(self) -> None:
        self.many |= len(self.values) > MOST_CLASSES
        if self.many:
            self.values.clear()


class Decision(NamedTuple):
    """Where the labels of some shards are."""

    rule: str
    """`Manifest.label`."""
    classes: tuple[str, ...]
    """Names of the labels 0, 1, ...; empty where there are none, or only scattered numbers."""
    why: str
    """What the rule was chosen for, in words."""


class Counts(NamedTuple):
    """How a rule fits some samples."""

    labelled: int
    """Samples with a label that is one of the classes, or any number where there are no classes."""
    bad: int
    """Samples whose label cannot be read, or is none of the classes."""
    strange: tuple[str, ...]
    """Up to three labels that are none of the classes."""


def decide(label: str, tallies: Mapping[str, Tally], samples: int, given: Sequence[str] = ()) -> Decision:
    """Choose the rule of labels, and name the classes.

    `auto` takes the first of: `.cls`; a number or word in `.json` under one of `JSON_KEYS`; `.txt` whose texts are
    names of classes; the folders of the keys, where every key has one. Texts and folders are names of classes when
    there are two or more of them, and on the average `SAMPLES_A_TEXT` samples for each text, `SAMPLES_A_FOLDER` for
    each folder; or, where the classes are given, when half of the labels are among them.

    Args:
        label: `auto`, or a rule as in `Manifest.label` (`folder` alone skips the folders that all keys share).
        tallies: rule → what was counted; under `folder` whole folder paths.
        samples: number of samples.
        given: classes; by default the words, sorted, or the numbers from 0 to the largest where half of them occur.

    Raises:
        UserError: no sample has a label by the rule that was asked for, or labels that go with no classes.
    """
    if label == "none":
        return Decision("none", tuple(given), "as asked for")
    rule, tally, why = _automatic(tallies, samples, given) if label == "auto" else _by_hand(label, tallies, given)
    decision = Decision(rule, tuple(given) if given or rule == "none" else _named(rule, tally), why)
    counts = _count(decision.classes, tally)
    if counts.strange and not counts.labelled:
        raise UserError(
            f"no label by {rule} is among the {len(decision.classes)} classes, such as '{counts.strange[0]}'",
            where="--label",
            mend="use another rule, or other classes",
        )
    return decision


def count(decision: Decision, tallies: Mapping[str, Tally]) -> Counts:
    """How the rule fits the samples that were counted."""
    kind, _, depth = decision.rule.partition(":")
    if kind == "folder":
        return _count(decision.classes, _folders(tallies.get("folder", Tally()), (), int(depth or 0))[1])
    return _count(decision.classes, tallies.get(decision.rule, Tally()))


def check_rule(label: str) -> None:
    """Whether a rule is one.

    Raises:
        UserError: it is none.
    """
    if not _RULE.fullmatch(label):
        hint = did_you_mean(label, ("auto", *_RULES))
        mend = f"{hint}use auto, {', '.join(_RULES)} or json:KEY"
        raise UserError(f"unknown rule '{label}'", where="--label", mend=mend)


def described(rule: str) -> str:
    """A rule as in `Manifest.label`, in words."""
    kind, _, detail = rule.partition(":")
    if kind == "json":
        return f"'{detail}' in .json"
    if kind == "folder":
        return f"folder of the key, {detail} below the first" if detail else "first folder of the key"
    return {"": "number in .cls, or 'label' in .json", "none": "none"}.get(rule, f".{rule}")


def _automatic(tallies: Mapping[str, Tally], samples: int, given: Sequence[str]) -> tuple[str, Tally, str]:
    reasons = []
    for rule in ("cls", *(f"json:{key}" for key in JSON_KEYS)):
        tally = tallies.get(rule, Tally())
        if tally.values:
            return rule, tally, f"{tally.values.total():,} of {samples:,} samples have one"
        if tally.many:
            reasons.append(f"{rule} has more than {MOST_CLASSES:,} different values")
        elif tally.bad:
            reasons.append(f"{rule} is neither number nor word")
    text = tallies.get("txt", Tally())
    if _names(text, given, SAMPLES_A_TEXT):
        return "txt", text, f"{len(text.values):,} different texts in {text.values.total():,} samples"
    if text.values or text.many:
        reasons.append(f"the texts in .txt are captions: {_different(text)}")
    paths = tallies.get("folder", Tally())
    depth, folders = _folders(paths, given)
    if folders.values.total() == samples and _names(folders, given, SAMPLES_A_FOLDER):
        return _folder_rule(depth), folders, f"{len(folders.values):,} folders"
    if folders.values or folders.many:
        reasons.append(f"the folders of the keys are no classes: {_different(folders)}")
    return "none", Tally(), "; ".join(reasons) or "no .cls, no label in .json, no folders"


def _by_hand(label: str, tallies: Mapping[str, Tally], given: Sequence[str]) -> tuple[str, Tally, str]:
    kind, _, detail = label.partition(":")
    tally = tallies.get(kind if kind == "folder" else label, Tally())
    rule = label
    if kind == "folder":
        depth, tally = _folders(tally, given, int(detail) if detail else None)
        rule = _folder_rule(depth)
    if tally.many:
        raise UserError(
            f"{label} has more than {MOST_CLASSES:,} different values", where="--label", mend="use another rule"
        )
    if not tally.values:
        raise UserError(f"no sample has a label by {label}", where="--label", mend="use another rule, or --label none")
    return rule, tally, "as asked for"


def _names(tally: Tally, given: Sequence[str], samples: int) -> bool:
    """Whether values are names of classes."""
    if given:
        known = set(given)
        return 2 * sum(count for value, count in tally.values.items() if value in known) >= max(1, tally.values.total())
    return len(tally.values) >= 2 and tally.values.total() >= samples * len(tally.values)


def _folders(paths: Tally, given: Sequence[str], depth: int | None = None) -> tuple[int, Tally]:
    """Which folder of the keys is the class, counted from the top, and the classes that samples have by it.

    By default it is the first that is not the same for all; where classes are given, the one that holds most of them.
    """
    parts = {path: str(path).split("/") for path in paths.values}
    depths = range(max(map(len, parts.values()), default=1))
    if depth is None and given:
        known = set(given)
        hits = [
            sum(paths.values[path] for path, names in parts.items() if set(names[at : at + 1]) & known) for at in depths
        ]
        depth = hits.index(max(hits))
    elif depth is None:
        depth = next((at for at in depths if len({tuple(names[at : at + 1]) for names in parts.values()}) > 1), 0)
    folders = Tally(bad=paths.bad, many=paths.many)
    for path, names in parts.items():
        folders.add(names[depth] if len(names) > depth else None, paths.values[path])
    return depth, folders


def _folder_rule(depth: int) -> str:
    return f"folder:{depth}" if depth else "folder"


def _named(rule: str, tally: Tally) -> tuple[str, ...]:
    """The classes: words, sorted; of numbers those from 0 to the largest, unless most of them do not occur."""
    words, numbers = tally.words, tally.numbers
    if words and numbers:
        raise UserError(
            f"labels by {rule} are numbers and words, such as {numbers[0]} and '{words[0]}'",
            where="--label",
            mend="use another rule, --label none, or name the classes in their order with --classes",
        )
    if words and not all(word.isascii() and word.isdigit() for word in words):
        return tuple(sorted(words))
    values = {number for number in map(int, tally.values) if number >= 0}
    if 2 * len(values) > max(values, default=0):
        return tuple(str(number) for number in range(max(values) + 1))
    return tuple(sorted(words, key=int))


def _count(classes: Sequence[str], tally: Tally) -> Counts:
    numbers = {name: number for number, name in enumerate(classes)}
    labelled, strange = 0, []
    for value, count in tally.values.items():
        try:
            label_number(value, classes, numbers)
            labelled += count
        except BadSample:
            strange.append(str(value))
    return Counts(labelled, tally.bad + tally.values.total() - labelled, tuple(sorted(strange)[:3]))


def _different(tally: Tally) -> str:
    total = f"{len(tally.values):,}" if not tally.many else f"more than {MOST_CLASSES:,}"
    return (
        f"{total} different ones in {tally.values.total():,} samples" if not tally.many else f"{total} different ones"
    )


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # what is no UTF-8 in a tar has surrogates in its place, which no manifest can hold
        return False
    return True
