"""Checks that stop a run which would otherwise go wrong in silence."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

from vqscale.models.quantizer import Codebook
from vqscale.training.distributed import Ranks


class DivergedError(FloatingPointError):
    """Too many steps in a row had a gradient that is not finite. Every rank raises it."""


class CodebookMismatchError(RuntimeError):
    """The codebooks of two ranks are no longer bit-identical."""


def compare_codebooks(codebooks: Mapping[str, Codebook], ranks: Ranks, step: int) -> None:
    """Compare a hash of all that a codebook keeps over all ranks; one small gather.

    Raises:
        CodebookMismatchError: names rank, level and step. Every rank raises it.
    """
    mine = {name: _digest(book) for name, book in codebooks.items()}
    for rank, theirs in enumerate(everyones := ranks.gather(mine)):
        for name in mine:
            if theirs[name] != everyones[0][name]:
                raise CodebookMismatchError(
                    f"step {step}: the codebook of level '{name}' on rank {rank} differs from rank 0's; "
                    f"resume from the last checkpoint"
                )


def require_finite(loss: float, gradient_norm: float, step: int) -> None:
    """Stop on a loss or gradient that is not a number, before it is logged as progress."""
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise FloatingPointError(
            f"step {step}: loss {loss}, gradient norm {gradient_norm}; lower the learning rate or use fp32"
        )


def require_progress(skipped: int, allowed: int, step: int) -> None:
    """Stop a run that only skips.

    Args:
        skipped: steps in a row, the last one among them, whose gradient was not finite.
        allowed: how many of them are borne.
        step: finished steps.

    Raises:
        DivergedError: it was one more.
    """
    if skipped > allowed:
        raise DivergedError(
            f"step {step}: the last {skipped} steps were skipped, since their gradient was not finite, and {allowed} "
            f"are borne here; lower the learning rate or use fp32"
        )


def _digest(book: Codebook) -> str:
    digest = hashlib.sha256()
    for buffer in book.buffers():
        digest.update(buffer.cpu().numpy().tobytes())
    return digest.hexdigest()
