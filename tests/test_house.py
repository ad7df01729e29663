"""The rooms of the house: what files are called, what each room imports, how large it may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import recon_aux
from helpers.running import ROOT, run_python

TASK, ENGINE = ROOT / "recon_aux" / "task", ROOT / "recon_aux" / "engine"
PROBE, CLI = ROOT / "recon_aux" / "probe", ROOT / "recon_aux" / "cli"
ADAPTER = "recon_aux.engine.adapter"
FRAMEWORKS = {"lightly", "solo", "lightning", "pytorch_lightning", "lightning_fabric"}
FRAMEWORKS |= {"stable_pretraining", "transformers", "timm", "torchvision", "kornia", "sklearn"}

# --- names ---

RESERVED = {"con", "prn", "aux", "nul"}
RESERVED |= {f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10)}


def is_refused_by_windows(path: str) -> bool:
    """Whether Windows can't have a file of this name, or a folder on the way to it."""
    return any(
        part.split(".")[0].strip().lower() in RESERVED
        or any(character in '<>:"|?*\\' or ord(character) < 32 for character in part)
        or part.endswith((".", " "))
        for part in path.split("/")
    )


@pytest.mark.parametrize(
    "path",
    ["recon_aux/aux.py", "AUX", "a/Con.tar.gz", "nul/b.txt", "com1.md", "docs/lpt9", "aux .py",
     "what?.md", "a:b", 'say "so".txt', "tab\t.py", "a\\b.py", "ends./a.py", "ends ", "<b>", "x|y"],
)  # fmt: skip
def test_names_that_windows_reserves_are_known(path: str) -> None:
    assert is_refused_by_windows(path)


@pytest.mark.parametrize(
    "path", ["recon_aux/task.py", "auxiliary.py", "recon_aux/x.aux", "com10.py", ".ci/run", "lpt0"]
)
def test_other_names_are_not_refused(path: str) -> None:
    assert not is_refused_by_windows(path)


def test_every_file_can_be_checked_out_on_windows() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    paths = listed.stdout.decode().split("\0")
    assert "pyproject.toml" in paths
    assert [path for path in paths if is_refused_by_windows(path)] == []


def test_no_module_stands_where_a_public_name_does() -> None:
    code = """
import importlib, pkgutil, types
import recon_aux, recon_aux.integrations
public = {name: getattr(recon_aux, name) for name in recon_aux.__all__}

def visit(package):
    for found in pkgutil.iter_modules(package.__path__):
        try:
            module = importlib.import_module(f"{package.__name__}.{found.name}")
        except ImportError as error:
            # a framework that isn't installed
            assert "install" in str(error), error
            continue
        assert getattr(package, found.name) is module, module
        if found.ispkg:
            visit(module)

visit(recon_aux)
visit(recon_aux.integrations)
for name, value in public.items():
    assert getattr(recon_aux, name) is value, name
assert isinstance(recon_aux.attach, types.FunctionType), recon_aux.attach
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


# --- imports ---


def imported_by(source: str, package: str = "") -> Iterator[tuple[str, str]]:
    """Modules, and the names that are imported from each, or "" for the module itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            within = parents[: len(parents) + 1 - node.level] if node.level else []
            module = ".".join([*within, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func)
            if function.endswith("import_module") or function == "__import__":
                yield str(node.args[0].value), ""


def package_of(path: Path) -> str:
    within = path.parent.relative_to(ROOT).parts
    return ".".join(("recon_aux", *within) if within[0] == "integrations" else within)


def is_of(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def foreign(source: str, allowed: Iterable[str], package: str = "") -> list[str]:
    """The modules that are imported beyond those allowed and the standard library."""
    return [
        module
        for module, name in imported_by(source, package)
        if module.split(".")[0] not in sys.stdlib_module_names
        and not is_of(module, allowed)
        # as in: from recon_aux import task
        and not is_of(f"{module}.{name}", allowed)
    ]


def test_imports_of_every_form_are_seen() -> None:
    source = """
import os, lightly.loss
from recon_aux import engine
from torch.nn import Module
def late():
    import timm
    importlib.import_module("kornia")
"""
    assert foreign(source, ["torch"]) == ["lightly.loss", "recon_aux", "timm", "kornia"]
    assert foreign("from . import a\nfrom ..engine.b import c", ["x"], "recon_aux.task") == [
        "recon_aux.task",
        "recon_aux.engine.b",
    ]
    assert foreign("from recon_aux import task", ["recon_aux.task"]) == []


def files_of(room: Path) -> list[Path]:
    found = sorted(room.rglob("*.py"))
    assert found
    return found


def foreign_in(room: Path, *allowed: str) -> dict[str, list[str]]:
    """What a room's files import beyond those allowed, by file."""
    found = {
        str(path.relative_to(ROOT)): foreign(path.read_text(), allowed, package_of(path))
        for path in files_of(room)
    }
    return {path: modules for path, modules in found.items() if modules}


def test_the_task_imports_no_other_room() -> None:
    assert foreign_in(TASK, "torch", "einops", "recon_aux.task") == {}


def test_the_engine_imports_the_task_and_nothing_else() -> None:
    assert foreign_in(ENGINE, "torch", "einops", "recon_aux.task", "recon_aux.engine") == {}


def test_the_probe_imports_task_and_engine_and_nothing_else_of_recon_aux() -> None:
    needs = ("torch", "numpy", "sklearn", "kornia", "rich", "PIL")
    rooms = ("recon_aux.task", "recon_aux.engine", "recon_aux.probe")
    assert foreign_in(PROBE, *needs, *rooms) == {}


def test_the_monitor_imports_every_other_room_and_no_trainer() -> None:
    rooms = ("recon_aux.task", "recon_aux.engine", "recon_aux.probe", "recon_aux.monitor")
    assert foreign_in(PROBE.parent / "monitor", "torch", "numpy", "PIL", *rooms) == {}


def test_the_command_line_imports_every_room_and_no_trainer() -> None:
    needs = ("torch", "numpy", "sklearn", "rich", "typer", "torchvision", "timm", "PIL")
    rooms = ("recon_aux", "matplotlib", "safetensors")
    assert foreign_in(CLI, *needs, *rooms) == {}


@pytest.mark.parametrize(
    "room", [ROOT / "recon_aux", ROOT / "integrations"], ids=lambda room: room.name
)
def test_nothing_imports_the_command_line(room: Path) -> None:
    found = {
        path
        for path in files_of(room)
        for module, name in imported_by(path.read_text(), package_of(path))
        if CLI not in path.parents and is_of(f"{module}.{name}", ["recon_aux.cli"])
    }
    assert found == set()


@pytest.mark.parametrize("room", [TASK, ENGINE], ids=lambda room: room.name)
def test_no_framework_is_imported_by_task_or_engine(room: Path) -> None:
    for path in files_of(room):
        modules = {module.split(".")[0] for module, _ in imported_by(path.read_text())}
        assert not modules & FRAMEWORKS, path


def names_in_all(path: Path) -> set[str]:
    """What a module declares to be public, if there is such a module."""
    if not path.is_file():
        return set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{path} has no __all__")


def private_names(source: str, package: str) -> list[str]:
    """What a file takes of recon_aux that is not public."""
    public = {
        "recon_aux": {"", *recon_aux.__all__},
        ADAPTER: names_in_all(ENGINE / "adapter.py"),
    }
    return [
        f"{module}.{name}"
        for module, name in imported_by(source, package)
        if is_of(module, ["recon_aux"])
        and not is_of(f"{module}.{name}", ["recon_aux.integrations"])
        and name not in public.get(module, set())
    ] + [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) == "recon_aux"
        and node.attr not in {*recon_aux.__all__, "integrations"}
    ]


def test_private_names_are_seen() -> None:
    source = """
import recon_aux
from recon_aux import ReconAux, engine
from recon_aux.integrations.lightly import attach
from .lightly import attach
from recon_aux.engine.hooks import anything
recon_aux.detach(recon_aux.task.task)
"""
    assert private_names(source, "recon_aux.integrations") == [
        "recon_aux.engine",
        "recon_aux.engine.hooks.anything",
        "recon_aux.task",
    ]


def test_integrations_use_public_names_alone() -> None:
    for path in files_of(ROOT / "integrations"):
        assert private_names(path.read_text(), package_of(path)) == [], path


def test_torch_and_einops_are_all_that_the_task_needs() -> None:
    code = f"""
import importlib, pkgutil, sys
import einops, torch, torch._dynamo
there = set(sys.modules)
package = importlib.import_module("recon_aux.task")
for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(found.name)
known = {{name.split(".")[0] for name in there}} | {{"recon_aux"}} | set(sys.stdlib_module_names)
print(sorted({{name.split(".")[0] for name in sys.modules}} - known))
print(sorted({FRAMEWORKS!r} & set(sys.modules)))
"""
    result = run_python("-c", code)
    assert result.stdout.split("\n")[:2] == ["[]", "[]"], result.stdout + result.stderr


# --- sizes ---


def too_long(source: str, a_class: int = 250, a_function: int = 60) -> list[str]:
    """Classes, and functions without their docstrings, of more lines than there may be."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and lines_of(node) > a_class:
            found.append(node.name)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            documented = ast.get_docstring(node) is not None
            if lines_of(node) - documented * lines_of(node.body[0]) > a_function:
                found.append(node.name)
    return found


def lines_of(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_what_is_too_long_is_seen() -> None:
    source = '''
class A:
    def f(self):
        """One.

        Two.
        """
        x = 1
        return x
'''
    assert too_long(source, a_class=8, a_function=3) == []
    assert too_long(source, a_class=7, a_function=2) == ["A", "f"]


@pytest.mark.parametrize(("room", "most"), [(TASK, 2560), (ENGINE, 4110)], ids=["task", "engine"])
def test_a_room_does_not_grow(room: Path, most: int) -> None:
    assert sum(len(path.read_text().splitlines()) for path in files_of(room)) <= most


def test_no_class_and_no_function_is_too_long() -> None:
    paths = [*files_of(ROOT / "recon_aux"), *files_of(ROOT / "integrations")]
    found = {str(path.relative_to(ROOT)): too_long(path.read_text()) for path in paths}
    assert {path: names for path, names in found.items() if names} == {}
