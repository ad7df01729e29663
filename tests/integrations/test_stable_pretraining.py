"""The stable-pretraining adapter, on the package's own forward functions and classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Dataset

import recon_aux
from helpers.running import ROOT, run_example, run_python
from helpers.weights import assert_same, assert_trained, decoder_of, weights_of

pytest.importorskip(
    "stable_pretraining",
    reason="stable-pretraining is not installed; `nox -s stable_pretraining` installs it",
)
import lightning
import stable_pretraining as spt
from omegaconf import OmegaConf
from stable_pretraining import forward, losses, methods
from stable_pretraining.callbacks import factories
from stable_pretraining.callbacks.queue import OnlineQueue
from stable_pretraining.config import recursive_instantiate
from stable_pretraining.utils.fsdp2 import default_parallelize_fn
from timm.models.vision_transformer import VisionTransformer
from torchmetrics.classification import MulticlassAccuracy
from transformers import ViTConfig, ViTModel

from recon_aux.integrations.stable_pretraining import attach

pytestmark = pytest.mark.filterwarnings("error:.*recon_aux")

WIDTH, SIDE, BATCH, STEPS = 16, 32, 4, 2
FAST = {"optimizer": {"type": "SGD", "lr": 0.05}, "scheduler": {"type": "ConstantLR"}}


@pytest.fixture(scope="module", autouse=True)
def bare_trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Without what the package adds to every trainer: it asks git, pip and the hardware."""
    spt.set(cache_dir=str(tmp_path_factory.mktemp("cache")), verbose="ERROR")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factories, "_DEFAULT_CALLBACK_REGISTRY", {})
        yield


# --- tiny encoders and heads ---


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def vit(**options: Any) -> nn.Module:
    return VisionTransformer(
        SIDE, 8, embed_dim=WIDTH, depth=1, num_heads=2, num_classes=0, **options
    )


def vit_of_transformers() -> nn.Module:
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        image_size=SIDE,
        patch_size=8,
    )
    return ViTModel(config, add_pooling_layer=False, use_mask_token=True)


def mlp(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, width))


def both(module: nn.Module) -> nn.Module:
    return spt.TeacherStudentWrapper(module, base_ema_coefficient=0.9)


# --- the forward functions ---


def module(name: str, backbone: nn.Module, **parts: Any) -> Any:
    return of_forward(getattr(forward, name), backbone=backbone, **parts)


def of_forward(its: Any, **parts: Any) -> Any:
    return spt.Module(forward=its, optim=copy.deepcopy(FAST), **parts)


FORWARDS: dict[str, Callable[[], Any]] = {
    "simclr": lambda: module("simclr", conv(), projector=mlp(), simclr_loss=losses.NTXEntLoss()),
    "vicreg": lambda: module("vicreg", conv(), projector=mlp(), vicreg_loss=losses.VICRegLoss()),
    "barlow_twins": lambda: module(
        "barlow_twins", conv(), projector=mlp(), barlow_loss=losses.BarlowTwinsLoss()
    ),
    "byol": lambda: module(
        "byol",
        both(conv()),
        projector=both(mlp()),
        predictor=nn.Linear(8, 8),
        byol_loss=losses.BYOLLoss(),
    ),
    "swav": lambda: module(
        "swav",
        conv(),
        projector=mlp(),
        prototypes=nn.Linear(8, 6, bias=False),
        swav_loss=losses.SwAVLoss(),
        use_queue=True,
        queue_length=8,
        projection_dim=8,
        start_queue_at_epoch=0,
    ),
    "nnclr": lambda: module(
        "nnclr",
        conv(),
        projector=mlp(),
        predictor=nn.Linear(8, 8),
        nnclr_loss=losses.NTXEntLoss(),
        hparams={"support_set_size": 16, "projection_dim": 8},
    ),
    "dino": lambda: module(
        "dino",
        both(vit_of_transformers()),
        projector=both(mlp()),
        dino_loss=losses.DINOv1Loss(),
    ),
    "dinov2": lambda: module(
        "dinov2",
        both(vit_of_transformers()),
        projector=both(mlp()),
        patch_projector=both(mlp()),
        dinov2_loss=losses.DINOv2Loss(),
    ),
}

# --- the classes ---


def of_two_views(self: Any, batch: Any, stage: str) -> Any:
    return call(self, *(view["image"] for view in batch["views"]))


def of_crops(self: Any, batch: Any, stage: str) -> Any:
    views = [view["image"] for view in batch["views"].values()]
    return call(self, views[:2], views[2:])


def of_global_crops(self: Any, batch: Any, stage: str) -> Any:
    return call(self, [view["image"] for view in batch["views"].values()][:2])


def call(self: Any, *views: Any) -> Any:
    """The package's own benchmarks put such a function over the class's forward."""
    output = type(self).forward(self, *views)
    return {"loss": output.loss, "embedding": output.embedding.detach()}


def method(name: str, through: Any, *given: Any, **options: Any) -> Any:
    model = getattr(methods, name)(*given, **options)
    model.forward = through.__get__(model)
    model.optim = copy.deepcopy(FAST)
    return model


def lejepa() -> Any:
    model = method("LeJEPA", of_crops, "test_vit", projector=mlp(), n_slices=8)
    model.backbone = vit(dynamic_img_size=True)
    return model


HEADS = {"projector_hidden_dim": 16, "projector_bottleneck_dim": 8}
PROTOTYPES = {"n_cls_prototypes": 8, "n_patch_prototypes": 8}
CLASSES: dict[str, Callable[[], Any]] = {
    "SimCLR": lambda: method("SimCLR", of_two_views, conv(), (16, 8)),
    "VICReg": lambda: method("VICReg", of_two_views, conv(), (16, 8)),
    "BarlowTwins": lambda: method("BarlowTwins", of_two_views, conv(), (16, 8)),
    "BYOL": lambda: method("BYOL", of_two_views, conv(), (16, 8), (16, 8)),
    "SimSiam": lambda: method("SimSiam", of_two_views, conv(), 16, 8),
    "MoCov2": lambda: method("MoCov2", of_two_views, conv(), (16, 8), 16),
    "MoCov3": lambda: method("MoCov3", of_two_views, conv(), (16, 16, 8), 8),
    "NNCLR": lambda: method("NNCLR", of_two_views, conv(), (16, 8), 8, 16),
    "TiCO": lambda: method("TiCO", of_two_views, conv(), (16, 8)),
    "WMSE": lambda: method("WMSE", of_two_views, conv(), (16, 4)),
    "PIRL": lambda: method("PIRL", of_two_views, conv(), 8, 16),
    "SwAV": lambda: method("SwAV", of_two_views, conv(), (16, 8), 6),
    "VICRegL": lambda: method("VICRegL", of_two_views, vit(), 16, image_size=SIDE),
    "MSN": lambda: method("MSN", of_two_views, vit(), 16, 8, 8, image_size=SIDE),
    "PMSN": lambda: method(
        "PMSN", of_two_views, encoder_name=vit(), n_prototypes=8, image_size=SIDE, **HEADS
    ),
    "CMAE": lambda: method(
        "CMAE", of_two_views, vit(), patch_size=8, projector_dim=8, image_size=SIDE
    ),
    "DINO": lambda: method("DINO", of_crops, vit(dynamic_img_size=True), 16, 8, 8),
    "DINOv2": lambda: method(
        "DINOv2", of_crops, vit(dynamic_img_size=True), 16, 8, **PROTOTYPES, image_size=SIDE
    ),
    "DINOv3": lambda: method(
        "DINOv3", of_crops, vit(dynamic_img_size=True), 2, image_size=SIDE, **HEADS, **PROTOTYPES
    ),
    "iBOT": lambda: method("iBOT", of_global_crops, vit(), 16, 8, **PROTOTYPES, image_size=SIDE),
    "MIMRefiner": lambda: method(
        "MIMRefiner", of_global_crops, vit(), image_size=SIDE, **HEADS, **PROTOTYPES
    ),
    "LeJEPA": lejepa,
}
CASES = {**FORWARDS, **CLASSES}
QUEUES = {"swav": "swav_queue", "nnclr": "nnclr_support_set"}
MULTI_CROP = {"dino", "dinov2", "DINO", "DINOv2", "DINOv3", "iBOT", "MIMRefiner", "LeJEPA"}


# --- data and training ---


class Views(Dataset[Any]):
    """The same views for each index."""

    def __init__(self, crops: bool, size: int = BATCH * STEPS) -> None:
        self.crops, self.size = crops, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        coarse = torch.rand(3, 4, 4, generator=generator)
        noisy = [coarse + 0.3 * torch.rand(3, 4, 4, generator=generator) for _ in range(3)]
        whole = [nn.functional.interpolate(x[None], SIDE, mode="bilinear")[0] for x in noisy]
        views = [{"image": x, "label": torch.tensor(index % 2)} for x in whole]
        if not self.crops:
            return {"views": views[:2]}
        views[2]["image"] = views[2]["image"][:, :16, :16]
        return {"views": dict(zip(["global_1", "global_2", "local_1"], views, strict=True))}


class Seeded(lightning.Callback):
    """Draw the same masks in each step, however it is come to, and keep the losses."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())


def fit(
    model: Any,
    name: str,
    *,
    ckpt_path: Path | None = None,
    callbacks: Any = (),
    validate: bool = False,
    **options: Any,
) -> Any:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    its = [Seeded(), spt.callbacks.TeacherStudentCallback(), *callbacks]
    its += [OnlineQueue(QUEUES[name], 16, 8)] if name in QUEUES else []
    trainer = lightning.Trainer(**{**quiet, **options}, callbacks=its)
    data = DataLoader(Views(name in MULTI_CROP), BATCH)
    images: Any = [view for index in range(BATCH) for view in Views(False)[index]["views"]]
    validation = DataLoader(images, BATCH) if validate else None
    trainer.fit(model, data, validation, ckpt_path=ckpt_path)
    return trainer


def made(name: str) -> Any:
    torch.manual_seed(0)
    return CASES[name]()


def encoders_of(model: Any) -> list[Any]:
    """The one that is trained, then its teacher, if there is one."""
    backbone = model.encoder if hasattr(model, "encoder") else model.backbone
    parts = [getattr(backbone, part, None) for part in ("student", "teacher")]
    return [part for part in parts if part is not None] or [backbone]


def disturb(model: Any) -> None:
    """Add noise to the equivariant channels of what the encoders return."""
    noise = torch.Generator().manual_seed(0)

    def add(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        added = torch.randn(output.shape, generator=noise)
        added[..., : WIDTH // 2] = 0
        return output + added

    for encoder in encoders_of(model):
        children = dict(encoder.named_children())
        # a ViT's pooling comes after its norm
        names = [name for name in ("norm", "layernorm", *reversed(children)) if name in children]
        children[names[0]].register_forward_hook(add)


def losses_of(model: Any, name: str) -> list[Tensor]:
    seeded = Seeded()
    fit(model, name, callbacks=[seeded])
    return seeded.losses


def resumed(make: Callable[[], Any], name: str, folder: Path) -> tuple[Any, Any]:
    """A model after two epochs, and one that was resumed after the first."""
    torch.manual_seed(7)
    whole = make()
    fit(whole, name, max_epochs=2)
    torch.manual_seed(7)
    first = make()
    fit(first, name).save_checkpoint(folder / "last.ckpt")
    torch.manual_seed(8)
    again = make()
    if hasattr(first, "dino_loss"):
        # the package keeps its centre out of checkpoints
        again.dino_loss = copy.deepcopy(first.dino_loss)
    fit(again, name, max_epochs=2, ckpt_path=folder / "last.ckpt")
    return whole, again


# --- every method ---


@pytest.mark.parametrize("name", CASES)
def test_encoder_and_decoder_are_trained(name: str) -> None:
    bare = made(name)
    before = weights_of(encoders_of(bare)[0])
    fit(bare, name)
    model = attach(made(name))
    decoder = decoder_of(model)
    trainer = fit(model, name)
    assert_trained(model, decoder)
    changed = [
        {
            key
            for key, p in encoders_of(one)[0].named_parameters()
            if not torch.equal(p, before[key])
        }
        for one in (bare, model)
    ]
    assert changed[0] <= changed[1]
    assert torch.isfinite(trainer.callback_metrics["recon_aux/loss"])


@pytest.mark.parametrize("name", CASES)
def test_the_methods_loss_sees_no_equivariant_channels(name: str) -> None:
    def losses_with_noise(model: Any) -> list[Tensor]:
        disturb(model)
        return losses_of(model, name)

    def attached() -> Any:
        return attach(made(name), weight=0)

    assert losses_of(made(name), name) != losses_with_noise(made(name))
    assert losses_of(attached(), name) == losses_with_noise(attached())


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_resumes_bit_identically(name: str, tmp_path: Path) -> None:
    whole, again = resumed(lambda: attach(CASES[name]()), name, tmp_path)
    assert_same(again.state_dict(), whole.state_dict())


# --- forward ---


def two_views() -> list[Tensor]:
    return [view["image"] for view in next(iter(DataLoader(Views(False), BATCH)))["views"]]


def test_forward_has_to_be_set_before_attaching() -> None:
    model = attach(methods.SimCLR(conv(), (16, 8)))
    model.forward = of_two_views.__get__(model)
    with pytest.raises(RuntimeError, match="before attaching, and what step_method= names"):
        fit(model, "SimCLR", max_epochs=2)


def test_a_class_is_trained_in_a_loop_of_ones_own() -> None:
    model = attach(methods.SimCLR(conv(), (16, 8)))
    before = decoder_of(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        output = model(*two_views())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert_trained(model, before)
    assert isinstance(output, methods.simclr.SimCLROutput)
    assert output["loss"] is output.loss


def test_a_teacher_may_be_the_student_itself() -> None:
    def both_in_one(part: nn.Module) -> nn.Module:
        return spt.TeacherStudentWrapper(part, base_ema_coefficient=0.0, final_ema_coefficient=0.0)

    model = module(
        "byol",
        both_in_one(conv()),
        projector=both_in_one(mlp()),
        predictor=nn.Linear(8, 8),
        byol_loss=losses.BYOLLoss(),
    )
    before = decoder_of(attach(model))
    fit(model, "byol")
    assert_trained(model, before)


def test_features_are_whole_in_evaluation() -> None:
    views = two_views()
    bare, model = made("DINOv3").eval(), attach(made("DINOv3")).eval()
    embeddings = [type(one).forward(one, images=views[0]).embedding for one in (bare, model)]
    assert torch.equal(*embeddings)
    batch = {"image": views[0]}
    bare, model = made("simclr").eval(), attach(made("simclr")).eval()
    assert torch.equal(*(one(batch, stage="predict")["embedding"] for one in (bare, model)))


ONE_VIEW = ["MAE", "CrossMAE", "SimMIM", "MaskFeat", "BEiT", "Data2Vec"]
ONE_VIEW += ["IJEPA", "SALT", "iGPT", "NEPA"]


@pytest.mark.parametrize("name", ONE_VIEW)
def test_methods_of_one_view_are_refused(name: str) -> None:
    model = getattr(methods, name).__new__(getattr(methods, name))
    nn.Module.__init__(model)
    with pytest.raises(TypeError, match=f"encodes two views, got {name}, which .* one view"):
        attach(model)


def test_a_forward_of_one_view_is_refused() -> None:
    model = module("supervised", conv(), classifier=mlp(), supervised_loss=nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="two views, got supervised, which classifies one view"):
        attach(model)


def test_a_partial_of_a_forward_of_one_view_is_refused() -> None:
    model = spt.Module(forward=partial(forward.supervised), backbone=conv(), classifier=mlp())
    with pytest.raises(TypeError, match="two views, got supervised, which classifies one view"):
        attach(model)


def test_a_forward_of_that_name_attaches_if_it_encodes_two_views() -> None:
    def supervised(self: Any, batch: Any, stage: str) -> dict[str, Any]:
        """Encode both views, as a supervised contrastive loss asks for."""
        return {"loss": self.criterion(*(self.neck(self.encoder(x)) for x in images_of(batch)))}

    model = of_forward(supervised, encoder=conv(), neck=mlp(), criterion=losses.NTXEntLoss())
    with pytest.raises(TypeError, match="If this one encodes two, pass backbone= and heads="):
        attach(model)
    before = decoder_of(attach(model, backbone="encoder", heads=["neck"]))
    fit(model, "simclr")
    assert_trained(model, before)


def images_of(batch: Any) -> list[Tensor]:
    return [view["image"] for view in batch["views"]]


def test_a_probe_of_ones_own_is_told_from_a_head() -> None:
    def probed(self: Any, batch: Any, stage: str) -> dict[str, Any]:
        features = [self.backbone(x) for x in images_of(batch)]
        read = self.linear_head(features[0].detach()).square().mean()
        return {"loss": self.criterion(*map(self.projector, features)) + read}

    def probing() -> Any:
        heads = {"projector": mlp(), "linear_head": nn.Linear(WIDTH, 2)}
        return of_forward(probed, backbone=conv(), criterion=losses.NTXEntLoss(), **heads)

    with pytest.warns(UserWarning, match=r"pass heads=\[\.\.\.\] without \['linear_head'\]"):
        fit(attach(probing()), "simclr")
    model = attach(probing(), heads=["projector"])
    fit(model, "simclr")
    whole = torch.rand(2, WIDTH)
    half = torch.cat([whole[:, : WIDTH // 2], torch.zeros(2, WIDTH // 2)], 1)
    assert not torch.equal(model.linear_head(whole), model.linear_head(half))


def test_another_method_of_an_encoder_that_runs_by_layers_is_refused() -> None:
    model = attach(made("DINOv2"), backbone_method="forward")
    with pytest.raises(RuntimeError, match=r"to call forward of .* Pass backbone_method="):
        fit(model, "DINOv2")


def test_every_method_is_attached_or_refused() -> None:
    assert {*CLASSES, *ONE_VIEW} == set(methods.__all__)


def test_where_the_package_is_missing_the_error_says_what_to_install() -> None:
    code = """
import sys
sys.modules["stable_pretraining"] = None
import recon_aux.integrations.stable_pretraining
"""
    result = run_python("-c", code)
    assert "ImportError: recon_aux.integrations.stable_pretraining needs" in result.stderr
    assert "pip install '.[stable-pretraining]'" in result.stderr


# --- optimizers ---


def group_of(optimizers: Any, parameter: Tensor) -> tuple[int, Any]:
    """Which optimizer, and which group of it."""
    (found,) = (
        (index, group)
        for index, optimizer in enumerate(optimizers)
        for group in optimizer.param_groups
        if any(p is parameter for p in group["params"])
    )
    return found


def test_one_optimizer_trains_both() -> None:
    model = made("simclr")
    model.optim["optimizer"] = {
        "type": "AdamW", "lr": 1e-3, "weight_decay": 0.1, "exclude_bias_norm": True
    }  # fmt: skip
    optimizers = fit(attach(model), "simclr").optimizers
    for ours in model.recon_aux.parameters():
        like = model.backbone[0].bias if ours.ndim < 2 else model.backbone[0].weight
        assert group_of(optimizers, ours)[1] is group_of(optimizers, like)[1]


@pytest.mark.parametrize("rest", ["projector", ".*"])
def test_the_decoder_joins_the_encoders_optimizer(rest: str) -> None:
    model = made("simclr")
    each = {"scheduler": "ConstantLR", "interval": "step"}
    model.optim = {
        "rest": {"modules": rest, "optimizer": {"type": "SGD", "lr": 0.1}, **each},
        "encoder": {"modules": "backbone", "optimizer": {"type": "AdamW", "lr": 1e-3}, **each},
    }
    if rest == ".*":
        model.optim = dict(reversed(model.optim.items()))
    attach(model)
    before = decoder_of(model)
    optimizers = fit(model, "simclr").optimizers
    assert_trained(model, before)
    (home, _), (other, _) = (
        group_of(optimizers, part[0].weight) for part in (model.backbone, model.projector)
    )
    assert home != other
    assert {group_of(optimizers, p)[0] for p in model.recon_aux.parameters()} == {home}


def test_an_expression_may_name_the_decoder() -> None:
    model = made("simclr")
    each = {"optimizer": {"type": "SGD", "lr": 0.1}, "scheduler": "ConstantLR"}
    model.optim = {
        "encoder": {"modules": "backbone|projector", **each},
        "decoder": {"modules": "recon_aux", **each},
    }
    optimizers = fit(attach(model), "simclr").optimizers
    assert {group_of(optimizers, p)[0] for p in model.recon_aux.parameters()} == {1}


# --- what goes with a trainer ---


def accuracy(name: str) -> dict[str, Any]:
    return {f"{name}_accuracy": MulticlassAccuracy(2)}


def probes(model: Any) -> list[Any]:
    return [
        spt.callbacks.OnlineProbe(
            model,
            name="probe",
            input="embedding",
            target="label",
            probe=nn.Linear(WIDTH, 2),
            loss=nn.CrossEntropyLoss(),
            metrics=accuracy("probe"),
        ),
        spt.callbacks.OnlineKNN(
            "knn", "embedding", "label", 16, accuracy("knn"), input_dim=WIDTH, k=2
        ),
        spt.callbacks.RankMe("rank", "embedding", 16, WIDTH),
    ]


@pytest.mark.parametrize("first", ["probes", "attach"])
def test_online_probes(first: str) -> None:
    model = made("byol")
    if first == "attach":
        attach(model)
    callbacks = probes(model)
    if first == "probes":
        attach(model)
    before, decoder = weights_of(encoders_of(model)[0]), decoder_of(model)
    trainer = fit(model, "byol", callbacks=callbacks, validate=True)
    assert_trained(model, decoder)
    assert not torch.equal(encoders_of(model)[0][0].weight, before["0.weight"])
    assert {"recon_aux/loss", "train/probe_loss", "rank"} <= {*trainer.callback_metrics}
    assert len(trainer.optimizers) == 2
    ours = {id(p) for p in model.recon_aux.parameters()}
    assert not ours & {id(p) for g in trainer.optimizers[1].param_groups for p in g["params"]}


def test_bf16() -> None:
    model = attach(made("simclr"))
    before = decoder_of(model)
    fit(model, "simclr", precision="bf16-mixed")
    assert_trained(model, before)


def test_what_transformers_checkpoints_hold_is_the_bare_encoder(tmp_path: Path) -> None:
    def of_tokens(self: Any, batch: Any, stage: str) -> Any:
        tokens = [self.backbone(view["image"]).last_hidden_state for view in batch["views"]]
        return {"loss": self.simclr_loss(*(self.projector(x[:, 0]) for x in tokens))}

    parts = {"backbone": vit_of_transformers(), "projector": mlp()}
    model = of_forward(of_tokens, simclr_loss=losses.NTXEntLoss(), **parts)
    attach(model)
    exports = spt.callbacks.HuggingFaceCheckpointCallback(str(tmp_path), raise_on_error=True)
    fit(model, "simclr", callbacks=[exports]).save_checkpoint(tmp_path / "last.ckpt")
    options: Any = {"add_pooling_layer": False, "use_mask_token": True}
    loaded = ViTModel.from_pretrained(tmp_path / "last" / "backbone", **options)
    assert_same(loaded.state_dict(), model.backbone.state_dict())


def manager(model: Any, folder: Path, **options: Any) -> Any:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "enable_progress_bar": False, "logger": False, "max_epochs": 2
    }  # fmt: skip
    trainer = lightning.Trainer(**{**quiet, **options}, default_root_dir=folder)
    data = spt.data.DataModule(train=DataLoader(Views(False), BATCH))
    return spt.Manager(trainer=trainer, module=model, data=data, seed=0)


def test_gradients_are_accumulated_and_clipped(tmp_path: Path) -> None:
    model = attach(made("simclr"))
    before = decoder_of(model)
    steps = []
    model.after_manual_backward = lambda: steps.append(model.trainer.global_step)
    manager(model, tmp_path, accumulate_grad_batches=2, gradient_clip_val=1e-3, max_epochs=2)()
    assert steps == [0, 0, 1, 1]
    moved = [(p - before[name]).square().sum() for name, p in model.recon_aux.named_parameters()]
    assert 0 < sum(moved) ** 0.5 < 2 * 0.05 * 1e-3


class Preempted(lightning.Callback):
    """The machine is taken away in the second epoch."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1:
            raise OSError("preempted")


def test_a_manager_resumes_after_a_preemption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stable_pretraining.manager._install_sigterm_preempt_handler", int)

    def run(start: int, *callbacks: Any) -> Any:
        torch.manual_seed(start)
        model = attach(made("byol"))
        manager(model, tmp_path, callbacks=[Seeded(), *callbacks])()
        return model

    whole = run(0)
    monkeypatch.setenv("SLURM_JOB_ID", "29")
    with pytest.raises(OSError, match="preempted"):
        run(0, Preempted())
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert_same(run(1).state_dict(), whole.state_dict())


def test_the_pages_module_in_yaml(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "stable_pretraining.md").read_text()
    config: Any = OmegaConf.create(page.split("```yaml\n")[1].split("```")[0])
    model = recursive_instantiate(config)["module"]
    before = decoder_of(model)
    manager(model, tmp_path, max_epochs=1, enable_checkpointing=False)()
    assert_trained(model, before)
    assert model.recon_aux.options["weight"] == 1


def test_a_manager_takes_a_node(tmp_path: Path) -> None:
    node = {"_target_": "recon_aux.integrations.stable_pretraining.attach", "decoder_lr": 0.01}
    made_by = {"_target_": f"{__name__}.made", "name": "simclr"}
    run = manager(OmegaConf.create({**node, "model": made_by}), tmp_path, max_epochs=1)
    run()
    (optimizer,) = run._trainer.optimizers
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.05, 0.01]


@pytest.mark.slow
def test_the_example_compares_bare_and_attached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPT_CACHE_DIR", str(tmp_path))
    printed = run_example("spt_simclr.py", "--epochs", "1")
    assert "bare whole" in printed
    assert "attached equivariant" in printed


# --- off again, and copies ---


def test_what_was_attached_comes_off_again() -> None:
    model = made("DINOv2")
    before = [vars(module).keys() for module in model.modules()]
    recon_aux.detach(attach(model))
    assert [vars(module).keys() for module in model.modules()] == before


def test_a_copy_is_trained() -> None:
    model = attach(made("simclr"))
    other = copy.deepcopy(model)
    before = decoder_of(model)
    fit(other, "simclr")
    assert_trained(other, before)
    assert_same(decoder_of(model), before)


# --- many processes ---


def test_with_fsdp2_the_decoder_is_one_unit_and_trains(tmp_path: Path) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = attach(FORWARDS["simclr"]())
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        default_parallelize_fn(model, mesh)
        views = [torch.rand(BATCH, 3, SIDE, SIDE) for _ in range(2)]
        batch = {"views": [{"image": view} for view in views]}
        model.forward(batch, "fit")["loss"].backward()
        sharded = {n for n, m in model.recon_aux.named_modules() if isinstance(m, FSDPModule)}
        assert sharded == {""}
        assert all(p.grad is not None for p in model.recon_aux.parameters())
    finally:
        distributed.destroy_process_group()
