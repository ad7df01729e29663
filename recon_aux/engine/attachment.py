"""What an attached model does in a training step, and between steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recon_aux.engine.auto_weight import AttachedReconAux, Balance
from recon_aux.engine.autograd import reached
from recon_aux.engine.compiled import around_compiled, not_compiled, run_eagerly
from recon_aux.engine.hooks import Capture, Door, EncoderCall, Mask, doors, watch
from recon_aux.engine.modules import (
    describe_children,
    find_copies,
    find_momentum_heads,
    is_frozen,
    uncompiled,
    unwrap,
)
from recon_aux.engine.optimizers import Settings, enroll
from recon_aux.engine.verify import (
    TrainedTogether,
    are_fed_by_others,
    gradients_of,
    gradients_to,
    past_masks,
    trained_encoders,
)
from recon_aux.engine.views import is_of, largest_views, two_views, verify_views
from recon_aux.task.splitter import as_feature

# where LightningModule is, in either package
_STUBS = {"lightning.pytorch.core.module", "pytorch_lightning.core.module"}


class Attachment:
    """What one model was given: doors, and what they have seen in the current step."""

    def __init__(
        self,
        model: nn.Module,
        encoder: nn.Module,
        backbone_method: str,
        capture: Capture,
        views: int | None,
        settings: Settings,
    ) -> None:
        self.model = model
        self.settings = settings
        self.backbone_method = backbone_method
        self.encoder = self._with_method(encoder)
        self.capture = capture
        self.views = views
        self.verified = False
        self.heads: list[nn.Module] = []
        self.mask: Mask | None = None
        self.watched = capture.encoders = [self.encoder]
        self.doors = [watch(self.encoder, backbone_method, capture)]
        self.watch_copies()
        self.steps = 0
        # whether the loss depended on features past the heads, if without gradient
        self.was_past = False
        self.other_is_a_copys = False
        self.was_frozen = False
        # whether a step may encode what isn't its views, as a loop between steps
        self.encodes_others = self.in_a_loop = not trains_by_itself(model)
        self.usual_calls = 0
        # whether the model's own optimizers train the decoder; if not, see whether any does
        self.enrolled = False
        self.trained_together = TrainedTogether()
        self.balance = Balance()
        if not self.in_a_loop:
            self.doors += [
                Door(model, "training_step", self.step),
                Door(model, "configure_optimizers", self.enroll),
            ]

    @property
    def aux(self) -> AttachedReconAux:
        """The model's ReconAux."""
        aux: AttachedReconAux = self.model.get_submodule("recon_aux")  # type: ignore[assignment]
        return aux

    @property
    def trained_encoder(self) -> nn.Module:
        """The encoder that is trained, also before the first step after a checkpoint was loaded."""
        saved = self.aux.encoder_name
        named = ((uncompiled(name), module) for name, module in self.model.named_modules())
        return next((module for name, module in named if name and name == saved), self.encoder)

    def watch_copies(self) -> None:
        """Watch momentum encoders, too: their features are the other view's in MoCo."""
        for copy in map(self._with_method, find_copies(self.model, self.encoder)):
            if not any(copy is known for known in self.watched):
                self.watched.append(copy)
                self.doors.append(watch(copy, self.backbone_method, self.capture))

    def hide_from_copies(self) -> None:
        """Hide the equivariant channels from momentum heads, too, unless one was named."""
        inside = {id(module) for module in self.model.modules()}
        if self.mask and not any(is_frozen(head) and id(head) in inside for head in self.heads):
            copies = [known for known in self.watched if known is not self.encoder]
            copied = find_momentum_heads(self.model, self.encoder, copies, self.heads)
            self.hide_from(copied, self.mask)

    def _with_method(self, encoder: nn.Module) -> nn.Module:
        # torch.compile's wrapper has no methods of its own but forward
        return encoder if self.backbone_method == "forward" else unwrap(encoder)

    def hide_from(self, heads: Sequence[nn.Module], mask: Mask) -> None:
        """Hide the equivariant channels from the heads."""
        self.mask = self.capture.mask = mask
        for head in heads:
            if not any(head is known for known in self.heads):
                self.heads.append(head)
                self.doors.append(Door(head, "forward", mask))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on in a copy of the model; a copy of the encoder alone sees nothing."""
        vars(self).update(state)
        self.capture.encoders, self.capture.mask = self.watched, self.mask
        if self.in_a_loop:
            self.capture.start(in_a_loop=True)

    # what the method does in its step may be compiled, what is done around it not
    @around_compiled
    def step(self, model: nn.Module, training_step: Callable[..., Any], args: Any, kw: Any) -> Any:
        """Run the method's training step and add the reconstruction loss to what it returns."""
        if not torch.is_grad_enabled():
            # validation by the training step
            return training_step(*args, **kw)
        self.start()
        try:
            # where the weight is due, gradients are to be seen
            if self.verified and not self.aux.weight_is_due:
                result = training_step(*args, **kw)
            else:
                result = run_eagerly(training_step, *args, **kw)
            refuse_manual_optimization(self.model)
            if result is None:
                return None
            loss = result.get("loss") if isinstance(result, Mapping) else result
            if not isinstance(loss, Tensor):
                raise TypeError(
                    "expected training_step to return the loss, a dict with 'loss', or None, got "
                    f"{sorted(result) if isinstance(result, Mapping) else type(result).__name__}"
                )
            total = self.add_loss(loss, (args, kw))
            return {**result, "loss": total} if isinstance(result, Mapping) else total
        finally:
            self.stop()

    @not_compiled
    def start(self) -> None:
        """Forget what was seen, and look from here on."""
        if not self.verified or self.other_is_a_copys:
            # momentum encoders may have been made since
            self.watch_copies()
        if not self.verified:
            self.hide_from_copies()
        self.capture.start(in_a_loop=self.in_a_loop)
        if self.mask:
            self.mask.start()
            # no more where it is compiled, perhaps, after the first step
            self.mask.without_gradient &= self.verified

    @not_compiled
    def stop(self) -> None:
        """Forget what was seen, and look no more."""
        self.capture.stop()
        if self.mask:
            self.mask.masked = None

    @not_compiled
    def add_loss(self, loss: Tensor, given: Any) -> Tensor:
        """Add the reconstruction loss to the method's."""
        calls = self._calls_of(loss, given)
        online = [call for call in calls if call.output.requires_grad]
        if not self.verified and online and loss.requires_grad:
            self._verify_encoder(loss, online)
        if not self.verified and online:
            self._tell_of_unmasked(calls, online, given)
        online = [call for call in online if call.encoder is self.encoder]
        if not online:
            candidates = [self.encoder] if self.verified else self.watched
            if not any(p.requires_grad for e in candidates for p in e.parameters()):
                self._tell_of_frozen()
                return loss
            raise RuntimeError(self._no_call())
        if self.mask and loss.requires_grad:
            self._verify_mask(loss, [call.output for call in online], self.mask.masked or [])
        views, outputs = two_views(calls, online, given, self.views)
        if not self.verified:
            verify_views(views, given, self.views)
            self.verified = loss.requires_grad
        self.other_is_a_copys = not outputs[1].requires_grad
        if not self.aux.enabled:
            return loss
        if not self.enrolled and self.aux.weight > 0:
            self.trained_together.verify(self.encoder, self.aux)
        features = list(outputs)
        if self.aux.is_balanced and loss.requires_grad:
            features = self.balance(self.aux, loss, features, [call.output for call in online])
        output = self.aux(views, [self._feature(y) for y in features])
        self._log("recon_aux/loss", output.unweighted_loss, len(views[0]))
        if self.aux.is_balanced:
            self._log("recon_aux/weight", torch.tensor(self.aux.weight), len(views[0]))
        total: Tensor = loss + output.loss
        return total

    def _calls_of(self, loss: Tensor, given: Any) -> list[EncoderCall]:
        """Give the step's calls, without what the loss doesn't depend on: a probe's, say."""
        calls = self.capture.calls
        is_usual = self.verified and len(calls) == self.usual_calls
        if not loss.requires_grad or (is_usual and not self.encodes_others):
            return calls
        belongs = reached(loss, [call.output for call in calls])
        its = [call for call, is_its in zip(calls, belongs, strict=True) if is_its]
        if not self.in_a_loop:
            self.usual_calls = len(calls)
            # one may be encoded without gradient, or detached: both have to be among the loss's
            if len(largest_views(its)) < 2:
                return calls
            known = {id(call) for call in its}
            trained = {id(call.encoder) for call in its}
            kept = [c for c in calls if id(c) in known or id(c.encoder) not in trained]
            self.encodes_others |= len(kept) < len(calls)
            return kept
        # in a loop, calls without gradient may be others': the batch tells, or the last are its
        others = [call for call in calls if not call.output.requires_grad]
        shown = [call for call in others if is_of(given, call.image)]
        return its + shown + [call for call in reversed(others) if not is_of(given, call.image)]

    def enroll(self, model: nn.Module, configure: Callable[..., Any], args: Any, kw: Any) -> Any:
        """Let the optimizers that the model configures train the decoder, too."""
        configured = configure(*args, **kw)
        enroll(configured, self.aux, self.watched, self.settings)
        self.enrolled = True
        return configured

    def _tell_of_frozen(self) -> None:
        if not self.was_frozen:
            warnings.warn(
                f"recon_aux: the encoder {self._name(self.encoder)} is frozen; nothing is rebuilt "
                "until it is trained; if another is, backbone= tells which, of these: "
                f"{describe_children(self.model)}",
                stacklevel=2,
            )
        self.was_frozen = True

    def _tell_of_unmasked(
        self, calls: Sequence[EncoderCall], online: Sequence[EncoderCall], given: Any
    ) -> None:
        momentum = [call for call in calls if call.encoder is not self.encoder]
        if self.in_a_loop:
            # it may be evaluated between steps
            trained = {id(call.image) for call in online}
            momentum = [c for c in momentum if id(c.image) in trained or is_of(given, c.image)]
        if self.mask and momentum and not self._is_masked([call.output for call in momentum]):
            warnings.warn(
                "recon_aux: expected a momentum encoder's features to go through a head that is "
                f"masked, saw {self._name(momentum[0].encoder)} called and none of "
                f"{[self._name(head) for head in self.heads]} without gradient; if the method's "
                "loss compares with what it gives, it sees the equivariant channels: heads= tells "
                "the momentum encoder's heads, too, of these: "
                f"{describe_children(self.model)}; equivariant_dim=0 trains without a split",
                stacklevel=2,
            )

    def _is_masked(self, outputs: Sequence[Tensor]) -> bool:
        """Whether some head, as far as can be told, gets what a momentum encoder gave."""
        assert self.mask is not None
        live = [output for output in outputs if output.requires_grad]
        return (
            self.mask.without_gradient
            or any(any(reached(x, live)) for x in self.mask.masked or [] if live)
            # a head that was copied brought a mask along
            or any(
                isinstance(door.guard, Mask) and door.guard is not self.mask
                for door in doors(self.model)
            )
        )

    def _no_call(self) -> str:
        where = "each step, before add_loss," if self.in_a_loop else "training_step"
        return (
            f"expected {where} to call {self.backbone_method} of the encoder "
            f"{self._name(self.encoder)} with gradient, saw {len(self.capture.calls)} calls "
            "without and none with; backbone= tells which of these is the encoder: "
            f"{describe_children(self.model)}; backbone_method= tells what of it is called"
            + "; one step has one add_loss"
            * self.in_a_loop
        )

    def _verify_encoder(self, loss: Tensor, online: list[EncoderCall]) -> None:
        encoders = trained_encoders(loss, online)
        if len(encoders) != 1:
            raise RuntimeError(
                "expected the method's loss to train one encoder, but it depends on "
                f"{[self._name(encoder) for encoder in encoders] or 'none'} of those like "
                f"{self._name(self.encoder)}; backbone= tells which it is, of these: "
                f"{describe_children(self.model)}; {self._advice(encoders)}"
            )
        # names are a first guess: a teacher may be called backbone
        (self.encoder,) = encoders
        self.aux.encoder_name = self._name(self.encoder)

    def _advice(self, encoders: Sequence[nn.Module]) -> str:
        if encoders:
            return (
                "what a momentum encoder gives is to be detached, and two that are alike can't "
                "both be trained"
            )
        if self.capture.features is not None:
            return (
                "features= has to give a tensor that is in the output, as last_hidden_state, not "
                "one that is made of it, as last_hidden_state[:, 0]"
            )
        return (
            "a warm-up of the heads needs encoder.requires_grad_(False), not a feature that is "
            "detached"
        )

    def _verify_mask(self, loss: Tensor, outputs: list[Tensor], masked: list[Tensor]) -> None:
        """Check every step, since heads may be exchanged, but not always look at gradients."""
        if not self.verified and are_fed_by_others(masked):
            raise RuntimeError(
                "expected heads that take the encoder's features, but of "
                f"{[self._name(head) for head in self.heads]} one takes what another gives, and "
                "would lose a part of that; heads= tells those that take the features themselves"
            )
        self.steps += 1
        # in the 1st, 2nd, 4th, 8th, ... step, too: what weighs nothing at first, may later
        is_due = not self.was_past or self.steps.bit_count() == 1
        past = past_masks(loss, outputs, masked) if is_due else []
        gradients = [] if self.verified else gradients_to(outputs, masked)
        if past:
            gradients += gradients_of([loss], past)
            self.was_past = True
        if any(self.aux.equivariant(self._feature(g)).any() for g in gradients):
            raise RuntimeError(
                "expected the method's loss to see the invariant channels alone, but it sees the "
                f"equivariant ones {'past' if past else 'mixed into'} what the heads "
                f"{[self._name(head) for head in self.heads]} receive; heads= tells every module "
                "that takes the encoder's features as they are, of these: "
                f"{describe_children(self.model)}; equivariant_dim=0 trains without a split"
            )

    def _feature(self, output: Tensor) -> Tensor:
        return as_feature(output, spatial=self.aux.decoder.spatial)

    def _name(self, module: nn.Module) -> str:
        names = (name for name, known in self.model.named_modules() if known is module)
        return uncompiled(next(names, type(module).__name__))

    def _log(self, name: str, value: Tensor, batch_size: int) -> None:
        try:
            trainer = getattr(self.model, "trainer", None)
            # a step that is called by hand has none, or one that isn't training
            in_training = trainer is not None and getattr(trainer, "training", True)
        except (RuntimeError, ReferenceError):  # Lightning's ways to say that there is none
            return
        log: Any = getattr(self.model, "log", None)
        if in_training and callable(log):
            log(name, value, batch_size=batch_size)


def trains_by_itself(model: nn.Module) -> bool:
    """Whether a model has a training step and optimizers, or is trained in a loop of its user's."""
    step, configure = (
        getattr(model, method, None) for method in ("training_step", "configure_optimizers")
    )
    # LightningModule's own does nothing
    is_none = getattr(step, "__module__", "") in _STUBS
    return callable(step) and callable(configure) and not is_none


def refuse_manual_optimization(model: nn.Module) -> None:
    """Say no to a model whose losses don't pass through what its training step returns.

    Raises:
        TypeError: that says what to do instead.
    """
    if getattr(model, "automatic_optimization", True) is False:
        raise TypeError(
            f"expected automatic optimization, but {type(model).__name__} sets "
            "automatic_optimization=False, so no loss passes through what training_step returns; "
            "call recon_aux.ReconAux in its step instead, see the README"
        )
