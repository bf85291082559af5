"""``d2ft cloud``: serves the frozen blocks of a model to edges, as ``d2ft-cloud`` does."""

from __future__ import annotations

import typer

from .answer import errors_in_one_line


def add_to(app: typer.Typer) -> None:
    """Add the command; it has the options of ``d2ft-cloud``, and ``--help`` lists them."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command("cloud", add_help_option=False, context_settings=settings)(cloud)


def cloud(context: typer.Context) -> None:
    """Serve the frozen blocks of a model to edges (DLoRA). Example: d2ft cloud BASE --port 50051"""
    with errors_in_one_line():
        try:
            from ..dlora.cloud.__main__ import main
        except ImportError as error:
            raise ImportError(f'{error}; the cloud needs pip install "d2ft_peft[dlora]"') from error
        main(context.args)
