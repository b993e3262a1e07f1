"""What a check comes to: ok, warn or FAIL, with value, limit and mend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Word = Literal["ok", "warn", "FAIL", "n/a"]
"""`warn` may cost speed or comfort, `FAIL` will stop a run or spoil it, `n/a` could not be asked here."""


@dataclass(frozen=True)
class Verdict:
    """One check of one machine, or of all of them together."""

    check: str
    where: str
    """`here`, the name of a node, or `all nodes`."""
    word: Word
    value: str
    limit: str = ""
    """What the value is compared with."""
    mend: str = ""
    """What can be done, where it is not ok."""


def expect(
    check: str, where: str, good: bool, value: str, *, limit: str = "", mend: str, word: Word = "FAIL"
) -> Verdict:
    """A verdict that is ok or else `word`, and then has the mend."""
    return Verdict(check, where, "ok" if good else word, value, limit, "" if good else mend)


def at_least(check: str, where: str, value: float, floor: float | None, unit: str, mend: str) -> Verdict:
    """A figure against the profile's floor; without one it is reported alone."""
    text = f"{value:,.3g} {unit}" if value < 100 else f"{value:,.0f} {unit}"
    if floor is None:
        return Verdict(check, where, "ok", text, "no floor in the profile")
    return expect(check, where, value >= floor, text, limit=f"at least {floor:g} {unit}", mend=mend)
