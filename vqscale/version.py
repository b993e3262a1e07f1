"""The version of vqscale; `pyproject.toml` has the same. Light: `vqscale --version` prints it."""

__version__ = "0.1.0"
