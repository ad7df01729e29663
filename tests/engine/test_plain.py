"""Encoders and heads stay plain: what is pickled, copied or exported of them has no hook."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import timm
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, ResNet

import recon_aux
from helpers.data import batch
from helpers.inside import hooked
from helpers.models import InALoop, tiny_encoder
from helpers.running import run_python
from helpers.training import fit
from helpers.versions import OLDEST
from recon_aux.integrations.lightly import attach

BATCH = batch(side=32)
IMAGES = BATCH[0][0]


def flat_encoder() -> nn.Module:
    return nn.Sequential(tiny_encoder(), nn.Flatten())


def resnet() -> nn.Module:
    encoder = ResNet(BasicBlock, [1, 1, 1, 1])
    encoder.fc = nn.Identity()
    return encoder


def vit() -> nn.Module:
    encoder: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", depth=1, num_classes=0, img_size=32
    )
    return encoder


def traced() -> nn.Module:
    return symbolic_trace(flat_encoder())


ENCODERS = {"cut": (flat_encoder, 16), "resnet": (resnet, 512), "vit": (vit, 192)}
TRACED = {**ENCODERS, "traced": (traced, 16)}


class Method(LightningModule):
    """Can be loaded from a checkpoint, which holds its encoder."""

    def __init__(self, backbone: Any, features: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = backbone
        self.projection_head: Any = nn.Linear(features, 8)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        z0, z1 = (self.projection_head(self.backbone(x)) for x in batch[0])
        loss: Tensor = (z0 - z1).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def built(name: str) -> Any:
    """An attached method that has trained a step, in eval mode."""
    torch.manual_seed(0)
    encoder, features = TRACED[name]
    model = attach(Method(encoder(), features))
    model.training_step(BATCH).backward()
    model.zero_grad()
    return model.eval()


def saved(module: nn.Module, protocol: int | None = None) -> bytes:
    """A module's pickle, of torch.save without a protocol."""
    file = io.BytesIO()
    if protocol is None:
        torch.save(module, file)
    else:
        pickle.dump(module, file, protocol)
    content = file.getvalue()
    for name in (b"recon_aux", b"MethodHook", b"EncoderRecorder", b"HeadMask"):
        assert name not in content
    return content


def loaded(module: nn.Module) -> Any:
    return pickle.loads(saved(module, pickle.DEFAULT_PROTOCOL))


WITHOUT = """
import io, pickle, sys, torch

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "recon_aux":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
for content, images, expected, attributes in torch.load(sys.argv[1], weights_only=False):
    if isinstance(content, bytes) and content[:2] == b"PK":
        module = torch.load(io.BytesIO(content), weights_only=False)
    else:
        module = pickle.loads(content)
    assert sorted(vars(module)) == sorted(attributes), set(vars(module)) ^ set(attributes)
    assert torch.equal(module.eval()(images), expected)
    optimizer = torch.optim.SGD(module.train().parameters(), lr=0.1)
    before = [parameter.clone() for parameter in module.parameters()]
    module(images).square().mean().backward()
    optimizer.step()
    assert not any(map(torch.equal, before[-2:], module.parameters()))
    pickle.dumps(module)
assert "recon_aux" not in sys.modules
print("all trained")
"""


def assert_plain_without_recon_aux(path: Path, entries: list[Any]) -> None:
    torch.save(entries, path / "entries.pt")
    result = run_python("-c", WITHOUT, path / "entries.pt")
    assert "all trained" in result.stdout, result.stderr[-3000:]


# --- pickled ---


def test_encoders_and_heads_are_pickled_plain(tmp_path: Path) -> None:
    entries = []
    for name, (encoder, features) in TRACED.items():
        model, attributes = built(name), [*vars(encoder())]
        for each in (model.backbone, copy.deepcopy(model.backbone), copy.copy(model.backbone)):
            output = each(IMAGES).detach()
            protocols = (None, 0, 2, 3, 4, 5) if name in ("cut", "traced") else (None,)
            entries += [(saved(each, p), IMAGES, output, attributes) for p in protocols]
        feature = model.backbone(IMAGES).detach()
        bare = nn.Linear(features, 8)
        bare.load_state_dict(model.projection_head.state_dict())
        for head in (model.projection_head, copy.deepcopy(model.projection_head)):
            entries.append((saved(head), feature, bare(feature).detach(), [*vars(bare)]))
    assert_plain_without_recon_aux(tmp_path, entries)


def test_a_checkpoint_with_the_encoder_loads_without_recon_aux(tmp_path: Path) -> None:
    model = attach(Method(flat_encoder()))
    fit(model, enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path)]).save_checkpoint(
        tmp_path / "model.ckpt"
    )
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=False)
    encoder = checkpoint["hyper_parameters"]["backbone"]
    assert not hooked(encoder)
    assert type(encoder) is nn.Sequential
    code = WITHOUT.partition("for content")[0] + (
        "encoder = torch.load(sys.argv[1], weights_only=False)['hyper_parameters']['backbone']\n"
        "print('features', *encoder(torch.rand(2, 3, 8, 8)).shape)\n"
    )
    result = run_python("-c", code, tmp_path / "model.ckpt")
    assert "features 2 16" in result.stdout, result.stderr[-3000:]
    if OLDEST:
        pytest.skip("Lightning 2.2 with torch 2.6 loads no checkpoint that pickles an encoder")
    with pytest.warns(UserWarning, match="is an instance of `nn.Module`"):
        bare = Method.load_from_checkpoint(
            tmp_path / "model.ckpt", strict=False, weights_only=False
        ).eval()
    assert not hooked(bare)
    assert torch.equal(bare.backbone(IMAGES), model.eval().backbone(IMAGES))
    torch.jit.script(bare.backbone)


def doubled(self: Any, x: Tensor) -> Tensor:
    y: Tensor = 2 * self.encode(x)
    return y


class Encoder(nn.Module):
    """Of a user's own: what is pickled of it lacks one attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = flat_encoder()
        self.unpicklable = lambda: 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "unpicklable"}

    def encode(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    # pickled by its name
    doubled = doubled

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


class WithinATuple(Encoder):
    """Its attributes are a part of what is pickled."""

    def __getstate__(self) -> Any:
        return super().__getstate__(), "1.0"

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state[0])


@pytest.mark.parametrize("kind", [Encoder, WithinATuple])
def test_what_an_encoder_makes_of_its_pickle_is_respected(kind: Any) -> None:
    model = attach(Method(kind()))
    again = loaded(model.backbone)
    assert not hasattr(again, "unpicklable")
    assert not hooked(again)
    assert torch.equal(again.eval()(IMAGES), model.eval().backbone(IMAGES))


def test_a_forward_of_the_instance_s_own_is_pickled() -> None:
    encoder: Any = Encoder()
    encoder.forward = MethodType(doubled, encoder)
    model = attach(Method(encoder))
    again = loaded(model.backbone.eval())
    assert again.forward.__func__ is doubled
    assert again.forward.__self__ is again
    assert torch.equal(again(IMAGES), 2 * again.net(IMAGES))


def test_a_hook_that_an_encoder_holds_is_pickled_as_its_method() -> None:
    model = attach(Method(flat_encoder()))
    model.backbone.held = {"forward": model.backbone.forward}
    again = loaded(model.backbone.eval())
    assert again.held["forward"].__self__ is again
    recon_aux.detach(model)
    assert loaded(model.backbone).held["forward"].__func__ is nn.Sequential.forward


def test_another_method_of_an_encoder_is_pickled_plain() -> None:
    model = InALoop(Encoder())
    recon_aux.attach(
        model, backbone="backbone", heads=["projection_head"], backbone_method="encode"
    )
    again = loaded(model.backbone.eval())
    assert not {"encode", "forward"} & {*vars(again)}
    assert torch.equal(again.encode(IMAGES), model.backbone.encode(IMAGES))


def test_modules_around_encoders_and_heads_are_pickled_plain() -> None:
    model: Any = InALoop(tiny_encoder())
    model.student = nn.ModuleDict({"encoder": model.backbone, "head": model.projection_head})
    del model.backbone, model.projection_head
    recon_aux.attach(model, backbone="student.encoder", heads=["student.head"])
    again = loaded(nn.ModuleDict(OrderedDict(student=model.student, twin=model.student.encoder)))
    assert not hooked(again)
    assert again.twin is again.student.encoder


def test_an_encoder_is_pickled_plain_within_a_step() -> None:
    class Pickles(Method):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            self.kept = [loaded(self.backbone), loaded(copy.deepcopy(self.backbone))]
            return super().training_step(batch)

    model = attach(Pickles(flat_encoder()))
    model.training_step(BATCH)
    assert not hooked(*model.kept)


def test_a_shallow_copy_is_pickled_itself() -> None:
    model = attach(Method(flat_encoder()))
    shallow = copy.copy(model.backbone)
    shallow.note = "of the copy"
    assert loaded(shallow).note == "of the copy"
    assert hooked(model) == ["", "backbone", "projection_head"]


# --- whole models ---


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


COPIED = [pickled, copy.deepcopy]


def assert_attached(model: Any, bare_encoder: nn.Module) -> None:
    """It adds the task, masks the head, and comes off without a trace."""
    model.train()
    total = model.training_step(BATCH)
    total.backward()
    assert model.recon_aux.decoder.queries.grad.any()
    model.recon_aux.weight = 0.0
    own = model.training_step(BATCH)
    assert own != total
    with torch.no_grad():
        model.projection_head.weight[:, -1] += 1
    assert model.training_step(BATCH) == own
    recon_aux.detach(model)
    assert model.training_step(BATCH) != own
    assert vars(model.backbone).keys() == vars(bare_encoder).keys()
    loaded(model)


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("order", ["bm", "mb"])
@pytest.mark.parametrize("copied", COPIED)
def test_a_model_resumes_attached_with_its_encoder_beside_it(
    name: str, order: str, copied: Callable[[Any], Any]
) -> None:
    model = built(name)
    parts = {"b": [model.backbone, model.projection_head], "m": model}
    again = copied(copied({key: parts[key] for key in order}))
    twin = again["m"]
    assert again["b"] == [twin.backbone, twin.projection_head]
    assert twin.hparams["backbone"] is twin.backbone
    expected, losses = (each.train().training_step(BATCH) for each in (model, twin))
    assert torch.equal(expected, losses)
    assert_attached(twin, TRACED[name][0]())
    assert hooked(model) == ["", "backbone", "projection_head"]


class Momentum(Method):
    """Copies its encoder and head within the first step."""

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        if not hasattr(self, "target"):
            pair = copy.deepcopy(self.backbone), copy.deepcopy(self.projection_head)
            self.target: Any = nn.Sequential(*pair).requires_grad_(False)
        with torch.no_grad():
            target = self.target(batch[0][1])
        z = self.projection_head(self.backbone(batch[0][0]))
        loss: Tensor = (z - target).square().mean()
        return loss


@pytest.mark.parametrize("copied", COPIED)
def test_what_was_copied_within_a_step_resumes_with_its_hooks(copied: Any) -> None:
    model = attach(Momentum(flat_encoder()))
    model.training_step(BATCH)
    twin = copied(model)
    assert (
        hooked(twin) == hooked(model) == ["", "backbone", "projection_head", "target.0", "target.1"]
    )
    twin.recon_aux.weight = 0.0
    own = twin.training_step(BATCH)
    with torch.no_grad():
        twin.target[1].weight[:, -1] += 1
    assert twin.training_step(BATCH) == own
    assert not hooked(loaded(twin.target))
    assert not hooked(recon_aux.detach(twin))


def test_a_criterion_outside_the_model_resumes_masked() -> None:
    model, criterion = InALoop(tiny_encoder()), nn.Linear(16, 4)
    attach(model, heads=["projection_head", criterion])
    assert not hooked(loaded(criterion))
    twin, outside = pickle.loads(pickle.dumps((model, criterion)))
    assert hooked(twin, outside) == ["backbone", "projection_head", ""]
    feature = torch.rand(2, 16)
    hidden = feature.clone()
    hidden[:, 8:] = 0
    assert torch.equal(outside(feature), outside(hidden))
    recon_aux.detach(twin)
    assert not hooked(twin, outside)


# --- exported ---


def export(module: Any) -> Any:
    return torch.export.export(module, (IMAGES,)).module()


def export_by_dynamo(module: Any) -> Any:
    return torch.export.export(module, (IMAGES,), strict=True).module()


def script(module: Any) -> Any:
    return torch.jit.script(module)


def trace(module: Any) -> Any:
    return torch.jit.trace(module, (IMAGES,))


def extract(module: Any) -> Any:
    *_, last = (name for name, _ in module.named_children())
    extractor = create_feature_extractor(module, {last: "feature"})
    return lambda images: extractor(images)["feature"]


def compile_whole(module: Any) -> Any:
    return torch.compile(module, backend="eager", fullgraph=True)


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize(
    "tool", [export, export_by_dynamo, script, trace, symbolic_trace, extract, compile_whole]
)
def test_an_attached_encoder_is_exported_as_a_bare_one(name: str, tool: Any) -> None:
    if OLDEST and name == "vit" and tool not in (script, trace, compile_whole):
        pytest.skip("torch 2.6 traces no attention of timm's, and exports no optional input")
    torch._dynamo.reset()
    model = built(name)
    bare = TRACED[name][0]().eval()
    bare.load_state_dict(recon_aux.export_backbone(model))
    expected = tool(bare)(IMAGES)
    kinds = {"attached": model.backbone, "copied": copy.deepcopy(model.backbone)}
    for kind, each in kinds.items():
        assert torch.equal(tool(each)(IMAGES), expected), kind
    # within a module of the user's
    if tool not in (extract, compile_whole):
        assert torch.equal(tool(nn.Sequential(model.backbone, nn.Flatten()))(IMAGES), expected)
    model.train().training_step(BATCH).backward()
    assert model.recon_aux.decoder.queries.grad.any()
    model.eval()
    recon_aux.detach(model)
    assert vars(model.backbone).keys() == vars(bare).keys()


def around(module: Any) -> Any:
    return symbolic_trace(nn.Sequential(module, nn.Flatten()))


@pytest.mark.parametrize("tool", [export, export_by_dynamo, script, trace, symbolic_trace, around])
def test_a_loop_goes_on_after_its_encoder_was_exported(tool: Any) -> None:
    torch._dynamo.reset()
    model = attach(InALoop(tiny_encoder()))
    views = BATCH[0]
    for _ in range(2):
        tool(model.eval().backbone)
        model.train()
        recon_aux.add_loss(model, sum(model(view).var() for view in views), views).backward()
    assert model.recon_aux.decoder.queries.grad.any()
