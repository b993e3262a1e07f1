"""Ranks, the engine seam, the one loop and its tasks, checkpoints, and what a run shows."""
