"""The first step: find the encoder, the views and the heads that see them, and check all of it.

What was found is a plan. Later steps follow it, and look again only where the step differs. The
checks of a step and their messages stand here, but for what a single hook or optimizer refuses.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recon_aux.engine.autograd import feed_each_other, gradients_of, past, reached
from recon_aux.engine.compiling import is_recomputing
from recon_aux.engine.hooks import HeadMask, find_hooks
from recon_aux.engine.modules import describe_children, share_values, share_weights
from recon_aux.engine.pairing import PairCheck
from recon_aux.engine.step import EncoderCall, Pair, Step, Views, depends_on
from recon_aux.engine.views import (
    batch_sizes,
    candidates,
    images_in,
    is_of,
    parts_of,
    rows_in,
    two_views,
)
from recon_aux.task.splitter import as_feature
from recon_aux.task.turns import version_of

if TYPE_CHECKING:
    from recon_aux.engine.attachment import Attachment

_IN_ORDER = (
    "Call the encoder once for each whole view, or once with all views, one after the other, in "
    "the batch's order. If they take turns in one call, image by image, pass interleaved=True."
)

_UNLIKE = (
    "expected two views of the same images, row by row, saw rows no more alike than any two "
    "images. Encode the views first, one by one, then other images, as labelled ones. If one call "
    "gets several views concatenated, pass views= how many, or else leave it out; if they take "
    "turns, image by image, pass interleaved=True; or put the views into the batch."
)

# calls that train: no step of a loop makes as many
MANY_CALLS = 32


@dataclass
class Plan:
    """What the first step found, for the steps after it.

    Attributes:
        encoder: that is trained.
        calls: how many calls a step makes, if the method's loss depends on all of them. None if a
            step also encoded other images: then each step is looked through.
        other_is_momentum: whether the other view is encoded without gradient.
        interleaved: whether the views of one call take turns there, image by image.
        uses_past_heads: whether the loss depends on features that didn't pass a masked head.
        steps: how many steps were checked.
        pairs: whether the views show the same images, row by row.
        pixels: lowest and highest value of the first view.
        in_batch: whether both views are the batch's own tensors.
        shape: of a view.
        joined: whether several views came in one call.
    """

    encoder: nn.Module
    calls: int | None = 0
    other_is_momentum: bool = False
    interleaved: bool = False
    uses_past_heads: bool = False
    steps: int = 0
    pairs: PairCheck = field(default_factory=PairCheck)
    pixels: tuple[float, ...] = ()
    in_batch: bool = False
    shape: tuple[int, ...] = ()
    joined: bool = False


def discover(
    attached: Attachment, step: Step, loss: Tensor, batch: Any
) -> tuple[Plan, Views | None]:
    """Make the plan from a step, and check it thoroughly.

    Returns:
        The plan, and the step's views; None if the encoder is frozen.

    Raises:
        RuntimeError: if something about the step is not as it has to be.
    """
    plan = Plan(attached.encoder, interleaved=attached.interleaved)
    calls = _calls_of_method(attached, plan, step, loss, batch)
    online = [call for call in calls if call.output.requires_grad]
    if online and loss.requires_grad:
        plan.encoder = _trained_encoder(attached, loss, online)
        if attached.mask:
            attached.unmask_momentum_heads([head for head in step.not_fed if head not in step.fed])
            _warn_of_shared_heads(attached, [head for head in step.not_fed if head in step.fed])
            own = [call for call in online if share_weights(call.encoder, plan.encoder)]
            _refuse_mixing_heads(attached, step, own)
    views = replay(attached, plan, step, loss, batch)
    if views is not None:
        problem = _wrong_views(views.images, batch, attached.views)
        if problem and not plan.interleaved:
            plan.interleaved = True
            views = replay(attached, plan, step, loss, batch) or views
            problem = problem and _wrong_views(views.images, batch, attached.views)
        if problem:
            raise RuntimeError(problem)
        warn_of_changed_features(step, views)
        plan.in_batch = all(is_of(batch, image) for image in views.images)
        plan.shape = tuple(views.images[0].shape)
        plan.joined = not any(call.image is views.images[0] for call in step.calls)
        plan.pixels = tuple(float(x) for x in views.images[0].detach().aminmax())
        if attached.mask and loss.requires_grad:
            _warn_of_unmasked_targets(attached, plan, step, loss, views, batch)
    return plan, views


def replay(attached: Attachment, plan: Plan, step: Step, loss: Tensor, batch: Any) -> Views | None:
    """Follow the plan, and bring it up to date.

    Every step checks that the loss sees no equivariant channels, since heads may be replaced.

    Returns:
        The step's views; None if the encoder is frozen.

    Raises:
        RuntimeError: if something about the step is not as it has to be.
    """
    calls = _calls_of_method(attached, plan, step, loss, batch)
    online = _online(plan, calls)
    if not online:
        encoders = attached.encoders if attached.plan is None else [plan.encoder]
        trains = any(p.requires_grad for encoder in encoders for p in encoder.parameters())
        if trains and not is_paused(attached):
            raise RuntimeError(_no_call(attached, plan, step))
        return None
    if attached.mask and loss.requires_grad:
        _refuse_past_heads(attached, plan, step, loss, online)
    # what ran early took all calls for the method's
    if plan.calls is None:
        step.early = None
    views = step.early.views if step.early else find_views(attached, plan, calls, batch)
    if views is None and is_paused(attached):
        return None
    if views is None:
        raise RuntimeError(_no_second_view(attached, step, calls, online, batch))
    plan.other_is_momentum = not views.outputs[1].requires_grad
    return views


def is_paused(attached: Attachment) -> bool:
    """Whether a step needs no views: its weight was set to 0 after the first step."""
    return attached.plan is not None and attached.aux.weight == 0


def find_views(
    attached: Attachment, plan: Plan, calls: Sequence[EncoderCall], batch: Any
) -> Views | None:
    """Find two views among a step's calls; None if there are no two."""
    online = _online(plan, calls)
    if not online:
        return None
    found = two_views(calls, online, batch, attached.views, plan.interleaved)
    return None if found is None else Views(*found, online)


def refuse_changed(step: Step, views: Views) -> None:
    """Refuse views that were changed in place: the task would rebuild something else.

    Raises:
        RuntimeError: if one isn't as it was encoded.
    """
    if any(image for image, _ in _changed(step, views)):
        raise RuntimeError(
            "expected views that stay as they are until the step ends, got one that was changed in "
            "place after it was encoded. Encode a copy of it: encoder(view.clone())."
        )


def _changed(step: Step, views: Views) -> list[tuple[bool, bool]]:
    """Whether images and outputs of the views' calls were changed in place."""
    used = {id(image) for image in views.images} | {id(call.image) for call in views.online}
    return [call.changed for call in step.calls if id(call.image) in used]


def warn_of_changed_features(step: Step, views: Views) -> None:
    """Warn if a feature isn't as the encoder returned it."""
    if any(output for _, output in _changed(step, views)):
        warnings.warn(
            "recon_aux: expected features that stay as the encoder returned them, saw one that was "
            "changed in place, as by F.relu(y, inplace=True). The task learns from what it has "
            "become. Make a copy first: y = encoder(view).clone().",
            stacklevel=2,
        )


def _online(plan: Plan, calls: Sequence[EncoderCall]) -> list[EncoderCall]:
    """Give the calls that train the plan's encoder."""
    with_gradient = (call for call in calls if call.output.requires_grad)
    return [call for call in with_gradient if share_weights(call.encoder, plan.encoder)]


def _calls_of_method(
    attached: Attachment, plan: Plan, step: Step, loss: Tensor, batch: Any
) -> list[EncoderCall]:
    """Give the calls that the loss was made of, without those of a probe, say."""
    if not loss.requires_grad:
        return step.calls
    kept = attached.driver.calls_of_method(step, loss, batch)
    encodes_others = attached.driver.encodes_others or len(kept) < len(step.calls)
    plan.calls = None if encodes_others or plan.calls is None else len(step.calls)
    return kept


def _trained_encoder(
    attached: Attachment, loss: Tensor, online: Sequence[EncoderCall]
) -> nn.Module:
    """Give the encoder that the loss trains. Names are a guess: backbone may be a teacher."""
    trains = depends_on(loss, online)
    trained = {id(c.encoder): c.encoder for c, is_its in zip(online, trains, strict=True) if is_its}
    first = next(iter(trained.values()), None)
    if first is not None and all(share_weights(first, other) for other in trained.values()):
        return first
    if trained:
        advice = (
            "What a momentum encoder gives has to be detached. Two encoders that are alike can't "
            "both be trained."
        )
    elif attached.recorder.features is not None:
        advice = "Let features= take what the heads receive."
    else:
        advice = (
            "If the method uses another tensor than the encoder returns, as one that a hook took, "
            "pass features=lambda output: that tensor. A warm-up of the heads needs "
            "encoder.requires_grad_(False) instead of a feature that is detached."
        )
    raise RuntimeError(
        "expected the method's loss to train one encoder, but it depends on "
        f"{attached.names(trained.values()) or 'none'} of those like "
        f"{attached.name(attached.encoder)}. Pass backbone=: one of "
        f"{describe_children(attached.model)}. {advice}"
    )


def warn_of_unlike(plan: Plan, images: Pair) -> None:
    """Warn once it is clear that a plan's two views don't show the same images."""
    if plan.pairs(*images):
        warnings.warn(f"recon_aux: {_UNLIKE}", stacklevel=2)


def _warn_of_unmasked_targets(
    attached: Attachment, plan: Plan, step: Step, loss: Tensor, views: Views, batch: Any
) -> None:
    """Warn if features that the loss sees without gradient pass no masked head.

    They are a momentum encoder's, in the model or outside, or the encoder's own. What happens to
    them isn't in the graph, so this is as much as can be seen.
    """
    is_its = depends_on(loss, step.calls)
    trained = {id(c.image) for c, is_trained in zip(step.calls, is_its, strict=True) if is_trained}
    viewed, shape = {id(image) for image in views.images}, views.images[1].shape
    targets = [
        call
        for call, is_trained in zip(step.calls, is_its, strict=True)
        if not is_trained
        and call.image.shape == shape
        and (
            not share_weights(call.encoder, plan.encoder)
            or plan.other_is_momentum
            or id(call.image) in viewed - trained
        )
        # between a loop's steps an encoder may be evaluated
        and (
            not attached.driver.encodes_others
            or id(call.image) in trained | viewed
            or is_of(batch, call.image)
        )
    ]
    outputs = [call.output for call in targets if call.output.requires_grad]
    passes_a_mask = step.masked_without_gradient or any(
        any(reached(x, outputs)) for x in step.masked if outputs
    )
    # a head that was copied brought a mask along
    has_other_mask = any(
        isinstance(hook.callback, HeadMask) and hook not in attached.hooks
        for hook in find_hooks(attached.model)
    )
    inside = set(attached.model.modules())
    names_outside = any(head not in inside for head in attached.heads)
    in_loop = attached.driver.encodes_others
    unknown = _unknown_encoders(step, plan.encoder, trained | viewed if in_loop else None, batch)
    unsure = [head for head in step.unsure if head not in step.fed]
    if unsure and not unknown and all(call.output.requires_grad for call in step.calls):
        _warn_of_unsure_heads(attached, unsure)
    if passes_a_mask:
        unknown = [] if names_outside else [module for module in unknown if module not in inside]
    if has_other_mask or not (unknown or (targets and not passes_a_mask)):
        return
    if unknown:
        seen = f"features of {_describe_unknown(attached, unknown)}"
        advice = "Pass momentum_encoders=[it], and heads=[...] with its heads, too,"
    else:
        seen = (
            f"{attached.name(targets[0].encoder)} called and none of "
            f"{attached.names(attached.heads)} without gradient"
        )
        advice = "Pass heads=[...] with the heads that take it, too,"
    warnings.warn(
        "recon_aux: expected features without gradient, as a momentum encoder's, to go through a "
        f"head that is masked, saw {seen}. If the method's loss compares with what it gives, the "
        f"loss sees the equivariant channels. {advice} of these: "
        f"{describe_children(attached.model)}. Or pass equivariant_dim=0 to train without a split.",
        stacklevel=2,
    )


def _unknown_encoders(
    step: Step, trained: nn.Module, known: set[int] | None, batch: Any
) -> list[nn.Module]:
    """Find copies of the encoder that gave features as it does, but without gradient.

    They may be built otherwise. A copy of an attached one isn't among them: its heads are masked.

    Args:
        step: whose calls are looked through.
        trained: the encoder.
        known: ids of the only images that count, next to the batch's; None if all do.
        batch: the step's.
    """
    images = {call.image.shape for call in step.calls}
    features = {call.output.shape for call in step.calls}
    hooked = [call.module for call in step.others if find_hooks(call.module)]
    copies = {part for module in hooked for part in module.modules()}
    return [
        call.module
        for call in step.others
        if (call.is_alike or (call.shapes & features and share_values(call.module, trained)))
        and (
            (known is None and (call.image is None or call.image.shape in images))
            or (
                call.image is not None
                and (id(call.image) in (known or ()) or is_of(batch, call.image))
            )
        )
        and call.module not in copies
    ]


def _warn_of_shared_heads(attached: Attachment, heads: Sequence[nn.Module]) -> None:
    if heads:
        names = sorted({attached.name(head) for head in heads})
        warnings.warn(
            f"recon_aux: expected heads that take the encoder's features alone, saw {names} take "
            "other features, too. Those are left as they are in training. In evaluation, and in "
            "compiled or checkpointed code, their last channels are zeroed. Give each a head of "
            "its own, or pass equivariant_dim=0 to train without a split.",
            stacklevel=2,
        )


def _warn_of_unsure_heads(attached: Attachment, heads: Sequence[nn.Module]) -> None:
    names = sorted({attached.name(head) for head in heads})
    warnings.warn(
        f"recon_aux: expected heads that receive the encoder's features, saw {names} receive "
        "something without gradient, and can't see what. Its last channels are zeroed. If these "
        f"are other features, as a table's, pass heads=[...] without {names}, of these: "
        f"{describe_children(attached.model)}.",
        stacklevel=2,
    )


def _describe_unknown(attached: Attachment, unknown: Sequence[nn.Module]) -> str:
    # a module is called after what is in it
    its = unknown[-1]
    name, kind = attached.name(its), type(its).__name__
    return f"{name} ({kind})" if name != kind else f"a {kind} that isn't in the model"


def _refuse_mixing_heads(attached: Attachment, step: Step, calls: Sequence[EncoderCall]) -> None:
    """Refuse heads that take what another gives, or what mixes channels before them."""
    if feed_each_other(step.masked):
        raise RuntimeError(
            "expected heads that take the encoder's features, but of "
            f"{attached.names(attached.heads)} one takes what another gives. A part of that would "
            "be zeroed. Pass heads=[...]: those that take the features themselves."
        )
    if any(_sees_equivariant(attached, call, step.masked) for call in calls):
        raise RuntimeError(_leak(attached, "mixed into"))


def _refuse_past_heads(
    attached: Attachment, plan: Plan, step: Step, loss: Tensor, calls: Sequence[EncoderCall]
) -> None:
    """Refuse a loss that sees equivariant channels without a masked head in between."""
    plan.steps += 1
    # a loss past the heads may weigh nothing at first: look in step 1, 2, 4, 8, ...
    is_due = not plan.uses_past_heads or plan.steps.bit_count() == 1
    if not is_due:
        return
    seen = past(loss, [x for call in calls for x in call.sources], step.masked)
    plan.uses_past_heads |= bool(seen)
    its = [call for call in calls if any(x is y for x in call.sources for y in seen)]
    if any(_sees_equivariant(attached, call, [loss]) for call in its):
        raise RuntimeError(_leak(attached, "past"))


def _sees_equivariant(attached: Attachment, call: EncoderCall, results: Sequence[Tensor]) -> bool:
    """Whether some results depend on the equivariant channels of a call's feature."""
    aux = attached.aux
    feature = as_feature(call.feature, spatial=aux.decoder.spatial)
    own = gradients_of([aux.equivariant(feature)], call.sources)
    seen = gradients_of(results, call.sources)
    both = ((x, y) for x, y in zip(own, seen, strict=True) if x is not None and y is not None)
    return any(bool(((x != 0) & (y != 0)).any()) for x, y in both)


def _leak(attached: Attachment, where: str) -> str:
    return (
        "expected the method's loss to see the invariant channels alone, but equivariant channels "
        f"reach it {where} what the heads {attached.names(attached.heads)} receive. Pass "
        "heads=[...]: every module that takes the encoder's features as they are, of these: "
        f"{describe_children(attached.model)}. If something between encoder and head mixes "
        "channels, as F.normalize or a norm does, make it a part of the head, or of the encoder. "
        "If features= is given, let it take what the heads receive. Or pass equivariant_dim=0 to "
        "train without a split."
    )


def _wrong_views(images: Pair, batch: Any, count: int | None) -> str | None:
    """Say so if the batch shows that these aren't two views of the same images."""
    shapes = [tuple(view.shape) for view in images]
    if images[0].shape == images[1].shape and torch.equal(*images):
        return f"expected two views, saw the same images {shapes[0]} twice. {_IN_ORDER}"
    known = [x for x in images_in(batch) if x.shape[1:] == images[0].shape[1:]]
    size = len(images[0])
    joined = [x for x in known if count and len(x) == count * size]
    # there, too, views may take turns
    parts = known + [p for x in joined for turns in (False, True) for p in parts_of(x, size, turns)]
    places = [[(x, rows) for x in parts if (rows := rows_in(v, x)) is not None] for v in images]
    if all(places):
        # a part of the batch has the same rows of both views
        pairs = [(b, rows) for _, rows in places[0] for b, _ in places[1] if rows.max() < len(b)]
        mixed = not any(torch.equal(b[rows], images[1]) for b, rows in pairs)
    else:
        unplaced = [view for view, place in zip(images, places, strict=True) if not place]
        mixed = any(known and rows_in(view, torch.cat(known)) is not None for view in unplaced)
    if not mixed:
        return None
    return (
        f"expected two views of the batch, saw its images in another arrangement, {shapes}. "
        f"{_IN_ORDER}"
    )


def _no_call(attached: Attachment, plan: Plan, step: Step) -> str:
    in_a_loop = attached.driver.encodes_others
    return (
        f"expected {attached.driver.where} to call {attached.backbone_method} of the encoder "
        f"{attached.name(plan.encoder)} with gradient, saw {len(step.calls)} calls without and "
        f"none with. Pass backbone=: one of {describe_children(attached.model)}. Pass "
        "backbone_method= if another of its methods is called."
        + " Encode both views with gradient, then call add_loss, in each step."
        * in_a_loop
    )


def _no_second_view(
    attached: Attachment,
    step: Step,
    calls: Sequence[EncoderCall],
    online: Sequence[EncoderCall],
    batch: Any,
) -> str:
    trained = [tuple(call.image.shape) for call in online]
    known = {id(call.output) for call in online}
    others = [tuple(call.image.shape) for call in calls if id(call.output) not in known]
    advice = []
    if unknown := _unknown_encoders(step, online[0].encoder, None, batch):
        advice.append(
            f"Features came from {_describe_unknown(attached, unknown)}, too: pass "
            "momentum_encoders=[it], and heads=[...] with its heads."
        )
    if any(call.is_alike and find_hooks(call.module) for call in step.others):
        advice.append(
            "A copy of the attached encoder was called, too: make it before attach, and pass "
            "momentum_encoders=[it], and heads=[...] with its heads."
        )
    if candidates(calls, online):
        advice.append(
            "A momentum encoder's images aren't in the batch: they were made within the step, or "
            "are another process's, which can't be used. If they are in the order of the "
            "encoder's own, pass views=1. Else put the views into the batch."
        )
    if len({*trained}) > 1:
        advice.append("Make two views of one size, with as many images and channels.")
    if len({id(call.image) for call in online}) == 1 or len({shape[0] for shape in trained}) > 1:
        advice.append(
            "Encode the other view, too. If a call gets several views concatenated, and the "
            "batch doesn't show it, pass views= how many. If they take turns there, image by "
            "image, pass interleaved=True, too."
        )
    if attached.plan is not None:
        advice.append(
            "For a step without two views, as a supervised one, make model.recon_aux.weight 0."
        )
    if attached.driver.encodes_others:
        advice.append("Encode both views, then call add_loss(model, loss, batch) with their batch.")
    return (
        "expected two views of one size, one in each call of the encoder, or both concatenated in "
        "one, or one in a momentum encoder's call, saw calls with gradient of images "
        f"{trained} and others of {others}, where images and labels of the batch number "
        f"{sorted(batch_sizes(batch))}. {' '.join(advice)}"
    )


def refuse_training_outside(head: nn.Module, masked: Tensor, versions: dict[int, int]) -> None:
    """Refuse to train a masked head past the training_step that adds the loss.

    A loss that is only looked at is no training. It is training if a backward pass went through
    the head outside a step, and its weights have changed since.
    """
    if is_recomputing():
        return
    now = version_of(head.parameters())
    hooked: Any = masked
    hooked.register_hook(lambda gradient: versions.update({id(head): now}))
    if versions.get(id(head), now) != now:
        raise RuntimeError(
            f"expected the attached training_step to train the head {type(head).__name__}, which "
            "is masked, saw it change past it. Replace training_step before attaching, and what "
            "step_method= names. Or take all off: recon_aux.detach(model)."
        )


def refuse_forgotten_loss(calls: int, has_changed: bool) -> None:
    """Refuse a loop that trains the encoder on, or changes it, without add_loss.

    Args:
        calls: of the encoder that train, since the last step.
        has_changed: whether the encoder has, since then.
    """
    if has_changed or calls >= MANY_CALLS:
        raise RuntimeError(
            "expected recon_aux.add_loss(model, loss) once a step, saw the encoder change or "
            f"{MANY_CALLS} calls of it without. Call add_loss in each step. Around calls "
            "that don't train it, as an evaluation's or an attack's, use model.eval(), and "
            "torch.no_grad() where that is possible. To train on without the task: "
            "recon_aux.detach(model)."
        )


def refuse_search_for_unused_parameters() -> None:
    """Refuse DistributedDataParallel that looks for unused parameters before add_loss."""
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is not None and wrapper.find_unused_parameters:
        raise TypeError(
            "expected DistributedDataParallel with find_unused_parameters=False, got True: it "
            "looks for them before the decoder is used. Pass find_unused_parameters=False."
        )


def refuse_manual_optimization(model: nn.Module) -> None:
    """Refuse a model whose losses don't pass through what its training step returns.

    Raises:
        TypeError: that says what to do instead.
    """
    if getattr(model, "automatic_optimization", True) is False:
        raise TypeError(
            f"expected automatic optimization, but {type(model).__name__} sets "
            "automatic_optimization=False, so no loss passes through what training_step returns. "
            "Put what computes the loss into a method of its own, and pass step_method= its name. "
            "Or call recon_aux.ReconAux in the step, see the README."
        )
