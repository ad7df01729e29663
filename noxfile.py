"""`nox` checks style and types, runs every test, builds the package and imports what it built."""

import shutil
from pathlib import Path

import nox

nox.options.reuse_existing_virtualenvs = True


@nox.session
def tests(session: nox.Session) -> None:
    """Everything that guards the main branch, in one environment."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "recon_aux", "integrations")
    session.run("pytest", *session.posargs)
    package(session)


def package(session: nox.Session) -> None:
    """Build wheel and sdist; install the wheel somewhere empty and import it from there."""
    built = Path(session.create_tmp()) / "dist"
    shutil.rmtree(built, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(built), silent=True)
    (wheel,) = built.glob("*.whl")
    (_,) = built.glob("*.tar.gz")
    installed = built / "installed"
    session.install("--no-deps", "--upgrade", "--target", str(installed), str(wheel))
    check = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "import pathlib, recon_aux.integrations.lightly, recon_aux.probe; "
        "root = pathlib.Path(recon_aux.__file__).parent; "
        "assert str(root).startswith(sys.argv[1]), root; "
        "assert (root / 'py.typed').exists(); print('imported', root)"
    )
    session.run("python", "-c", check, str(installed.resolve()))
