"""Bad samples over all ranks while a stage trains: counted by kind, listed, and compared with the error budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from vqscale.data.bad import KINDS, check_budget
from vqscale.quarantine import Quarantine
from vqscale.storage.store import Store
from vqscale.training.distributed import Ranks

CHANGED = "changed-shard"
"""On the quarantine list: a shard (without a key) whose content is not the one that its manifest names."""


class Counted(Protocol):
    """What is asked of a loader."""

    @property
    def read(self) -> int:
        """Samples so far."""

    @property
    def bad(self) -> Mapping[str, int]:
        """Kind → bad samples so far."""

    @property
    def bad_samples(self) -> list[tuple[str, str, str]]:
        """(shard, key, kind) of the bad samples so far, in the order in which they were met."""


class DataWatch:
    """Judges the data of one attempt, at the log lines.

    Args:
        ranks: all of them.
        budget: largest share of bad samples over all ranks.
        quarantine: the stage's list; written by rank 0.
        store: opens this rank's shards.
    """

    def __init__(self, ranks: Ranks, budget: float, quarantine: Quarantine, store: Store) -> None:
        self._ranks, self._budget, self._quarantine, self._store = ranks, budget, quarantine, store
        self._listed = self._mismatched = 0  # of this rank's bad samples and shards: those that are on the list
        self._known = 0.0
        self._sums = dict.fromkeys(self._own(None), 0.0)

    def counts(self, loader: Counted) -> list[float]:
        """This rank's counts, to be added up over the ranks together with whatever else is."""
        return list(self._own(loader).values())

    def update(self, loader: Counted, summed: Sequence[float]) -> None:
        """Take the sums over all ranks of `counts`; lists new bad samples. Collective where there are any."""
        self._sums = dict(zip(self._sums, summed, strict=True))
        known = self.total + self._sums["mismatched"]
        if known == self._known:  # the same on every rank
            return
        self._known = known
        fresh = loader.bad_samples[self._listed :]
        self._listed += len(fresh)
        shards = self._store.mismatched[self._mismatched :]
        self._mismatched += len(shards)
        gathered = self._ranks.gather([*fresh, *((url, "", CHANGED) for url in shards)])
        if self._ranks.first:
            self._quarantine.add([name for part in gathered for name in part])

    @property
    def kinds(self) -> dict[str, int]:
        """Kind → bad samples of all ranks so far; kinds that did not occur are left out."""
        return {kind: round(self._sums[kind]) for kind in KINDS if self._sums[kind]}

    @property
    def total(self) -> int:
        """Bad samples of all ranks so far."""
        return sum(self.kinds.values())

    def figures(self) -> dict[str, float]:
        """For TensorBoard: bad samples, in all and by kind, and how remote storage was read."""
        figures = {"data/bad_samples": float(self.total)}
        figures |= {f"data/bad_{kind}": float(count) for kind, count in self.kinds.items()}
        opened = self._sums["cache_hits"] + self._sums["cache_misses"]
        if opened:
            figures["data/cache_hits"] = self._sums["cache_hits"] / opened
        if self._sums["remote_bytes"]:
            figures["data/remote_gb"] = self._sums["remote_bytes"] / 1e9
            figures["data/remote_retries"] = self._sums["retries"]
        return figures

    def check(self) -> None:
        """Compare with the budget; the same on every rank.

        Raises:
            UserError: there are too many.
        """
        check_budget(self.kinds, round(self._sums["read"]), self._budget)

    def _own(self, loader: Counted | None) -> dict[str, float]:
        bad = loader.bad if loader else {}
        store = self._store
        return {
            "read": float(loader.read if loader else 0),
            **{kind: float(bad.get(kind, 0)) for kind in KINDS},
            "mismatched": float(len(store.mismatched)),
            "retries": float(sum(store.retries.copy().values())),
            "remote_bytes": float(store.bytes_read),
            "cache_hits": float(store.cache_hits),
            "cache_misses": float(store.cache_misses),
        }
