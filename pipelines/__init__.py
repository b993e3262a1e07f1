"""One thin main a stage: `torchrun -m pipelines.STAGE --run-dir DIR`."""
