"""Bad samples: what they are, how they are counted, and when there are too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vqscale.errors import UserError

KINDS = {
    "format": "no JPEG, PNG or WebP",
    "corrupt": "cannot be decoded",
    "bomb": "more pixels than any photograph",
    "missing": "no image member",
    "label": "a label that cannot be read, or is none of the classes",
    "path": "an absolute name, or one that leads to a parent folder",
    "truncated": "behind the place where its shard is cut off or damaged",
}
"""What can be wrong with a sample."""

_JUDGED = 1_000  # samples after which the share of bad ones says something
_LISTED = 10_000  # bad samples that are remembered by name


class BadSample(Exception):  # noqa: N818  (bad data, not a fault of the program)
    """A stored sample cannot be used.

    Args:
        kind: one of `KINDS`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        super().__init__(kind)


class BadPick(NamedTuple):
    """A bad sample among those that were asked for."""

    place: int
    """Which of the picks it is."""
    shard: str
    key: str
    kind: str


class BadCount:
    """Counts bad samples by kind, remembers which they were, and stops the run above the budget.

    The budget is judged over all ranks (`check_budget`, where their counts meet). Alone, a rank stops only when its
    own bad samples are too many for all of them together.

    Args:
        budget: largest share of bad samples among those read.
        world: number of ranks that read as much as this one.
    """

    def __init__(self, budget: float, world: int = 1) -> None:
        self.read = 0
        """Samples that were asked for."""
        self.kinds: Counter[str] = Counter()
        """Kind → how many were met; one that is met in every epoch counts every time."""
        self.samples: dict[tuple[str, str, str], int] = {}
        """(shard, key, kind) → how often it was met."""
        self._budget, self._world = budget, world

    def add(self, read: int, bad: Sequence[BadPick]) -> None:
        """Account for samples that were read.

        Raises:
            UserError: this rank has more bad ones than the budget of all.
        """
        self.read += read
        if not bad:
            return
        for pick in bad:
            self.kinds[pick.kind] += 1
            name = (pick.shard, pick.key, pick.kind)
            if name in self.samples or len(self.samples) < _LISTED:
                self.samples[name] = self.samples.get(name, 0) + 1
        check_budget(self.kinds, self.read * self._world, self._budget, f"{bad[-1].key} in {bad[-1].shard}")


def check_budget(kinds: Mapping[str, int], read: int, budget: float, last: str = "") -> None:
    """Compare the share of bad samples with the budget, among a thousand samples or more.

    Args:
        kinds: kind → number of bad samples.
        read: samples that were read, the bad ones included.
        budget: largest share of bad ones.
        last: a bad sample to name.

    Raises:
        UserError: there are more.
    """
    total = sum(kinds.values())
    if total <= budget * max(read, _JUDGED):
        return
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()) if count)
    raise UserError(
        f"{total} of {read} samples are bad ({counts})" + (f", the last one is {last}" if last else ""),
        where="data.error_budget",
        mend="run `vqscale data verify` on the shards, or raise the budget",
    )
