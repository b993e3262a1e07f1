"""The kinds of tokenizer that a recipe may have."""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Tag

from vqscale.config.pixels import Pixels
from vqscale.config.section import kind_or
from vqscale.config.vae import GaussianVAE
from vqscale.config.vqvae2 import VQVAE2

Tokenizer = Annotated[
    Annotated[VQVAE2, Tag("vqvae2")] | Annotated[GaussianVAE, Tag("vae")] | Annotated[Pixels, Tag("pixels")],
    Discriminator(kind_or("vqvae2")),
]
"""A tokenizer by its `kind`."""
