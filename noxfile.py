"""`nox` checks style and types, runs every test, builds the package and imports what it built.

`nox -s fast` is for while one edits: style, types and the tests that aren't slow.

Three environments, two on top of the first: PyPI's solo-learn, of 2021, wants another Lightning
than everything else, and stable-pretraining changes every trainer where it is installed.
"""

import shutil
from pathlib import Path

import nox

nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests", "solo_learn"]

SOLO_LEARN_NEEDS = [
    "pytest",
    "torchvision",
    "pytorch-lightning==1.9.5",
    "lightning-bolts==0.7.0",
    "timm",
    "wandb",
    "scipy",
    "setuptools<80",
]


@nox.session
def tests(session: nox.Session) -> None:
    """Style, types, every test but solo-learn's, the package."""
    session.install("-e", ".[dev]")
    check(session)
    session.run("python", "-m", "pytest", *session.posargs)
    package(session)


@nox.session
def fast(session: nox.Session) -> None:
    """Style, types, the tests that aren't slow."""
    share_packages(session)
    session.install("-e", ".[dev]")
    check(session)
    session.run("python", "-m", "pytest", "-m", "not slow", *session.posargs)


def check(session: nox.Session) -> None:
    """Style and types."""
    session.run("python", "-m", "ruff", "check", ".")
    session.run("python", "-m", "ruff", "format", "--check", ".")
    session.run("python", "-m", "mypy", "recon_aux", "integrations", "tests", "examples")


def package(session: nox.Session) -> None:
    """Build wheel and sdist; install the wheel somewhere empty and import it from there."""
    built = Path(session.create_tmp()) / "dist"
    shutil.rmtree(built, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(built), silent=True)
    (wheel,) = built.glob("*.whl")
    (_,) = built.glob("*.tar.gz")
    installed = built / "installed"
    session.install("--no-deps", "--upgrade", "--target", str(installed), str(wheel))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "import pathlib, recon_aux.integrations.lightly, recon_aux.probe; "
        "root = pathlib.Path(recon_aux.__file__).parent; "
        "assert str(root).startswith(sys.argv[1]), root; "
        "assert (root / 'py.typed').exists(); print('imported', root)"
    )
    session.run("python", "-c", code, str(installed.resolve()))


@nox.session
def solo_learn(session: nox.Session) -> None:
    """The solo-learn adapter on the version that PyPI has."""
    share_packages(session)
    session.install("-e", ".", *SOLO_LEARN_NEEDS)
    # its pins, of torch 1.9 among others, can't be met
    session.install("--no-deps", "solo-learn==1.0.2")
    solo_tests = "tests/integrations/test_solo_learn.py"
    session.run("python", "-m", "pytest", "-rs", solo_tests, *session.posargs)


@nox.session
def stable_pretraining(session: nox.Session) -> None:
    """The stable-pretraining adapter. The package adds callbacks to every trainer around it."""
    share_packages(session)
    session.install("-e", ".[stable-pretraining,probe]", "pytest")
    spt_tests = "tests/integrations/test_stable_pretraining.py"
    session.run("python", "-m", "pytest", "-rs", spt_tests, *session.posargs)


def share_packages(session: nox.Session) -> None:
    """Look for packages in the tests' environment, too, if there is one: torch takes gigabytes."""
    own = Path(session.virtualenv.location).resolve()
    shared = own.parent / "tests"
    for packages in own.glob("lib/python*/site-packages"):
        others = shared / packages.relative_to(own)
        if others.is_dir():
            (packages / "shared.pth").write_text(f"{others}\n")
