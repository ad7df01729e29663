"""Models and loops as people write them: nothing in them may be silently wrong."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import BYOLProjectionHead, SimCLRProjectionHead
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18, swin_t
from torchvision.models.feature_extraction import create_feature_extractor

import recon_aux
from helpers.own_code import (
    BYOL,
    WIDTH,
    Noise,
    Trained,
    encoder,
    frozen,
    sees_noise,
    trains,
    views,
)
from helpers.watching import rebuilt_from
from helpers.weights import assert_both_trained, weights_of
from recon_aux.integrations import lightly

# --- momentum encoders ---


def test_a_momentum_encoder_is_known_whatever_its_class_is() -> None:
    class Fx(BYOL):
        def take(self, output: Any) -> Tensor:
            return output["f"]

    def extractor() -> Any:
        bare: Any = resnet18()
        bare.avgpool = nn.Sequential(bare.avgpool, Noise())
        return create_feature_extractor(
            bare, {"flatten": "f"}, tracer_kwargs={"leaf_modules": [Noise]}
        )

    model = Fx(extractor(), extractor(), 512)
    assert type(model.online) is not type(model.target)
    recon_aux.attach(model, backbone="online", heads=["projector"], features=lambda out: out["f"])
    assert not sees_noise(model, model.target.get_submodule("avgpool.1"), views())


def test_a_momentum_encoder_that_is_built_otherwise_can_be_named() -> None:
    def attached(**options: Any) -> BYOL:
        model = BYOL(encoder(), nn.Sequential(encoder()))
        heads = ["projector", "target_projector"]
        return recon_aux.attach(model, backbone="online", heads=heads, **options)

    model = attached(momentum_encoders=["target"])
    assert not sees_noise(model, model.target.get_submodule("0.3"), views())
    with pytest.raises(ValueError, match="momentum_encoders= to name a submodule"):
        attached(momentum_encoders=["teacher"])

    # MoCo's other view is what it encoded
    class MoCo(BYOL):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                key = self.target_projector(self.target(batch[1]))
            return self.criterion(self.projector(self.online(batch[0])), key)

    heads = ["projector", "target_projector"]
    model = MoCo(encoder(), nn.Sequential(encoder()))
    recon_aux.attach(model, backbone="online", heads=heads, momentum_encoders=[model.target])
    seen = rebuilt_from(model)
    batch = views()
    model.training_step(batch, 0)
    assert all(torch.equal(a, b) for a, b in zip(seen[0][0], batch, strict=True))


OUTSIDE = r"saw features of a \w+ that isn't in the model.*momentum_encoders=\[it\]"


class Taught(Trained):
    """Learns from a teacher that isn't in the model."""

    def __init__(self, build: Callable[[], nn.Module] = encoder, width: int = WIDTH) -> None:
        super().__init__()
        self.encoder = build()
        self.head = BYOLProjectionHead(width, 64, 16)
        self.outside = [frozen(self.encoder), frozen(self.head)]
        self.criterion = NegativeCosineSimilarity()
        for module in (self, *self.outside):
            module.eval()

    def teach(self, x: Tensor) -> Tensor:
        return self.outside[1](self.outside[0](x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        p = [self.head(self.encoder(x)) for x in batch]
        with torch.no_grad():
            z = [self.teach(x) for x in batch]
        return self.criterion(p[0], z[1]) + self.criterion(p[1], z[0])


def test_a_teacher_outside_the_model_is_warned_of_and_the_advice_helps() -> None:
    model = recon_aux.attach(Taught(), backbone="encoder", heads=["head"])
    with pytest.warns(UserWarning, match=OUTSIDE):
        model.training_step(views(), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.training_step(views(), 0)
    assert sees_noise(model, model.outside[0][3], views())

    model = Taught()
    teacher, its_head = model.outside
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heads = ["head", its_head]
        recon_aux.attach(model, backbone="encoder", heads=heads, momentum_encoders=[teacher])
        trains(model, views(), views())
    assert not sees_noise(model, model.outside[0][3], views())


def test_a_teacher_outside_is_seen_in_a_loop_and_by_any_method() -> None:
    def vit() -> nn.Module:
        name: Any = "vit_tiny_patch16_224"
        size: Any = {"img_size": 32, "patch_size": 8}
        return timm.create_model(name, **size, embed_dim=WIDTH, num_heads=2, depth=2, num_classes=0)

    class TaughtByTokens(Taught):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            student: Any = self.encoder
            teacher: Any = self.outside[0]
            p = [self.head(student.forward_features(x)[:, 0]) for x in batch]
            with torch.no_grad():
                z = [self.outside[1](teacher.forward_features(x)[:, 0]) for x in batch]
            return self.criterion(p[0], z[1]) + self.criterion(p[1], z[0])

    tokens = TaughtByTokens(vit)
    given: Any = {"backbone": "encoder", "heads": ["head"]}
    recon_aux.attach(tokens, **given, backbone_method="forward_features")
    with pytest.warns(UserWarning, match=OUTSIDE):
        tokens.training_step(views(), 0)

    net = nn.ModuleDict({"encoder": encoder(), "head": BYOLProjectionHead(WIDTH, 64, 16)})
    teacher = frozen(net)
    recon_aux.attach(net, **given)
    x0, x1 = views()
    p = net["head"](net["encoder"](x0)), net["head"](net["encoder"](x1))
    with torch.no_grad():
        z = teacher["head"](teacher["encoder"](x0))
    with pytest.warns(UserWarning, match=OUTSIDE):
        recon_aux.add_loss(net, NegativeCosineSimilarity()(p[1], z) + (p[0] - p[1]).var())


def test_copies_that_nothing_calls_are_no_reason_to_warn() -> None:
    other = encoder()
    model = recon_aux.attach(BYOL(encoder(), encoder()), backbone="online", heads=["projector"])
    other(views()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.training_step(views(), 0)
    assert not other._forward_pre_hooks


def test_a_target_that_is_the_encoders_own_feature_is_warned_of() -> None:
    class Detached(Taught):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            target = self.encoder(batch[1])[:, :16].detach()
            return self.criterion(self.head(self.encoder(batch[0])), target)

    class WithoutGradient(Taught):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                target = self.encoder(batch[1])[:, :16]
            return self.criterion(self.head(self.encoder(batch[0])), target)

    for kind in (Detached, WithoutGradient):
        model = recon_aux.attach(kind(), backbone="encoder", heads=["head"])
        with pytest.warns(UserWarning, match=r"saw encoder called and none of \['head'\] without"):
            model.training_step(views(), 0)


# --- which images are a pair ---

UNLIKE = r"no more alike than any two .*Encode the views first.*interleaved=True"


class Augmenting(Trained):
    """Makes the views within the step, in turns: image 0, image 0, image 1, image 1, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()
        self.head = SimCLRProjectionHead(WIDTH, 32, 16)
        self.classifier = nn.Linear(WIDTH, 10)
        self.criterion = NTXentLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = self.head(self.encoder(noised(batch.repeat_interleave(2, 0))))
        return self.criterion(z[0::2], z[1::2])


class Labelled(Augmenting):
    """Encodes a labelled batch of the same size before the views, or after them."""

    first = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (labelled, labels), x = batch
        order = [labelled, noised(x), noised(x)] if self.first else [noised(x), noised(x), labelled]
        y = [self.encoder(images) for images in order]
        y, z = (y[0], y[1:]) if self.first else (y[2], y[:2])
        loss = nn.functional.cross_entropy(self.classifier(y), labels)
        return loss + self.criterion(*map(self.head, z))


def noised(images: Tensor) -> Tensor:
    return images + 0.05 * torch.rand_like(images)


def photographs(count: int) -> Tensor:
    """Images that differ from each other in more than noise."""
    coarse = torch.rand(count, 3, 4, 4)
    return nn.functional.interpolate(coarse, size=32, mode="bilinear")


def warnings_in(model: Any, batches: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for batch in batches:
            model.training_step(batch, 0)
    return [str(warning.message) for warning in seen if "alike" in str(warning.message)]


@pytest.mark.parametrize("size", [8, 64])
def test_two_images_are_not_taken_for_two_views(size: int) -> None:
    heads = ["head", "classifier"]
    batches = [photographs(size) for _ in range(512 // size)]
    labelled = [((photographs(size), torch.arange(size) % 10), x) for x in batches]
    model = recon_aux.attach(Augmenting(), backbone="encoder", heads=heads)
    (message,) = warnings_in(model, batches)
    assert re.search(UNLIKE, message)
    model = recon_aux.attach(Labelled(), backbone="encoder", heads=heads)
    (message,) = warnings_in(model, labelled)
    assert re.search(UNLIKE, message)

    # the remedies that it names
    model = recon_aux.attach(Augmenting(), backbone="encoder", heads=heads, interleaved=True)
    assert warnings_in(model, batches) == []
    model = recon_aux.attach(Labelled(), backbone="encoder", heads=heads)
    model.first = False
    assert warnings_in(model, labelled) == []


def test_blank_images_are_no_reason_to_warn() -> None:
    model = recon_aux.attach(Augmenting(), backbone="encoder", heads=["head", "classifier"])
    batches = [torch.zeros(64, 3, 32, 32)] * 8
    assert warnings_in(model, batches) == []


def test_a_labelled_batch_of_another_size_is_no_view() -> None:
    model = recon_aux.attach(Labelled(), backbone="encoder", heads=["head", "classifier"])
    seen = rebuilt_from(model)
    x = photographs(8)
    for labelled in (photographs(4), nn.functional.interpolate(photographs(8), size=48)):
        model.training_step(((labelled, torch.arange(len(labelled))), x), 0)
        (x0, x1), _ = seen.pop()
        assert all((view - x).abs().max() < 0.06 for view in (x0, x1))


# --- other encoders ---


class WithTable(Trained):
    """Each image has a row of a table, with an encoder of the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = encoder()
        self.projection_head = SimCLRProjectionHead(WIDTH, 32, 16)
        self.table = nn.Sequential(nn.Linear(5, WIDTH), nn.ReLU())
        self.projection_head_table = SimCLRProjectionHead(WIDTH, 32, 16)
        self.criterion = NTXentLoss()
        self.received: list[Tensor] = []
        first: Any = self.projection_head_table.layers[0]
        first.register_forward_pre_hook(lambda module, args: self.received.append(args[0]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1), rows = batch
        z0, z1 = (self.projection_head(self.backbone(x)) for x in (x0, x1))
        z = self.projection_head_table(self.table(rows))
        return self.criterion(z0, z1) + self.criterion(z0, z)


def test_a_head_that_gets_another_encoders_feature_is_not_masked() -> None:
    model = lightly.attach(WithTable())
    batch = (views(), torch.rand(4, 5))
    for _ in range(2):
        model.training_step(batch, 0)
        assert torch.equal(model.received.pop(), model.table(batch[1]))
    # nor outside of a step
    model.projection_head_table(model.table(batch[1]))
    assert torch.equal(model.received.pop(), model.table(batch[1]))
    assert not sees_noise(model, model.backbone[3], batch)


def test_nor_is_that_head_s_momentum_head() -> None:
    class WithMomentum(WithTable):
        def __init__(self) -> None:
            super().__init__()
            self.backbone_momentum = frozen(self.backbone)
            self.projection_head_momentum = frozen(self.projection_head)
            self.projection_head_table_momentum = frozen(self.projection_head_table)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (x0, x1), rows = batch
            z0, z = self.projection_head(self.backbone(x0)), self.table(rows)
            with torch.no_grad():
                key = self.projection_head_momentum(self.backbone_momentum(x1))
                target = self.projection_head_table_momentum(z.detach())
            return self.criterion(z0, key) + self.criterion(self.projection_head_table(z), target)

    model, batch = lightly.attach(WithMomentum()), (views(), torch.rand(4, 5))
    model.training_step(batch, 0)
    del model.received[:]
    model.training_step(batch, 1)
    assert len(model.received) == 2
    assert all(torch.equal(x, model.table(batch[1])) for x in model.received)
    assert not sees_noise(model, model.backbone_momentum.get_submodule("3"), batch)


class Ordered(WithTable):
    """Calls the table's head before the images' encoder, or after it."""

    first, how = True, "trained"

    def z(self, rows: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.how != "without gradient"):
            y = torch.cat([rows] * 7, 1)[:, :WIDTH] if self.how == "raw" else self.table(rows)
            return self.projection_head_table(y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1), rows = batch
        z = self.z(rows) if self.first else None
        z0, z1 = (self.projection_head(self.backbone(x)) for x in (x0, x1))
        z = self.z(rows) if z is None else z
        return self.criterion(z0, z1) + self.criterion(z0, z)


def table_s_last_channels(model: Any, batch: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.training_step(batch, 0)
    return model.received.pop()[:, 16:]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("how", ["trained", "frozen", "without gradient", "raw"])
def test_a_table_s_head_is_left_alone_or_warned_of_and_the_advice_helps(
    how: str, first: bool
) -> None:
    def model() -> Ordered:
        made = Ordered()
        made.how, made.first = how, first
        made.table.requires_grad_(how == "trained")
        made.projection_head_table.requires_grad_(how != "without gradient")
        return made

    attached = lightly.attach(model())
    batch = (views(), torch.rand(4, 5) + 0.1)
    if how != "trained":
        # from where it comes can't be seen
        with pytest.warns(UserWarning, match=r"without \['projection_head_table'\], of these"):
            attached.training_step(batch, 0)
        attached = lightly.attach(model(), heads=["projection_head"])
    for _ in range(3):
        assert (table_s_last_channels(attached, batch) > 0).float().mean() > 0.3
    assert not sees_noise(attached, attached.backbone[3], batch)


def test_a_target_s_head_is_masked_whatever_was_done_to_the_feature() -> None:
    class Joined(Trained):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = encoder(), nn.Linear(WIDTH, 8)
            self.head_average = frozen(self.head)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            y = [self.backbone(x) for x in batch]
            target = self.head_average(torch.cat(y[::-1]).detach())
            return (self.head(torch.cat(y)) - target).square().mean()

    model = Joined()
    heads = ["head", "head_average"]
    recon_aux.attach(model, backbone="backbone", heads=heads)
    with pytest.warns(UserWarning, match=r"saw \['head_average'\] receive something without"):
        model.training_step(views(), 0)
    assert not sees_noise(model, model.backbone[3], views())


def test_what_a_head_takes_beside_a_feature_stays_as_it_is() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2 * WIDTH, 8)
            self.received: list[Tensor] = []

        def forward(self, y: Tensor, other: Tensor) -> Tensor:
            self.received.append(other)
            return self.layer(torch.cat([y, other], 1))

    class Noisy(Trained):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = encoder(), Beside()
            self.code = nn.Parameter(torch.ones(WIDTH))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            y0, y1 = (self.backbone(x) for x in batch)
            z0, z1 = self.head(y0, torch.ones_like(y0)), self.head(y1, self.code.expand_as(y1))
            return (z0 - z1).square().mean()

    model = recon_aux.attach(Noisy(), backbone="backbone", heads=["head"])
    for _ in range(3):
        model.training_step(views(), 0)
    with torch.no_grad():
        model.eval().head(torch.rand(4, WIDTH), torch.ones(4, WIDTH))
    assert len(model.head.received) == 7
    assert all((other == 1).all() for other in model.head.received)


def test_a_head_that_two_encoders_share_is_masked_for_the_images_alone() -> None:
    class Shared(WithTable):
        def __init__(self) -> None:
            super().__init__()
            self.projection_head = self.projection_head_table

    model = lightly.attach(Shared())
    batch = (views(), torch.rand(4, 5))
    for step in range(2):
        with warnings.catch_warnings(record=True) as caught:
            model.training_step(batch, 0)
        messages = [str(warning.message) for warning in caught]
        assert any("take other features, too" in text for text in messages) == (step == 0)
        *images, table = model.received
        assert torch.equal(table, model.table(batch[1]))
        assert all(not x[:, 16:].any() and x[:, :16].any() for x in images)
        model.received.clear()


class Tokens(nn.Module):
    """Returns a feature of the image, and those of its patches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.noise = nn.Conv2d(3, WIDTH, 8, 8), Noise()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.noise(self.stem(x))
        return y.mean((2, 3)), y.flatten(2).mT


class OfTwoTensors(Trained):
    """Compares images and patches with a teacher's, as iBOT does."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.head = Tokens(), nn.Linear(WIDTH, 8)
        self.patch_head = nn.Sequential(nn.Linear(WIDTH, 8))
        self.teacher = frozen(self.student)
        self.teacher_head, self.teacher_patch_head = frozen(self.head), frozen(self.patch_head)
        self.received: list[Tensor] = []
        for head in (self.patch_head, self.teacher_patch_head):
            head[0].register_forward_pre_hook(lambda _, args: self.received.append(args[0]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = []
        for x, other in (batch, reversed(batch)):
            with torch.no_grad():
                cls, patches = self.teacher(other)
                of_cls, of_patches = self.teacher_head(cls), self.teacher_patch_head(patches)
            cls, patches = self.student(x)
            losses.append((self.head(cls) - of_cls).square().mean())
            losses.append((self.patch_head(patches) - of_patches).square().mean())
        return torch.stack(losses).mean()


def test_heads_of_all_that_an_encoder_returns_are_masked_in_student_and_teacher() -> None:
    model = OfTwoTensors()
    heads = ["head", "patch_head"]
    recon_aux.attach(model, backbone="student", heads=heads, features=lambda output: output[0])
    for _ in range(3):
        model.training_step(views(), 0)
    assert len(model.received) == 12
    half = WIDTH // 2
    assert all(x[..., :half].any() and not x[..., half:].any() for x in model.received)


def test_an_average_of_encoder_and_head_is_a_momentum_encoder_with_a_head() -> None:
    class Averaged(Trained):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = encoder(), BYOLProjectionHead(WIDTH, 64, 16)
            self.average = AveragedModel(nn.Sequential(self.encoder, self.head))
            self.criterion = NegativeCosineSimilarity()
            self.eval()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            p = [self.head(self.encoder(x)) for x in batch]
            with torch.no_grad():
                z = [self.average(x) for x in batch]
            return self.criterion(p[0], z[1]) + self.criterion(p[1], z[0])

    model = recon_aux.attach(Averaged(), backbone="encoder", heads=["head"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.training_step(views(), 0)
    assert not sees_noise(model, model.average.get_submodule("module.0.3"), views())


def test_each_step_looks_which_of_its_calls_the_loss_depends_on() -> None:
    class Looking(Trained):
        """Looks at other images first, in the third step."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = encoder(), nn.Linear(WIDTH, 8)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            z = [self.head(self.backbone(x)) for x in batch][int(batch_idx == 2) :]
            return (z[0] - z[1]).square().mean() + z[-1].square().mean()

    model = recon_aux.attach(Looking(), backbone="backbone", heads=["head"], weight=1.0)
    seen = rebuilt_from(model)
    for step in range(4):
        batch = torch.cat([torch.rand(1, 4, 3, 32, 32), views()])
        batch = batch if step == 2 else batch.flip(0)
        x0, x1 = batch[int(step == 2) :][:2]
        model.training_step(list(batch), step)
        # what ran early is dropped
        assert all(torch.equal(a, b) for a, b in zip(seen[-1][0], (x0, x1), strict=True))


def test_a_batch_as_large_as_the_feature_is_no_reason_to_mask_images() -> None:
    class Stacked(Trained):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = encoder(), nn.Linear(WIDTH, 8)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            z0, z1 = self.head(torch.stack([self.backbone(x) for x in batch]))
            return (z0 - z1).square().mean()

    model = recon_aux.attach(Stacked(), backbone="backbone", heads=["head"])
    model.training_step(views(), 0)
    batch = [x.repeat(WIDTH // 4, 1, 1, 1) for x in views()]
    assert len(batch[0]) == WIDTH
    assert not sees_noise(model, model.backbone[3], batch)


def test_a_head_that_takes_two_features_sees_neither_s_equivariant_channels() -> None:
    class Align(nn.Module):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return (student - teacher.detach()).square().mean()

    class Aligned(BYOL):
        def __init__(self) -> None:
            super().__init__(encoder(), encoder())
            self.align = Align()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            y0, y1 = self.online(batch[0]), self.target(batch[1])
            z = self.criterion(self.projector(y0), self.target_projector(y1))
            return z + self.align(y0, teacher=y1) + self.projector(self.online(batch[1])).var()

    model = Aligned()
    heads = ["projector", "target_projector", "align"]
    recon_aux.attach(model, backbone="online", heads=heads)
    for noise in (model.online.get_submodule("3"), model.target.get_submodule("3")):
        assert not sees_noise(model, noise, views())
    model.recon_aux.weight = 1.0
    trains(model, views(), views())


class Joins(nn.Module):
    """A head of two features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2 * WIDTH, 8)

    def forward(self, y0: Tensor, y1: Tensor) -> Tensor:
        return self.layer(torch.cat([y0, y1], 1))


class OfTwoViews(nn.Module):
    """Its head takes the features of both views at once."""

    recon_aux: Any

    def __init__(self, save: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head, self.save = encoder(), Joins(), save

    def forward(self, batch: Any) -> Tensor:
        y0, y1 = (self.encoder(x) for x in batch)
        z = checkpoint(self.head, y0, y1, use_reentrant=False) if self.save else self.head(y0, y1)
        return z.square().mean()


class StepOfTwoViews(OfTwoViews, Trained):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch)


def gradient_of_unseen(model: Any, compiled: bool) -> Tensor:
    """The gradient of a two-feature head's weights for equivariant channels, in the third step."""
    recon_aux.attach(model, backbone="encoder", heads=["head"])
    if compiled:
        model.head.compile(backend="aot_eager")
    for _ in range(3):
        model.zero_grad()
        if isinstance(model, StepOfTwoViews):
            loss = model.training_step(views(), 0)
        else:
            loss = recon_aux.add_loss(model, model(views()))
        loss.backward()
    return model.head.layer.weight.grad.unflatten(1, (2, 2, -1))[:, :, 1]


@pytest.mark.parametrize("make", [OfTwoViews, StepOfTwoViews])
@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_what_is_masked_does_not_depend_on_how_a_head_runs(make: Any, how: str) -> None:
    model = make(save=how == "checkpointed")
    assert not gradient_of_unseen(model, compiled=how == "compiled").any()
    with torch.no_grad():
        y = torch.rand(4, WIDTH)
        z = model.head(y, y)
        y[:, WIDTH // 2 :] = 0
        assert torch.equal(z, model.head(y, y))


def test_a_head_of_other_features_is_masked_where_it_takes_the_encoder_s() -> None:
    class Late(Trained):
        """The table's head also takes the encoder's detached feature, or that alone later."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.table = encoder(), nn.Linear(5, WIDTH)
            self.head, self.shared = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
            self.turn = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            y0, y1 = (self.backbone(x) for x in batch)
            loss = (self.head(y0) - self.head(y1)).square().mean()
            if self.turn < 2:
                z = self.shared(self.table(torch.ones(4, 5)))
                return loss + (z - self.shared(y0.detach()) * self.turn).square().mean()
            return loss + self.shared(y1).square().mean()

    model = recon_aux.attach(Late(), backbone="backbone", heads=["head", "shared"])
    for model.turn in (0, 1, 2):
        assert not sees_noise(model, model.backbone[3], views())
    # nor outside of a step
    y = torch.rand(4, WIDTH)
    same = torch.cat([y[:, : WIDTH // 2], torch.rand(4, WIDTH // 2)], 1)
    assert torch.equal(model.shared(y), model.shared(same))


def test_a_frozen_head_of_both_is_no_momentum_head() -> None:
    class WithPrototypes(BYOL):
        def __init__(self) -> None:
            super().__init__(encoder(), encoder())
            self.prototypes = frozen(nn.Linear(WIDTH, 6))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                target = self.prototypes(self.target(batch[1]))
            z = (self.prototypes(self.online(batch[0])) - target).square().mean()
            return z + super().training_step(batch, batch_idx)

    model = WithPrototypes()
    recon_aux.attach(model, backbone="online", heads=["projector", "prototypes"])
    assert not sees_noise(model, model.target.get_submodule("3"), list(views()))


class Both(nn.Module):
    """Returns two tensors, of which a feature may be joined."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = encoder(WIDTH // 2), encoder(WIDTH // 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        left = self.left(x)
        torch._dynamo.graph_break()
        return {"left": left, "right": self.right(x)}


def joined(output: dict[str, Tensor]) -> Tensor:
    return torch.cat([output["left"], output["right"]], 1)


def test_of_a_feature_that_is_joined_of_several_tensors_all_are_checked() -> None:
    class Joined(Trained):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Both()
            self.head, self.other = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            y = [joined(self.encoder(x)) for x in batch]
            z = [self.head(x) + self.other(x) for x in y]
            return (z[0] - z[1]).square().mean()

    for heads in (["head"], ["head", "other"]):
        model = recon_aux.attach(Joined(), backbone="encoder", heads=heads, features=joined)
        if len(heads) == 1:
            with pytest.raises(RuntimeError, match="equivariant channels reach it past"):
                model.training_step(views(), 0)
        else:
            trains(model, views(), views())


def test_a_compiled_encoder_may_return_several_tensors() -> None:
    class InALoop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = Both(), nn.Linear(WIDTH // 2, 8)

    model: Any = InALoop()
    recon_aux.attach(
        model, backbone="encoder", heads=["head"], features=lambda output: 1 * output["right"]
    )
    model.encoder.compile(backend="aot_eager")
    for _ in range(2):
        z = [model.head(model.encoder(x)["right"]) for x in views()]
        recon_aux.add_loss(model, (z[0] - z[1]).square().mean()).backward()
    assert model.recon_aux.decoder.queries.grad.any()


def test_an_average_of_ones_own_may_keep_its_model_anywhere() -> None:
    class ModelEma(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.ema = frozen(model)

    model = Taught()
    model.ema = ModelEma(model.head)
    recon_aux.attach(model, backbone="encoder", heads=["head"])


# --- where the channels are ---


class SimCLR(Trained):
    """Pools what the encoder gives as ``pool`` does."""

    def __init__(self, encoder: nn.Module, width: int, pool: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.encoder, self.pool = encoder, pool
        self.head = SimCLRProjectionHead(width, 32, 16)
        self.criterion = NTXentLoss()

    def encode(self, x: Tensor) -> Any:
        return self.encoder(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(*(self.head(self.pool(self.encode(x))) for x in batch))


class Swin(nn.Module):
    """torchvision's, without what comes after the map."""

    def __init__(self, channels_first: bool = False) -> None:
        super().__init__()
        self.features = swin_t().features[:3]
        self.channels_first = channels_first

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.features(x)
        return y.permute(0, 3, 1, 2) if self.channels_first else y


@pytest.mark.parametrize("features", [None, lambda out: out, lambda out: out.permute(0, 3, 1, 2)])
def test_channels_are_found_where_they_are(features: Any) -> None:
    model = SimCLR(Swin(), 192, lambda y: y.mean((1, 2)))
    recon_aux.attach(model, backbone="encoder", heads=["head"], features=features)
    assert model.recon_aux.splitter.feature_dim == 192
    seen = rebuilt_from(model)
    trains(model, views(), views())
    assert {tuple(y.shape) for y in seen[0][1]} == {(4, 192, 4, 4)}
    first = model.head.layers[0].weight.grad
    assert first[:, :96].any()
    assert not first[:, 96:].any()


def test_a_map_with_channels_first_stays_as_it_is() -> None:
    model = SimCLR(Swin(channels_first=True), 192, lambda y: y.mean((2, 3)))
    recon_aux.attach(model, backbone="encoder", heads=["head"])
    seen = rebuilt_from(model)
    trains(model, views(), views())
    assert {tuple(y.shape) for y in seen[0][1]} == {(4, 192, 4, 4)}


def test_timms_swin_by_forward_features() -> None:
    class Features(SimCLR):
        def encode(self, x: Tensor) -> Any:
            return self.encoder.forward_features(x)  # type: ignore[operator]

    sizes: Any = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, num_classes=0, **sizes)
    model = Features(swin, 48, lambda y: y.mean((1, 2)))
    given: Any = {"backbone": "encoder", "heads": ["head"]}
    recon_aux.attach(model, **given, backbone_method="forward_features")
    assert model.recon_aux.splitter.feature_dim == 48
    trains(model, views(), views())


class OfFlattenedMap(nn.Module):
    """Positions as tokens, with the channels before them: ``(B, D, N)``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, WIDTH, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y.flatten(2)


def test_tokens_with_channels_first_are_known_by_another_size() -> None:
    model = SimCLR(OfFlattenedMap(), WIDTH, lambda y: y.mean(2))
    recon_aux.attach(model, backbone="encoder", heads=["head"])
    seen = rebuilt_from(model)
    trains(model, views(), views())
    assert {tuple(y.shape) for y in seen[0][1]} == {(4, 64, WIDTH)}


def test_a_map_that_does_not_show_its_channels_is_asked_for_and_the_advice_helps() -> None:
    class Cube(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(8))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y.permute(0, 2, 3, 1)

    def model() -> SimCLR:
        return SimCLR(Cube(), 8, lambda y: y.mean((1, 2)))

    given: Any = {"backbone": "encoder", "heads": ["head"]}
    with pytest.raises(ValueError, match="shows where its channels are") as refusal:
        recon_aux.attach(model(), **given)
    assert "last, pass features=lambda output: output.movedim(-1, 1)." in str(refusal.value)
    trained = model()
    recon_aux.attach(trained, **given, features=lambda output: output.movedim(-1, 1))
    trains(trained, views(), views())


# --- names and weights that are shared ---


def test_every_name_that_pytorch_accepts_is_accepted() -> None:
    class Named(Augmenting):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["hidden"] = self.head
            self.box = torch.compile(nn.Sequential(self.encoder))

        @property
        def trunk(self) -> nn.Module:
            return self.encoder

    for backbone, head in (("trunk", "hidden"), ("box.0", "head"), ("encoder", "hidden")):
        model = Named()
        assert model.get_submodule(backbone) is model.encoder
        recon_aux.attach(model, backbone=backbone, heads=[head], interleaved=True)
        trains(model, photographs(4), photographs(4))


def test_heads_may_be_named_by_what_holds_them() -> None:
    class Held(BYOL):
        def __init__(self) -> None:
            super().__init__(encoder(), encoder())
            self.heads: Any = nn.ModuleDict({"a": self.projector, "b": nn.Linear(WIDTH, 4)})
            del self.projector

        @property
        def projector(self) -> Any:
            return self.get_submodule("heads.a")

    model = recon_aux.attach(Held(), backbone="online", heads=["heads"])
    trains(model, views(), views())
    assert not sees_noise(model, model.target.get_submodule("3"), views())


@pytest.mark.parametrize("wholly", [True, False])
def test_two_encoders_of_the_same_weights_are_one(wholly: bool) -> None:
    class Tied(Trained):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = encoder(), encoder()
            self.right[0].weight = self.left[0].weight
            if wholly:
                self.right[0].bias = self.left[0].bias
            self.head = SimCLRProjectionHead(WIDTH, 32, 16)
            self.criterion = NTXentLoss()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            z = self.head(self.left(batch[0])), self.head(self.right(batch[1]))
            return self.criterion(*z)

    model = recon_aux.attach(Tied(), backbone="left", heads=["head"])
    seen = rebuilt_from(model)
    batch = views()
    if wholly:
        trains(model, batch, batch)
        assert all(torch.equal(a, b) for a, b in zip(seen[0][0], batch, strict=True))
    else:
        with pytest.raises(RuntimeError, match=r"train one encoder, but it depends on .*right"):
            model.training_step(batch, 0)


# --- calls of other kinds ---


class Wavelengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = encoder()

    def forward(self, x: Tensor, wavelengths: Tensor) -> Tensor:
        y: Tensor = self.layers(x * wavelengths[:, None, None])
        return y


class OfADict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = encoder()

    def forward(self, batch: dict[str, Tensor], scale: float = 1.0) -> Any:
        return {"hidden": None if scale == 1.0 else (self.layers(scale * batch["image"]),)}


def test_an_encoder_that_is_called_with_more_than_images() -> None:
    class Method(SimCLR):
        def encode(self, x: Tensor) -> Any:
            return self.encoder(x, torch.ones(3))

    model = Method(Wavelengths(), WIDTH, lambda y: y)
    given: Any = {"backbone": "encoder", "heads": ["head"]}
    with pytest.raises(ValueError, match=r"missing 1 required.*example_input=: a tuple") as refusal:
        recon_aux.attach(model, **given)
    assert "a dict of keyword arguments" in str(refusal.value)
    recon_aux.attach(model, **given, example_input=(torch.rand(1, 3, 32, 32), torch.ones(3)))
    trains(model, views(), views())


def test_an_encoder_that_takes_a_dict_and_returns_what_it_is_asked_for() -> None:
    class Method(SimCLR):
        def encode(self, x: Tensor) -> Any:
            return self.encoder({"image": x}, scale=2.0)

    model = Method(OfADict(), WIDTH, lambda out: out["hidden"][0])
    given: Any = {"backbone": "encoder", "heads": ["head"]}
    given["features"] = lambda out: out["hidden"][0]
    with pytest.raises(TypeError, match="pass example_input="):
        recon_aux.attach(model, **given)
    example = {"batch": {"image": torch.rand(1, 3, 32, 32)}, "scale": 2.0}
    recon_aux.attach(model, **given, example_input=example)
    trains(model, views(), views())


@pytest.mark.parametrize("stem", [nn.Conv3d(1, 8, 3), nn.Conv1d(4, 8, 3)])
def test_images_have_two_dimensions(stem: nn.Module) -> None:
    model = SimCLR(nn.Sequential(stem, nn.Flatten()), 8, lambda y: y)
    with pytest.raises(ValueError, match="Only 2-D images can be rebuilt, no volumes"):
        recon_aux.attach(model, backbone="encoder", heads=["head"])


# --- steps that train the heads alone ---


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("in_a_loop", [False, True])
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_in_a_step_that_trains_the_heads_alone_the_encoder_stays(
    make_optimizer: Callable[[Any], torch.optim.Optimizer], in_a_loop: bool
) -> None:
    class Method(SimCLR):
        alone = False

        def loss(self, batch: Any) -> Tensor:
            y0, y1 = (self.encoder(x) for x in batch)
            if self.alone:
                y0, y1 = y0.detach(), y1.detach()
            loss: Tensor = self.criterion(self.head(y0), self.head(y1))
            return loss

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            return make_optimizer(self.parameters())

    model: Any = Method(encoder(), WIDTH, lambda y: y)
    if in_a_loop:
        model.configure_optimizers = None
    recon_aux.attach(model, backbone="encoder", heads=["head"], weight=1.0)
    optimizer = make_optimizer(model.parameters())
    for alone in (False, True, True, False, True):
        model.alone, model.recon_aux.weight = alone, 0.0 if alone else 1.0
        before = [p.clone() for p in model.encoder.parameters()]
        batch = views()
        optimizer.zero_grad()
        loss = model.loss(batch) if in_a_loop else model.training_step(batch, 0)
        (recon_aux.add_loss(model, loss) if in_a_loop else loss).backward()
        optimizer.step()
        stays = all(map(torch.equal, before, model.encoder.parameters()))
        assert stays == alone


# --- heads that are called otherwise ---


@pytest.mark.parametrize("labels", [torch.arange(8), torch.tensor(0.5)])
def test_a_head_may_take_a_number_first_and_is_refused_if_it_takes_labels(labels: Tensor) -> None:
    class Head(nn.Linear):
        def forward(self, scale: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            z: Tensor = super().forward(y)
            return z * (scale if scale.ndim == 0 else scale[:, None] + 1)

    class Method(SimCLR):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = self.criterion(*(self.head(labels, self.encoder(x)) for x in batch))
            return loss

    model = Method(encoder(), WIDTH, lambda y: y)
    model.head = Head(WIDTH, 16)
    recon_aux.attach(model, backbone="encoder", heads=["head"])
    if labels.ndim:
        with pytest.raises(ValueError, match=r"receive the encoder's .* channels, got \(8,\)"):
            model.training_step(views(), 0)
    else:
        trains(model, views(), views())


@pytest.mark.parametrize("still", [True, False])
def test_of_two_models_with_one_encoder_the_first_says_so(still: bool) -> None:
    shared = encoder()
    first, second = (SimCLR(shared, WIDTH, lambda y: y) for _ in range(2))
    for model in (first, second):
        recon_aux.attach(model, backbone="encoder", heads=["head"])
    trains(second, views())
    if not still:
        recon_aux.detach(second)
    with pytest.raises(
        RuntimeError, match="another model got this encoder: detach each that still is"
    ):
        first.training_step(views(), 0)
    for model in (first, second) if still else (first,):
        recon_aux.detach(model)
    trains(recon_aux.attach(first, backbone="encoder", heads=["head"]), views(), views())


@pytest.mark.parametrize("has_step", [True, False])
def test_a_momentum_head_of_two_features_sees_the_invariant_part_of_both(has_step: bool) -> None:
    class Both(Trained if has_step else nn.Module):  # type: ignore[misc]
        recon_aux: Any

        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = encoder(), Joins()
            self.target, self.target_head = frozen(self.encoder), frozen(self.head)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            z = self.head(*map(self.encoder, batch))
            with torch.no_grad():
                self.seen = self.target_head(*map(self.target, batch))
            return (z - self.seen).square().mean()

    model = recon_aux.attach(Both(), backbone="encoder", heads=["head"])
    batch, seen = views(), []
    # the encoder is as it was, so only the noise may differ
    for model.target[3].is_on in (False, True):
        loss = model.training_step(batch, 0)
        if not has_step:
            recon_aux.add_loss(model, loss, batch)
        seen.append(model.seen)
    assert torch.equal(*seen)


def test_a_step_may_call_itself_for_the_parts_of_its_batch() -> None:
    class OfLoaders(SimCLR):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if isinstance(batch, dict):
                return torch.stack([self.training_step(x, 0) for x in batch.values()]).sum()
            return super().training_step(batch, batch_idx)

    model = OfLoaders(encoder(), WIDTH, lambda y: y)
    recon_aux.attach(model, backbone="encoder", heads=["head"])
    trains(model, {"photos": views()}, {"photos": views(), "drawings": views()})


def test_a_batch_may_hold_images_of_nothing() -> None:
    class Labelled(SimCLR):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["views"], batch_idx)

    x0, x1 = views()
    model = Labelled(encoder(), WIDTH, lambda y: y)
    recon_aux.attach(model, backbone="encoder", heads=["head"])
    trains(model, {"views": [x0, x1], "labelled": x0[:0]}, {"views": [x0, x1], "labelled": x0})


def test_a_loop_that_replaces_its_momentum_encoder_is_told_to_load_it() -> None:
    def attached() -> Any:
        net = nn.ModuleDict({"encoder": encoder(), "head": nn.Linear(WIDTH, 8)})
        for name in ("encoder", "head"):
            net[f"{name}_momentum"] = frozen(net[name])
        return recon_aux.attach(net, backbone="encoder", heads=["head"])

    def step(net: Any) -> Tensor:
        x0, x1 = views()
        with torch.no_grad():
            z1 = net["head_momentum"](net["encoder_momentum"](x1))
        z0 = net["head"](net["encoder"](x0))
        return recon_aux.add_loss(net, (z0 - z1).square().mean(), (x0, x1))

    net = attached()
    step(net)
    net["encoder_momentum"] = frozen(net["encoder"])
    with pytest.raises(RuntimeError, match=r"replaced since .*momentum.load_state_dict\(encoder"):
        step(net)
    net = attached()
    step(net)
    net["encoder_momentum"].load_state_dict(net["encoder"].state_dict())
    step(net).backward()


def test_a_sequential_runs_its_own_layers_alone() -> None:
    bare = nn.Sequential(encoder(), nn.Linear(WIDTH, 8))
    net = recon_aux.attach(copy.deepcopy(bare), backbone="0", heads=["1"], equivariant_dim=0)
    images = views()
    for model in (net, copy.deepcopy(net)):
        assert torch.equal(model(images[0]), bare(images[0]))
        z0, z1 = (model(x) for x in images)
        before = weights_of(model)
        recon_aux.add_loss(model, (z0 - z1).square().mean()).backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        assert_both_trained(model, before)
    recon_aux.detach(net)
    assert len(net) == 2
    assert "forward" not in vars(net)
