"""Shapes of lightly 1.6's newest methods: each attaches by one line, or is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightly.models.modules import SimCLRProjectionHead
from lightly.models.utils import update_momentum
from torch import Tensor, nn

from helpers.data import shaded_views
from helpers.methods import Masked, Method, Momentum, map_encoder, tiny_vit
from helpers.training import take_steps
from helpers.versions import newer
from helpers.watching import rebuilt_from
from helpers.weights import assert_trained, decoder_of, weights_of
from recon_aux.integrations.lightly import attach

REGIONS = 4


class DetConS(Method):
    """A map is averaged over the regions of a mask, which comes with each view."""

    def __init__(self) -> None:
        super().__init__(map_encoder())
        self.criterion: Any = newer("lightly.loss", "DetConSLoss")()

    def batch(self) -> Any:
        masks = torch.randint(0, REGIONS, (2, 4, 8, 8))
        return [list(pair) for pair in zip(shaded_views(2), masks, strict=True)], torch.arange(4)

    def expected(self, batch: Any) -> list[Tensor]:
        return [view for view, _ in batch[0]]

    def regions(self, head: Any, feature: Tensor, mask: Tensor) -> Tensor:
        pooled = newer("lightly.models.utils", "pool_masked")(
            feature, mask, num_cls=REGIONS
        ).permute(0, 2, 1)
        return head(pooled.flatten(0, 1)).unflatten(0, pooled.shape[:2])

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        z = [self.regions(self.projection_head, self.backbone(x), mask) for x, mask in batch[0]]
        every = torch.arange(REGIONS).expand(len(z[0]), -1)
        return self.criterion(*z, every, every)


class DetConB(DetConS):
    """The same with a momentum encoder for the targets, and a predictor."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = newer("lightly.loss", "DetConBLoss")()
        self.prediction_head = nn.Linear(16, 16)
        self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)
        self.projection_head_momentum = copy.deepcopy(self.projection_head).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
        predicted, targets = [], []
        for x, mask in batch[0]:
            z = self.regions(self.projection_head, self.backbone(x), mask)
            predicted.append(self.prediction_head(z))
            with torch.no_grad():
                target = self.backbone_momentum(x)
                targets.append(self.regions(self.projection_head_momentum, target, mask))
        every = torch.arange(REGIONS).expand(4, -1)
        return self.criterion(*predicted, *targets, every, every)


class FroSSL(Method):
    """A loss on a list of views."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = newer("lightly.loss", "FroSSLLoss")()

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return self.criterion([self.embed(x) for x in batch[0]])


class LeJEPA(Method):
    """Large and small views, each kind concatenated; no momentum encoder, no detached target."""

    large = 2

    def __init__(self) -> None:
        super().__init__()
        self.criterion = newer("lightly.loss", "LeJEPALoss")()

    def batch(self) -> Any:
        return shaded_views(self.large) + shaded_views(3, side=16), torch.arange(4)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        large, small = batch[0][: self.large], batch[0][self.large :]
        z, local = (torch.stack(self.embed(torch.cat(x)).chunk(len(x))) for x in (large, small))
        return self.criterion(local_proj=local, global_proj=z)


class VISReg(LeJEPA):
    """Four large views."""

    large = 4

    def __init__(self) -> None:
        super().__init__()
        self.criterion = newer("lightly.loss", "VISRegLoss")(num_slices=16)


class IBOTPlusPlus(Masked):
    """Every patch has a target, also those that aren't masked."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_criterion: Any = newer("lightly.loss", "IBOTPlusPlusPatchLoss")(output_dim=64)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        large = torch.cat(batch[0][:2])
        blocks = torch.zeros(len(large), 4, 4, dtype=torch.bool)
        blocks[::2, 1:3, 1:3] = True
        with torch.no_grad():
            known = self.teacher_head(self.teacher_backbone.encode(large))
        mask = F.pad(blocks.flatten(1), (1, 0))
        given = self.student_head(self.student_backbone.encode(large, mask=mask))
        teacher, student = known[:, 0].chunk(2), given[:, 0].chunk(2)
        whole = self.criterion(list(teacher), list(student), epoch=0)
        return whole + self.patch_criterion(known[:, 1:], given[:, 1:], blocks)


class PaKa(Momentum):
    """How alike patches are to each other, in a student's tokens and in a teacher's."""

    def __init__(self) -> None:
        super().__init__(tiny_vit(global_pool=""))
        self.projection_head = SimCLRProjectionHead(48, 32, 16, batch_norm=False)
        self.projection_head_momentum = copy.deepcopy(self.projection_head).requires_grad_(False)
        self.dense_criterion = newer("lightly.loss", "PatchKernelAlignmentLoss")()

    def kernels(self, tokens: Tensor, known: Tensor) -> Tensor:
        z = self.projection_head(tokens)
        with torch.no_grad():
            target = self.projection_head_momentum(known)
        return self.criterion(z[:, 0], target[:, 0]) + self.dense_criterion(z[:, 1:], target[:, 1:])

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        x0, x1 = batch[0]
        return self.kernels(self.backbone(x0), self.backbone_momentum(x1))


NEWEST = [DetConS, DetConB, FroSSL, LeJEPA, VISReg, IBOTPlusPlus, PaKa]
every_method = pytest.mark.parametrize("method", NEWEST, ids=lambda method: method.__name__)


@every_method
def test_a_method_attaches_by_one_line_and_trains(method: type[Method]) -> None:
    model: Any = attach(method())
    decoder, encoder = decoder_of(model), weights_of(model.get_submodule(model.trained))
    batch, seen = model.batch(), rebuilt_from(model)
    take_steps(model, model.configure_optimizers(), [batch] * 4)
    assert_trained(model, decoder)
    trained = weights_of(model.get_submodule(model.trained))
    assert any(not torch.equal(weight, encoder[name]) for name, weight in trained.items())
    views, _ = seen[0]
    assert all(torch.equal(a, b) for a, b in zip(views, model.expected(batch), strict=True))


@every_method
def test_its_loss_leaves_the_equivariant_channels_alone(method: type[Method]) -> None:
    model: Any = method()
    encoder = model.get_submodule(model.trained)
    name = "encode" if isinstance(model, Masked) else "forward"
    call = getattr(encoder, name)
    outputs: list[Tensor] = []

    def note(*args: Any, **kwargs: Any) -> Tensor:
        output = call(*args, **kwargs)
        outputs.extend([output] if output.requires_grad else [])
        return output

    setattr(encoder, name, note)
    attach(model, weight=0, equivariant_dim=6)
    loss = model.training_step(model.batch())
    for gradient in torch.autograd.grad(loss, outputs):
        invariant, equivariant = model.recon_aux.splitter(gradient)
        assert invariant.any()
        assert not equivariant.any()


class PaKaWithoutHead(PaKa):
    def kernels(self, tokens: Tensor, known: Tensor) -> Tensor:
        z = self.projection_head(tokens[:, 0])
        target = self.projection_head_momentum(known[:, 0])
        return self.criterion(z, target) + self.dense_criterion(tokens[:, 1:], known[:, 1:])


class PaKaWithIdentity(PaKa):
    def __init__(self) -> None:
        super().__init__()
        self.dense_projection = nn.Identity()

    def kernels(self, tokens: Tensor, known: Tensor) -> Tensor:
        z, target = self.projection_head(tokens[:, 0]), self.projection_head_momentum(known[:, 0])
        dense = (self.dense_projection(feature[:, 1:]) for feature in (tokens, known))
        return self.criterion(z, target) + self.dense_criterion(*dense)


def test_a_loss_on_tokens_themselves_needs_an_identity_as_head() -> None:
    model: Any = attach(PaKaWithoutHead())
    with pytest.raises(RuntimeError, match="equivariant channels reach it past what the heads"):
        model.training_step(model.batch())
    model = attach(PaKaWithIdentity())
    decoder = decoder_of(model)
    take_steps(model, model.configure_optimizers(), [model.batch()] * 4)
    assert_trained(model, decoder)


def test_a_world_model_is_refused_by_name() -> None:
    class LeWM(Method):
        pass

    with pytest.raises(TypeError, match="got LeWM, which predicts the next frame of a clip"):
        attach(LeWM())
