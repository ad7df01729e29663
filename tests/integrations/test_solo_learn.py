"""The solo-learn adapter, on the real classes of whichever version is installed."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import recon_aux
from helpers.data import shaded_views
from helpers.inside import options_in_section
from helpers.running import ROOT, run_example, run_python
from helpers.watching import rebuilt_by, rebuilt_from
from helpers.weights import assert_same, assert_trained, bare_state, decoder_of, loss_of

pytest.importorskip("solo", reason="solo-learn is not installed; `nox -s solo_learn` installs it")
from solo.methods import METHODS
from solo.methods.base import BaseMethod

from recon_aux.integrations import solo_learn
from recon_aux.integrations.solo_learn import attach

# 1.0.2, on PyPI, takes keyword arguments; 1.0.6, on GitHub, a config object
TAKES_A_CONFIG = "cfg" in inspect.signature(BaseMethod.__init__).parameters
Trainer = importlib.import_module("lightning" if TAKES_A_CONFIG else "pytorch_lightning").Trainer
TWO_VIEW = sorted(set(METHODS) - {"base", "linear", "mae"})
BATCH = 8
PAGE = (ROOT / "docs" / "methods.md").read_text()

METHOD_OPTIONS = {
    "proj_hidden_dim": 32,
    "proj_output_dim": 16,
    "pred_hidden_dim": 32,
    "temperature": 0.2,
    "temperature_q": 0.1,
    "temperature_k": 0.04,
    "queue_size": 64,
    "lamb": 5e-3,
    "scale_loss": 0.025,
    "supervised": False,
    "sk_iters": 3,
    "sk_epsilon": 0.05,
    "epoch_queue_starts": 0,
    "freeze_prototypes_epochs": 0,
    "num_prototypes": 32,
    "kmeans_iters": 2,
    "use_bn_in_head": False,
    "norm_last_layer": True,
    "clip_grad": 0,
    "freeze_last_layer": 0,
    "student_temperature": 0.1,
    "teacher_temperature": 0.07,
    "warmup_teacher_temperature": 0.04,
    "warmup_teacher_temperature_epochs": 1,
    "sim_loss_weight": 25.0,
    "var_loss_weight": 25.0,
    "cov_loss_weight": 1.0,
    "iternorm": True,
    "whitening_size": 8,
    "whitening_iters": 1,
    "whitening_eps": 1e-2,
}
PARTICULAR: dict[str, dict[str, Any]] = {
    "deepclusterv2": {"num_prototypes": [8, 8]},
    "wmse": {"proj_output_dim": 2},
}


@pytest.fixture(autouse=True)
def cholesky_of_2021(monkeypatch: pytest.MonkeyPatch) -> None:
    """W-MSE of 1.0.2 calls torch.cholesky, which torch has removed since."""
    if not TAKES_A_CONFIG:
        monkeypatch.setattr(torch, "cholesky", torch.linalg.cholesky)


def as_in_2021(model: Any) -> Any:
    """Give 1.0.2 what its Lightning, 1.4, gave it and 1.9 doesn't; without it, bare ones fail."""
    if hasattr(model, "momentum_pairs"):
        model.on_train_batch_end = partial(model.on_train_batch_end, dataloader_idx=0)
    # DINO has a clip_gradients of its own, which Lightning has come to call with other arguments
    model.configure_gradient_clipping = lambda *args, **kwargs: None
    # the length of Lightning's loader has become a float
    model.dali_epoch_size = 2 * BATCH
    return model


OPTIMIZER_OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "adam": {},
    "adamw": {},
    "lars": {"momentum": 0.9, "eta": 0.02, "clip_lr": True, "exclude_bias_n_norm": True},
}


def solo_method(
    name: str,
    backbone: str = "resnet18",
    small_crops: int = 0,
    optimizer: str = "sgd",
    **backbone_options: Any,
) -> Any:
    torch.manual_seed(0)
    options = {**METHOD_OPTIONS, **PARTICULAR.get(name, {})}
    if TAKES_A_CONFIG:
        cfg = config(name, backbone, small_crops, options, backbone_options)
        cfg.optimizer.name, cfg.optimizer.kwargs = optimizer, OPTIMIZER_OPTIONS[optimizer]
        cfg.optimizer.exclude_bias_n_norm_wd = optimizer != "sgd"
        return METHODS[name](cfg)
    model = METHODS[name](
        **options,
        encoder=backbone,
        backbone_args={"cifar": False, **backbone_options},
        num_classes=4,
        max_epochs=2,
        batch_size=BATCH,
        optimizer="sgd" if optimizer == "lars" else optimizer,
        lars=optimizer == "lars",
        lr=0.01,
        weight_decay=1e-5,
        classifier_lr=0.1,
        exclude_bias_n_norm=True,
        accumulate_grad_batches=1,
        extra_optimizer_args={"momentum": 0.9} if optimizer in ("sgd", "lars") else {},
        scheduler="warmup_cosine",
        min_lr=0.0,
        warmup_start_lr=0.002,
        warmup_epochs=1,
        num_large_crops=2,
        num_small_crops=small_crops,
        eta_lars=0.02,
        grad_clip_lars=True,
        knn_eval=False,
        base_tau_momentum=0.99,
        final_tau_momentum=1.0,
        momentum_classifier=False,
    )
    return as_in_2021(model)


def config(name: str, backbone: str, small_crops: int, options: Any, backbone_options: Any) -> Any:
    return importlib.import_module("omegaconf").OmegaConf.create(
        {
            "name": name,
            "method": name,
            "method_kwargs": options,
            "backbone": {"name": backbone, "kwargs": backbone_options},
            "data": {
                "dataset": "custom",
                "num_classes": 4,
                "num_large_crops": 2,
                "num_small_crops": small_crops,
            },
            "optimizer": {
                "name": "sgd",
                "batch_size": BATCH,
                "lr": 0.01,
                "classifier_lr": 0.1,
                "weight_decay": 1e-5,
                "kwargs": {"momentum": 0.9},
            },
            "scheduler": {"name": "warmup_cosine", "warmup_epochs": 1, "warmup_start_lr": 0.002},
            "momentum": {"base_tau": 0.99, "final_tau": 1.0},
            "max_epochs": 2,
        }
    )


def backbone_of(model: Any) -> nn.Module:
    return model.backbone if hasattr(model, "backbone") else model.encoder


def solo_batch(small_crops: int = 0, side: int = 32) -> list[Any]:
    crops = shaded_views(2, BATCH, side=side)
    crops += shaded_views(small_crops, BATCH, side=3 * side // 4, seed=2)
    return [torch.arange(BATCH), crops, torch.arange(BATCH) % 4]


def fit_solo(model: Any, small_crops: int = 0, epochs: int = 1) -> Any:
    index, crops, labels = solo_batch(small_crops)
    samples: Any = [(index[i], [crop[i] for crop in crops], labels[i]) for i in range(BATCH)] * 2
    samples = [(torch.tensor(i), crops, label) for i, (_, crops, label) in enumerate(samples)]
    validation: Any = [(crops[0], label) for _, crops, label in samples[:BATCH]]
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    loader = DataLoader(samples, BATCH, shuffle=True, drop_last=True)
    trainer.fit(model, loader, DataLoader(validation, BATCH))
    return trainer


def ready(model: Any) -> Any:
    """Trained for a few steps by its trainer, then free of it."""
    # DeepCluster has its first clusters after one epoch
    trainer = fit_solo(model, epochs=2)
    model.train()
    # SwaV asks the trainer for its epoch, which the model itself doesn't keep alive
    model.log = model.log_dict = lambda *args, trainer=trainer, **kwargs: None
    return model


every_method = pytest.mark.parametrize("name", TWO_VIEW)


def test_there_are_as_many_methods_as_the_page_says() -> None:
    assert len(TWO_VIEW) == (18 if TAKES_A_CONFIG else 14)
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| solo-learn | all4one")]
    assert set(TWO_VIEW) <= set(row.split("|")[2].strip().split(", "))


@every_method
def test_trains_under_the_trainer_in_a_group_of_its_own(name: str) -> None:
    model = solo_method(name)
    bare = [group.get("name") for group in model.learnable_params]
    declared = BaseMethod.learnable_params
    assert attach(model) is model
    before = decoder_of(model)
    trainer = fit_solo(model)
    assert_trained(model, before)
    assert "recon_aux/loss" in trainer.callback_metrics
    optimizer = trainer.optimizers[0]
    assert BaseMethod.learnable_params is declared
    groups = [group.get("name") for group in optimizer.param_groups]
    assert sorted(map(str, groups)) == sorted(map(str, [*bare, "recon_aux"]))
    placed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    own = [group for group in optimizer.param_groups if group.get("name") == "recon_aux"]
    assert len(own) == 1
    assert {id(p) for p in own[0]["params"]} == {id(p) for p in model.recon_aux.parameters()}
    assert len(placed) == len(set(placed))


@pytest.mark.parametrize("settings", [{}, {"decoder_lr": 0.03, "decoder_weight_decay": 0.2}])
@pytest.mark.parametrize("optimizer", OPTIMIZER_OPTIONS)
def test_the_decoder_trains_on_the_methods_schedule(
    optimizer: str, settings: dict[str, float]
) -> None:
    model = attach(solo_method("simclr", optimizer=optimizer), **settings)
    before = decoder_of(model)
    rates: list[list[float]] = []

    def on_before_optimizer_step(optimizer: Any, *rest: Any) -> None:
        named = {group.get("name"): group for group in optimizer.param_groups}
        backbone = named.get("backbone", optimizer.param_groups[0])
        rates.append([group["lr"] for group in (backbone, named["recon_aux"])])

    model.on_before_optimizer_step = on_before_optimizer_step
    made = fit_solo(model, epochs=2).optimizers[0]
    assert_trained(model, before)
    ours = {id(p) for p in model.recon_aux.parameters()}
    own = [g for g in made.param_groups if any(id(p) in ours for p in g["params"])]
    assert sorted(id(p) for group in own for p in group["params"]) == sorted(ours)
    assert len({backbone for backbone, _ in rates}) > 1
    if settings:
        assert own[0]["weight_decay"] == 0.2
        # in proportion, though solo-learn's warmup starts at the same rate for all
        assert [rate for _, rate in rates] == pytest.approx([3 * backbone for backbone, _ in rates])
    else:
        assert all(rate == backbone for backbone, rate in rates)
    assert [g["weight_decay"] for g in own[1:]] == [0] * (len(own) - 1)


@every_method
def test_the_methods_loss_leaves_the_equivariant_channels_alone(name: str) -> None:
    model = attach(solo_method(name), weight=0, equivariant_dim=200)
    ready(model)
    seen: list[Tensor] = []
    backbone_of(model).register_forward_hook(lambda *call: seen.append(call[2]))
    loss = loss_of(model.training_step(solo_batch(), 0))
    # the losses of mocov2plus and ressl take one view from the encoder
    gradients = torch.autograd.grad(loss, [y for y in seen if y.requires_grad], allow_unused=True)
    reached = [g for g in gradients if g is not None]
    assert len(gradients) == 2
    assert any(g[:, :312].any() for g in reached)
    assert not any(g[:, 312:].any() for g in reached)


# weights that were measured, or are set by the first batch; losses of both views, or of one
@pytest.mark.slow
@pytest.mark.parametrize("name", ["simclr", "ressl"])
def test_the_reconstruction_loss_halves_on_a_fixed_batch(name: str) -> None:
    model = ready(attach(solo_method(name)))
    outputs = rebuilt_by(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    # the first only sets the weight, where none was measured
    for _ in range(24):
        optimizer.zero_grad()
        loss_of(model.training_step(solo_batch(), 0)).backward()
        optimizer.step()
    losses = [output.reconstruction_loss.item() for output in outputs]
    assert sum(losses[-2:]) < sum(losses[:2]) / 2, losses


@pytest.mark.parametrize("name", ["simclr", "byol", "vicreg", "mocov2plus"])
def test_switched_off_or_detached_is_bit_identical_to_the_bare_model(name: str) -> None:
    def trained(change: Any) -> tuple[dict[str, Tensor], Tensor]:
        model = change(solo_method(name))
        torch.manual_seed(3)
        fit_solo(model)
        return bare_state(model), torch.random.get_rng_state()

    bare, random = trained(lambda model: model)
    for change in (
        lambda model: attach(model, weight=0, equivariant_dim=0),
        lambda model: recon_aux.detach(attach(model)),
    ):
        state, state_of_random = trained(change)
        assert_same(state, bare)
        assert torch.equal(random, state_of_random)


@pytest.mark.parametrize("name", ["simclr", "byol", "swav"] if TAKES_A_CONFIG else ["simclr"])
def test_small_crops_are_not_rebuilt(name: str) -> None:
    model = attach(solo_method(name, small_crops=2))
    seen = rebuilt_from(model)
    fit_solo(model, small_crops=2)
    assert [[view.shape[-1] for view in views] for views, _ in seen] == [[32, 32]] * 2


BACKBONES: dict[str, dict[str, Any]] = {
    "vit_tiny": {"img_size": 32, "patch_size": 8},
    "swin_tiny": {"img_size": 64, "window_size": 2},
}
if TAKES_A_CONFIG:
    BACKBONES |= {"convnext_tiny": {}, "poolformer_s12": {}, "wide_resnet28w2": {}}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones(backbone: str) -> None:
    model = attach(solo_method("simclr", backbone, **BACKBONES[backbone]))
    model.log = model.log_dict = lambda *args, **kwargs: None
    given = solo_batch(side=64 if "swin" in backbone else 32)
    loss_of(model.training_step(given, 0)).backward()
    assert model.recon_aux.splitter.feature_dim == model.features_dim
    assert model.recon_aux.decoder.queries.grad.any()


def test_the_online_classifier_sees_the_whole_feature() -> None:
    model = attach(solo_method("simclr"))
    seen: list[Tensor] = []
    model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ready(model)
    assert seen
    assert all(feature[:, 256:].any() for feature in seen)


WEIGHTS = {
    "simclr": 1.0,
    "vicreg": 0.3,
    "byol": 0.8,
    "nnbyol": 0.8,
    "simsiam": 0.2,
    "nnsiam": 0.2,
}


@every_method
def test_the_weight_depends_on_the_method(name: str) -> None:
    aux = attach(solo_method(name)).recon_aux
    assert aux.options["weight"] == WEIGHTS.get(name, "auto")
    assert aux.weight == WEIGHTS.get(name, 1.0)


def test_a_weight_that_is_given_goes_before_the_methods() -> None:
    for weight in (0, 2.0):
        assert attach(solo_method("byol"), weight=weight).recon_aux.weight == weight
    assert attach(solo_method("byol"), weight="auto").recon_aux.options["weight"] == "auto"


def test_another_models_optimizer_gets_no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = attach(solo_method("simclr")), solo_method("simclr")
    bare = [group.get("name") for group in other.learnable_params]
    groups: list[Any] = []
    configure = type(other).configure_optimizers

    def both(self: Any) -> Any:
        # while one model's are made, as where a method has a teacher of its own
        groups.append([group.get("name") for group in other.learnable_params])
        return configure(self)

    monkeypatch.setattr(type(other), "configure_optimizers", both)
    fit_solo(model)
    assert groups == [bare]


@pytest.mark.parametrize("name", ["linear", "mae"])
def test_methods_without_two_views_are_refused_by_name(name: str) -> None:
    if name not in METHODS:
        pytest.skip(f"this solo-learn has no {name}")
    model = METHODS[name].__new__(METHODS[name])
    nn.Module.__init__(model)
    with pytest.raises(TypeError, match=f"two views, got {METHODS[name].__name__}, which "):
        attach(model)


def test_a_section_of_the_config_is_the_options() -> None:
    with pytest.raises(TypeError, match=r"expected recon_aux\.OPTION=VALUE.*got recon_aux=4"):
        options_in_section(4)
    options = {"weight": 2.0, "backbone": "backbone", "equivariant_dim": 64}
    assert options_in_section(options) == options
    with pytest.raises(TypeError, match=r"got the option wieght=; did you mean weight=\?"):
        attach(solo_method("simclr"), **options_in_section({"wieght": 1.0}))


@pytest.mark.slow
@pytest.mark.skipif(not TAKES_A_CONFIG, reason="1.0.2 has no config to read the options from")
def test_a_script_runs_with_every_method_attached(tmp_path: Path) -> None:
    script = tmp_path / "main_pretrain.py"
    script.write_text(
        "import copy, json, pickle, sys\n"
        "from solo.methods import METHODS\n"
        "from test_solo_learn import METHOD_OPTIONS, config\n"
        "def main(count: int = 0):\n"
        "    assert main.__annotations__ == {'count': int}\n"
        "    cfg = config('simclr', 'resnet18', 0, METHOD_OPTIONS, {})\n"
        "    cfg.recon_aux = {'weight': 2.0, 'decoder_depth': 2}\n"
        "    model = copy.copy(METHODS['simclr'])(cfg)\n"
        "    pickle.loads(pickle.dumps(model))\n"
        "    print(json.dumps([sys.argv[1:], dict(cfg.recon_aux), hasattr(model, 'recon_aux')]))\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    module = ["-m", "recon_aux.integrations.solo_learn"]
    own = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    # what Lightning runs for a second device: the module and the arguments, without the script
    second = {**own, "RECON_AUX_SOLO_LEARN_SCRIPT": str(script)}
    for command, environment in (([*module, script, "++a=1"], own), ([*module, "++a=1"], second)):
        result = run_python(*command, environment=environment, folder=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        printed = result.stdout.splitlines()
        options = {"weight": 2.0, "decoder_depth": 2, "equivariant_dim": 256}
        assert json.loads(printed[-1]) == [["++a=1"], options, True]
        assert printed[-2].startswith("recon_aux is attached to SimCLR: ")


@pytest.mark.skipif(TAKES_A_CONFIG, reason="1.0.6 takes a config")
def test_scripts_of_an_older_version_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["solo_learn", __file__])
    with pytest.raises(SystemExit, match=r"expected solo-learn 1\.0\.6, from GitHub"):
        solo_learn.run()


@pytest.mark.skipif(not TAKES_A_CONFIG, reason="1.0.2 has no scripts that could run")
def test_a_script_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["solo_learn", "nowhere.py"])
    with pytest.raises(SystemExit, match=r"main_pretrain\.py ARGUMENTS.*got 'nowhere\.py'"):
        solo_learn.run()


@pytest.mark.slow
@pytest.mark.skipif(not TAKES_A_CONFIG, reason="the examples are for solo-learn's GitHub version")
@pytest.mark.parametrize("script", ["solo_simclr.py", "solo_byol.py", "solo_vicreg.py"])
def test_an_example_compares_bare_and_attached(script: str) -> None:
    printed = run_example(script, "--epochs", "1")
    assert "bare whole" in printed
    assert "attached equivariant" in printed
