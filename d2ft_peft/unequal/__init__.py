"""Data parallelism on unequal devices: how fast each process is, and how many of its samples it runs."""

from .pace import Pace
from .shares import Shares


__all__ = ["Pace", "Shares"]
