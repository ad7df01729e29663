"""Attached to a model whose loop, criterion and optimizer are its user's."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import recon_aux
from helpers.data import shaded_views
from helpers.models import InALoop, Siamese, siamese_loss, tiny_encoder
from helpers.versions import newer
from helpers.watching import alive, rebuilt_by, rebuilt_from, seen_by
from helpers.weights import assert_same, assert_trained, decoder_of
from recon_aux.integrations.lightly import attach

VIEWS = shaded_views(2)


def in_a_loop() -> Any:
    """With batch norm."""
    return InALoop(tiny_encoder())


def test_a_loop_of_ones_own_gets_what_a_training_step_gets() -> None:
    model = attach(InALoop(), weight=4.0)
    twin = attach(Siamese(), weight=4.0)
    for _ in range(2):
        z0, z1 = (model(view) for view in VIEWS)
        loss = recon_aux.add_loss(model, siamese_loss(z0, z1))
        assert torch.equal(loss, twin.training_step((VIEWS, torch.arange(4)), 0))
    loss.backward()
    assert model.recon_aux.decoder.queries.grad.any()


def test_a_loop_that_concatenates_its_views() -> None:
    model = attach(in_a_loop())
    seen = rebuilt_from(model)
    for given in (VIEWS, [*VIEWS, torch.arange(4)]):
        recon_aux.add_loss(model, model(torch.cat(VIEWS)).var(), given)
    with pytest.raises(RuntimeError, match="expected two views"):
        recon_aux.add_loss(model, model(torch.cat(VIEWS)).var())
    recon_aux.add_loss(model, sum(model(view).var() for view in VIEWS))
    assert all(torch.equal(a, b) for call in seen for a, b in zip(call[0], VIEWS, strict=True))
    assert len(seen) == 3


@pytest.mark.parametrize("without_gradient", [True, False])
def test_a_loop_may_encode_other_images_between_its_steps(without_gradient: bool) -> None:
    model = attach(in_a_loop())
    model.eval()
    with torch.set_grad_enabled(not without_gradient):
        for _ in range(100 if without_gradient else 20):
            model(torch.rand(4, 3, 32, 32))
    model.train()
    seen = rebuilt_from(model)
    recon_aux.add_loss(model, sum(model(view).var() for view in VIEWS))
    assert all(torch.equal(a, b) for a, b in zip(seen[0][0], VIEWS, strict=True))


def test_in_a_loop_a_look_at_other_images_is_no_view() -> None:
    model = in_a_loop()
    model.backbone_momentum = copy.deepcopy(model.backbone).requires_grad_(False)
    attach(model, views=1)
    seen = rebuilt_from(model)
    (x0, x1), (other, _) = torch.rand(2, 2, 4, 3, 16, 16)
    for _ in range(2):
        z0, z1 = model(x0), model.projection_head(model.backbone_momentum(x1).flatten(1))
        recon_aux.add_loss(model, (z0 - z1.detach()).square().mean()).backward()
        with torch.no_grad():
            model(other)
    assert len(seen) == 2
    assert all(torch.equal(views[1], x1) for views, _ in seen)


def test_a_loop_may_checkpoint_its_encoder() -> None:
    model = attach(in_a_loop())
    seen = rebuilt_from(model)
    for step in range(2):
        batch = [view + step for view in VIEWS]
        features = [checkpoint(model.backbone, x, use_reentrant=False) for x in batch]
        loss = sum(model.projection_head(y.flatten(1)).var() for y in features)
        recon_aux.add_loss(model, loss).backward()
        assert all(torch.equal(a, b) for a, b in zip(seen.pop()[0], batch, strict=True))


def test_a_loop_that_forgets_the_loss_is_stopped() -> None:
    model = attach(in_a_loop())
    with pytest.raises(
        RuntimeError, match=r"expected recon_aux\.add_loss.* once a step, .* or 32 calls"
    ):
        for _ in range(300):
            model(torch.rand(2, 3, 8, 8))


def steps_with(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, forget: Any) -> None:
    for _ in range(count):
        loss = sum(model(view).var() for view in VIEWS)
        if not forget:
            loss = recon_aux.add_loss(model, loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_an_optimizer_without_the_decoder_is_noticed() -> None:
    model = in_a_loop()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model)
    with (
        warnings.catch_warnings(),
        pytest.raises(RuntimeError, match=r"train the decoder .*add_param_group"),
    ):
        warnings.simplefilter("error")
        steps_with(model, optimizer, 3, forget=False)
    model = attach(in_a_loop())
    before = decoder_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps_with(model, optimizer, 5, forget=False)
    assert_trained(model, before)
    # and once it was seen to train, no values are compared, which would wait for a GPU
    with torch.profiler.profile() as profile:
        steps_with(model, optimizer, 2, forget=False)
    assert not any(event.key == "aten::equal" for event in profile.key_averages())


def test_a_decoder_that_is_updated_every_other_time_is_trained() -> None:
    model = attach(in_a_loop(), weight=1.0)
    before = decoder_of(model)
    decoder = {id(p) for p in model.recon_aux.parameters()}
    for step in range(8):
        model.zero_grad()
        recon_aux.add_loss(model, siamese_loss(*(model(view) for view in VIEWS))).backward()
        # no optimizer of torch's shows whose turn it is
        with torch.no_grad():
            for p in model.parameters():
                if step % 2 or id(p) not in decoder:
                    p -= 0.01 * p.grad
    assert_trained(model, before)


def test_so_is_one_that_is_fused_whose_steps_change_no_version() -> None:
    model = in_a_loop()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    attach(model)
    with pytest.warns(UserWarning, match=r"train the decoder .*add_param_group"):
        steps_with(model, optimizer, 3, forget=False)
    model = attach(in_a_loop())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps_with(model, torch.optim.AdamW(model.parameters(), fused=True), 5, forget=False)


def test_the_decoder_may_have_a_fused_optimizer_alone() -> None:
    model = attach(in_a_loop())
    its = [*model.backbone.parameters(), *model.projection_head.parameters()]
    optimizers = [
        torch.optim.SGD(its, lr=0.1),
        torch.optim.AdamW(model.recon_aux.parameters(), fused=True),
    ]
    optimizers[0].register_step_post_hook(lambda *_: optimizers[1].step())
    before = decoder_of(model)
    steps_with(model, optimizers[0], 5, forget=False)
    assert_trained(model, before)


def test_a_decoder_that_a_weight_of_zero_leaves_as_it_is_is_no_mistake() -> None:
    model = attach(in_a_loop(), weight=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    model.recon_aux.weight = 0.0
    before = decoder_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps_with(model, optimizer, 5, forget=False)
        assert_same(decoder_of(model), before)
        model.recon_aux.weight = 1.0
        steps_with(model, optimizer, 3, forget=False)
    assert_trained(model, before)


def test_steps_of_the_encoder_alone_in_turn_with_the_decoders_are_no_mistake() -> None:
    model = attach(in_a_loop())
    whole = torch.optim.SGD(model.parameters(), lr=0.1)
    alone = torch.optim.SGD(model.backbone.parameters(), lr=0.1)
    before = decoder_of(model)
    for optimizer in (whole, alone, whole, alone, whole):
        steps_with(model, optimizer, 1, forget=False)
    assert_trained(model, before)


def test_an_average_that_is_evaluated_between_steps_is_no_teacher() -> None:
    model = in_a_loop()
    model.average = copy.deepcopy(model.backbone)
    attach(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model.average(torch.rand(4, 3, 32, 32))
        seen = rebuilt_from(model)
        with torch.enable_grad():
            recon_aux.add_loss(model, sum(model(view).var() for view in VIEWS))
    assert all(torch.equal(a, b) for a, b in zip(seen[0][0], VIEWS, strict=True))


@pytest.mark.parametrize("shown", ["the same image", "the batch", "nothing"])
def test_in_a_loop_a_teacher_whose_head_is_not_masked_gives_a_warning(shown: str) -> None:
    model = in_a_loop()
    model.average = copy.deepcopy(model.backbone).requires_grad_(False)
    attach(model, views=1)
    x0, x1 = VIEWS
    z0 = model(x0)
    with torch.no_grad():
        if shown == "the same image":
            model.average(x0)
        y1 = model.average(x1).flatten(1)[:, :8]
    loss = (z0 - y1).square().mean()
    batch = (x0, x1) if shown == "the batch" else ()
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        recon_aux.add_loss(model, loss, batch)
    told = [str(w.message) for w in given if "saw average called and none of" in str(w.message)]
    assert len(told) == 1


def test_encoder_and_head_may_be_compiled_whole_after_attaching() -> None:
    torch._dynamo.reset()
    backbone = tiny_encoder().append(nn.Flatten())
    net: Any = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(16, 4)})
    recon_aux.attach(net, backbone="backbone", heads=["head"], weight=1.0)
    for module in (net["head"], net["backbone"]):
        module.compile(fullgraph=True, backend="eager")
    for _ in range(2):
        z0, z1 = (net["head"](net["backbone"](view)) for view in VIEWS)
        recon_aux.add_loss(net, siamese_loss(z0, z1)).backward()
    assert net.recon_aux.decoder.queries.grad.any()


def test_in_a_loop_a_view_is_the_latest_of_many_that_are_encoded_without_gradient() -> None:
    model = attach(MomentumInALoop(), views=1)
    views = list(torch.rand(2, 4, 3, 16, 16))
    seen = rebuilt_from(model)
    for _ in range(2):
        with torch.no_grad():
            for _ in range(40):
                model.backbone_momentum(torch.rand(4, 3, 16, 16))
        recon_aux.add_loss(model, model.loss(views)).backward()
        assert torch.equal(seen.pop()[0][1], views[1])


def test_a_part_of_the_decoder_may_be_frozen_between_steps() -> None:
    model = attach(in_a_loop())
    for _ in range(2):
        recon_aux.add_loss(model, sum(model(view).var() for view in VIEWS)).backward()
        model.recon_aux.edges.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for frozen in (True, False):
        model.recon_aux.edges.requires_grad_(not frozen)
        before = decoder_of(model)
        for _ in range(3):
            optimizer.zero_grad()
            recon_aux.add_loss(model, sum(model(view).var() for view in VIEWS)).backward()
            optimizer.step()
        after = decoder_of(model)
        its = {name for name in after if name.startswith("edges.")}
        assert its
        for name, weight in after.items():
            assert torch.equal(weight, before[name]) == (frozen and name in its), name


def test_a_step_without_the_loss_is_noticed_in_the_next() -> None:
    model = attach(in_a_loop())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="once a step, saw the encoder change"):
        steps_with(model, optimizer, 2, forget=True)


def test_a_criterion_outside_the_model_may_take_the_features() -> None:
    model, criterion = in_a_loop(), newer("lightly.loss", "KoLeoLoss")()
    attach(model, heads=["projection_head", criterion])

    def loss() -> Any:
        features = [model.backbone(view).flatten(1) for view in VIEWS]
        return sum(model.projection_head(y).var() + criterion(y) for y in features)

    recon_aux.add_loss(model, loss()).backward()
    recon_aux.detach(model)
    assert "forward" not in vars(criterion)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_model_in_a_loop_is_attached_to_itself(copied: Any) -> None:
    model = attach(in_a_loop())
    twin = copied(model)
    loss = recon_aux.add_loss(twin, sum(twin(view).var() for view in VIEWS))
    loss.backward()
    assert twin.recon_aux.decoder.queries.grad.any()
    with pytest.raises(RuntimeError, match="saw 0 calls"):
        recon_aux.add_loss(model, loss)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_that_trains_rebuilds_from_its_momentum_encoder_s_view(copied: Any) -> None:
    twin = copied(attach(MomentumInALoop()))
    seen = rebuilt_from(twin)
    for _ in range(2):
        query = twin(VIEWS[0])
        with torch.no_grad():
            key = twin.projection_head(twin.backbone_momentum(VIEWS[1]).flatten(1))
        recon_aux.add_loss(twin, (query - key).square().mean(), VIEWS).backward()
        assert torch.equal(torch.stack(seen.pop()[0]), torch.stack(list(VIEWS)))


def test_a_copy_of_the_encoder_alone_remembers_nothing() -> None:
    model = attach(in_a_loop())
    encoder = copy.deepcopy(model.backbone)
    seen = seen_by(encoder)
    for _ in range(100):
        encoder(torch.rand(2, 3, 8, 8))
    assert len(seen) == 200
    assert alive(seen) == 0


def test_the_loss_is_not_added_twice() -> None:
    model = attach(Siamese())
    with pytest.raises(TypeError, match="training_step returns the sum of both losses already"):
        recon_aux.add_loss(model, model.training_step((VIEWS, torch.arange(4)), 0))
    with pytest.raises(ValueError, match="got a bare Siamese"):
        recon_aux.add_loss(recon_aux.detach(model), torch.zeros(()))
    with pytest.raises(TypeError, match="loss as a tensor, got float"):
        recon_aux.add_loss(model, 3.0)  # type: ignore[arg-type]


class MomentumInALoop(InALoop):
    """One view through the encoder, the other through its momentum copy."""

    def __init__(self) -> None:
        super().__init__(tiny_encoder())
        self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)

    def loss(self, views: Any) -> Tensor:
        with torch.no_grad():
            key = self.projection_head(self.backbone_momentum(views[1]).flatten(1))
        return (self(views[0]) - key).square().mean()


@pytest.mark.parametrize("shows_the_batch", [True, False])
def test_in_a_loop_a_momentum_encoders_look_at_other_images_is_no_view(
    shows_the_batch: bool,
) -> None:
    model = attach(MomentumInALoop(), views=None if shows_the_batch else 1)
    seen = rebuilt_from(model)
    for views in torch.rand(3, 2, 4, 3, 16, 16).unbind():
        batch = tuple(views)
        recon_aux.add_loss(model, model.loss(batch), batch if shows_the_batch else ()).backward()
        assert torch.equal(seen.pop()[0][1], batch[1])
        with torch.no_grad():
            model.backbone_momentum(torch.rand(4, 3, 16, 16))


def test_in_a_loop_the_batch_tells_which_of_a_momentum_encoders_calls_is_a_view() -> None:
    model = attach(MomentumInALoop())
    x0, x1, negatives = torch.rand(3, 4, 3, 16, 16)
    seen = rebuilt_from(model)
    for batch in ((x0, x1), (x0, x1, negatives)):
        loss = model.loss((x0, x1))
        with torch.no_grad():
            loss = loss - model.backbone_momentum(negatives).square().mean()
        recon_aux.add_loss(model, loss, batch).backward()
        assert torch.equal(seen.pop()[0][1], x1)


def test_in_a_loop_a_momentum_encoder_may_be_in_eval_mode() -> None:
    model = attach(MomentumInALoop())
    model.backbone_momentum.eval()
    views = list(torch.rand(2, 4, 3, 16, 16))
    seen = rebuilt_from(model)
    recon_aux.add_loss(model, model.loss(views), views).backward()
    assert torch.equal(seen[0][0][1], views[1])


def test_a_loop_may_validate_by_its_loss() -> None:
    model = attach(in_a_loop())
    model.eval()
    with torch.no_grad():
        loss = sum(model(view).var() for view in VIEWS)
        assert recon_aux.add_loss(model, loss) is loss
    model.train()
    recon_aux.add_loss(model, sum(model(view).var() for view in VIEWS)).backward()


def test_a_loop_may_look_at_its_batch_between_backward_and_step() -> None:
    model = attach(in_a_loop())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen, before = rebuilt_from(model), decoder_of(model)
    for _ in range(3):
        recon_aux.add_loss(model, sum(model(view).var() for view in VIEWS)).backward()
        with torch.no_grad():
            model(VIEWS[0])
        optimizer.step()
    assert_trained(model, before)
    assert len(seen) == 3
    assert all(torch.equal(a, b) for call in seen for a, b in zip(call[0], VIEWS, strict=True))


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy])
@pytest.mark.parametrize("mode", [True, False])
def test_an_encoder_may_be_frozen_for_a_while(mode: bool, copied: Any) -> None:
    looped, method = copied(attach(in_a_loop())), copied(attach(Siamese(tiny_encoder())))

    def losses() -> list[Tensor]:
        loss = sum(looped(view).square().mean() for view in VIEWS)
        return [recon_aux.add_loss(looped, loss), method.training_step((VIEWS, torch.arange(4)), 0)]

    for model in (looped, method):
        model.backbone.requires_grad_(False).train(mode)
    with pytest.warns(UserWarning, match=r"encoder backbone is frozen, .* pass backbone="):
        found = losses()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found += losses()
    for loss in found:
        loss.backward()
    assert all(p.grad is None for m in (looped, method) for p in m.recon_aux.parameters())
    for model in (looped, method):
        model.backbone.requires_grad_(True).train()
    for loss in losses():
        loss.backward()
    assert all(m.recon_aux.decoder.queries.grad.any() for m in (looped, method))


def test_an_encoder_that_trained_may_be_frozen_for_a_while() -> None:
    looped, method = attach(in_a_loop()), attach(Siamese(tiny_encoder()))
    outputs = [rebuilt_by(model) for model in (looped, method)]

    def steps() -> int:
        loss = sum(looped(view).square().mean() for view in VIEWS)
        recon_aux.add_loss(looped, loss).backward()
        method.training_step((VIEWS, torch.arange(4)), 0).backward()
        assert len(outputs[0]) == len(outputs[1])
        return len(outputs[0])

    assert steps() == 1
    for model in (looped, method):
        model.backbone.requires_grad_(False)
    with pytest.warns(UserWarning, match="encoder backbone is frozen, so nothing is rebuilt"):
        assert steps() == 1
    for model in (looped, method):
        model.zero_grad()
        model.backbone.requires_grad_(True)
    assert steps() == 2
    for model in (looped, method):
        assert model.recon_aux.decoder.queries.grad.any()
        assert model.backbone[0].weight.grad.any()


@pytest.mark.parametrize("whole", [True, False])
def test_a_loop_may_train_its_encoder_in_eval_mode(whole: bool) -> None:
    model = attach(in_a_loop())
    (model if whole else model.backbone).eval()
    seen = rebuilt_from(model)
    crops = torch.rand(19, 4, 3, 16, 16)
    for _ in range(2):
        recon_aux.add_loss(model, sum(model(view).var() for view in crops)).backward()
        assert all(torch.equal(a, b) for a, b in zip(seen.pop()[0], crops, strict=False))
    with pytest.raises(RuntimeError, match="or 32 calls"):
        for _ in range(33):
            model(crops[0])


@pytest.mark.parametrize("whole", [True, False])
def test_then_its_momentum_encoder_may_be_in_eval_mode_too(whole: bool) -> None:
    model = attach(MomentumInALoop())
    model.train(not whole)
    model.backbone.eval()
    model.backbone_momentum.eval()
    seen = rebuilt_from(model)
    for _ in range(2):
        views = list(torch.rand(2, 4, 3, 16, 16))
        recon_aux.add_loss(model, model.loss(views), views).backward()
        assert torch.equal(seen.pop()[0][1], views[1])


def test_a_loop_may_change_its_mode_from_step_to_step() -> None:
    model = attach(in_a_loop())
    seen = rebuilt_from(model)
    crops = torch.rand(19, 4, 3, 16, 16)
    for step in range(4):
        model.train(step % 2 == 0)
        recon_aux.add_loss(model, sum(model(view).var() for view in crops)).backward()
        assert all(torch.equal(a, b) for a, b in zip(seen.pop()[0], crops, strict=False))
