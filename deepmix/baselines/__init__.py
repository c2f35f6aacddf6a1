"""Methods that the papers compare with, on the same engine, networks and start."""

from deepmix.baselines.dec import DEC

__all__ = ["DEC"]
