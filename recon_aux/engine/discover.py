"""The first step: find the encoder and its two views, and check all of it.

What was found is a plan. Later steps follow it, and look again only where the step differs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recon_aux.engine.hooks import find_hooks
from recon_aux.engine.leaks import (
    check_heads,
    describe_replaced,
    describe_unknown,
    refuse_bypassed_heads,
    unknown_encoders,
    warn_of_unmasked_targets,
)
from recon_aux.engine.modules import describe_children, find_copies, share_weights, unwrap
from recon_aux.engine.plan import Plan
from recon_aux.engine.step import EncoderCall, Pair, Step, Views, calls_behind
from recon_aux.engine.views import (
    batch_sizes,
    candidates,
    images_in,
    is_of,
    parts_of,
    rows_in,
    two_views,
)

if TYPE_CHECKING:
    from recon_aux.engine.attachment import Attachment

_IN_ORDER = (
    "Call the encoder once for each whole view, or once with all views, one after the other, in "
    "the batch's order. If they take turns in one call, image by image, pass interleaved=True. "
    "Encode labelled images in a call of their own."
)

_UNLIKE = (
    "expected two views of the same images, row by row, saw rows no more alike than any two "
    "images. Encode the views first, one by one, then other images, as labelled ones. If one call "
    "gets several views concatenated, pass views= how many, or else leave it out; if they take "
    "turns, image by image, pass interleaved=True; or put the views into the batch."
)


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
    if step.misses_encoder and is_paused(attached):
        return plan, None
    if online and loss.requires_grad:
        plan.encoder = _trained_encoder(attached, loss, online)
        if attached.aux.splitter.equivariant_dim:
            check_heads(attached, step, _online(plan, calls))
    views = replay(attached, plan, step, loss, batch)
    if views is not None:
        problem = _wrong_views(views.images, batch, attached.view_count)
        if problem and not plan.interleaved:
            plan.interleaved = True
            views = replay(attached, plan, step, loss, batch) or views
            problem = _wrong_views(views.images, batch, attached.view_count)
        if problem:
            raise RuntimeError(problem)
        warn_of_changed_features(step, views)
        plan.in_batch = all(is_of(batch, image) for image in views.images)
        plan.shape = tuple(views.images[0].shape)
        plan.joined = not any(call.image is views.images[0] for call in step.calls)
        plan.pixels = tuple(float(x) for x in views.images[0].detach().aminmax())
        if attached.aux.splitter.equivariant_dim and loss.requires_grad:
            warn_of_unmasked_targets(attached, plan, step, loss, views, batch)
    return plan, views


def replay(attached: Attachment, plan: Plan, step: Step, loss: Tensor, batch: Any) -> Views | None:
    """Follow the plan, and bring it up to date.

    Every step checks that the loss sees no equivariant channels, since heads may be replaced. A
    loss that also sees a feature without a head is checked less often.

    Returns:
        The step's views; None if the encoder is frozen, or the step trains heads alone.

    Raises:
        RuntimeError: if something about the step is not as it has to be.
    """
    calls = _calls_of_method(attached, plan, step, loss, batch)
    if step.misses_encoder and is_paused(attached):
        # even a gradient of zeros would let momentum and weight decay change the encoder
        return None
    online = _online(plan, calls)
    if not online:
        encoders = attached.encoders if attached.plan is None else [plan.encoder]
        trains = any(p.requires_grad for encoder in encoders for p in encoder.parameters())
        if trains and not is_paused(attached):
            raise RuntimeError(_no_call(attached, plan, step))
        return None
    if attached.aux.splitter.equivariant_dim and loss.requires_grad:
        refuse_bypassed_heads(attached, plan, step, loss, online)
    # the early run counted all calls as the method's
    if plan.calls is None:
        step.early = None
    if step.misses_encoder and attached.plan is not None:
        _warn_of_loss_past_encoder(attached, plan)
    views = step.early.views if step.early else find_views(attached, plan, calls, batch)
    if views is None and is_paused(attached):
        return None
    if views is None:
        raise RuntimeError(_no_second_view(attached, step, calls, online, batch))
    plan.other_is_momentum = not views.features[1].requires_grad
    return views


def is_paused(attached: Attachment) -> bool:
    """Whether a step needs no views: its weight was set to 0, or it is 0 after the first step."""
    aux = attached.aux
    return aux.weight == 0 and (aux.weight_is_given or attached.plan is not None)


def find_views(
    attached: Attachment, plan: Plan, calls: Sequence[EncoderCall], batch: Any
) -> Views | None:
    """Find two views among a step's calls; None if there are no two."""
    online = _online(plan, calls)
    if not online:
        return None
    found = two_views(calls, online, batch, attached.view_count, plan.interleaved)
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
    """Give the method's calls, without a probe's, for example, and note how many a step makes."""
    if not loss.requires_grad:
        return step.calls
    kept = attached.driver.calls_of_method(step, loss, batch)
    has_others = attached.driver.is_loop or len(kept) < len(step.calls)
    plan.calls = None if has_others or plan.calls is None else len(step.calls)
    return kept


def _trained_encoder(
    attached: Attachment, loss: Tensor, online: Sequence[EncoderCall]
) -> nn.Module:
    """Give the encoder that the loss trains. Names are a guess: backbone may be a teacher."""
    trained = {id(call.encoder): call.encoder for call in calls_behind(loss, online)}
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
            "encoder.requires_grad_(False), or model.recon_aux.weight = 0."
        )
    raise RuntimeError(
        "expected the method's loss to train one encoder, but it depends on "
        f"{attached.names(trained.values()) or 'none'} of those like "
        f"{attached.name(attached.encoder)}. Pass backbone=: one of "
        f"{describe_children(attached.model)}. {advice}"
    )


def _warn_of_loss_past_encoder(attached: Attachment, plan: Plan) -> None:
    warnings.warn(
        "recon_aux: expected the method's loss to train the encoder "
        f"{attached.name(plan.encoder)} in each step, saw one that it doesn't depend on. The task "
        "trains the encoder alone then. To train the heads alone, make model.recon_aux.weight 0 in "
        "such steps, or call encoder.requires_grad_(False).",
        stacklevel=2,
    )


def warn_of_unlike(plan: Plan, images: Pair) -> None:
    """Warn once it is clear that a plan's two views don't show the same images."""
    if plan.pairs(*images):
        warnings.warn(f"recon_aux: {_UNLIKE}", stacklevel=2)


def _wrong_views(images: Pair, batch: Any, count: int | None) -> str | None:
    """Give the error's text if the batch shows that these aren't views of the same images."""
    shapes = [tuple(view.shape) for view in images]
    if images[0].shape == images[1].shape and torch.equal(*images):
        return f"expected two views, saw the same images {shapes[0]} twice. {_IN_ORDER}"
    known = [x for x in images_in(batch, images[0].device) if x.shape[1:] == images[0].shape[1:]]
    size = len(images[0])
    joined = [x for x in known if count and len(x) == count * size]
    # there, too, views may take turns
    parts = known + [p for x in joined for turns in (False, True) for p in parts_of(x, size, turns)]
    places = [[(x, rows) for x in parts if (rows := rows_in(v, x)) is not None] for v in images]
    if all(places):
        # views are in order if each has the same rows of its part of the batch
        pairs = [(b, rows) for a, rows in places[0] for b, _ in places[1] if len(a) == len(b)]
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
    in_a_loop = attached.driver.is_loop
    where = "each step, before add_loss," if in_a_loop else attached.step_method
    advice = ""
    if any(share_weights(call.encoder, plan.encoder) for call in step.calls):
        advice += (
            " To train the heads alone in some steps, make model.recon_aux.weight 0 in them, or "
            "call encoder.requires_grad_(False)."
        )
    if in_a_loop:
        advice += " Encode both views with gradient, then call add_loss, in each step."
    return (
        f"expected {where} to call {attached.backbone_method} of the encoder "
        f"{attached.name(plan.encoder)} with gradient, saw {len(step.calls)} calls, none of which "
        f"trains it. Pass backbone=: one of {describe_children(attached.model)}. Pass "
        "backbone_method= if another of its methods is called."
        f"{describe_replaced(attached)}{advice}"
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
    if unknown := unknown_encoders(step, online[0].encoder, None, batch):
        advice.append(
            f"Features came from {describe_unknown(attached, unknown)}, too: pass "
            "momentum_encoders=[it], and heads=[...] with its heads."
        )
    if any(call.is_alike and find_hooks(call.module) for call in step.others):
        advice.append(
            "A copy of the attached encoder was called, too: make it before attach, and pass "
            "momentum_encoders=[it], and heads=[...] with its heads."
        )
    known_encoders = attached.encoders
    twins = find_copies(attached.model, known_encoders[0])
    if any(x not in known_encoders and unwrap(x) not in known_encoders for x in twins):
        advice.append(
            "A momentum encoder was replaced since the last step. Load the weights into the old "
            "one instead: momentum.load_state_dict(encoder.state_dict())."
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
    advice.append(
        "For a step without two views, as a supervised one, make model.recon_aux.weight 0 in it."
    )
    if attached.driver.is_loop:
        advice.append("Encode both views, then call add_loss(model, loss, batch) with their batch.")
    return (
        "expected two views of one size, one in each call of the encoder, or both concatenated in "
        "one, or one in a momentum encoder's call, saw calls with gradient of images "
        f"{trained} and others of {others}, where images and labels of the batch number "
        f"{sorted(batch_sizes(batch))}. {' '.join(advice)}"
    )
