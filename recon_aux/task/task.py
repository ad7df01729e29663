"""The task as one module: splitter, decoder and the terms of the loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from recon_aux.task.calibration import Calibrated, ChannelWhitening
from recon_aux.task.checks import finite_number
from recon_aux.task.contexts import seeded
from recon_aux.task.decoder import CrossAttentionDecoder
from recon_aux.task.finite import FiniteCheck
from recon_aux.task.gradients import trained_tensors, with_gradients
from recon_aux.task.inputs import check_views
from recon_aux.task.options import TERMS, Options, Reconstruct, differences, pack, takes, unpack
from recon_aux.task.splitter import FeatureSplitter, as_feature, pooled
from recon_aux.task.terms.edges import Edges
from recon_aux.task.terms.prediction import PredictionTerm, read
from recon_aux.task.terms.reconstruction import ReconstructionLoss, resize_view, to_patches
from recon_aux.task.terms.registration import Registration
from recon_aux.task.terms.statistics import Statistics
from recon_aux.task.turns import forget_turns, set_turn, takes_turn, turn_of


@dataclass
class ReconAuxOutput:
    """What one call of :class:`ReconAux` returns. Only ``loss`` has a gradient.

    Attributes:
        loss: what to add to the method's loss: ``weight`` times ``unweighted_loss``.
        unweighted_loss: the four terms, summed with their weights; by default about 40 at first.
        reconstruction_loss: of the decoder.
        registration_loss: 0 where ``registration=0``.
        statistics_loss: 0 where ``statistics=0``.
        edges_loss: 0 where ``edges=0``.
        target: the views that were rebuilt, resized, ``(V*B, C, target_size, target_size)``, V the
            number of views that were rebuilt.
        rebuilt: which of the two views were rebuilt, ``(0,)``, ``(1,)`` or ``(0, 1)``.
    """

    loss: Tensor
    unweighted_loss: Tensor
    reconstruction_loss: Tensor
    registration_loss: Tensor
    statistics_loss: Tensor
    edges_loss: Tensor
    target: Tensor
    rebuilt: tuple[int, ...]
    draw: Callable[[], Tensor] = field(repr=False)

    @property
    def reconstruction(self) -> Tensor:
        """What was rebuilt, in the shape and the units of ``target``.

        With ``normalize_patches=True`` its patches are normalised.
        """
        return self.draw()


class ReconAux(nn.Module):
    """The image-reconstruction task that keeps what augmentation changes.

    Wang, Krajsek & Scharr, "Equivariant Representation Learning for Augmentation-based
    Self-Supervised Learning via Image Reconstruction", 2024, arXiv 2412.03314. Registration,
    statistics and edges are not in the paper.

    Args:
        feature_dim: D, the number of channels of the encoder's features.
        options: by name, all those of :class:`~recon_aux.task.options.Options`.

    Raises:
        ValueError: if an option is out of range; the message names it.
        TypeError: if an option is unknown, or must be a whole number and isn't.

    Example:
        >>> aux = ReconAux(feature_dim=512)
        >>> x1, x2 = torch.rand(2, 4, 3, 96, 96)              # two views of four images
        >>> y1, y2 = torch.rand(2, 4, 512)                    # the encoder's features
        >>> aux.invariant(y1).shape                           # what the projection head gets
        torch.Size([4, 256])
        >>> output = aux((x1, x2), (y1, y2))
        >>> output.loss.backward()
        >>> output.reconstruction.shape
        torch.Size([4, 3, 32, 32])
    """

    @takes(Options)
    def __init__(self, options: Options) -> None:
        super().__init__()
        self._options = options
        self._weight = options.weight
        self._seed = torch.initial_seed() if options.seed is None else options.seed
        self._calls = 0
        self.finite_check = FiniteCheck()
        self.splitter = FeatureSplitter(options.feature_dim, options.equivariant_dim)
        self.reconstruction_loss = ReconstructionLoss(
            options.loss,
            structure=options.structure,
            normalize_patches=options.normalize_patches,
            patch_size=options.patch_size,
        )
        # its name is a key of checkpoints
        self.pixel_scale = ChannelWhitening(options.image_channels)
        dim, channels = options.channels("equivariant")[1], options.image_channels
        with seeded(self._seed):
            self.decoder = CrossAttentionDecoder(
                dim,
                options.channels(options.context)[1],
                target_size=options.target_size,
                patch_size=options.patch_size,
                image_channels=channels,
                dim=options.decoder_dim,
                depth=options.decoder_depth,
                heads=options.decoder_heads,
                tokens=options.decoder_tokens,
                spatial=options.spatial,
            )
            predict = partial(PredictionTerm, dim)
            self.registration = Registration(dim) if options.registration else None
            self.statistics = predict(Statistics(channels)) if options.statistics else None
            self.edges = predict(Edges()) if options.edges else None
        self.requires_grad_(options.weight != 0)

    @property
    def _terms(self) -> dict[str, Registration | PredictionTerm]:
        """The terms next to the reconstruction that have a weight."""
        found = {name: getattr(self, name) for name in TERMS}
        return {name: term for name, term in found.items() if term is not None}

    @property
    def options(self) -> dict[str, Any]:
        """The options that affect what is learned, defaults included, as plain values to log.

        Example:
            >>> options = ReconAux(feature_dim=512, edges=0).options
            >>> options["equivariant_dim"], options["edges"], options["weight"]
            (256, 0, 1.0)
        """
        left_out = ("seed", "compile")
        return {name: x for name, x in asdict(self._options).items() if name not in left_out}

    @property
    def image_channels(self) -> int:
        """The number of channels of the views."""
        return self._options.image_channels

    @property
    def weight(self) -> float:
        """Factor of the whole loss. It may be set at any time, to any real number."""
        return self._weight

    @weight.setter
    def weight(self, weight: float) -> None:
        self._weight = finite_number("weight", weight)

    @property
    def enabled(self) -> bool:
        """Whether there is anything to train: False if built with ``weight=0``.

        Raises:
            ValueError: if it was built with ``weight=0`` and its weight has been set since.
        """
        is_frozen = self._options.weight == 0
        if is_frozen and self.weight != 0:
            raise ValueError(
                f"expected the weight to stay 0, as it was at construction, got {self.weight}: the "
                "decoder is frozen. To ramp it up, build with a positive weight=, then set "
                ".weight = 0. Set .weight again after loading a checkpoint."
            )
        return not is_frozen

    def invariant(self, feature: Tensor) -> Tensor:
        """Return the invariant part of a feature, ``(B, D)`` -> ``(B, D - equivariant_dim)``."""
        part: Tensor = self.splitter(feature)[0]
        return part

    def equivariant(self, feature: Tensor) -> Tensor:
        """Return the equivariant part of a feature, ``(B, D)`` -> ``(B, equivariant_dim)``."""
        part: Tensor = self.splitter(feature)[1]
        return part

    def forward(self, views: Sequence[Tensor], features: Sequence[Tensor]) -> ReconAuxOutput:
        """Rebuild a view, or both, and compute the loss.

        If only one feature has a gradient, its view is rebuilt, whatever ``reconstruct`` says.

        Args:
            views: two augmented views of the same images, each ``(B, C, H, W)``.
            features: the encoder's features of them, each ``(B, D)`` or ``(B, D, 1, 1)``, or, with
                ``spatial=True``, ``(B, D, H, W)`` or ``(B, N, D)``.

        Returns:
            The weighted loss and what it was computed from.

        Raises:
            ValueError: if there aren't two of each, or a shape isn't as above, or devices differ,
                or it was built with ``weight=0`` and its weight has been set since.
            TypeError: if a view is complex or a feature isn't of a floating-point type.
            FloatingPointError: if the loss isn't finite, on a GPU that of an earlier call; see
                :class:`~recon_aux.task.finite.FiniteCheck`.
        """
        options = self._options
        features = [as_feature(feature, spatial=options.spatial) for feature in features]
        check_views(views, features, options, self.decoder.queries.device)
        weight = self.weight if self.enabled else 0.0
        # an evaluation takes no turn
        self._calls += torch.is_grad_enabled() and takes_turn(self)
        chosen = _choose(features, options.reconstruct, self._calls, self._seed)
        # what is rebuilt comes first: one compiled graph serves either view
        order = (1, 0) if chosen == (1,) else (0, 1)
        resized = _stacked([resize_view(views[i], options.target_size) for i in order])
        dtype = self.decoder.queries.dtype
        inner = [_leaf(feature, dtype) for feature in features]
        # Run in float32: launching the weight casts costs more than half precision saves.
        with torch.autocast(resized.device.type, enabled=False):
            compute = _compiled() if _may_compile(self) else _losses
            loss, losses, rebuilt = compute(self, [inner[i] for i in order], resized, len(chosen))
            pairs = [(p, p) for p in trained_tensors(self)]
            pairs += [(y, x) for y, x in zip(features, inner, strict=True) if y.requires_grad]
            readouts = [term.readout for term in self._terms.values()]
            scales = {p: scale for x in readouts for p, scale in x.gradient_scales().items()}
            weighted = with_gradients(loss, weight, pairs, scales)
        normal = 2 + options.structure + sum(getattr(options, name) for name in TERMS)
        self.finite_check(self._calls, loss.detach(), normal, resized, *features)
        return ReconAuxOutput(
            loss=weighted,
            unweighted_loss=loss.detach(),
            **losses,
            target=resized[: len(rebuilt)],
            rebuilt=chosen,
            draw=partial(_draw, self, rebuilt),
        )

    @torch.no_grad()
    def rebuild(self, feature: Tensor, other: Tensor) -> Tensor:
        """Rebuild views from their own features and those of other views, or of other images.

        Args:
            feature: of the views to rebuild, as in :meth:`forward`; its equivariant part is used.
            other: of as many other views; the part that ``context=`` names is used.

        Returns:
            ``(B, C, target_size, target_size)`` in the views' own units. With
            ``normalize_patches=True`` the patches are normalised, as the decoder predicts them.

        Raises:
            ValueError: if a shape isn't as above.

        Example:
            >>> aux = ReconAux(feature_dim=512)
            >>> aux.rebuild(torch.rand(4, 512), torch.rand(4, 512)).shape
            torch.Size([4, 3, 32, 32])
        """
        if len(feature) != len(other):
            raise ValueError(
                f"expected as many other features as features, got {len(other)} for "
                f"{len(feature)}. Pass as many of each."
            )
        options = self._options
        feature, other = (as_feature(x, spatial=options.spatial) for x in (feature, other))
        own, context = options.part("equivariant", feature), options.part(options.context, other)
        with torch.autocast(own.device.type, enabled=False):
            return self.pixel_scale.restore(self.decoder(own, context).float())

    def saved_state(self) -> dict[str, Any]:
        """Return what is saved next to the weights; a subclass may add plain values to it.

        A resumed run goes on with the same choice of views. Each number that changes in training is
        a string of fixed width, so that averages of checkpoints can be read.
        """
        return {"calls": f"{self._calls:012d}", "seed": self._seed, "options": self.options}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`saved_state` returned; a subclass may read what it added."""
        self._calls, self._seed = int(state["calls"]), state["seed"]

    def get_extra_state(self) -> Tensor:
        """Return :meth:`saved_state` as a tensor of bytes.

        Raises:
            FloatingPointError: if a loss was not finite, and a GPU reports it only now.
        """
        self.finite_check.flush()
        return pack(self.saved_state())

    def set_extra_state(self, state: Tensor) -> None:
        """Load what :meth:`get_extra_state` returned, unless it can't be read."""
        if found := unpack(state):
            self.load_saved_state(found)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load, but keep the decoder as it is where the checkpoint has none or another one."""
        # losses that are on their way from the GPU belong to the old weights
        self.finite_check = FiniteCheck()
        forget_turns(self)
        if not _has_this_decoder(state_dict, prefix, self.options, errors=rest[-1]):
            # the submodules load from this dict, too
            own = self.state_dict()
            state_dict.update({prefix + key: value for key, value in own.items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Show the options in the module's printout, and the weight as it is now."""
        shown = self.options | {"weight": self.weight}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


@contextmanager
def on_trial(aux: ReconAux) -> Iterator[Callable[[], None]]:
    """Let calls of the task in this context leave no trace: they take no turn, and judge no loss.

    Yields:
        What to call if the output is used after all.

    Example:
        >>> aux = ReconAux(feature_dim=512)
        >>> with on_trial(aux) as keep:
        ...     output = aux(torch.rand(2, 4, 3, 32, 32), torch.rand(2, 4, 512))
        >>> keep()
    """
    calls, turn, check = aux._calls, turn_of(aux), aux.finite_check
    noted: list[tuple[Any, ...]] = []
    check.noted = noted

    def keep() -> None:
        aux._calls += takes_turn(aux)
        for given in noted:
            check(*given)

    try:
        yield keep
    finally:
        aux._calls, check.noted = calls, None
        set_turn(aux, turn)


def _losses(
    aux: ReconAux, features: Sequence[Tensor], resized: Tensor, count: int
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Compute the loss, each term's loss, and the rebuilt patches of the first ``count`` views.

    Only the loss has a gradient.

    The first batch sets the units. From then on no value is read and no state is changed.
    """
    options, terms = aux._options, aux._terms
    white = aux.pixel_scale.whiten(resized)
    parts = [options.part("equivariant", feature) for feature in features]
    others = [options.part(options.context, feature) for feature in reversed(features)]
    # the terms first: they need memory for a moment, the decoder until the gradients are known
    found = {}
    if terms:
        equivariant = torch.cat([pooled(part) for part in parts])
        numbers = read([term.readout for term in terms.values()], equivariant)
        for (name, term), its in zip(terms.items(), numbers, strict=True):
            found[name] = term(its, white)
    own, context = (_joined(pair[:count]) for pair in (parts, others))
    rebuilt = aux.decoder(own, context, as_patches=True).float()
    losses = {f"{name}_loss": rebuilt.new_zeros(()) for name in TERMS if name not in terms}
    target = to_patches(white[: len(rebuilt)], options.patch_size)
    loss = aux.reconstruction_loss.of_patches(rebuilt, target)
    losses["reconstruction_loss"] = loss.detach()
    for name, own_loss in found.items():
        losses[f"{name}_loss"] = own_loss.detach()
        loss = torch.add(loss, own_loss, alpha=getattr(options, name))
    return loss, losses, rebuilt.detach()


def _leaf(feature: Tensor, dtype: torch.dtype) -> Tensor:
    """Make a leaf of a feature, so that the task has a graph of its own."""
    # a tensor that was made in inference mode can't be saved for a backward pass
    leaf = feature.clone() if feature.is_inference() else feature.detach()
    return leaf.to(dtype).requires_grad_(feature.requires_grad)


def _may_compile(aux: ReconAux) -> bool:
    """Whether a call may run compiled code. Those that set the units may not."""
    # first what is cheap: each step asks
    if not (aux._options.compile and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return False
    return all(m.has_units for m in aux.modules() if isinstance(m, Calibrated))


@cache
def _compiled() -> Callable[..., tuple[Tensor, dict[str, Tensor], Tensor]]:
    return torch.compile(_losses)


def _draw(aux: ReconAux, patches: Tensor) -> Tensor:
    return aux.pixel_scale.restore(aux.decoder.assemble(patches))


def _stacked(views: Sequence[Tensor]) -> Tensor:
    """Concatenate views along the batch, never as channels_last: all that follows would be slow."""
    return torch.cat([view.flatten(2) for view in views]).view(-1, *views[0].shape[1:])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _choose(
    features: Sequence[Tensor], reconstruct: Reconstruct, call: int, seed: int
) -> tuple[int, ...]:
    """Choose which of the two views a call rebuilds."""
    live = tuple(i for i in (0, 1) if features[i].requires_grad)
    if len(live) == 1:
        # rebuilding a momentum encoder's view would not train the equivariant part
        return live
    if reconstruct == "both":
        return (0, 1)
    return (Random(f"{seed} {call}").randrange(2) if reconstruct == "random" else (call - 1) % 2,)


def _has_this_decoder(
    state_dict: dict[str, Any], prefix: str, options: dict[str, Any], errors: list[str]
) -> bool:
    """Return whether a checkpoint has the decoder that these options build; if not, say so."""
    extra = state_dict.get(prefix + "_extra_state")
    state = None if extra is None else unpack(extra)
    changes, is_other = differences(state["options"] if state else {}, options)
    is_bare = bool(prefix) and not any(key.startswith(prefix) for key in state_dict)
    warning = ""
    if is_bare:
        warning = "a checkpoint of a bare model; the decoder starts as it is"
    elif is_other:
        errors.append(f"recon_aux: expected the options it was saved with: {changes}")
    elif changes:
        warning = f"saved with other options: {changes}"
    elif extra is not None and state is None:
        warning = "the saved options can't be read, as in an average of checkpoints; they may "
        warning += "differ from these"
    if warning:
        warnings.warn(f"recon_aux: {warning}", stacklevel=3)
    return not (is_bare or is_other)
