"""Run the task before the method's loss, in steps that go by the plan.

A GPU still works on the encoder then. The method's loss often makes the CPU wait for the GPU. What
begins after that keeps the GPU waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recon_aux.engine.discover import find_views
from recon_aux.engine.step import EarlyTask, Step, Views
from recon_aux.engine.views import is_of
from recon_aux.task import ReconAuxOutput
from recon_aux.task.splitter import as_feature

if TYPE_CHECKING:
    from recon_aux.engine.attachment import Attachment


def run_early(attached: Attachment, batch: Any, step: Step) -> None:
    """Run the task if a step has encoded all that its plan says."""
    plan, aux = attached.plan, attached.aux
    if plan is None or len(step.calls) != plan.calls or not aux.enabled:
        return
    # gradients that are measured have to be hooked first
    if aux.weight_is_due or attached.logs.is_due or _is_checkpointing():
        return
    views = find_views(attached, plan, step.calls, batch)
    # something else may have been encoded in between
    if views is None or plan.in_batch != all(is_of(batch, image) for image in views.images):
        return
    with torch.enable_grad():
        step.early = EarlyTask(views, aux.weight, run_task(attached, views, views.outputs))


def _is_checkpointing() -> bool:
    """Whether tensors are saved for the backward pass in another way, as by checkpointing."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(""):
            return False
    except RuntimeError:
        return True


def output_of(
    attached: Attachment, step: Step, views: Views, features: Sequence[Tensor]
) -> ReconAuxOutput:
    """Give what the task made of these views, or run it now."""
    early = step.early
    if early is None or early.views is not views or early.weight != attached.aux.weight:
        return run_task(attached, views, features)
    return early.output


def run_task(attached: Attachment, views: Views, features: Sequence[Tensor]) -> ReconAuxOutput:
    """Run the task on two views and their features."""
    aux = attached.aux
    if aux.weight > 0:
        attached.updates.verify(attached.encoder, aux)
    spatial = aux.decoder.spatial
    output: ReconAuxOutput = aux(views.images, [as_feature(y, spatial=spatial) for y in features])
    return output
