"""Images and code grids in shards: written once, read in one canonical order. Imports no torch."""
