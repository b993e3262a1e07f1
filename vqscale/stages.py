"""The names of the stages. Light: the help of the command line lists them."""

from __future__ import annotations

STAGES = ("generate", "pack", "tokenizer", "extract", "prior", "sample", "evaluate")
"""All stages, in the order in which data flows through them."""

TRAINED = ("tokenizer", "prior")
"""Those that train, and so have checkpoints."""

DRILLED = ("tokenizer", "extract", "prior")
"""Those that a drill can repeat."""
