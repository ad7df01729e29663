"""The lightly adapter, on real lightly classes, under both names of Lightning."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightly.loss
import lightning
import pytest
import pytorch_lightning
import timm
import torch
import torchvision
from lightly.models.modules import BYOLPredictionHead, SimCLRProjectionHead
from torch import Tensor, nn

import recon_aux
from helpers.data import batch
from helpers.inside import hooked
from helpers.lightly_styles import build
from helpers.models import tiny_encoder
from helpers.training import fit
from helpers.versions import newer
from helpers.watching import alive, seen_by
from helpers.weights import assert_same, assert_trained, bare_state, decoder_of, loss_of
from recon_aux.integrations.lightly import attach

METHODS = ["SimCLR", "BYOL", "VICReg"]
STYLES = ["one_by_one", "concatenated"]
every_method = pytest.mark.parametrize("method", METHODS)
every_style = pytest.mark.parametrize("style", STYLES)
PACKAGES = {"lightning": lightning, "pytorch_lightning": pytorch_lightning}


def model_of(method: str = "SimCLR", style: str = "one_by_one", seed: int = 0, **kw: Any) -> Any:
    torch.manual_seed(seed)
    return build(pytorch_lightning.LightningModule, method, style, **kw)


@every_style
@every_method
@pytest.mark.parametrize("package", PACKAGES)
def test_trains_under_the_trainer(method: str, style: str, package: str) -> None:
    torch.manual_seed(0)
    module = PACKAGES[package]
    model = build(module.LightningModule, method, style)
    assert attach(model) is model
    before = decoder_of(model)
    trained = fit(model, module, max_steps=5)
    assert_trained(model, before)
    assert "recon_aux/loss" in trained.callback_metrics


@every_style
@every_method
def test_each_decoder_parameter_stands_in_exactly_one_group(method: str, style: str) -> None:
    model = attach(model_of(method, style))
    optimizer = fit(model, side=32, max_steps=1).optimizers[0]
    placed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    for parameter in model.recon_aux.parameters():
        assert placed.count(id(parameter)) == 1


@every_style
@every_method
def test_the_methods_loss_sees_only_the_invariant_channels(method: str, style: str) -> None:
    model = attach(model_of(method, style), weight=0, equivariant_dim=6)
    seen = []
    model.backbone.register_forward_hook(lambda *call: seen.append(call[2]))
    loss = loss_of(model.training_step(batch(), 0))
    gradients = torch.autograd.grad(loss, seen)
    assert all((g[:, 10:] == 0).all() and g[:, :10].any() for g in gradients)


@every_style
@every_method
def test_the_reconstruction_reaches_every_equivariant_channel(method: str, style: str) -> None:
    model = attach(model_of(method, style), equivariant_dim=6, reconstruct="both")
    seen = []
    model.backbone.register_forward_hook(lambda *call: seen.append(call[2]))
    loss = loss_of(model.training_step(batch(), 0))
    assert all(g[:, 10:].any(dim=0).all() for g in torch.autograd.grad(loss, seen))


def weights_after(model: Any) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(3)
    fit(model, shuffle=True, max_steps=4)
    return bare_state(model), torch.random.get_rng_state()


def assert_identical(
    a: tuple[dict[str, Tensor], Tensor], b: tuple[dict[str, Tensor], Tensor]
) -> None:
    assert_same(a[0], b[0])
    assert torch.equal(a[1], b[1])


@every_style
@every_method
def test_switched_off_is_bit_identical_to_the_bare_model(method: str, style: str) -> None:
    bare = weights_after(model_of(method, style, dropout=0.1))
    off = attach(model_of(method, style, dropout=0.1), weight=0, equivariant_dim=0)
    assert_identical(bare, weights_after(off))


@every_style
@every_method
def test_detached_is_bit_identical_to_the_bare_model(method: str, style: str) -> None:
    bare = weights_after(model_of(method, style, dropout=0.1))
    model = model_of(method, style, dropout=0.1)
    keys, own = set(model.state_dict()), set(vars(model))
    assert recon_aux.detach(attach(model)) is model
    assert set(model.state_dict()) == keys
    assert set(vars(model)) == own
    assert not hooked(model)
    assert_identical(bare, weights_after(model))


def test_attaching_leaves_the_random_state_and_the_encoder_alone() -> None:
    model = model_of(dropout=0.5)
    encoder = copy.deepcopy(model.backbone.state_dict())
    model.backbone[1].eval()
    state = torch.random.get_rng_state()
    attach(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.backbone.state_dict().keys() == encoder.keys()
    assert all(torch.equal(encoder[k], v) for k, v in model.backbone.state_dict().items())
    assert model.backbone.training
    assert not model.backbone[1].training


BACKBONES = {
    "resnet18 without fc": lambda: nn.Sequential(
        *list(torchvision.models.resnet18().children())[:-1]
    ),
    "vit_tiny": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=0
    ),
}


@pytest.mark.parametrize("backbone", BACKBONES)
@every_style
def test_backbones_of_torchvision_and_timm(backbone: str, style: str) -> None:
    torch.manual_seed(0)
    base = pytorch_lightning.LightningModule
    model = attach(build(base, "SimCLR", style, BACKBONES[backbone]()))
    width = {"resnet18 without fc": 512, "vit_tiny": 192}[backbone]
    assert model.recon_aux.splitter.feature_dim == width
    fit(model, side=32, max_steps=1)


@pytest.mark.parametrize("channels", [1, 4])
def test_views_of_any_number_of_channels(channels: int) -> None:
    model = model_of()
    model.backbone = tiny_encoder(channels)
    attach(model)
    model.training_step(batch(channels=channels), 0).backward()
    assert model.recon_aux.image_channels == channels


def test_validation_captures_nothing_and_heads_stay_masked() -> None:
    model = attach(model_of(), equivariant_dim=8)
    seen, x = seen_by(model.backbone, outputs=True), batch()[0][0]
    model.eval()
    with torch.no_grad():
        z = model(x)
        masked = model.backbone(x).flatten(1).clone()
        masked[:, 8:] = 0
        assert torch.equal(z, model.projection_head.layers(masked))
    assert len(seen) == 2
    assert alive(seen) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_attached_to_itself(copied: Any) -> None:
    model = attach(AtModuleLevel())
    twin = copied(model)
    twin.training_step(batch()).backward()
    assert twin.backbone[0].weight.grad is not None
    assert model.backbone[0].weight.grad is None
    assert twin.recon_aux.decoder.queries.grad is not None
    recon_aux.detach(twin).training_step(batch())
    assert recon_aux.is_attached(model)


class AtModuleLevel(pytorch_lightning.LightningModule):
    """Can be pickled, which a class inside a function can't."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_encoder()
        self.projection_head = SimCLRProjectionHead(16, 32, 16)

    def training_step(self, batch: Any) -> Tensor:
        z0, z1 = (self.projection_head(self.backbone(x).flatten(1)) for x in batch[0])
        return (z0 - z1).square().mean()

    def configure_optimizers(self) -> Any:
        modules = {"backbone": self.backbone, "projection_head": self.projection_head}
        return {"optimizer": torch.optim.Adam(nn.ModuleDict(modules).named_parameters())}


WEIGHTS = {
    "NTXentLoss": 1.0,
    "DirectCLRLoss": 1.0,
    "VICRegLoss": 0.3,
    "VICRegLLoss": 0.3,
    "NegativeCosineSimilarity": 0.2,
    "KoLeoLoss": 1.0,
}
LOSSES = sorted(name for name in dir(lightly.loss) if name.endswith(("Loss", "Similarity")))


@pytest.mark.parametrize("loss", LOSSES)
def test_each_of_lightlys_losses_has_its_default_weight(loss: str) -> None:
    model: Any = AtModuleLevel()
    made_by = getattr(lightly.loss, loss)
    made = made_by(target_distribution=None) if loss == "PMSNCustomLoss" else made_by()
    model.criterion = made
    # a loss on patches needs an encoder with encode
    attach(model, backbone_method="forward")
    expected = WEIGHTS.get(loss, "auto")
    assert model.recon_aux.options["weight"] == expected
    assert model.recon_aux.weight == (1.0 if expected == "auto" else expected)


@every_style
@pytest.mark.parametrize(("method", "weight"), [("SimCLR", 1.0), ("BYOL", 0.2), ("VICReg", 0.3)])
def test_each_method_has_its_default_weight(method: str, weight: float, style: str) -> None:
    assert attach(model_of(method, style)).recon_aux.weight == weight
    given = attach(model_of(method, style), weight=0)
    assert given.recon_aux.weight == 0
    assert attach(model_of(method, style), weight="auto").recon_aux.options["weight"] == "auto"


def test_a_prediction_head_is_no_head_whatever_it_is_called() -> None:
    model = AtModuleLevel()
    model.q_projection = BYOLPredictionHead(16, 32, 16)
    model.neck = nn.ModuleDict({"projection": nn.Linear(16, 16)})
    attach(model)
    assert [name for name in hooked(model) if name] == ["backbone", "projection_head"]


@pytest.mark.parametrize("loss", ["IBOTPatchLoss", "IBOTPlusPlusPatchLoss"])
def test_a_loss_on_patches_needs_an_encoder_that_gives_them(loss: str) -> None:
    model = AtModuleLevel()
    model.criterion = newer("lightly.loss", loss)(output_dim=8)
    with pytest.raises(ValueError, match="to name a method of Sequential, got 'encode'"):
        attach(model)


@pytest.mark.parametrize("name", ["student_backbone", "online_backbone", "student", "my_encoder"])
def test_the_usual_names_of_an_encoder(name: str) -> None:
    model = AtModuleLevel()
    if name in ("student_backbone", "online_backbone"):
        # backbone is a teacher that nobody froze
        setattr(model, name, tiny_encoder())
    else:
        setattr(model, name, model.backbone)
        del model.backbone
    attach(model)
    assert_same(recon_aux.export_backbone(model), getattr(model, name).state_dict())


def test_a_loss_of_ones_own_has_the_weight_of_the_one_that_it_extends() -> None:
    model = AtModuleLevel()
    model.criterion = type("MyLoss", (lightly.loss.VICRegLoss,), {})()
    assert attach(model).recon_aux.weight == 0.3


def test_a_step_that_takes_no_batch_index_and_named_parameters() -> None:
    model = attach(AtModuleLevel())
    optimizer = fit(model, side=32, max_steps=1).optimizers[0]
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(group["param_names"]) == len(list(model.parameters()))
    assert "recon_aux.decoder.queries" in group["param_names"]


@every_method
def test_a_presets_weight_comes_before_the_methods_and_after_the_users(method: str) -> None:
    def options(**given: Any) -> dict[str, Any]:
        found: dict[str, Any] = attach(model_of(method), **given).recon_aux.options
        return found

    usual = options()
    assert options(preset="geometry") == {**usual, "edges": 64}
    paper = {"registration": 0, "statistics": 0, "edges": 0, "weight": 4}
    assert options(preset="paper") == {**usual, **paper}
    assert options(preset="paper", weight="auto", edges=1) == {
        **usual, **paper, "weight": "auto", "edges": 1,
    }  # fmt: skip
