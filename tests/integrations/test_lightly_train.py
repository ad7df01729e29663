"""The LightlyTrain adapter: its own pretrain, on a few images and the smallest encoders."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import recon_aux
from helpers.running import ROOT, fail_once, run_example, run_python
from helpers.watching import rebuilt_from
from helpers.weights import assert_same, weights_of

pytest.importorskip(
    "lightly_train", reason="LightlyTrain is not installed; `nox -s lightly_train` installs it"
)
import lightly_train
from lightly_train._commands import train, train_helpers
from lightly_train._methods import method_helpers
from lightly_train._methods.method import Method

from recon_aux.integrations.lightly_train import pretrain, run

TWO_VIEW = ["dino", "dinov2", "dinov31", "simclr"]
REFUSED = ["densecl", "distillation", "distillationv1", "distillationv2", "distillationv3"]
BATCH = 8
every_method = pytest.mark.parametrize("name", TWO_VIEW)

Run = Callable[..., Any]


class Tiny(nn.Module):
    """An encoder as LightlyTrain wraps one: 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        first = nn.Conv2d(3, 16, 4, 4, bias=False)
        second = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.net = nn.Sequential(first, nn.BatchNorm2d(16), nn.ReLU(), second, nn.BatchNorm2d(16))

    def feature_dim(self) -> int:
        return 16

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": self.net(x)}

    def forward_pool(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"pooled_features": x["features"].mean((2, 3), keepdim=True)}

    def get_model(self) -> nn.Module:
        return self.net


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Report nothing, and leave nothing outside the test's folder."""
    monkeypatch.setenv("LIGHTLY_TRAIN_EVENTS_DISABLED", "1")
    monkeypatch.setenv("LIGHTLY_TRAIN_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Each method that begins to train, with its weights at that time in ``first``."""
    methods: list[Any] = []

    def on_train_start(method: Any) -> None:
        method.first = weights_of(method)
        methods.append(method)

    monkeypatch.setattr(Method, "on_train_start", on_train_start)
    return methods


def arguments_for(
    name: str, out: Path, method_args: dict[str, Any] | None = None, **arguments: Any
) -> dict[str, Any]:
    """What LightlyTrain's pretrain is called with: two epochs of two steps."""
    data = out.parent / "images"
    if not data.exists():
        data.mkdir()
        draw = np.random.default_rng(0)
        for index in range(2 * BATCH):
            pixels = draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((64, 64)).save(data / f"{index:02d}.png")
    is_vit = name.startswith("dinov")
    transform: dict[str, Any] = {"image_size": (56, 56) if is_vit else (32, 32)}
    if name != "simclr":
        transform["local_view"] = {"num_views": 2, "view_size": (28, 28) if is_vit else (16, 16)}
    given: dict[str, Any] = {"hidden_dim": 32} | ({"output_dim": 64} if name != "simclr" else {})
    if name == "dinov31":
        given["paka_num_local"] = 2
        transform["paka_num_local"] = 2
    defaults = {
        "data": data,
        "model": "dinov2/_vittest14" if is_vit else Tiny(),
        "method": name,
        "method_args": given | (method_args or {}),
        "epochs": 2,
        "batch_size": BATCH,
        "optim": "adamw",
        "optim_args": {"lr": 0.05},
        "transform_args": transform,
        "loader_args": {"shuffle": False},
        "num_workers": 0,
        "accelerator": "cpu",
        "devices": 1,
        "loggers": {"tensorboard": None},
    }
    return {"out": out, **defaults, **arguments}


def checkpoint_in(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(out / "checkpoints" / "last.ckpt", weights_only=False)
    return loaded


def bare_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if not name.startswith("recon_aux.")}


@every_method
def test_pretrains_attached(name: str, tmp_path: Path, trained: list[Any]) -> None:
    pretrain(**arguments_for(name, tmp_path / "out"))
    (method,) = trained
    kept = {key for key, x in method.named_parameters() if torch.equal(x, method.first[key])}
    encoder = "embedding_model." if name == "simclr" else "student_embedding_model."
    changed = method.first.keys() - kept
    assert not [key for key in kept if key.startswith((encoder, "recon_aux."))]
    assert any(key.startswith(encoder) for key in changed)
    assert any(key.startswith("recon_aux.decoder.") for key in changed)
    assert "recon_aux/loss" in method.trainer.callback_metrics
    weight = "auto" if name == "dino" else 1.0
    assert method.recon_aux.options["weight"] == weight
    written = (tmp_path / "out" / "train.log").read_text()
    assert f"recon_aux is attached to {type(method).__name__}: " in written
    assert f"'weight': {weight!r}" in written


@every_method
def test_the_methods_loss_is_blind_to_the_equivariant_channels(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []

    def on_train_end(method: Any) -> None:
        method.log = method.log_dict = lambda *args, **kwargs: None
        batch = next(iter(method.trainer.train_dataloader))
        student, teacher = "student_embedding_model", "teacher_embedding_model"
        encoders = ["embedding_model"] if name == "simclr" else [student, teacher]
        state = {key: x.clone() for key, x in method.state_dict().items()}
        half = method.recon_aux.splitter.invariant_dim
        # DINOv2's centers follow a step late, so the first call is only for the second
        for channels in (slice(0), slice(0), slice(half, None), slice(half)):
            hooks = []
            for encoder in encoders:
                last = method.get_submodule(encoder)
                # what DINOv2 calls is no module's forward
                last = last.wrapped_model.get_model().norm if "dinov" in name else last
                hooks.append(last.register_forward_hook(noise_on(channels, "dinov" in name)))
            # a step changes teachers and centers
            method.load_state_dict(state)
            seed(0)
            losses.append(method.training_step(batch, 0).item())
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(Method, "on_train_end", on_train_end)
    given = {"ibot_separate_head": True} if name == "dinov2" else {}
    arguments = arguments_for(name, tmp_path / "out", method_args=given, epochs=1)
    pretrain(**arguments, recon_aux={"weight": 0})
    _, bare, equivariant, invariant = losses
    assert equivariant == bare
    assert invariant != bare


def noise_on(channels: slice, is_last: bool) -> Any:
    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.zeros_like(output)
        of_channels = noise[..., channels] if is_last else noise[:, channels]
        of_channels.normal_(generator=generator)
        return output + noise

    return add


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.fixture
def seeded_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the same in each epoch and step, whatever ran before."""

    def on_train_epoch_start(method: Any) -> None:
        # LightlyTrain leaves the crops unseeded
        for view in method.trainer.train_dataloader.dataset.transform.transforms:
            view.transform.set_random_seed(method.current_epoch)

    def on_train_batch_start(method: Any, batch: Any, index: int) -> None:
        seed(method.global_step)

    monkeypatch.setattr(Method, "on_train_epoch_start", on_train_epoch_start)
    monkeypatch.setattr(Method, "on_train_batch_start", on_train_batch_start)


# dinov31 draws crops without a seed that could be set, so no two runs of it are alike
@pytest.fixture(params=[name for name in TWO_VIEW if name != "dinov31"])
def repeatable(request: pytest.FixtureRequest, seeded_epochs: None) -> str:
    """A method whose bare runs are alike."""
    name: str = request.param
    return name


def test_switched_off_is_bit_identical_to_the_bare_run(repeatable: str, tmp_path: Path) -> None:
    def state_after(how: Run, folder: str, **options: Any) -> dict[str, Tensor]:
        how(**arguments_for(repeatable, tmp_path / folder), **options)
        state: dict[str, Tensor] = checkpoint_in(tmp_path / folder)["state_dict"]
        return bare_part(state)

    bare = state_after(lightly_train.pretrain, "bare")
    off = state_after(pretrain, "off", recon_aux={"weight": 0, "equivariant_dim": 0})
    assert_same(off, bare)
    on = state_after(pretrain, "on")
    assert not all(torch.equal(on[key], bare[key]) for key in bare)


@pytest.mark.parametrize("how", [lightly_train.pretrain, pretrain], ids=["bare", "attached"])
def test_a_stopped_run_resumes_bit_identically(
    repeatable: str, how: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # LightlyTrain doesn't save DINOv2's center of the last step, which "softmax" needs
    given = {"center_method": "sinkhorn_knopp"} if repeatable == "dinov2" else {}
    whole, stopped = (
        arguments_for(repeatable, tmp_path / folder, epochs=3, method_args=given)
        for folder in ("whole", "stopped")
    )
    how(**whole)
    with monkeypatch.context() as patch:
        fail_once(patch, Method, at=6)
        with pytest.raises(OSError, match="the power went"):
            how(**stopped)
    # Tiny is trained in place
    model = {"model": Tiny()} if repeatable != "dinov2" else {}
    how(**{**stopped, **model, "resume_interrupted": True})
    expected, resumed = (checkpoint_in(tmp_path / folder) for folder in ("whole", "stopped"))
    assert expected["global_step"] == resumed["global_step"] == 6
    assert_same(resumed["state_dict"], expected["state_dict"])
    assert ("recon_aux.decoder.queries" in resumed["state_dict"]) == (how is pretrain)


def test_what_is_saved_loads_where_recon_aux_is_not_installed(tmp_path: Path) -> None:
    for name in ("simclr", "dinov2"):
        arguments = arguments_for(name, tmp_path / name, model="dinov2/_vittest14")
        arguments["transform_args"]["image_size"] = (56, 56)
        pretrain(**arguments)
    code = """
import sys, torch
sys.modules["recon_aux"] = None
import lightly_train
for out in ("simclr", "dinov2"):
    path = f"{out}/checkpoints/last.ckpt"
    models = torch.load(path, weights_only=False)["lightly_train"]["models"]
    assert models["embedding_model"](torch.rand(2, 3, 56, 56)).shape == (2, 8, 1, 1)
    exported = torch.load(f"{out}/exported_models/exported_last.pt", weights_only=True)
    state = models["model"].state_dict()
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[key], state[key]) for key in state)
    again = f"{out}.pt"
    lightly_train.export(out=again, checkpoint=path, part="embedding_model", format="torch_model")
    torch.load(again, weights_only=False)(torch.rand(2, 3, 56, 56))
"""
    result = run_python("-c", code, folder=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("first", [lightly_train.pretrain, pretrain], ids=["bare", "attached"])
def test_a_run_goes_on_from_a_checkpoint(first: Run, tmp_path: Path, trained: list[Any]) -> None:
    first(**arguments_for("simclr", tmp_path / "first"))
    checkpoint = tmp_path / "first" / "checkpoints" / "last.ckpt"
    pretrain(**arguments_for("simclr", tmp_path / "second", checkpoint=checkpoint))
    state = checkpoint_in(tmp_path / "first")["state_dict"]
    assert (
        trained[1]
        .first["projection_head.layers.0.weight"]
        .equal(state["projection_head.layers.0.weight"])
    )
    queries = "recon_aux.decoder.queries"
    assert (queries in state) == (first is pretrain)
    assert first is not pretrain or trained[1].first[queries].equal(state[queries])


def test_a_bare_run_goes_on_from_a_stripped_checkpoint(tmp_path: Path) -> None:
    pretrain(**arguments_for("simclr", tmp_path / "first", epochs=1))
    torch.save(recon_aux.strip(checkpoint_in(tmp_path / "first")), tmp_path / "bare.ckpt")
    arguments = arguments_for("simclr", tmp_path / "second", epochs=1)
    lightly_train.pretrain(**arguments, checkpoint=tmp_path / "bare.ckpt")
    with pytest.raises(RuntimeError, match="recon_aux"):
        lightly_train.pretrain(
            **arguments, overwrite=True, checkpoint=tmp_path / "first" / "checkpoints" / "last.ckpt"
        )


@every_method
def test_the_global_views_are_rebuilt(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    batches: list[Any] = []

    def on_train_batch_start(method: Any, batch: Any, index: int) -> None:
        batches.append(batch["views"])

    monkeypatch.setattr(Method, "on_train_start", lambda method: seen.append(rebuilt_from(method)))
    monkeypatch.setattr(Method, "on_train_batch_start", on_train_batch_start)
    pretrain(**arguments_for(name, tmp_path / "out", epochs=1))
    (steps,) = seen
    assert len(steps) == len(batches) == 2
    for (views, _), given in zip(steps, batches, strict=True):
        assert all(torch.equal(*pair) for pair in zip(views, given[:2], strict=True))


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_the_decoder_may_have_its_own_rate(name: str, tmp_path: Path, trained: list[Any]) -> None:
    options = {"decoder_lr": 0.01, "decoder_weight_decay": 0.2}
    pretrain(**arguments_for(name, tmp_path / "out"), recon_aux=options)
    (method,) = trained
    groups = [g for g in method.optimizers().param_groups if "recon_aux" in str(g.get("name"))]
    placed = {id(p) for group in groups for p in group["params"]}
    assert placed == {id(p) for p in method.recon_aux.parameters()}
    assert not method.first["recon_aux.decoder.queries"].equal(method.recon_aux.decoder.queries)


def test_each_method_of_lightly_train_attaches_or_is_refused() -> None:
    assert sorted([*TWO_VIEW, *REFUSED]) == method_helpers._list_methods()
    page = (ROOT / "docs" / "lightly_train.md").read_text()
    table = "".join(line for line in page.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`(\w+)`", table)) >= {*TWO_VIEW, *REFUSED}


@pytest.mark.parametrize("name", [*REFUSED, None])
def test_methods_without_two_views_are_refused_before_anything_is_written(
    name: str | None, tmp_path: Path
) -> None:
    arguments = arguments_for(name or "", tmp_path / "out")
    if name is None:
        # the default
        del arguments["method"]
    does = "pairs positions" if name == "densecl" else "encodes one view"
    advice = "Pass method= one of \\['dino', 'dinov2', 'dinov31', 'simclr'\\]"
    with pytest.raises(TypeError, match=rf"two views, got D\w+, which {does}.*{advice}"):
        pretrain(**arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (r"got the option wieght=; did you mean weight=\?", {"wieght": 1}),
        (r"expected recon_aux= as a dict of options, got 4\.", 4),
    ],
)
def test_unknown_options_are_refused_before_anything_is_written(
    error: str, options: Any, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=error):
        pretrain(**arguments_for("simclr", tmp_path / "out"), recon_aux=options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'modle'"):
        pretrain(**arguments_for("simclr", tmp_path / "out"), modle="")
    with pytest.raises(ValueError, match="'simclrr' is unknown"):
        pretrain(**arguments_for("simclr", tmp_path / "out") | {"method": "simclrr"})
    assert not (tmp_path / "out").exists()


def test_options_go_before_the_methods(tmp_path: Path, trained: list[Any]) -> None:
    options = {"weight": 2.0, "heads": [], "equivariant_dim": 0, "backbone": "embedding_model"}
    pretrain(**arguments_for("simclr", tmp_path / "out", epochs=1), recon_aux=options)
    (method,) = trained
    assert method.recon_aux.weight == 2.0
    assert method.recon_aux.splitter.equivariant_dim == 0


def test_none_stands_for_the_default(tmp_path: Path, trained: list[Any]) -> None:
    options = {"weight": None, "backbone": None, "heads": None, "equivariant_dim": None}
    pretrain(**arguments_for("simclr", tmp_path / "out", epochs=1), recon_aux=options)
    (method,) = trained
    assert method.recon_aux.weight == 1
    assert method.recon_aux.splitter.equivariant_dim == 8


@pytest.mark.parametrize("missing", ["function", "call"])
def test_a_version_that_builds_its_methods_another_way_is_refused(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "function":
        monkeypatch.delattr(train_helpers, "get_method")
    else:
        monkeypatch.setattr(train, "train_from_config", lambda config: None)
    version = re.escape(lightly_train.__version__)
    with pytest.raises(ImportError, match=f"expected LightlyTrain 0.18.*got {version}.*install"):
        pretrain(**arguments_for("simclr", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_version_without_these_modules_is_refused() -> None:
    code = """
import sys
import lightly_train
sys.modules["lightly_train._commands.train_helpers"] = None
del lightly_train._commands.train_helpers
import recon_aux.integrations.lightly_train
"""
    message = run_python("-c", code).stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: expected LightlyTrain 0.18, whose methods")


def test_after_a_failure_bare_runs_are_bare(tmp_path: Path) -> None:
    build = train_helpers.get_method
    arguments = arguments_for("simclr", tmp_path / "out", epochs=1)
    with pytest.raises(ValueError, match="weight"):
        pretrain(**arguments, recon_aux={"weight": -1})
    assert train_helpers.get_method is build
    lightly_train.pretrain(**arguments, overwrite=True)
    assert not any("recon_aux" in key for key in checkpoint_in(tmp_path / "out")["state_dict"])


def test_the_command_line(tmp_path: Path) -> None:
    arguments = arguments_for("dinov2", tmp_path / "out", epochs=1)
    # as OmegaConf reads it
    written = [f"{key}={json.dumps(x, default=str)}" for key, x in arguments.items()]
    module = ["-m", "recon_aux.integrations.lightly_train"]
    command = [*module, "pretrain", *written, "recon_aux.weight=2", "recon_aux.decoder_depth=2"]
    result = run_python(*command, folder=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "recon_aux.decoder.blocks.1.norm.weight" in checkpoint_in(tmp_path / "out")["state_dict"]
    assert "'weight': 2," in (tmp_path / "out" / "train.log").read_text()


@pytest.mark.parametrize("given", [[], ["export", "out=out"], ["pretrain"]])
def test_other_commands_are_refused(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightly_train.py", *given])
    with pytest.raises(SystemExit, match=r"^expected: python -m recon_aux\.integrations\.light"):
        run()


def test_where_lightly_train_is_not_installed() -> None:
    code = """
import sys
sys.modules["lightly_train"] = None
import recon_aux.integrations.lightly_train
"""
    result = run_python("-c", code)
    message = result.stderr.strip().splitlines()[-1]
    assert message.endswith("install it with, in a clone: pip install '.[lightly-train]'")


@pytest.mark.slow
def test_the_example_compares_bare_and_attached() -> None:
    printed = run_example("lightly_train_simclr.py", "--epochs", "1")
    assert "bare whole" in printed
    assert "attached equivariant" in printed
