"""When a step starts and ends: in a training_step, or between a loop's calls of add_loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import DistributedDataParallel

from recon_aux.engine.autograd import reached
from recon_aux.engine.compiling import is_recomputing
from recon_aux.engine.modules import are_alike, largest_child, share_values
from recon_aux.engine.step import EncoderCall, OtherCall, Step, calls_behind, tensors_in
from recon_aux.engine.views import is_of, largest_views
from recon_aux.task.turns import version_of

# LightningModule's own methods, in either package, do nothing
_STUBS = {"lightning.pytorch.core.module", "pytorch_lightning.core.module"}

# calls that train: no step of a loop makes as many
_MANY_CALLS = 32

# calls without training that a loop's step keeps: the latest
_SPARE_CALLS = 16


class Driver:
    """Holds the running step, to which hooks hand what they see.

    Attributes:
        step: if one is running.
        after_call: called with the step after each call of an encoder; None in a loop.
        is_loop: whether the user's own loop trains. It may encode other images, too.
    """

    is_loop: bool

    def __init__(self) -> None:
        self.step: Step | None = None
        self.after_call: Callable[[Step], None] | None = None
        self.encoders: Sequence[nn.Module] = ()
        # the images' channels, to notice unknown momentum encoders; None: don't watch for them
        self.channels: int | None = None
        self.watching: finalize[[], Driver] | None = None
        self.is_encoding = False

    def __reduce__(self) -> tuple[type[Driver], tuple[()]]:
        """Leave the running step out of copies and pickles."""
        return type(self), ()

    def start(self, encoders: Sequence[nn.Module], channels: int | None = None) -> None:
        """Start a step, in which these encoders are recorded, and others watched for."""
        self.unwatch()
        self.step, self.encoders, self.channels = Step(), encoders, channels

    def record(self, step: Step, call: EncoderCall) -> None:
        """Note a call of an encoder."""
        step.calls.append(call)
        # asked in this order, compiled code doesn't depend on after_call
        if not torch.compiler.is_compiling() and self.after_call is not None:
            self.after_call(step)

    def watch(self) -> None:
        """From here on, note calls of any modules that may be momentum encoders."""
        if self.channels is not None and self.watching is None:
            hook = register_module_forward_hook(partial(_note, ref(self)))
            # a loop may end within its first step
            self.watching = finalize(self, hook.remove)

    def unwatch(self) -> None:
        """Stop watching for momentum encoders."""
        if self.watching is not None:
            self.watching()
        self.watching = None

    def feeds(self, head: nn.Module, received: Tensor, is_first: bool) -> bool | None:
        """Note and return whether a head receives an encoder's feature; None if that is unknown.

        Args:
            head: that is called.
            received: one of the tensors that it is called with.
            is_first: whether that is the first of them.
        """
        # a head may be run by a hook, before the encoder returns
        step = self.step
        if step is None or self.is_encoding or is_recomputing() or torch.compiler.is_compiling():
            return None
        calls = step.calls
        # between a loop's steps nothing is recorded
        if self.is_loop and not (calls and torch.is_grad_enabled()):
            return None
        with_gradient = [x for call in calls for x in call.returned]
        if received.requires_grad:
            fed = bool(reached(received, with_gradient))
        elif _share_memory(received, with_gradient):
            if is_first:
                step.detached.append(head)
            return True
        elif _share_memory(received, [call.output for call in calls]):
            fed = True
        else:
            # without gradient the graph doesn't show its origin; only the first step needs it
            if is_first and self.watching is not None:
                step.unsure.append(head)
            return None
        if is_first:
            (step.fed if fed else step.not_fed).append(head)
        return fed

    def may_feed(self, is_first: bool) -> bool:
        """Whether a tensor that a head receives counts as a feature, where ``feeds`` gives None."""
        if is_first or torch.compiler.is_compiling():
            return True
        return self.step is not None and any(not x.output.requires_grad for x in self.step.calls)

    def record_masked(self, head: nn.Module, masked: Tensor) -> None:
        """Note what a head received."""
        if self.step is not None and not masked.requires_grad:
            self.step.masked_without_gradient = True
        elif self.step is not None and not is_recomputing():
            self.step.masked.append(masked)

    def calls_of_method(self, step: Step, loss: Tensor, batch: Any) -> list[EncoderCall]:
        """Give the calls that belong to the method: without those of a probe, for example."""
        raise NotImplementedError


class TrainingStepDriver(Driver):
    """A step is one call of the model's ``training_step``."""

    is_loop = False

    def __init__(self) -> None:
        super().__init__()
        # versions of heads that a backward pass went through since the last step, outside a step
        self.trained_outside: dict[int, int] = {}

    def __deepcopy__(self, memo: Any) -> Driver:
        """Copy, but not within a step: a momentum encoder that is copied there is recorded."""
        return self if self.step is not None else type(self)()

    def start(self, encoders: Sequence[nn.Module], channels: int | None = None) -> None:
        """Start a step, in which these encoders are recorded."""
        super().start(encoders, channels)
        self.watch()
        self.trained_outside = {}

    def record_masked(self, head: nn.Module, masked: Tensor) -> None:
        """Note what a head received, or check that it isn't trained outside a step."""
        if self.step is not None:
            super().record_masked(head, masked)
        elif masked.requires_grad and head.training and not torch.compiler.is_compiling():
            _refuse_training_outside(head, masked, self.trained_outside)

    def calls_of_method(self, step: Step, loss: Tensor, batch: Any) -> list[EncoderCall]:
        """Drop the trained encoder's calls on which the loss doesn't depend."""
        its = calls_behind(loss, step.calls)
        step.misses_encoder = not its
        # one view may be encoded without gradient, or detached: then all calls count
        if len(largest_views(its)) < 2:
            return step.calls
        known = {id(call) for call in its}
        trained = {id(call.encoder) for call in its}
        return [c for c in step.calls if id(c) in known or id(c.encoder) not in trained]


class LoopDriver(Driver):
    """A step lasts from one ``add_loss`` to the next, whatever the loop encodes in between.

    Args:
        keeps_all_calls: those without gradient, too. False for a copied model: it may be only a
            teacher, and would keep images for nothing. True once it trains.
    """

    is_loop = True

    def __init__(self, keeps_all_calls: bool = False) -> None:
        super().__init__()
        self.keeps_all_calls = keeps_all_calls
        # whether the last loss was made in eval mode, as with frozen batch norm; None at first
        self.trains_in_eval: bool | None = None

    def record(self, step: Step, call: EncoderCall) -> None:
        """Note a call, unless it is of an evaluation."""
        with_gradient = call.output.requires_grad
        if torch.compiler.is_compiling():
            if with_gradient or call.in_training:
                step.calls.append(call)
            return
        self.keeps_all_calls |= with_gradient
        # a momentum encoder may be in eval mode throughout
        modes = [call.in_training, *(known.training for known in self.encoders)]
        is_training = any(modes) or self.trains_in_eval is not False
        if not with_gradient and not (is_training and self.keeps_all_calls):
            return
        _refuse_search_for_unused_parameters()
        if self._trains(call):
            # not before: watching gets in the way of torch.export
            self.watch()
            now = version_of(call.encoder.parameters())
            has_changed = step.versions.setdefault(id(call.encoder), now) != now
            _refuse_forgotten_loss(sum(map(self._trains, step.calls)), has_changed)
        else:
            self._make_room(step, with_gradient)
        step.calls.append(call)

    def _trains(self, call: EncoderCall) -> bool:
        """Whether this looks like a call of the encoder that is trained."""
        return call.output.requires_grad and (call.in_training or bool(self.trains_in_eval))

    def _make_room(self, step: Step, with_gradient: bool) -> None:
        alike = (call for call in step.calls if call.output.requires_grad == with_gradient)
        spare = [call for call in alike if not self._trains(call)]
        # keep more of those with gradient: the loss may still turn out to use them
        if len(spare) >= (_MANY_CALLS if with_gradient else _SPARE_CALLS):
            step.calls = [call for call in step.calls if call is not spare[0]]
            if with_gradient:
                step.masked = [x for x in step.masked if not reached(x, spare[0].returned)]

    def calls_of_method(self, step: Step, loss: Tensor, batch: Any) -> list[EncoderCall]:
        """Give the calls of the loss, then those without gradient: the batch's, then the latest."""
        its = calls_behind(loss, step.calls)
        if its:
            self.trains_in_eval = not all(call.in_training for call in its)
        others = [call for call in step.calls if not call.output.requires_grad]
        shown = [call for call in others if is_of(batch, call.image)]
        return its + shown + [call for call in reversed(others) if not is_of(batch, call.image)]


def _share_memory(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    # some tensors have no memory of their own, as sparse ones
    with suppress(RuntimeError, NotImplementedError):
        place = tensor.untyped_storage().data_ptr()
        return place in {x.untyped_storage().data_ptr() for x in others}
    return False


def _note(driver: ref[Driver], module: nn.Module, args: Any, result: Any) -> None:
    """Note what a module gave without gradient, if it took images, or is like the encoder."""
    its = None if torch.compiler.is_compiling() or torch._C._get_tracing_state() else driver()
    if its is None or its.step is None or its.is_encoding:
        return
    outputs = list(tensors_in(result))
    if any(x.requires_grad for x in outputs) or not outputs:
        return
    images = (x for x in tensors_in(args) if x.ndim == 4 and x.shape[1] == its.channels)
    image, first = next(images, None), its.encoders[0]
    # only forward is watched: a call of another method shows by the submodules that it runs
    part = largest_child(first)
    is_part = are_alike(module, part) and share_values(module, part)
    is_alike = is_part or are_alike(module, first)
    if (image is not None or is_alike) and not set(its.encoders) & set(module.modules()):
        its.step.others.append(OtherCall(module, image, {x.shape for x in outputs}, is_alike))


def driver_for(model: nn.Module, step_method: str) -> Driver:
    """Give the driver that suits a model."""
    has_step = has_training_step(model, step_method)
    return TrainingStepDriver() if has_step else LoopDriver(keeps_all_calls=True)


def has_training_step(model: nn.Module, step_method: str) -> bool:
    """Whether a model has a training step and optimizers of its own."""
    step, configure = (
        getattr(model, method, None) for method in (step_method, "configure_optimizers")
    )
    is_stub = getattr(step, "__module__", "") in _STUBS
    return callable(step) and callable(configure) and not is_stub


def _refuse_training_outside(head: nn.Module, masked: Tensor, versions: dict[int, int]) -> None:
    """Refuse to train a masked head outside the training_step that adds the loss.

    Computing a loss is not training yet. A head is trained if a backward pass went through it
    outside a step, and the head's weights have changed since.
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


def _refuse_forgotten_loss(calls: int, has_changed: bool) -> None:
    """Refuse a loop that goes on training the encoder without add_loss.

    Args:
        calls: how many calls of the encoder, since the last add_loss, look like training.
        has_changed: whether the encoder's weights have changed between these calls.
    """
    if has_changed or calls >= _MANY_CALLS:
        raise RuntimeError(
            "expected recon_aux.add_loss(model, loss) once a step, saw the encoder change or "
            f"{_MANY_CALLS} calls of it without. Call add_loss in each step. Around calls "
            "that don't train it, as an evaluation's or an attack's, use model.eval(), and "
            "torch.no_grad() where that is possible. To train on without the task: "
            "recon_aux.detach(model)."
        )


def _refuse_search_for_unused_parameters() -> None:
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
            "Or call recon_aux.ReconAux in the step, see docs/your_own_loop.md."
        )
