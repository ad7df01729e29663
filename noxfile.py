"""`nox` checks style and types, runs every test, builds the package and imports what it built.

`nox -s fast` is for while one edits: style, types and the tests that aren't slow. `nox -s mutation`
asks whether the tests would notice a bug.

Three environments, two on top of the first: PyPI's solo-learn, of 2021, wants another Lightning
than everything else, and stable-pretraining changes every trainer where it is installed.
"""

import json
import re
import shutil
from itertools import chain
from pathlib import Path

import nox

nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests", "solo_learn", "docs"]

# each test on one core
IN_PARALLEL = ["-n", "2", "--dist", "worksteal"]

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

# what depends on the versions of Python, torch and the frameworks
VERSIONED = [
    "tests/task",
    "tests/engine",
    "tests/integrations",
    "tests/monitor",
    "tests/probe",
    "tests/cli",
    "tests/test_refusals.py",
]

# the tests in tests/engine that answer for a module; for others of the task it's all of tests/task
MUTATED = {
    "adapter": ["adapter", "attach"],
    "api": ["attach", "loops", "own_code"],
    "attachment": ["attach", "loops", "methods", "plain", "training"],
    "auto_weight": ["auto_weight"],
    "autograd": ["methods", "attach"],
    "checkpoint": ["checkpoints"],
    "compiling": ["training"],
    "discover": ["methods", "attach", "own_code", "teachers"],
    "drivers": ["loops", "methods", "memory", "teachers", "own_code"],
    "early": ["early", "methods"],
    "encoder": ["inputs", "own_code", "attach"],
    "hooks": ["attach", "own_code", "plain", "methods"],
    "leaks": ["methods", "attach", "own_code", "teachers"],
    "logs": ["logs"],
    "modules": ["momentum", "teachers", "own_code", "attach"],
    "optimizers": ["optimizers", "loops"],
    "pairing": ["pairing"],
    "plan": ["methods", "attach"],
    "step": ["inputs", "methods"],
    "turns": ["closures"],
    "updates": ["loops", "optimizers"],
    "views": ["methods", "own_code", "loops", "attach"],
}

MUTATION = """
[cosmic-ray]
module-path = "{module}"
timeout = 600
test-command = "python -m pytest -x -q -p no:cacheprovider --disable-warnings {tests}"
[cosmic-ray.distributor]
name = "local"
[cosmic-ray.filters.operators-filter]
# of an operator's many replacements one; types in annotations are not run
exclude-operators = [
  "core/ReplaceBinaryOperator_(?!(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_Mul|Pow_Mul)$)",
  "core/ReplaceComparisonOperator_(?!(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Is_IsNot|IsNot_Is)$)",
  "core/ReplaceUnaryOperator_(?!Delete)",
]
"""


@nox.session
def tests(session: nox.Session) -> None:
    """Style, types, every test but solo-learn's, the package."""
    session.install("-e", ".[dev]")
    check(session)
    session.run("python", "-m", "pytest", *IN_PARALLEL, *session.posargs)
    package(session)


@nox.session
def fast(session: nox.Session) -> None:
    """Style, types, the tests that aren't slow."""
    share_packages(session)
    session.install("-e", ".[dev]")
    check(session)
    session.run("python", "-m", "pytest", *IN_PARALLEL, "-m", "not slow", *session.posargs)


def check(session: nox.Session) -> None:
    """Style and types."""
    session.run("python", "-m", "ruff", "check", ".")
    session.run("python", "-m", "ruff", "format", "--check", ".")
    session.run("python", "-m", "mypy", "recon_aux", "integrations", "tests", "examples")


def package(session: nox.Session) -> None:
    """Build wheel and sdist, check them, and import the wheel from somewhere empty."""
    built = Path(session.create_tmp()) / "dist"
    shutil.rmtree(built, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(built), silent=True)
    (wheel,) = built.glob("*.whl")
    (sdist,) = built.glob("*.tar.gz")
    session.run("python", "-m", "twine", "check", "--strict", str(wheel), str(sdist))
    installed = built / "installed"
    session.install("--no-deps", "--upgrade", "--target", str(installed), str(wheel))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "import pathlib, recon_aux.integrations.lightly, recon_aux.probe, recon_aux.cli; "
        "root = pathlib.Path(recon_aux.__file__).parent; "
        "assert str(root).startswith(sys.argv[1]), root; "
        "assert (root / 'py.typed').exists(); print('imported', root)"
    )
    session.run("python", "-c", code, str(installed.resolve()))


@nox.session
def docs(session: nox.Session) -> None:
    """Build the pages as a site, in site/; a warning is an error."""
    extras = nox.project.load_toml()["project"]["optional-dependencies"]
    # the package itself is only read, so torch isn't needed
    session.install(*extras["docs"])
    config = "docs/site/mkdocs.yml"
    session.run("mkdocs", "build", "--strict", "--config-file", config, *session.posargs)


@nox.session
def solo_learn(session: nox.Session) -> None:
    """The solo-learn adapter on the version that PyPI has."""
    share_packages(session)
    session.install("-e", ".", *SOLO_LEARN_NEEDS)
    # its pins, of torch 1.9 among others, can't be met
    session.install("--no-deps", "solo-learn==1.0.2")
    tests = its_tests("solo_learn")
    session.run("python", "-m", "pytest", "-rs", *IN_PARALLEL, *tests, *session.posargs)


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """The oldest versions that are supported: every lower bound in pyproject.toml, exactly."""
    project = nox.project.load_toml()["project"]
    needs = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    pins = Path(session.create_tmp()) / "pins.txt"
    bounds = (re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", need) for need in needs)
    pins.write_text("".join(f"{bound[1]}=={bound[2]}\n" for bound in bounds if bound))
    # Lightning 2.2 imports pkg_resources, which newer ones don't have
    session.install("-e", ".[dev]", "setuptools<81", "--constraint", str(pins))
    session.run("python", "-m", "pytest", *IN_PARALLEL, *VERSIONED, *session.posargs)


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """The newest versions that there are, of Python and of everything else."""
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", ".[dev]")
    session.run("python", "-m", "pytest", *IN_PARALLEL, *VERSIONED, *session.posargs)


@nox.session
def mutation(session: nox.Session) -> None:
    """Change one thing at a time in the named modules; how many changes do their tests notice?"""
    share_packages(session)
    found = [*Path("recon_aux/task").rglob("*.py"), *Path("recon_aux/engine").glob("*.py")]
    known = {path.stem: path for path in found if path.parts[1] == "task" or path.stem in MUTATED}
    del known["__init__"]
    unknown = set(session.posargs) - set(known)
    if unknown or not session.posargs:
        session.error(f"Pass modules among {sorted(known)}, as: nox -s mutation -- splitter")
    # the checkout stays as it is, and may be edited meanwhile
    copy = Path(session.create_tmp()).resolve() / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    for name in ("recon_aux", "integrations", "tests", "examples", "docs"):
        shutil.copytree(name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(name, copy)
    session.chdir(copy)
    session.install("-e", ".[dev]", "cosmic-ray>=8.7")
    for name in session.posargs:
        Path("mutation.toml").write_text(
            MUTATION.format(module=known[name], tests=tests_of(known[name]))
        )
        session.run("cosmic-ray", "baseline", "mutation.toml")
        session.run("cosmic-ray", "init", "mutation.toml", f"{name}.sqlite", "--force")
        session.run("cr-filter-operators", f"{name}.sqlite", "mutation.toml")
        session.run("cosmic-ray", "exec", "mutation.toml", f"{name}.sqlite")
    for name in session.posargs:
        results = str(session.run("cosmic-ray", "dump", f"{name}.sqlite", silent=True, log=False))
        outcomes = [json.loads(line)[1] for line in results.splitlines()]
        alive = [x["diff"] for x in outcomes if x["test_outcome"] == "survived"]
        killed = sum(x["test_outcome"] in ("killed", "incompetent") for x in outcomes)
        session.log("\n".join(["survived:", *alive]) if alive else "none survived")
        session.log(f"{name}: killed {killed} of {killed + len(alive)}")


def tests_of(module: Path) -> str:
    """The tests that answer for a module: its examples, then its own file, then the others."""
    name = module.stem
    if name in MUTATED:
        return " ".join(f"tests/engine/test_{part}.py" for part in MUTATED[name])
    others = sorted(
        Path("tests/task").glob("test_*.py"), key=lambda path: path.stem != f"test_{name}"
    )
    return " ".join(map(str, [module, *others]))


@nox.session
def lightly_train(session: nox.Session) -> None:
    """The LightlyTrain adapter. It is AGPL, so no other session installs it."""
    share_packages(session)
    session.install("-e", ".[lightly-train]", "pytest")
    session.run("python", "-m", "pytest", "-rs", *its_tests("lightly_train"), *session.posargs)


@nox.session
def stable_pretraining(session: nox.Session) -> None:
    """The stable-pretraining adapter. The package adds callbacks to every trainer around it."""
    share_packages(session)
    session.install("-e", ".[stable-pretraining,probe]", "pytest")
    session.run("python", "-m", "pytest", "-rs", *its_tests("stable_pretraining"), *session.posargs)


def its_tests(framework: str) -> list[str]:
    """The tests of a framework that has an environment of its own, and its snippets in pages."""
    snippets = f"tests/test_snippets.py::test_the_snippets_of_a_framework_run[{framework}]"
    return [f"tests/integrations/test_{framework}.py", snippets]


def share_packages(session: nox.Session) -> None:
    """Look for packages in the tests' environment, too, if there is one: torch takes gigabytes."""
    own = Path(session.virtualenv.location).resolve()
    shared = own.parent / "tests"
    for packages in own.glob("lib/python*/site-packages"):
        others = shared / packages.relative_to(own)
        if others.is_dir():
            (packages / "shared.pth").write_text(f"{others}\n")
