"""Whether a checkpoint belongs to a recipe; if not, the first tensor that differs is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vqscale.checkpoint.folder import Stored, is_foreign, open_stored, steps
from vqscale.checkpoint.manifest import CODES_OF, SUBMITTED, FaultError
from vqscale.errors import UserError
from vqscale.events import newest
from vqscale.training.pieces import EXTRA

Entry = tuple[tuple[int, ...], str]
"""Shape and dtype of a whole tensor."""

_MEND = "resume with the settings it was trained with, or start a new run"


def require_fit(stored: Stored, wanted: Mapping[str, Entry]) -> None:
    """Compare names, shapes and dtypes with the parts of a checkpoint (`model`, `optimizer`) that occur in `wanted`.

    What a task keeps besides (`extra`) has to be there where it is wanted; more of it may be there.

    Raises:
        UserError: names the first tensor that differs.
    """
    parts = {name.partition("/")[0] for name in wanted} - {EXTRA}
    there = {
        name: (tuple(record.shape), record.dtype)
        for name, record in stored.manifest.tensors.items()
        if name.partition("/")[0] in parts or name in wanted
    }
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            what = f"{name} is {_shown(there.get(name))} in it and {_shown(wanted.get(name))} by the recipe"
            raise UserError(f"does not fit the recipe ({what})", where=stored.url, mend=_MEND)


def require_seed(stored: Stored, state: Mapping[str, Any], seed: int) -> None:
    """All randomness and the data order follow from the seed: with another one it would be no continuation.

    Raises:
        UserError: the training had another seed.
    """
    if state.get("seed") != seed:
        raise UserError(
            f"was trained with seed {state.get('seed')}, the recipe has {seed}", where=stored.url, mend=_MEND
        )


def require_run(stored: Stored, made_by: Mapping[str, str]) -> None:
    """In a folder for many runs another one may have had the same id: one that was deleted, or of another user.

    Raises:
        UserError: another run wrote it.
    """
    if is_foreign(stored.manifest, made_by):
        theirs, mine = (one.get(SUBMITTED) for one in (stored.manifest.made_by, made_by))
        what = f"is of another run with this id (made {theirs}; this one {mine})"
        mend = "remove its folder if nobody needs it, or submit with another --run NAME or resources.checkpoints"
        raise UserError(what, where=stored.url, mend=mend)


def require_none(where: str, events: Path | None, notes: Sequence[str]) -> None:
    """Where no valid checkpoint is found there was none: a folder that is not mounted looks as an empty one.

    Raises:
        UserError: one was committed, as the stage's events tell.
    """
    last = newest(events, "checkpoint").get("checkpoint") if events else None
    if last is None:
        return
    told = "; ".join(notes) or "there is none"
    what = f"step {last['step']} was committed, but no valid checkpoint is found ({told})"
    mend = f"bring the storage back and requeue; to begin anew on purpose, remove {events}"
    raise UserError(what, where=where, mend=mend)


def require_codes(stored: Stored, made_by: Mapping[str, str]) -> None:
    """A prior knows the codes of one tokenizer.

    Raises:
        UserError: it was trained on those of another one than it is to go on with.
    """
    if CODES_OF in made_by and stored.manifest.made_by.get(CODES_OF) != made_by[CODES_OF]:
        raise UserError("was trained on codes of another tokenizer", where=stored.url, mend=_MEND)


def require_prior_of(fingerprint: str, where: str) -> None:
    """Whether the newest prior in a place draws codes of this tokenizer; a place without checkpoints is let pass.

    Raises:
        UserError: its codes are another tokenizer's, so that their images would mean nothing.
    """
    for step in steps(where):
        with suppress(FaultError):
            stored = open_stored(where, step)
            if stored.manifest.made_by.get(CODES_OF, fingerprint) != fingerprint:
                mend = "train the prior on the codes of this tokenizer"
                raise UserError("was trained on codes of another tokenizer", where=stored.url, mend=mend)
            return


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line about each setting of the optimisation that is another one than when the checkpoint was written."""
    return [
        f"goes on with another training.{name}: {before[name]} before, {value} now"
        for name, value in now.items()
        if name in before and before[name] != value
    ]


def _shown(entry: Entry | None) -> str:
    return f"{entry[1]} {list(entry[0])}" if entry else "absent"
