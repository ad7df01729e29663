"""Run the task before the method's loss, in steps that go by the plan.

At that time a GPU still works on the encoder. The method's loss often makes the CPU wait for the
GPU. If the task began after that, the GPU would have to wait for the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recon_aux.engine.discover import find_views, refuse_changed, warn_of_changed_features
from recon_aux.engine.step import EarlyTask, Step, Views, version_in_place
from recon_aux.engine.views import is_of
from recon_aux.task import ReconAuxOutput
from recon_aux.task.task import on_trial

if TYPE_CHECKING:
    from recon_aux.engine.attachment import Attachment


def run_early(attached: Attachment, batch: Any, step: Step) -> None:
    """Run the task if a step has encoded all that its plan says."""
    plan, aux = attached.plan, attached.aux
    if plan is None or len(step.calls) != plan.calls or not aux.enabled:
        return
    # gradients that are measured have to be hooked first
    if aux.weight_is_due or attached.logs.is_due or _saves_otherwise():
        return
    # the last view may be encoded without gradient, but the task needs it. Errors are left to the
    # run after the loss: the method may still skip the step
    with suppress(Exception), torch.enable_grad(), on_trial(aux) as keep:
        views = find_views(attached, plan, step.calls, batch)
        # something else may have been encoded in between
        if views is None or plan.in_batch != all(is_of(batch, image) for image in views.images):
            return
        # else the late run refuses it
        refuse_changed(step, views)
        versions = _versions(step)
        output = aux(views.images, views.features)
        step.early = EarlyTask(views, aux.weight, versions, output, keep)


def _saves_otherwise() -> bool:
    """Whether tensors are saved for the backward pass in another way or not at all."""
    if torch.is_inference_mode_enabled():
        return True
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(""):
            return False
    except RuntimeError:
        return True


def _versions(step: Step) -> list[tuple[int | None, bool]]:
    """Give the version of each encoder output, and whether it has a gradient."""
    outputs = [call.output for call in step.calls]
    return [(version_in_place(x), x.requires_grad) for x in outputs]


def drop_if_outdated(attached: Attachment, step: Step) -> None:
    """Drop the task's early output, if something that it depends on has changed since."""
    early, plan = step.early, attached.plan
    if early is None or plan is None:
        return
    has_changed = early.versions != _versions(step)
    if has_changed or len(step.calls) != plan.calls or early.weight != attached.aux.weight:
        step.early = None
    if has_changed:
        # each step will change its features: never run early again
        plan.calls = None
        warn_of_changed_features(step, early.views)


def output_of(
    attached: Attachment, step: Step, views: Views, features: Sequence[Tensor]
) -> ReconAuxOutput:
    """Give what the task made of these views, or run it now."""
    early, aux = step.early, attached.aux
    if aux.weight > 0:
        attached.updates.verify(attached.encoder, aux)
    if early is None:
        refuse_changed(step, views)
        output: ReconAuxOutput = aux(views.images, features)
        return output
    early.keep()
    return early.output
