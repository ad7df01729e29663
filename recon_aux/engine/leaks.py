"""See to it that the method's loss sees no equivariant channels: refuse a leak, or warn of one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from recon_aux.engine.autograd import feed_each_other, gradients_of, reached
from recon_aux.engine.hooks import HeadMask, find_hooks
from recon_aux.engine.modules import describe_children, share_values, share_weights
from recon_aux.engine.plan import Plan
from recon_aux.engine.step import EncoderCall, Step, Views, calls_behind
from recon_aux.engine.views import is_of

if TYPE_CHECKING:
    from recon_aux.engine.attachment import Attachment


def check_heads(attached: Attachment, step: Step, online: Sequence[EncoderCall]) -> None:
    """Unmask other encoders' momentum heads, and refuse heads that see mixed channels.

    Args:
        attached: whose heads they are.
        step: what they received.
        online: the calls that train the encoder.

    Raises:
        RuntimeError: if equivariant channels reach the loss through the heads.
    """
    fed = {*step.fed, *step.detached}
    attached.unmask_momentum_heads([head for head in step.not_fed if head not in fed])
    _warn_of_shared_heads(attached, [head for head in step.not_fed if head in fed])
    _warn_of_probes(attached, step)
    _refuse_mixing_heads(attached, step, online)


def _refuse_mixing_heads(attached: Attachment, step: Step, calls: Sequence[EncoderCall]) -> None:
    """Refuse heads that take another head's output, or features whose channels were mixed."""
    if feed_each_other(step.masked):
        raise RuntimeError(
            "expected heads that take the encoder's features, but of "
            f"{attached.names(attached.heads)} one takes what another gives. A part of that would "
            "be zeroed. Pass heads=[...]: those that take the features themselves."
        )
    if any(_sees_equivariant(attached, call, step.masked) for call in calls):
        raise RuntimeError(_leak(attached, "mixed into"))


def refuse_bypassed_heads(
    attached: Attachment, plan: Plan, step: Step, loss: Tensor, calls: Sequence[EncoderCall]
) -> None:
    """Refuse a loss that sees equivariant channels without a masked head in between."""
    plan.steps += 1
    # such a loss may have weight 0 at first: look in step 1, 2, 4, ..., 64, 128, 192, ...
    is_due = plan.steps.bit_count() == 1 or plan.steps % 64 == 0
    if plan.bypasses_heads and not is_due:
        return
    its = calls_behind(loss, calls, avoiding=step.masked)
    plan.bypasses_heads |= bool(its)
    if any(_sees_equivariant(attached, call, [loss]) for call in its):
        raise RuntimeError(_leak(attached, "past"))


def _sees_equivariant(attached: Attachment, call: EncoderCall, results: Sequence[Tensor]) -> bool:
    """Whether some results depend on the equivariant channels of a call's feature."""
    own = gradients_of([attached.aux.equivariant(call.feature)], call.sources)
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
        "If the encoder returns more than the heads receive, pass features=lambda output: what "
        "they receive. Or pass equivariant_dim=0 to train without a split."
        + describe_replaced(attached)
    )


def warn_of_unmasked_targets(
    attached: Attachment, plan: Plan, step: Step, loss: Tensor, views: Views, batch: Any
) -> None:
    """Warn if features that the loss sees without gradient pass no masked head.

    They are a momentum encoder's, in the model or outside, or the encoder's own. What happens to
    them isn't in the graph, so this is as much as can be seen.
    """
    its = calls_behind(loss, step.calls)
    trained = {id(call.image) for call in its}
    viewed, shape = {id(image) for image in views.images}, views.images[1].shape
    targets = [
        call
        for call in step.calls
        if not any(call is one for one in its)
        and call.image.shape == shape
        and (
            not share_weights(call.encoder, plan.encoder)
            or plan.other_is_momentum
            or id(call.image) in viewed - trained
        )
        # between a loop's steps an encoder may be evaluated
        and (
            not attached.driver.is_loop
            or id(call.image) in trained | viewed
            or is_of(batch, call.image)
        )
    ]
    outputs = [call.output for call in targets if call.output.requires_grad]
    passes_a_mask = step.masked_without_gradient or any(reached(x, outputs) for x in step.masked)
    # a head that was copied brought a mask along
    has_other_mask = any(
        isinstance(hook.callback, HeadMask) and hook not in attached.hooks
        for hook in find_hooks(attached.model)
    )
    inside = set(attached.model.modules())
    names_outside = any(head not in inside for head in attached.heads)
    in_loop = attached.driver.is_loop
    unknown = unknown_encoders(step, plan.encoder, trained | viewed if in_loop else None, batch)
    if not unknown and all(call.output.requires_grad for call in step.calls):
        _warn_of_unsure_heads(attached, step)
    if passes_a_mask:
        unknown = [] if names_outside else [module for module in unknown if module not in inside]
    if has_other_mask or not (unknown or (targets and not passes_a_mask)):
        return
    if unknown:
        seen = f"features of {describe_unknown(attached, unknown)}"
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


def unknown_encoders(
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

    def counts(image: Tensor | None) -> bool:
        if image is None:
            return known is None
        is_near = image.shape in images if known is None else id(image) in known
        return is_near or is_of(batch, image)

    return [
        call.module
        for call in step.others
        if (call.is_alike or (call.shapes & features and share_values(call.module, trained)))
        and counts(call.image)
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


def _warn_of_probes(attached: Attachment, step: Step) -> None:
    probes = [head for head in step.detached if head not in step.fed]
    seen = "receive them detached, as probes do"
    _warn_without_gradient(attached, probes, seen, "they are probes")


def _warn_of_unsure_heads(attached: Attachment, step: Step) -> None:
    unsure = [head for head in step.unsure if head not in {*step.fed, *step.detached}]
    seen = "receive something without gradient, and can't see what"
    _warn_without_gradient(attached, unsure, seen, "these are other features, as a table's")


def _warn_without_gradient(
    attached: Attachment, heads: Sequence[nn.Module], seen: str, why: str
) -> None:
    if heads:
        names = sorted({attached.name(head) for head in heads})
        warnings.warn(
            f"recon_aux: expected heads that receive the encoder's features, saw {names} {seen}. "
            f"Their last channels are zeroed. If {why}, pass heads=[...] without {names}, of "
            f"these: {describe_children(attached.model)}.",
            stacklevel=2,
        )


def describe_unknown(attached: Attachment, unknown: Sequence[nn.Module]) -> str:
    """Name the last module: it may contain the others, since their calls end before its own."""
    its = unknown[-1]
    name, kind = attached.name(its), type(its).__name__
    return f"{name} ({kind})" if name != kind else f"a {kind} that isn't in the model"


def describe_replaced(attached: Attachment) -> str:
    """Say so, for an error, if the encoder or a head was replaced since attach."""
    its = (hook for hook in attached.hooks if hook.module in attached.encoders)
    if any(hook.callback is not attached.recorder for hook in its):
        return " Since attach, another model got this encoder: detach each that still is attached."
    masks = ((hook.callback, hook.module) for hook in attached.hooks)
    known = {mask.name: head for mask, head in masks if isinstance(mask, HeadMask)}
    known[attached.aux.encoder_name] = attached.encoder
    now = dict(attached.model.named_modules())
    # torch.compile replaces a module, but its wrapper keeps it in the model
    gone = [name for name in known if name and name in now and known[name] not in now.values()]
    if not gone:
        return ""
    return (
        f" Since attach, {gone} was replaced: load new weights into the old module. Or call "
        "recon_aux.detach(model) before it is replaced, then attach, and make the optimizer."
    )
