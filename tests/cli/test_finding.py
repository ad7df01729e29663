"""Is the encoder found in checkpoints of every kind, with all its weights, and no other?"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from lightly.models import ResNetGenerator
from lightly.models.modules import SimCLRProjectionHead
from torch import nn

from helpers.checkpoints import KINDS, lightning, small_stem
from recon_aux.cli.architectures import build, likely
from recon_aux.cli.errors import UserError
from recon_aux.cli.finding import find_encoder
from recon_aux.cli.opening import tensors_in

HERE = Path("here.ckpt")


def randomized(model: nn.Module) -> nn.Module:
    """Change what a new model has of zeros and ones, so that no weight can be mistaken."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.01)
    return model.eval()


def assert_found(encoder: nn.Module, checkpoint: Any, arch: str, size: int = 32) -> None:
    found = find_encoder(tensors_in(checkpoint), HERE)
    assert found.arch == arch
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        mine, theirs = (x(images).flatten(1) for x in (found.build(), encoder))
    assert torch.allclose(mine, theirs, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_of_each_kind_of_checkpoint_is_found(kind: str) -> None:
    encoder, checkpoint, arch = KINDS[kind]()
    assert_found(encoder, checkpoint, arch)


def vit(**options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0, **options)


@pytest.mark.parametrize(
    ("make", "arch", "size"),
    [
        (lambda: build("torchvision:resnet50"), "torchvision:resnet50", 32),
        (vit(img_size=32, patch_size=4), "timm:vit_tiny_patch16_224", 32),
        (vit(), "timm:vit_tiny_patch16_224", 224),
        (vit(img_size=64, class_token=False, global_pool="avg"), None, 64),
        (lambda: build("torchvision:convnext_tiny"), "torchvision:convnext_tiny", 32),
        (lambda: build("timm:convnext_atto"), "timm:convnext_atto", 32),
        (lambda: build("torchvision:efficientnet_b0"), "torchvision:efficientnet_b0", 32),
        (lambda: build("torchvision:mobilenet_v2"), "torchvision:mobilenet_v2", 32),
        (lambda: build("torchvision:densenet121"), "torchvision:densenet121", 32),
        (lambda: build("torchvision:regnet_y_400mf"), "torchvision:regnet_y_400mf", 32),
        (lambda: build("torchvision:swin_t"), "torchvision:swin_t", 32),
        (lambda: build("timm:resnet26d"), "timm:resnet26d", 32),
    ],
)
@pytest.mark.slow
def test_likely_architectures_are_found(
    make: Callable[[], nn.Module], arch: str | None, size: int
) -> None:
    encoder = randomized(make())
    checkpoint = {"state_dict": {f"student.{key}": x for key, x in encoder.state_dict().items()}}
    if arch is None:
        # built unlike any architecture that has a name
        with pytest.raises(UserError, match=r"Pass --arch with its architecture, as timm:resnet50"):
            find_encoder(tensors_in(checkpoint), HERE)
    else:
        assert_found(encoder, checkpoint, arch, size)


@pytest.mark.slow
def test_torchvisions_transformer_is_found_with_its_image_size() -> None:
    model = torchvision.models.vit_b_16(image_size=32)
    model.heads = nn.Identity()
    encoder = randomized(model)
    found = find_encoder(tensors_in(encoder.state_dict()), HERE)
    assert (found.arch, found.options) == ("torchvision:vit_b_16", {"image_size": 32})
    assert found.input_size(found.build()) == 32
    # naming it finds the same
    named = find_encoder(tensors_in(encoder.state_dict()), HERE, arch="torchvision:vit_b_16")
    assert named.options == found.options


def test_lightlys_resnet_for_small_images_is_found() -> None:
    layers = list(ResNetGenerator("resnet-18").children())[:-1]
    encoder = randomized(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)))
    model = nn.ModuleDict({"backbone": encoder, "head": SimCLRProjectionHead(512, 64, 32)})
    assert_found(encoder, lightning(model), "torchvision:resnet18-lightly")


def test_compiled_and_wrapped_encoders_are_found() -> None:
    encoder = randomized(build("torchvision:resnet18"))
    state = encoder.state_dict()
    compiled = {f"module.backbone._orig_mod.{key}": x for key, x in state.items()}
    assert_found(encoder, {"model": compiled}, "torchvision:resnet18")


def test_counters_of_batches_may_lack() -> None:
    encoder = randomized(build("torchvision:resnet18"))
    old = {key: x for key, x in encoder.state_dict().items() if "num_batches" not in key}
    assert_found(encoder, old, "torchvision:resnet18")


@pytest.mark.parametrize("name", ["momentum_backbone", "teacher", "target_encoder", "encoder_k"])
def test_momentum_encoders_are_left_alone(name: str) -> None:
    encoder = randomized(build("torchvision:resnet18"))
    other = randomized(build("torchvision:resnet18"))
    model = nn.ModuleDict({name: other, "online": encoder})
    assert_found(encoder, lightning(model), "torchvision:resnet18")
    assert find_encoder(tensors_in(lightning(model)), HERE).others == [f"state_dict.{name}."]
    # one that stands alone is what the file is for
    assert_found(other, {name: other.state_dict()}, "torchvision:resnet18")


def test_several_encoders_are_asked_for_by_prefix_unless_they_are_equal() -> None:
    encoder = randomized(build("torchvision:resnet18"))
    other = randomized(build("torchvision:resnet18"))
    tensors = tensors_in({"left": encoder.state_dict(), "right": other.state_dict()})
    with pytest.raises(UserError, match=r"found 2 .* Pass --prefix left or --prefix right\.$"):
        find_encoder(tensors, HERE)
    found = find_encoder(tensors, HERE, prefix="right")
    assert torch.equal(found.state["conv1.weight"], other.state_dict()["conv1.weight"])
    with pytest.raises(UserError, match=r"got 'middle'; there are: left\.conv1, .*Pass one"):
        find_encoder(tensors, HERE, prefix="middle")
    equal = tensors_in({"left": encoder.state_dict(), "right": copy.deepcopy(encoder).state_dict()})
    assert find_encoder(equal, HERE).prefix == "left."


def test_the_first_layers_of_an_encoder_are_not_it() -> None:
    state = build("torchvision:resnet18").state_dict()
    cut = {key: x for key, x in state.items() if not key.startswith("layer4")}
    heads = {f"head.{i}.weight": torch.rand(4, 4) for i in range(60)}
    for state in (cut, {**{f"backbone.{key}": x for key, x in cut.items()}, **heads}):
        with pytest.raises(UserError, match="Pass --arch"):
            find_encoder(state, HERE)
    # nor those of a deeper one
    with pytest.raises(UserError, match="none of it fits"):
        find_encoder(build("torchvision:resnet34").state_dict(), HERE, arch="torchvision:resnet18")


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet18", r"expected an architecture as timm:resnet50.*got 'resnet18'"),
        ("timm:resnet5O", r"got timm:resnet5O, which it doesn't have. Pass --arch timm:"),
        ("torchvision:resnet", r"Pass --arch torchvision:resnet"),
        ("torchvision:vit_b_16-small", "which it doesn't have"),
        ("no_such_code:build", r"no_such_code:build to be a function .*No module"),
        ("helpers.checkpoints:nothing", "has no attribute"),
        ("helpers.checkpoints:no_module", r"to give a torch.nn.Module, got int"),
    ],
)
def test_an_unknown_architecture_is_refused(arch: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_encoder(small_stem().state_dict(), HERE, arch=arch)


def test_a_function_in_the_current_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "code_here.py").write_text("from torch import nn\n\nmake = nn.Flatten\n")
    assert isinstance(build("code_here:make"), nn.Flatten)


def test_solo_learns_stem_is_padded_as_solo_learn_pads_it() -> None:
    encoder, checkpoint, _ = KINDS["solo-learn"]()
    found = find_encoder(tensors_in(checkpoint), HERE).build()
    assert found.get_submodule("conv1").padding == (2, 2) == encoder.conv1.padding


def test_a_checkpoint_with_no_tensors_is_refused() -> None:
    with pytest.raises(UserError, match="holds no tensors"):
        find_encoder(tensors_in({"epoch": 3}), HERE)
    assert list(likely({})) == []
