"""The command ``recon-aux``: probe, export, strip, show, demo.

Needs typer, and what the probe and the pictures need: ``pip install '.[cli]'``.
"""

import importlib
import sys


def main() -> None:
    """Run the command line."""
    try:
        commands = importlib.import_module("recon_aux.cli.commands")
    except ImportError as error:
        # recon_aux.probe refuses with a message of its own
        missing = error.name or getattr(error.__cause__, "name", None) or str(error)
        if missing.startswith("recon_aux"):
            raise
        missing = missing.split(".")[0]
        sys.exit(f"recon-aux needs {missing}; install it with, in a clone: pip install '.[cli]'")
    commands.app()
