"""The command line: ``d2ft plan``, ``compare``, ``train``, ``report``, ``simulate`` and ``cloud``."""

from .app import app, main


__all__ = ["app", "main"]
