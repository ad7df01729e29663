"""Every snippet of the README and of the pages runs, with what its reader has."""

from __future__ import annotations

import builtins
import dis
import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from typer.testing import CliRunner

import recon_aux
from helpers.pages import PAGES, blocks, commands
from helpers.running import ROOT
from recon_aux.cli.commands import app

ELSEWHERE = ("solo_learn", "stable_pretraining", "lightly_train")

# --- what the reader has ---


def simclr() -> type[Any]:
    """The reader's method, as lightly's examples write one."""
    pytorch_lightning = importlib.import_module("pytorch_lightning")

    class SimCLR(pytorch_lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, backbone: nn.Module | None = None) -> None:
            super().__init__()
            cut = nn.Sequential(*list(HAS["resnet18"]()().children())[:-1])
            self.backbone = cut if backbone is None else backbone
            self.projection_head = HAS["SimCLRProjectionHead"]()(512, 64, 32)
            self.criterion = criterion()

        def forward(self, x: Tensor) -> Tensor:
            projected: Tensor = self.projection_head(self.backbone(x).flatten(start_dim=1))
            return projected

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (x0, x1), _ = batch
            loss: Tensor = self.criterion(self(x0), self(x1))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return SimCLR


class Network(nn.Module):
    """The reader's model in a loop, and their method with a step if it is asked for one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()
        self.projector = nn.Linear(512, 32)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.projector(self.encoder(x))
        return projected


class Method(Network):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return criterion()(self(batch[0]), self(batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def encoder() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 512, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def criterion() -> Any:
    return HAS["NTXentLoss"]()()


def views() -> list[Tensor]:
    x = torch.rand(8, 3, 32, 32)
    return [x, 0.9 * x]


def data() -> Any:
    return DataLoader([(views(), torch.arange(8)) for _ in range(2)], batch_size=None)  # type: ignore[arg-type]


def labelled() -> tuple[Tensor, Tensor]:
    return torch.rand(64, 3, 16, 16), torch.arange(64) % 2


def trainer(epochs: int = 2) -> Any:
    # it imports lightly, which not every environment has
    return importlib.import_module("helpers.training").trainer(max_epochs=epochs, max_steps=-1)


def bare() -> Any:
    return simclr()()


def attached() -> Any:
    lightly = importlib.import_module("recon_aux.integrations.lightly")
    return lightly.attach(bare())


def checkpoint(model: Any, name: str) -> None:
    one = trainer(epochs=1)
    one.fit(model, data())
    one.save_checkpoint(name)


def images() -> None:
    Path("images").mkdir()
    for index in range(8):
        Image.effect_noise((64, 64), 50 + index).convert("RGB").save(f"images/{index}.png")


def solo_options() -> dict[str, Any]:
    """What solo-learn's scripts read from YAML, for 1.0.6."""
    return {
        "name": "simclr",
        "method": "simclr",
        "method_kwargs": {"proj_hidden_dim": 32, "proj_output_dim": 16, "temperature": 0.2},
        "backbone": {"name": "resnet18"},
        "data": {"dataset": "custom", "num_classes": 4, "num_large_crops": 2, "num_small_crops": 0},
        "optimizer": {
            "name": "sgd",
            "batch_size": 8,
            "lr": 0.01,
            "classifier_lr": 0.1,
            "weight_decay": 0,
        },
        "scheduler": {"name": "warmup_cosine", "warmup_epochs": 1},
        "max_epochs": 2,
    }


def solo_methods() -> dict[str, Any]:
    """solo-learn's own; 1.0.2 takes keyword arguments, which its scripts read from a shell."""
    methods = dict(importlib.import_module("solo.methods").METHODS)
    made = methods["simclr"]
    if "cfg" in inspect.signature(made.__init__).parameters:
        return methods
    options = {
        **solo_options()["method_kwargs"],
        **{"encoder": "resnet18", "backbone_args": {"cifar": False}, "num_classes": 4},
        **{"max_epochs": 2, "batch_size": 8, "optimizer": "sgd", "lars": False, "lr": 0.01},
        **{"weight_decay": 0, "classifier_lr": 0.1, "exclude_bias_n_norm": True},
        **{"accumulate_grad_batches": 1, "extra_optimizer_args": {}, "scheduler": "warmup_cosine"},
        **{"min_lr": 0.0, "warmup_start_lr": 0.002, "warmup_epochs": 1, "num_large_crops": 2},
        **{"num_small_crops": 0, "eta_lars": 0.02, "grad_clip_lars": True, "knn_eval": False},
    }
    return {"simclr": lambda cfg: made(**options)}


def solo_config() -> Any:
    if importlib.util.find_spec("omegaconf") is None:
        return SimpleNamespace(method="simclr")
    return importlib.import_module("omegaconf").OmegaConf.create(solo_options())


def spt_options() -> dict[str, Any]:
    spt = importlib.import_module("stable_pretraining")
    optim = {"optimizer": {"type": "AdamW", "lr": 1e-3}}
    return {"simclr_loss": spt.losses.NTXEntLoss(), "optim": optim}


def module(name: str) -> Callable[[], Any]:
    return lambda: importlib.import_module(name)


def member(of: str, name: str) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module(of), name)


HAS: dict[str, Callable[[], Any]] = {
    **{name: module(name) for name in ("recon_aux", "torch", "torchvision")},
    "nn": module("torch.nn"),
    "spt": module("stable_pretraining"),
    "attach": member("recon_aux.integrations.lightly", "attach"),
    "resnet18": member("torchvision.models", "resnet18"),
    "NTXentLoss": member("lightly.loss", "NTXentLoss"),
    "SimCLRProjectionHead": member("lightly.models.modules", "SimCLRProjectionHead"),
    "MoCoTask": member("torchgeo.trainers", "MoCoTask"),
    "TimmSimCLR": member("recipes.timm_forward_features", "SimCLR"),
    "HuggingFaceSimCLR": member("recipes.hf_automodel", "SimCLR"),
    "simclr": member("stable_pretraining.forward", "simclr"),
    "SimCLR": simclr,
    "model": attached,
    "bare": bare,
    "network": Network,
    "method": Method,
    "encoder": encoder,
    "backbone": lambda: nn.Sequential(encoder()),
    "projector": lambda: nn.Linear(512, 32),
    "criterion": criterion,
    "trainer": trainer,
    "dataloader": data,
    "loader": lambda: [views(), views()],
    "x0": lambda: views()[0],
    "x1": lambda: views()[1],
    "normalize": lambda: transforms.Normalize([0.5] * 3, [0.25] * 3),
    "train": labelled,
    "test": labelled,
    "train_images": lambda: labelled()[0],
    "train_labels": lambda: labelled()[1],
    "test_images": lambda: labelled()[0],
    "test_labels": lambda: labelled()[1],
    "METHODS": solo_methods,
    "cfg": solo_config,
    "options": spt_options,
}
FILES: dict[str, Callable[[], None]] = {
    "last.ckpt": lambda: checkpoint(attached(), "last.ckpt"),
    "bare.ckpt": lambda: checkpoint(bare(), "bare.ckpt"),
    '"images"': images,
}


def missing(code: str) -> list[str]:
    """The names that a snippet uses before it makes them."""
    made = {*dir(builtins), "__module__", "__qualname__"}
    found: list[str] = []

    def walk(part: CodeType, made: set[str]) -> None:
        for one in dis.get_instructions(part):
            if one.opname == "STORE_NAME":
                made.add(one.argval)
            elif one.opname in ("LOAD_NAME", "LOAD_GLOBAL") and one.argval not in made:
                found.append(one.argval)
        # what a function uses has to be there when it is called
        for inner in part.co_consts:
            if isinstance(inner, CodeType):
                walk(inner, set(made))

    walk(compile(code, "snippet", "exec"), made)
    return list(dict.fromkeys(found))


def test_the_names_that_a_snippet_lacks_are_seen() -> None:
    code = """
import a.b
from c import d as e
x = f(a, e)
x = g(x, lambda y: y + 1)
y = y + x
class C(D):
    def h(self, u): return u + v
"""
    assert missing(code) == ["f", "g", "y", "D", "v"]


# --- the snippets ---


def snippets() -> list[Any]:
    """All of them, named by page and place."""
    return [
        pytest.param(code, id=f"{page.stem}-{place}")
        for page in PAGES
        for place, code in enumerate(blocks(page.read_text(), "python", "py"))
    ]


def framework_of(code: str) -> str | None:
    """The framework that a snippet needs and that has an environment of its own."""
    return next((name for name in ELSEWHERE if f"integrations.{name} " in code), None)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A group of one process, for a snippet that wraps its model in DistributedDataParallel."""
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def run_snippet(code: str) -> None:
    """Run a snippet with what it lacks, and look whether something is attached."""
    for name, make in FILES.items():
        if name in code:
            make()
    if "DistributedDataParallel(" in code:
        store = f"file://{os.getcwd()}/store"
        distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    names = {name: HAS[name]() for name in missing(code)}
    exec(compile(code, "snippet", "exec"), names)
    if re.search(r"= (recon_aux\.)?attach\(", code):
        results = [names.get(name) for name in ("model", "module", "task")]
        found = [one for one in results if isinstance(one, nn.Module)]
        assert [one for one in found if recon_aux.is_attached(one)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "code", [snippet for snippet in snippets() if framework_of(snippet.values[0]) is None]
)
def test_a_snippet_runs(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # how long an MLP is trained isn't seen in a snippet
    monkeypatch.setattr("recon_aux.probe.mlp._STEPS", 2)
    run_snippet(code)


@pytest.mark.slow
@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_snippets_of_a_framework_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"solo_learn": "solo"}.get(name, name)
    pytest.importorskip(installed, reason=f"`nox -s {name}` installs it")
    found = [one.values[0] for one in snippets() if framework_of(one.values[0]) == name]
    assert len(found) >= 2
    if name == "lightly_train":
        shorten_lightly_train(monkeypatch, tmp_path)
    for index, code in enumerate(found):
        folder = tmp_path / str(index)
        folder.mkdir()
        monkeypatch.chdir(folder)
        run_snippet(code)


def shorten_lightly_train(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Train for one epoch, report nothing, and leave nothing outside the test's folder."""
    monkeypatch.setenv("LIGHTLY_TRAIN_EVENTS_DISABLED", "1")
    monkeypatch.setenv("LIGHTLY_TRAIN_CACHE_DIR", str(folder / "cache"))
    adapter = importlib.import_module("recon_aux.integrations.lightly_train")
    pretrain = adapter.pretrain
    short = {"epochs": 1, "batch_size": 4, "num_workers": 0, "accelerator": "cpu", "devices": 1}
    monkeypatch.setattr(adapter, "pretrain", lambda **given: pretrain(**given, **short))


# --- the commands ---

SESSIONS = re.findall(r"^@nox\.session\ndef (\w+)", (ROOT / "noxfile.py").read_text(), re.MULTILINE)
EXTRAS = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
COMMANDS = sorted({command for page in PAGES for command in commands(page.read_text())})


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_what_there_is(command: str) -> None:
    program, *arguments = re.findall(r"'[^']*'|\"[^\"]*\"|\S+", command)
    program = program.rpartition("/")[2]
    if program == "pip":
        for extras in re.findall(r"\.\[([\w,-]+)\]", command):
            assert set(extras.split(",")) <= set(EXTRAS)
    elif program == "nox":
        asked = [arguments[i + 1] for i, one in enumerate(arguments) if one == "-s"]
        assert set(asked) <= set(SESSIONS)
    elif program == "recon-aux":
        result = CliRunner().invoke(app, [arguments[0], "--help"], terminal_width=200)
        assert result.exit_code == 0, result.output
        options = [one.split("=")[0] for one in arguments if one.startswith("--")]
        assert all(option in result.stdout for option in options)
    elif program in ("python", "python3") and arguments[0] == "-m":
        assert_is_module(arguments[1], arguments[2:])
    elif program == "python":
        assert_takes(arguments[0], arguments[1:])
    elif program == "tensorboard":
        # where the recipe before it writes
        logger = f'TensorBoardLogger("{arguments[1]}"'
        assert logger in (ROOT / "examples" / "recipes" / "monitored.py").read_text()
    else:
        raise AssertionError(
            f"expected pip, nox, recon-aux, tensorboard or python, got {program}: check it here"
        )


def assert_is_module(name: str, arguments: list[str]) -> None:
    if name == "pytest":
        assert all((ROOT / one.split("::")[0]).exists() for one in arguments if "/" in one)
    elif name != "venv":
        assert (ROOT / "integrations" / f"{name.rpartition('.')[2]}.py").is_file()


def assert_takes(script: str, arguments: list[str]) -> None:
    """A script is there, and the examples have the options that it is called with."""
    assert (ROOT / script).is_file()
    sources = "".join(one.read_text() for one in (ROOT / "examples").rglob("*.py"))
    for argument in arguments:
        option = argument.split("=")[0]
        # the CLI's own have a test of their own
        if option.startswith("--") and "." not in option:
            assert f'"{option}"' in sources, option
