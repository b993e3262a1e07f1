"""Bad samples: what they are, how they are counted, and when there are too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from vqscale.errors import UserError

_JUDGED = 1_000  # samples after which the share of bad ones says something
_LISTED = 10_000  # bad samples that are remembered by name


class BadSample(Exception):  # noqa: N818  (bad data, not a fault of the program)
    """A stored sample cannot be used.

    Args:
        kind: `format`, `corrupt`, `bomb`, `missing` (no image member) or `label`.
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

    Args:
        budget: largest share of bad samples among those read.
    """

    def __init__(self, budget: float) -> None:
        self.kinds: Counter[str] = Counter()
        """Kind → how many were met; one that is met in every epoch counts every time."""
        self.samples: dict[tuple[str, str, str], int] = {}
        """(shard, key, kind) → how often it was met."""
        self._budget, self._read = budget, 0

    def add(self, read: int, bad: Sequence[BadPick]) -> None:
        """Account for samples that were read.

        Raises:
            UserError: the share of bad ones is above the budget.
        """
        self._read += read
        if not bad:
            return
        for pick in bad:
            self.kinds[pick.kind] += 1
            name = (pick.shard, pick.key, pick.kind)
            if name in self.samples or len(self.samples) < _LISTED:
                self.samples[name] = self.samples.get(name, 0) + 1
        total = self.kinds.total()
        if total > self._budget * max(self._read, _JUDGED):
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
            last = f"{bad[-1].key} in {bad[-1].shard}"
            raise UserError(
                f"{total} of {self._read} samples are bad ({kinds}), the last one is {last}",
                where="data.error_budget",
                mend="run `vqscale data verify` on the shards, or raise the budget",
            )
