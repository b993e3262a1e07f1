"""The typed recipe, how it is loaded, and where a run keeps its files. Imports no torch."""
