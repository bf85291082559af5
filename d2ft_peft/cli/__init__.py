"""The command line: ``d2ft plan``, ``compare``, ``train``, ``report``, ``simulate``, ``cloud`` and ``edge``."""

from .app import app, main


__all__ = ["app", "main"]
