"""The one exception for what a user can mend: a single clear line, never a traceback."""

from __future__ import annotations

from vqscale.masking import shown

EXIT_USER_ERROR = 2
"""Exit code of every command that was given bad input."""


class UserError(Exception):
    """Bad input: says what is wrong, where, and the mend.

    Mains catch it, print `error: <where>: <what>; <mend>` on standard error and exit with code 2.

    Args:
        what: the fault, in plain words ("unknown key 'hiden'"). Secrets in URLs are masked, here and in the others.
        where: the recipe key, file or shard it stands in; may be empty.
        mend: what the user can do about it; may be empty.
    """

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = what, where, mend = shown(what), shown(where), shown(mend)
        line = f"{where}: {what}" if where else what
        # One line, always: a message that quotes foreign text may carry newlines.
        super().__init__(" ".join(f"{line}; {mend}".split()) if mend else " ".join(line.split()))
