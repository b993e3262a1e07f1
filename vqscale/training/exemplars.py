"""Training images that a prior looks at before its training begins, such as those of an aggregated posterior."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from vqscale.errors import UserError
from vqscale.models.prior import Prior


def show_exemplars(prior: Prior, batches: Iterable[Mapping[str, Tensor]], levels: Sequence[str]) -> None:
    """Show a prior as many images as it wants; of one that wants none, nothing is read.

    Args:
        prior: with fresh weights.
        batches: training images one after the other: a posterior [n, 2 · channels, side, side] by level name, and
            `label` int64 [n].
        levels: level names, the coarsest first.

    Raises:
        UserError: there are fewer images.
    """
    seen = 0
    if not prior.wanted:
        return
    for fields in batches:
        labels = fields["label"]
        prior.see(seen, [fields[name].float() for name in levels], prior.classes_of(labels))
        seen += len(labels)
        if seen >= prior.wanted:
            return
    raise UserError(
        f"the prior keeps {prior.wanted} images, the training shards hold {seen}",
        where="prior.networks.N.images",
        mend=f"set it to {seen} or less",
    )
