"""Which hooks a live model has, and the plan that its first step found."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recon_aux.engine.auto_weight import AttachedReconAux, AutoWeight
from recon_aux.engine.compiling import around_compiled, not_compiled, run_eagerly
from recon_aux.engine.discover import discover, is_paused, replay, warn_of_unlike
from recon_aux.engine.drivers import refuse_manual_optimization
from recon_aux.engine.early import drop_if_outdated, output_of, run_early
from recon_aux.engine.hooks import EncoderRecorder, HeadMask, MethodHook, find_hooks
from recon_aux.engine.logs import Logs
from recon_aux.engine.modules import (
    are_alike,
    describe_children,
    find_copies,
    find_momentum_heads,
    find_untrained,
    uncompiled,
    unwrap,
)
from recon_aux.engine.optimizers import DecoderGroup, add_decoder_params
from recon_aux.engine.plan import Plan
from recon_aux.engine.step import Step
from recon_aux.engine.updates import DecoderUpdates

_STEP = "training_step"


class Attachment:
    """The hooks of one model.

    Args:
        model: with a ``recon_aux``.
        encoders: the one given as ``backbone``, then the given momentum encoders.
        backbone_method: the encoders' method that a step calls.
        recorder: records the encoders' calls.
        views: how many views are concatenated in one call.
        interleaved: whether they take turns there, image by image.
        decoder_group: the decoder's own learning rate and weight decay.
        step_method: the model's method that returns the method's loss.
        logs: of what a step is made of.
    """

    def __init__(
        self,
        model: nn.Module,
        encoders: Sequence[nn.Module],
        backbone_method: str,
        recorder: EncoderRecorder,
        views: int | None,
        interleaved: bool,
        decoder_group: DecoderGroup,
        step_method: str,
        logs: Logs,
    ) -> None:
        self.model = model
        self.backbone_method = backbone_method
        self.view_count = views
        self.interleaved = interleaved
        self.decoder_group = decoder_group
        self.step_method = step_method
        self.logs = logs
        self.plan: Plan | None = None
        self.driver = recorder.driver
        self.recorder = recorder
        self.encoders: list[nn.Module] = []
        self.heads: list[nn.Module] = []
        self.hooks: list[MethodHook] = []
        for encoder in encoders:
            self.record(encoder)
        # these stay recorded, wherever they stand
        self.named = list(self.encoders)
        self.record_copies()
        self.auto_weight = AutoWeight()
        self.updates = DecoderUpdates()
        self.warned_of_frozen = False
        if type(model).forward is nn.Sequential.forward:
            self.hooks.append(MethodHook(model, "forward", _run_children))
        if not self.driver.is_loop:
            self.hooks += [
                MethodHook(model, step_method, self.run_step),
                MethodHook(model, "configure_optimizers", self.configure_optimizers),
            ]

    @property
    def aux(self) -> AttachedReconAux:
        """The model's ReconAux."""
        aux: AttachedReconAux = self.model.get_submodule("recon_aux")  # type: ignore[assignment]
        return aux

    @property
    def encoder(self) -> nn.Module:
        """The encoder that is trained."""
        return self.encoders[0] if self.plan is None else self.plan.encoder

    @property
    def trained_encoder(self) -> nn.Module:
        """The encoder that is trained, also before the first step after a checkpoint was loaded."""
        saved = self.aux.encoder_name
        named = ((uncompiled(name), module) for name, module in self.model.named_modules())
        return next((module for name, module in named if name and name == saved), self.encoder)

    def name(self, module: nn.Module) -> str:
        """Give a module's name in the model, or its class's."""
        names = (name for name, known in self.model.named_modules() if known is module)
        return uncompiled(next(names, type(module).__name__))

    def names(self, modules: Iterable[nn.Module]) -> list[str]:
        """Give the names of modules."""
        return [self.name(module) for module in modules]

    def record(self, encoder: nn.Module) -> None:
        """Record an encoder, unless it is recorded."""
        # torch.compile's wrapper has no methods of its own but forward
        encoder = encoder if self.backbone_method == "forward" else unwrap(encoder)
        if not any(encoder is known for known in self.encoders):
            self.encoders.append(encoder)
            self.hooks.append(self.recorder.hook(encoder, self.backbone_method))

    def record_copies(self) -> None:
        """Record momentum encoders, which give the other view in MoCo. Drop replaced ones."""
        inside = {*self.model.modules(), *self.named, self.encoder}
        for hook in find_hooks(*(x for x in self.encoders if x not in inside)):
            hook.remove()
        self.encoders = [x for x in self.encoders if x in inside]
        self.hooks = [x for x in self.hooks if x.module in inside or x.module in self.heads]
        for twin in find_copies(self.model, self.encoders[0]):
            self.record(twin)

    def mask_heads(self, heads: Sequence[nn.Module]) -> None:
        """Hide the equivariant channels from heads."""
        equivariant_dim = self.aux.splitter.equivariant_dim
        for head in heads:
            if equivariant_dim and not any(head is known for known in self.heads):
                self.heads.append(head)
                mask = HeadMask(self.recorder.shape, equivariant_dim, self.driver, self.name(head))
                self.hooks.append(MethodHook(head, "forward", mask))

    def mask_momentum_heads(self) -> None:
        """Mask the heads' momentum copies, too, unless the user has listed such a copy."""
        untrained = find_untrained(self.model)
        momentum = untrained.intersection(self.heads)
        trained = [head for head in self.heads if head not in untrained]
        unnamed = [head for head in trained if not any(are_alike(x, head) for x in momentum)]
        self.mask_heads(self._momentum_heads(unnamed))

    def unmask_momentum_heads(self, heads: Sequence[nn.Module]) -> None:
        """Unmask the momentum copies of these heads, which take another encoder's features."""
        others = self._momentum_heads(heads)
        self.heads = [head for head in self.heads if head not in others]
        for hook in self.hooks:
            if isinstance(hook.callback, HeadMask) and hook.module in others:
                hook.remove()
        self.hooks = [hook for hook in self.hooks if hook.callback is not None]

    def _momentum_heads(self, heads: Sequence[nn.Module]) -> list[nn.Module]:
        copies = [known for known in self.encoders if known is not self.encoder]
        return find_momentum_heads(self.model, self.encoder, copies, heads)

    def remove(self) -> None:
        """Take all hooks off again."""
        self.driver.unwatch()
        hooks = [*self.hooks, *find_hooks(self.model, *self.heads)]
        while hooks:
            for hook in hooks:
                hook.remove()
            # a copied module may carry another hook of ours
            hooks = find_hooks(self.model, *self.heads)

    def __getstate__(self) -> dict[str, Any]:
        """Save the hooks of encoders and heads here: those modules are pickled without hooks."""
        found = [h for h in find_hooks(self.model, *self.heads) if h.module is not self.model]
        others = [(hook.module, hook.method, hook.callback) for hook in found]
        own = [hook for hook in self.hooks if hook.module is self.model]
        return {**vars(self), "hooks": own, "others": others}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on in a copy of the model. A copy of the encoder alone records nothing."""
        for module, method, callback in state.pop("others"):
            if not isinstance(vars(module).get(method), MethodHook):
                MethodHook(module, method, callback)
        vars(self).update(state)
        if self.driver.is_loop:
            self.driver.start(self.encoders)

    @not_compiled
    def start(self) -> None:
        """Start a step."""
        # momentum encoders may have been made since
        if self.plan is None or self.plan.other_is_momentum:
            self.record_copies()
        watches = self.plan is None and self.aux.splitter.equivariant_dim
        if watches:
            self.mask_momentum_heads()
        self.driver.start(self.encoders, self.aux.image_channels if watches else None)

    @not_compiled
    def stop(self) -> None:
        """Drop the step."""
        self.driver.step = self.driver.after_call = None
        self.driver.unwatch()

    # the method's own step may be compiled, the code around it may not
    @around_compiled
    def run_step(self, model: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the method's training step and add the task's loss to what it returns."""
        trains = torch.is_grad_enabled() and (model.training or self.step_method == _STEP)
        # validation, inference, or a step that calls itself: the outer call is the step
        if not trains or self.driver.step is not None:
            return call(*args, **kwargs)
        try:
            self.start()
            self.driver.after_call = partial(run_early, self, (args, kwargs))
            # these steps read the graph, which compiled code hides
            if self.plan is None or self.aux.weight_is_due:
                result = run_eagerly(call, *args, **kwargs)
            else:
                result = call(*args, **kwargs)
            if self.step_method == _STEP:
                refuse_manual_optimization(self.model)
            if result is None:
                return None
            loss = result.get("loss") if isinstance(result, Mapping) else result
            if not isinstance(loss, Tensor):
                got = sorted(result) if isinstance(result, Mapping) else type(result).__name__
                raise TypeError(
                    f"expected {self.step_method} to return the loss, a dict with 'loss', or None, "
                    f"got {got}. Return the loss as a tensor."
                )
            return _with_loss(result, self.add_loss(loss, (args, kwargs)))
        finally:
            self.stop()

    @not_compiled
    def add_loss(self, loss: Tensor, batch: Any) -> Tensor:
        """Add the task's loss to the method's."""
        if loss.numel() != 1:
            raise ValueError(f"expected one number as loss, got {(*loss.shape,)}. Pass its mean.")
        step, aux = self.driver.step or Step(), self.aux
        if self.plan is None:
            plan, views = discover(self, step, loss, batch)
            if views is not None and loss.requires_grad:
                self.plan = plan
                aux.encoder_name = self.name(plan.encoder)
        else:
            plan = self.plan
            drop_if_outdated(self, step)
            views = replay(self, plan, step, loss, batch)
        if views is not None:
            warn_of_unlike(plan, views.images)
        elif not is_paused(self):
            _warn_of_frozen(self)
        if views is None or not aux.enabled:
            return loss
        features = list(views.features)
        if loss.requires_grad:
            outputs = [call.output for call in views.online]
            if aux.has_auto_weight:
                features = self.auto_weight(aux, loss, features, outputs)
            # before the weight is set, the task's gradient doesn't reach the encoder
            if not aux.weight_is_due:
                features = self.logs.measure(loss, features, outputs)
        output = output_of(self, step, views, features)
        self.logs.log(self.model, aux, output, loss, len(views.images[0]))
        total: Tensor = loss + output.loss
        return total

    def configure_optimizers(
        self, model: nn.Module, configure: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Let the optimizers that the model configures train the decoder, too."""
        configured = configure(*args, **kwargs)
        add_decoder_params(configured, self.aux, self.encoders, self.decoder_group)
        return configured


def _run_children(model: nn.Module, call: Any, args: Any, kwargs: Any) -> Any:
    """Run an nn.Sequential without the decoder, which is a child of it, too."""
    value = args[0] if args else kwargs["input"]
    for name, child in model._modules.items():
        value = value if name == "recon_aux" or child is None else child(value)
    return value


def _warn_of_frozen(attached: Attachment) -> None:
    if not attached.warned_of_frozen:
        warnings.warn(
            f"recon_aux: the encoder {attached.name(attached.encoder)} is frozen, so nothing is "
            "rebuilt. If another module is trained, pass backbone= to attach: one of "
            f"{describe_children(attached.model)}",
            stacklevel=2,
        )
    attached.warned_of_frozen = True


def _with_loss(result: Any, loss: Tensor) -> Any:
    """Put another loss into what a step returned."""
    if is_dataclass(result):
        # as transformers' outputs, whose entries are attributes, too
        return replace(result, loss=loss)  # type: ignore[type-var]
    if not isinstance(result, Mapping):
        return loss
    changed: Any = copy.copy(result)
    changed["loss"] = loss
    return changed
