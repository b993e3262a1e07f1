"""What `config.json` of exported models says: enough to build the networks without the run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vqscale.config.recipe import Prior
from vqscale.config.section import Positive, Section
from vqscale.config.tokenizer_kinds import Tokenizer
from vqscale.data.manifest import CodeLevel

CONFIG, TOKENIZER, PRIOR, CARD = "config.json", "tokenizer.safetensors", "prior.safetensors", "README.md"
"""Files of an exported folder."""


class StoredFile(Section):
    """A file beside `config.json`."""

    bytes: Annotated[int, Field(ge=0)]
    """Size."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of its content."""


class Exported(Section):
    """A tokenizer, and the prior of its codes if there is one."""

    format: Literal["vqscale-model/1"] = "vqscale-model/1"
    """Changes when older programs could not read it."""
    name: str
    """Of the recipe."""
    image_size: Positive
    """Side of the images in pixels."""
    tokenizer: Tokenizer
    """As in the recipe."""
    prior: Prior | None = None
    """As in the recipe; None when there is only a tokenizer."""
    classes: tuple[str, ...] = ()
    """Names of the classes that the prior knows."""
    fingerprint: str
    """Identity of the tokenizer, as code shards carry it."""
    files: dict[str, StoredFile]
    """Name → what it has to be."""
    made_by: dict[str, Any]
    """Run, code and versions that it comes from."""

    @property
    def levels(self) -> tuple[CodeLevel, ...]:
        """The tokenizer's latents of one image, from the finest level to the coarsest."""
        return self.tokenizer.levels_of(self.image_size)
