"""Secrets in URLs, masked wherever a URL is shown."""

from __future__ import annotations

import re

# Behind a port's number comes a slash; account points of S3 begin with arn: and hold colons; so do GitHub's owners.
_PASSWORD = re.compile(r"(?<!github)(://(?!arn:)[^/@:\[\s]*:)(?!\d+(?:[/?#]|$))[^@\s]*@")
_SECRET_NAMES = (
    r"[\w.-]*(?:signature|token|secret|passw|credential)[\w.-]*|sig|key|pwd|auth|(?:api|access)[_-]?key[\w-]*"
)
_SECRET = re.compile(rf"([?&;](?:{_SECRET_NAMES})=)[^&;#\s'\"<>)]+", re.IGNORECASE)


def shown(text: object) -> str:
    """A URL, or a text with URLs in it, as it may be shown: passwords and signatures are `***`."""
    return _SECRET.sub(r"\1***", _PASSWORD.sub(r"\1***@", str(text)))


def has_password(url: str) -> bool:
    """Whether a URL has a password in it, as `https://user:password@host` has."""
    return bool(_PASSWORD.search(url))
