"""Checkpoints: stopped and resumed, from attached to bare and back, out to plain encoders."""

from __future__ import annotations

import copy
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning
import numpy
import pytest
import pytorch_lightning
import timm
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.parsing import AttributeDict
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18, resnet34

import recon_aux
from helpers import inside
from helpers.data import Views, batch
from helpers.models import InALoop, Siamese, plain_encoder
from helpers.running import run_script
from helpers.scripts.killed import main as train_or_be_killed
from helpers.training import fit, trainer
from helpers.versions import newer, not_the_oldest
from helpers.weights import assert_same, bare_state, decoder_of
from recon_aux.integrations.lightly import attach

# --- stopped and resumed ---


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical_to_never_stopped(tmp_path: Path) -> None:
    not_the_oldest("before 2.5 Lightning doesn't resume a bare model bit for bit")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    # a random choice needs all that an alternating one needs, and the seed
    train_or_be_killed(whole, "random", 0)
    assert run_script("killed.py", killed, "random", 5).returncode == -signal.SIGKILL
    # from the end of the first epoch, after three steps
    assert torch.load(killed / "last.ckpt")["global_step"] == 3
    assert not (killed / "final.pt").exists()
    train_or_be_killed(killed, "random", 0)
    expected, resumed = (torch.load(folder / "final.pt") for folder in (whole, killed))
    assert_same(resumed, expected)


# --- attached <-> bare ---


def test_the_encoder_of_an_average_is_exported() -> None:
    model = attach(Siamese())
    average = torch.optim.swa_utils.AveragedModel(model)
    assert_same(recon_aux.export_backbone(average), recon_aux.export_backbone(model))


def saved_after_training(model: Any, path: Path, averaged: bool = False, **options: Any) -> Path:
    callbacks = [ModelCheckpoint(path)]
    if averaged:
        callbacks.append(newer("pytorch_lightning.callbacks", "WeightAveraging")())
    trained = fit(model, enable_checkpointing=True, callbacks=callbacks, **options)
    trained.save_checkpoint(path / "model.ckpt")
    return path / "model.ckpt"


def adam(model: Any) -> Any:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def test_a_bare_model_loads_an_attached_checkpoint_that_was_stripped(tmp_path: Path) -> None:
    model = attach(Siamese())
    checkpoint = torch.load(saved_after_training(model, tmp_path), weights_only=True)
    stripped = recon_aux.strip(checkpoint)
    bare = Siamese()
    bare.load_state_dict(stripped["state_dict"], strict=True)
    for name, value in bare.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert stripped["global_step"] == 3
    assert any(name.startswith("recon_aux.") for name in checkpoint["state_dict"])
    with pytest.raises(RuntimeError, match=r"Unexpected key.*recon_aux"):
        bare.load_state_dict(checkpoint["state_dict"])


def test_all_of_a_checkpoint_is_stripped(tmp_path: Path) -> None:
    model = attach(Siamese())
    path = saved_after_training(model, tmp_path, averaged=True)
    checkpoint = torch.load(path, weights_only=False)
    assert "recon_aux." in str(checkpoint["current_model_state"].keys())
    assert "recon_aux." not in str(
        [s.keys() for s in recon_aux.strip(checkpoint).values() if isinstance(s, dict)]
    )
    with pytest.raises(TypeError, match=r"as torch\.load\(path\) gives it, got str"):
        recon_aux.strip("model.ckpt")  # type: ignore[arg-type]


def test_wrappers_prefixes_are_stripped_too() -> None:
    model = attach(InALoop())
    nn.init.ones_(model.backbone[0].weight)
    bare = nn.DataParallel(InALoop())
    bare.load_state_dict(recon_aux.strip(nn.DataParallel(model).state_dict()))
    assert_same(bare.module.state_dict(), bare_state(model))


def test_a_decoder_is_stripped_at_any_depth() -> None:
    ours, theirs = {"recon_aux.x": torch.ones(2)}, {"x": torch.ones(2)}
    state = {"loops": {"ema": {"state": {**ours, **theirs}}, "epoch": 3}, "other": [theirs]}
    kept = copy.deepcopy(state)
    stripped = recon_aux.strip(state)
    assert str(stripped) == str({**state, "loops": {"ema": {"state": theirs}, "epoch": 3}})
    # what was given stays as it was
    assert str(state) == str(kept)


def test_what_is_no_weight_of_ours_is_left_as_it_is() -> None:
    state = attach(Siamese()).state_dict()
    settings = AttributeDict(lr=0.1, recon_aux={"weight": 2.0})
    decoder = {"recon_aux": {"queries": torch.ones(2)}, "state": {"recon_aux.x": {"step": state}}}
    stripped = recon_aux.strip({"state_dict": state, "hyper_parameters": settings, **decoder})
    assert stripped["hyper_parameters"] is settings
    assert "recon_aux" not in stripped
    assert not stripped["state"]
    theirs = {"my_recon_aux.weight": torch.ones(2), "recon_aux_head": torch.ones(3)}
    assert recon_aux.strip(theirs).keys() == theirs.keys()
    assert stripped["state_dict"]._metadata == state._metadata


def test_an_attached_model_loads_a_bare_one_and_says_so_in_one_line() -> None:
    bare, model = Siamese(), attach(Siamese())
    nn.init.ones_(bare.backbone[0].weight)
    decoder = decoder_of(model)
    with pytest.warns(UserWarning) as told:
        model.load_state_dict(bare.state_dict(), strict=True)
    (line,) = [str(warning.message) for warning in told]
    assert line == "recon_aux: a checkpoint of a bare model; the decoder starts as it is"
    assert (model.backbone[0].weight == 1).all()
    assert all(torch.equal(value, decoder[name]) for name, value in decoder_of(model).items())


@pytest.mark.parametrize("configure", [None, adam, lambda model: [adam(model)]])
def test_a_bare_run_goes_on_attached(configure: Any, tmp_path: Path) -> None:
    bare = Siamese(configure=configure)
    path = saved_after_training(bare, tmp_path, max_steps=2)
    model = attach(Siamese(configure=configure))
    before = decoder_of(model)
    trained = trainer(max_steps=4)
    with pytest.warns(UserWarning, match="the decoder starts as it is"):
        trained.fit(model, DataLoader(Views(), batch_size=4), ckpt_path=path)
    assert trained.global_step == 4
    assert not any(torch.equal(x, before[name]) for name, x in decoder_of(model).items())
    saved = torch.load(path)["optimizer_states"][0]["state"]
    state = trained.optimizers[0].state
    if configure is not None:
        # the encoder's moments are those of four steps, the decoder's of two
        assert state[model.backbone[0].weight]["step"] == 4 == saved[0]["step"] + 2
        assert state[model.recon_aux.decoder.queries]["step"] == 2


def test_named_parameters_keep_their_names_where_a_bare_run_goes_on() -> None:
    def named(model: Any) -> Any:
        return torch.optim.Adam(model.named_parameters(), lr=1e-3)

    saved = Siamese(configure=named).configure_optimizers().state_dict()
    model = attach(Siamese(configure=named))
    optimizer = model.configure_optimizers()
    optimizer.load_state_dict(saved)
    ((names, params),) = [(g["param_names"], g["params"]) for g in optimizer.param_groups]
    known = {id(p): name for name, p in model.named_parameters()}
    assert names == [known[id(p)] for p in params]
    assert sorted(names) == sorted(known.values())


def test_a_bare_optimizers_state_does_not_fit_a_group_of_its_own(tmp_path: Path) -> None:
    path = saved_after_training(Siamese(), tmp_path)
    model = attach(Siamese(), decoder_lr=0.1)
    with (
        pytest.warns(UserWarning, match="the decoder starts as it is"),
        pytest.raises(ValueError, match=r"with 2 groups, got one with 1; .*give the decoder_lr="),
    ):
        trainer(max_steps=4).fit(model, DataLoader(Views(), batch_size=4), ckpt_path=path)


def test_settings_of_its_own_on_resuming(tmp_path: Path) -> None:
    path = saved_after_training(attach(Siamese(), decoder_lr=0.1), tmp_path)
    data = DataLoader(Views(), batch_size=4)
    with pytest.raises(ValueError, match=r"with 1 groups, got one with 2; .*give the decoder_lr="):
        trainer(max_steps=4).fit(attach(Siamese()), data, ckpt_path=path)
    trained = trainer(max_steps=4)
    trained.fit(attach(Siamese(), decoder_lr=0.7), data, ckpt_path=path)
    assert [group["lr"] for group in trained.optimizers[0].param_groups] == [0.05, 0.7]


def test_the_moments_stay_with_their_parameters_wherever_the_decoder_stands() -> None:
    def optimizer_of(model: Any) -> Any:
        model.extra = nn.Linear(128, 16, bias=False)
        optimizer = model.configure_optimizers()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, parameter.numel())
        optimizer.step()
        return optimizer

    saved = optimizer_of(Siamese(configure=adam)).state_dict()
    model = attach(Siamese(configure=adam))
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(saved)
    # the decoder stands between the encoder and what came after it
    assert not optimizer.state[model.recon_aux.decoder.queries]
    for name, parameter in model.named_parameters():
        if not name.startswith("recon_aux."):
            moment = optimizer.state[parameter]["exp_avg"]
            torch.testing.assert_close(moment, torch.full_like(moment, parameter.numel() / 10))


# --- options ---


def test_options_that_differ_are_named() -> None:
    state = attach(Siamese(), decoder_dim=64, context="both").state_dict()
    expected = (
        "recon_aux: expected the options it was saved with: context='both', not 'invariant', "
        "decoder_dim=64, not 128"
    )
    with pytest.raises(RuntimeError, match=expected) as error:
        attach(Siamese()).load_state_dict(state)
    assert "size mismatch" not in str(error.value)
    attach(Siamese(), decoder_dim=64, context="both").load_state_dict(state)


@pytest.mark.parametrize(
    "option", [{"equivariant_dim": 4}, {"target_size": 16}, {"normalize_patches": True}]
)
def test_each_option_that_matters_is_saved(option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    state = attach(Siamese(), **option).state_dict()
    with pytest.raises(RuntimeError, match=f"saved with: {name}={value}, not"):
        attach(Siamese()).load_state_dict(state)


def test_numbers_of_numpys_are_saved_as_pythons(tmp_path: Path) -> None:
    options = {"weight": numpy.float64(2.5), "equivariant_dim": numpy.int64(4)}
    options["seed"] = numpy.int64(3)
    torch.save(attach(Siamese(), **options).state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    model = attach(Siamese(), weight=2.5, equivariant_dim=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(state)
    assert torch.equal(model.recon_aux.decoder.queries, state["recon_aux.decoder.queries"])


def test_options_that_may_change_are_told_and_the_rest_is_loaded() -> None:
    model, other = (
        attach(Siamese(), weight=3.0, seed=1),
        attach(Siamese(), weight=0.5, loss="l1", seed=2),
    )
    with pytest.warns(UserWarning, match=r"other options: weight=3.0, not 0.5, loss='mse', not"):
        other.load_state_dict(model.state_dict())
    assert all(torch.equal(x, decoder_of(model)[name]) for name, x in decoder_of(other).items())
    assert other.recon_aux.weight == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(other.state_dict())


def test_checkpoints_may_be_averaged_by_hand() -> None:
    model = attach(Siamese())
    states = [copy.deepcopy(model.state_dict())]
    for step in range(10):
        model.training_step(batch(), step)
        states.append(copy.deepcopy(model.state_dict()))
    # of calls 9 and 10, whose digits have another number
    for share in (0.5, 0.9):
        average = {key: share * states[9][key] + (1 - share) * states[10][key] for key in states[9]}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attach(Siamese()).load_state_dict(average)
            with pytest.raises(RuntimeError, match="saved with: context='invariant', not 'both'"):
                attach(Siamese(), context="both").load_state_dict(average)
    # before the first step it isn't known which encoder is trained
    moving = states[0]
    for state in states[1:]:
        moving = {key: 0.9 * moving[key] + 0.1 * value for key, value in state.items()}
    fresh = attach(Siamese())
    with pytest.warns(UserWarning, match="can't be read, as in an average of checkpoints"):
        fresh.load_state_dict(moving)
    assert torch.equal(fresh.recon_aux.decoder.queries, moving["recon_aux.decoder.queries"])
    fresh.training_step(batch(), 0)


# --- out to plain encoders ---


@pytest.mark.parametrize("package", [lightning, pytorch_lightning])
def test_torchvisions_own_resnet_loads_a_cut_one(package: Any, tmp_path: Path) -> None:
    class Cut(package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(*list(resnet18().children())[:-1])
            self.projection_head = nn.Linear(512, 8)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            z0, z1 = (self.projection_head(self.backbone(x).flatten(1)) for x in batch[0])
            return (z0 - z1).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    model = attach(Cut())
    fit(model, package, side=32, max_steps=1)
    path = tmp_path / "encoder.pt"
    plain = resnet18()
    recon_aux.export_backbone(model, path, like=plain)
    loaded = resnet18()
    loaded.load_state_dict(torch.load(path, weights_only=True), strict=True)
    loaded.fc = nn.Identity()
    x = torch.rand(2, 3, 64, 64)
    for each in (loaded, model):
        each.eval()
    assert torch.equal(loaded(x), model.backbone(x).flatten(1))
    assert torch.equal(torch.load(path)["fc.weight"], plain.fc.weight)


def test_timms_own_model_loads_what_stands_in_another() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0, dynamic_img_size=True)
    model = InALoop(newer("lightly.models.modules", "MaskedVisionTransformerTIMM")(vit=vit))
    model.projection_head = nn.Linear(192, 8)
    attach(model, heads=["projection_head"])
    plain = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0)
    plain.load_state_dict(recon_aux.export_backbone(model, like=plain), strict=True)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, vit.state_dict()[name])


def test_timms_own_resnet_loads_its_own_and_a_compiled_one() -> None:
    for compiled in (False, True):
        encoder = timm.create_model("resnet18", num_classes=0)
        model = InALoop(torch.compile(encoder, backend="eager") if compiled else encoder)
        model.projection_head = nn.Linear(512, 8)
        attach(model, heads=["projection_head"])
        plain = timm.create_model("resnet18", num_classes=0)
        plain.load_state_dict(recon_aux.export_backbone(model), strict=True)
        assert_same(plain.state_dict(), encoder.state_dict())


def test_an_encoder_of_another_depth_is_named() -> None:
    def vit(depth: int) -> Any:
        return timm.create_model("vit_tiny_patch16_224", depth=depth, num_classes=0)

    cut = [nn.Sequential(*list(resnet18().children())[:-1]), resnet34()]
    whole = timm.create_model("resnet18", num_classes=0), timm.create_model("resnet34")
    for encoder, like in (cut, whole, (vit(2), vit(4)), (vit(4), vit(2))):
        model = InALoop(encoder)
        model.projection_head = nn.Linear(192 if "Transf" in type(encoder).__name__ else 512, 8)
        attach(model, heads=["projection_head"])
        with pytest.raises(ValueError, match="like= of the encoder's architecture"):
            recon_aux.export_backbone(model, like=like)


class Affine(nn.Module):
    """Parameters of one shape, under names that are given."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.rand(16)))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.parameters()
        return x.mean((2, 3)).repeat(1, 6)[:, :16] * scale + shift


def test_tensors_of_one_shape_are_told_apart_by_their_names() -> None:
    encoder = Affine("weight", "bias")
    model = attach(InALoop(encoder))
    # the same names in another order, as they are and within another module
    turned = Affine("bias", "weight")
    for like in (turned, Affine("weight", "bias")):
        exported = recon_aux.export_backbone(model, like=like)
        assert list(exported) == list(like.state_dict())
        assert_same(exported, encoder.state_dict())
    within = attach(InALoop(nn.Sequential(encoder)))
    assert_same(recon_aux.export_backbone(within, like=turned), encoder.state_dict())
    # other names, in whose place there is something of their shape
    for names in (("scale", "shift"), ("bias", "other"), ("weight", "other")):
        with pytest.raises(ValueError, match="like= of the encoder's architecture"):
            recon_aux.export_backbone(within, like=nn.Sequential(Affine(*names)))


def test_an_export_shares_no_memory_with_the_model_or_the_other_architecture() -> None:
    encoder = nn.Sequential(*list(resnet18().children())[:-1])
    model = InALoop(encoder)
    model.projection_head = nn.Linear(512, 8)
    attach(model, heads=["projection_head"])
    plain = resnet18()
    exports = [recon_aux.export_backbone(model), recon_aux.export_backbone(model, like=plain)]
    kept = copy.deepcopy(exports)
    with torch.no_grad():
        for tensor in (*model.state_dict().values(), *plain.state_dict().values()):
            if isinstance(tensor, Tensor):
                tensor.add_(1)
    for exported, expected in zip(exports, kept, strict=True):
        assert_same(exported, expected)
        assert not any(x.requires_grad for x in exported.values())


@pytest.mark.parametrize("out", [recon_aux.detach, recon_aux.export_backbone, nn.Module.state_dict])
def test_weights_are_handed_out_only_after_a_late_loss_was_judged(
    out: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = inside.send_late(monkeypatch)
    model = attach(InALoop())
    views, _ = batch(4, side=16)
    views[0][0, 0, 0, 0] = float("nan")
    z0, z1 = (model(view) for view in views)
    recon_aux.add_loss(model, torch.nan_to_num(z0 - z1).sum())
    assert [loss.arrived for loss in late] == [False]
    with pytest.raises(FloatingPointError, match="got nan in step 1"):
        out(model)
    assert [loss.arrived for loss in late] == [True]
    assert recon_aux.is_attached(model) == (out is not recon_aux.detach)


class Misnamed(Siamese):
    """Its backbone is a teacher, that nothing trains but could."""

    def __init__(self) -> None:
        super().__init__()
        self.online: Any = nn.Sequential(copy.deepcopy(self.backbone))

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.projection_head(self.online(x).flatten(1))
        return z


def test_the_encoder_that_was_trained_is_exported_after_loading_too() -> None:
    model = attach(Misnamed())
    fit(model)
    again = attach(Misnamed())
    again.load_state_dict(model.state_dict())
    for each in (model, nn.DataParallel(again)):
        exported = recon_aux.export_backbone(each)
        assert_same(exported, model.online[0].state_dict())
    assert not torch.equal(model.online[0][0].weight, model.backbone[0].weight)


@pytest.mark.parametrize("is_compiled", [(True, False), (False, True)])
def test_an_encoder_that_was_trained_compiled_is_exported_uncompiled_and_the_other_way_round(
    is_compiled: tuple[bool, bool],
) -> None:
    model, again = attach(Misnamed()), attach(Misnamed())
    for each, compiled in zip((model, again), is_compiled, strict=True):
        if compiled:
            each.online = torch.compile(each.online, backend="eager")
    fit(model)
    weights = zip(again.state_dict(), model.state_dict().values(), strict=True)
    again.load_state_dict(dict(weights))
    weight = recon_aux.export_backbone(again)["0.weight"]
    assert torch.equal(weight, recon_aux.export_backbone(model)["0.weight"])
    assert not torch.equal(weight, again.backbone[0].weight)


def test_an_encoder_that_was_wrapped_since_is_exported_under_its_own_names() -> None:
    model = attach(Siamese(), weight=1.0)
    expected = recon_aux.export_backbone(model)
    model.training_step(batch(side=16), 0)
    model.backbone = nn.DataParallel(model.backbone)
    assert_same(recon_aux.export_backbone(model), expected)


def test_an_encoder_of_which_parts_are_compiled_is_exported_under_its_own_names() -> None:
    encoder: Any = plain_encoder()
    weights = copy.deepcopy(encoder.state_dict())
    encoder[0] = torch.compile(encoder[0], backend="eager")
    within: Any = torch.compile(encoder, backend="eager")
    model = attach(InALoop(nn.Sequential(within)))
    assert_same(
        recon_aux.export_backbone(model), {f"0.{key}": value for key, value in weights.items()}
    )
    assert_same(recon_aux.export_backbone(model, like=plain_encoder()), weights)


def test_an_encoder_of_another_architecture_is_named() -> None:
    model = attach(InALoop())
    with pytest.raises(ValueError, match=r"2\.bias \(16,\), got 4, .* 2\.bias \(32,\)"):
        recon_aux.export_backbone(model, like=plain_encoder(32))
    with pytest.raises(ValueError, match=r"whose 4 tensors are 0\.weight \(8, 3, 3, 3\).*got 122"):
        recon_aux.export_backbone(model, like=resnet18())
    with pytest.raises(TypeError, match="like= as a model, got <function resnet18"):
        recon_aux.export_backbone(model, like=resnet18)
    with pytest.raises(ValueError, match="got a bare InALoop"):
        recon_aux.export_backbone(InALoop())
    assert plain_encoder().load_state_dict(recon_aux.export_backbone(model))
