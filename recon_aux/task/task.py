"""Splitter, decoder and loss behind one module."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from recon_aux.engine.encoder import as_feature
from recon_aux.task import state as saved
from recon_aux.task.calibration import PixelScale
from recon_aux.task.checks import check_nonnegative, check_views
from recon_aux.task.decoder import CrossAttentionDecoder
from recon_aux.task.finite import FiniteCheck
from recon_aux.task.splitter import FeatureSplitter, channel_dim
from recon_aux.task.terms.edges import Edges
from recon_aux.task.terms.prediction import Telling
from recon_aux.task.terms.reconstruction import LossKind, ReconstructionLoss, resize_view
from recon_aux.task.terms.registration import Registration
from recon_aux.task.terms.statistics import Statistics

Context = Literal["invariant", "equivariant", "both", "none"]
Reconstruct = Literal["alternate", "random", "both"]


@dataclass
class ReconAuxOutput:
    """What one call of :class:`ReconAux` gives.

    Attributes:
        loss: what to add to the method's loss: ``weight`` times ``unweighted_loss``.
        unweighted_loss: the four terms, summed with their weights among each other, detached.
        reconstruction_loss: the decoder's, detached.
        registration_loss: detached; 0 where ``registration=0``.
        statistics_loss: detached; 0 where ``statistics=0``.
        edges_loss: detached; 0 where ``edges=0``.
        reconstruction: ``(V*B, C, target_size, target_size)`` in the views' own units, detached,
            V the number of views that were rebuilt; with ``normalize_patches=True`` the decoder
            speaks of normalised patches, and so does this.
        target: the views that were rebuilt, resized, in the same shape and order.
        rebuilt: which of the two views were rebuilt, ``(0,)``, ``(1,)`` or ``(0, 1)``.
    """

    loss: Tensor
    unweighted_loss: Tensor
    reconstruction_loss: Tensor
    registration_loss: Tensor
    statistics_loss: Tensor
    edges_loss: Tensor
    reconstruction: Tensor
    target: Tensor
    rebuilt: tuple[int, ...]


class ReconAux(nn.Module):
    """The image-reconstruction task that keeps what augmentation changes.

    Wang, Krajsek & Scharr, "Equivariant Representation Learning for Augmentation-based
    Self-Supervised Learning via Image Reconstruction", 2024, arXiv 2412.03314; registration,
    statistics and edges are not theirs.

    Args:
        feature_dim: D, the number of channels of the encoder's features.
        weight: what the sum of the terms is multiplied with; 0 at construction switches the
            task off: the decoder is frozen.
        registration: weight, among the terms, of moving one view onto the other; 0 leaves it out.
        statistics: weight, among the terms, of telling how a view's pixels vary; 0 leaves it out.
        edges: weight, among the terms, of telling where a view's edges run; 0 leaves it out.
        equivariant_dim: how many of the last channels are equivariant; half by default. 0 is no
            split: the method's loss and the decoder both see the whole feature.
        context: which part of the other view's feature the decoder sees: ``"invariant"``,
            ``"equivariant"``, ``"both"``, or ``"none"``, which makes it an autoencoder of one view.
        target_size: height and width of the reconstruction, in pixels.
        patch_size: side of the patch that each of the decoder's queries becomes, in pixels.
        image_channels: channels of the views.
        decoder_dim: width of the decoder.
        decoder_depth: its number of cross-attention blocks.
        decoder_heads: its attention heads.
        decoder_tokens: how many tokens it makes from a pooled feature.
        loss: ``"mse"``, ``"l1"`` or ``"smooth_l1"``, on pixels whitened over their channels.
        structure: weight of the same error on patches normalised in both images.
        normalize_patches: compare to per-patch normalised views (MAE's target).
        reconstruct: which view a call rebuilds: ``"alternate"`` (first, second, first, ...),
            ``"random"`` (drawn from ``seed``, not from the global random state) or ``"both"``.
        spatial: features keep positions, ``(B, D, H, W)`` or ``(B, N, D)``, instead of ``(B, D)``;
            all but the reconstruction is told from their average.
        seed: of the decoder's weights and of ``"random"``; by default the seed that torch was last
            given. The global random state is left as it is.

    Raises:
        ValueError: if an option is out of range; the message names it.
        TypeError: if it is to be a whole number and isn't.

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

    def __init__(
        self,
        feature_dim: int,
        *,
        weight: float = 1.0,
        registration: float = 4.0,
        statistics: float = 8.0,
        edges: float = 16.0,
        equivariant_dim: int | None = None,
        context: Context = "invariant",
        target_size: int = 32,
        patch_size: int = 8,
        image_channels: int = 3,
        decoder_dim: int = 128,
        decoder_depth: int = 1,
        decoder_heads: int = 8,
        decoder_tokens: int = 8,
        loss: LossKind = "mse",
        structure: float = 0.5,
        normalize_patches: bool = False,
        reconstruct: Reconstruct = "alternate",
        spatial: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        options = {
            "feature_dim": feature_dim,
            "equivariant_dim": equivariant_dim,
            "weight": weight,
            "registration": registration,
            "statistics": statistics,
            "edges": edges,
            "context": context,
            "target_size": target_size,
            "patch_size": patch_size,
            "image_channels": image_channels,
            "decoder_dim": decoder_dim,
            "decoder_depth": decoder_depth,
            "decoder_heads": decoder_heads,
            "decoder_tokens": decoder_tokens,
            "loss": loss,
            "structure": structure,
            "normalize_patches": normalize_patches,
            "reconstruct": reconstruct,
            "spatial": spatial,
            "seed": seed,
        }
        # in Python's own types, to be saved
        self._options = {name: saved.plain(name, value) for name, value in options.items()}
        del self._options["seed"]
        for name in ("weight", *saved.TERMS):
            check_nonnegative(name, self._options[name])
        _require("context", context, get_args(Context))
        _require("reconstruct", reconstruct, get_args(Reconstruct))
        self._weight: float = self._options["weight"]
        self.context = context
        self.reconstruct = reconstruct
        self.target_size = target_size
        self.image_channels = image_channels
        self.splitter = FeatureSplitter(feature_dim, self._options["equivariant_dim"])
        self._options["equivariant_dim"] = self.splitter.equivariant_dim
        self.reconstruction_loss = ReconstructionLoss(
            loss,
            structure=self._options["structure"],
            normalize_patches=normalize_patches,
            patch_size=patch_size,
        )
        if patch_size**2 * image_channels == 1 and (structure or normalize_patches):
            raise ValueError(
                "expected patches of two numbers or more where structure= or normalize_patches= "
                "normalises them, got patch_size=1 and image_channels=1"
            )
        self.pixel_scale = PixelScale(image_channels)
        seed = torch.initial_seed() if seed is None else int(seed)
        own = self._width("equivariant")
        if own == 1 < feature_dim:
            raise ValueError(
                "expected an equivariant_dim of 2 or more, since features are normalised, or "
                f"0, got 1 of {feature_dim} channels"
            )
        with _seeded(seed):
            self.decoder = CrossAttentionDecoder(
                own,
                self._width(context),
                target_size=target_size,
                patch_size=patch_size,
                image_channels=image_channels,
                dim=decoder_dim,
                depth=decoder_depth,
                heads=decoder_heads,
                tokens=decoder_tokens,
                spatial=spatial,
            )
            self.registration = Registration(own) if registration else None
            self.statistics = Telling(own, Statistics(image_channels)) if statistics else None
            self.edges = Telling(own, Edges()) if edges else None
        self._frozen = weight == 0
        # whether it is yet to be set, and whether the user did
        self.weight_is_due = self._weight_is_given = False
        self.requires_grad_(not self._frozen)
        self._seed = seed
        self._calls = 0
        self.refuse_not_finite = FiniteCheck()
        # where attach put this on a model, the name of the encoder that was seen to be trained
        self.encoder_name = ""

    @property
    def weight(self) -> float:
        """What the sum of the terms is multiplied with; may be set, for good, at any time.

        Where it is ``"auto"`` it is 1 until the first batch has set it.
        """
        return self._weight

    @weight.setter
    def weight(self, weight: float) -> None:
        self.balance_at(saved.plain("weight", weight))
        self._weight_is_given = True

    @property
    def is_balanced(self) -> bool:
        """Whether it is ``weight="auto"``."""
        return bool(self._options["weight"] == "auto")

    def balance_at(self, weight: float | None) -> None:
        """Set what ``weight="auto"`` stands for, until its user sets another; None: 1 for now."""
        self._weight = 1.0 if weight is None else weight
        self.weight_is_due = weight is None

    def expect_balance(self) -> None:
        """Be ``weight="auto"``, which the engine of attach sets."""
        self._options["weight"] = "auto"
        self.balance_at(None)

    @property
    def enabled(self) -> bool:
        """Whether there is anything to train: False if built with ``weight=0``.

        Raises:
            ValueError: if it was built with ``weight=0`` and then given a weight.
        """
        self._refuse_frozen()
        return not self._frozen

    def _refuse_frozen(self) -> None:
        if self.weight > 0 and self._frozen:
            raise ValueError(
                f"expected the weight to stay 0, as it was at construction, got {self.weight}; to "
                "ramp it up, build with a positive weight= and set .weight = 0 before training, "
                "and the weight that is due when a checkpoint was loaded, which doesn't set it"
            )

    def invariant(self, feature: Tensor) -> Tensor:
        """Give the invariant part of a feature, ``(B, D)`` -> ``(B, D - equivariant_dim)``."""
        part: Tensor = self.splitter(feature)[0]
        return part

    def equivariant(self, feature: Tensor) -> Tensor:
        """Give the equivariant part of a feature, ``(B, D)`` -> ``(B, equivariant_dim)``."""
        part: Tensor = self.splitter(feature)[1]
        return part

    def forward(self, views: Sequence[Tensor], features: Sequence[Tensor]) -> ReconAuxOutput:
        """Rebuild a view and say how well; only one with gradient, where the other has none.

        Args:
            views: two augmented views of the same images, each ``(B, C, H, W)``.
            features: the encoder's features of them, each ``(B, D)`` or ``(B, D, 1, 1)``, or, with
                ``spatial=True``, ``(B, D, H, W)`` or ``(B, N, D)``.

        Returns:
            The weighted loss and what it was computed from.

        Raises:
            ValueError: if there aren't two of each, or a shape isn't as above, or devices differ,
                or it was built with ``weight=0`` and then given a weight.
            TypeError: if a view is complex or a feature isn't of a floating-point type.
            FloatingPointError: if the sum of the terms is not finite, on a GPU that of an earlier
                call; in float16, where a loss scaler skips such steps, if it is so in more than 200
                in a row, or if the views aren't.
        """
        features = [self._as_feature(feature) for feature in features]
        check_views(
            views,
            features,
            image_channels=self.image_channels,
            feature_dim=self.splitter.feature_dim,
            alike=self.reconstruct == "both",
            device=self.decoder.queries.device,
        )
        self._refuse_frozen()
        # an evaluation takes no turn
        self._calls += torch.is_grad_enabled()
        chosen = self._choose(features)
        parts = [self._part("equivariant", feature) for feature in features]
        own = torch.cat([parts[i] for i in chosen])
        other = torch.cat([self._part(self.context, features[1 - i]) for i in chosen])
        resized = [resize_view(view, self.target_size) for view in views]
        both = torch.cat(resized)
        target = torch.cat([resized[i] for i in chosen])
        # its weights' casts would take a GPU's process longer than half precision saves the GPU
        with torch.autocast(target.device.type, enabled=False):
            decoded = self._decode(own, other)
            white = self.pixel_scale.whiten(both)
            wanted = torch.cat([white.chunk(2)[i] for i in chosen])
            rebuilding = self.reconstruction_loss(decoded, wanted)
            pooled = torch.cat([_pooled(part) for part in parts])
            terms = [
                rebuilding.new_zeros(()) if term is None else term(pooled, white)
                for term in (self.registration, self.statistics, self.edges)
            ]
            factors = [self._options[name] for name in saved.TERMS]
            loss = rebuilding + sum(f * term for f, term in zip(factors, terms, strict=True))
            reconstruction = self.pixel_scale.restore(decoded.detach().float())
        self.refuse_not_finite(self._calls, loss, both, features)
        weighted: Tensor = self.weight * loss
        return ReconAuxOutput(
            loss=weighted,
            unweighted_loss=loss.detach(),
            reconstruction_loss=rebuilding.detach(),
            **{
                f"{name}_loss": term.detach() for name, term in zip(saved.TERMS, terms, strict=True)
            },
            reconstruction=reconstruction,
            target=target,
            rebuilt=chosen,
        )

    @torch.no_grad()
    def rebuild(self, feature: Tensor, other: Tensor) -> Tensor:
        """Draw the view that a feature is of, in the context of another view, or of another image.

        Args:
            feature: of the view to draw, whose equivariant part is taken; as in :meth:`forward`.
            other: of as many other views; the part that ``context=`` names is taken, if any.

        Returns:
            ``(B, C, target_size, target_size)`` in the views' own units; with
            ``normalize_patches=True`` the decoder speaks of normalised patches, and so does this.

        Raises:
            ValueError: if a shape isn't as above.

        Example:
            >>> aux = ReconAux(feature_dim=512)
            >>> aux.rebuild(torch.rand(4, 512), torch.rand(4, 512)).shape
            torch.Size([4, 3, 32, 32])
        """
        if len(feature) != len(other):
            raise ValueError(
                f"expected as many other features as features, got {len(other)} for {len(feature)}"
            )
        feature, other = self._as_feature(feature), self._as_feature(other)
        own, context = self._part("equivariant", feature), self._part(self.context, other)
        with torch.autocast(own.device.type, enabled=False):
            return self.pixel_scale.restore(self._decode(own, context).float())

    def _as_feature(self, output: Tensor) -> Tensor:
        return as_feature(output, spatial=self.decoder.spatial)

    def _decode(self, own: Tensor, other: Tensor) -> Tensor:
        like = self.decoder.queries
        decoded: Tensor = self.decoder(own.to(like.dtype), other.to(like.dtype))
        return decoded

    def _part(self, name: Context, feature: Tensor) -> Tensor:
        invariant: Tensor
        equivariant: Tensor
        invariant, equivariant = self.splitter(feature)
        if name == "none":
            return feature.narrow(channel_dim(feature, self.splitter.feature_dim), 0, 0)
        if name == "both" or self.splitter.equivariant_dim == 0:
            return feature
        return invariant if name == "invariant" else equivariant

    def _width(self, name: Context) -> int:
        width = self._part(name, torch.empty(1, self.splitter.feature_dim)).shape[1]
        if width == 0 and name != "none":
            raise ValueError(
                f"expected context= to name a part with channels, got {name!r}, which has none "
                f"where equivariant_dim={self.splitter.equivariant_dim} is the whole feature"
            )
        return width

    def _choose(self, features: Sequence[Tensor]) -> tuple[int, ...]:
        live = tuple(i for i in (0, 1) if features[i].requires_grad)
        if len(live) == 1:
            # rebuilding a momentum encoder's view would train nothing of its equivariant part
            return live
        if self.reconstruct == "both":
            return (0, 1)
        if self.reconstruct == "random":
            return (Random(f"{self._seed} {self._calls}").randrange(2),)
        return ((self._calls - 1) % 2,)

    def get_extra_state(self) -> Tensor:
        """Save the options and which view comes next: a resumed run goes on as it would have.

        As a tensor of bytes, since not all that reads a ``state_dict`` takes anything else.

        Raises:
            FloatingPointError: if a GPU has not told until now that a loss was not finite.
        """
        self.refuse_not_finite.settle()
        state = {
            "calls": self._calls,
            "seed": self._seed,
            "options": self._options,
            "encoder": self.encoder_name,
        }
        if self.is_balanced:
            state["weight"] = "due" if self.weight_is_due else self.weight
        return saved.pack(state)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore which view comes next, unless that can't be read."""
        if found := saved.unpack(state):
            self._calls, self._seed = found["calls"], found["seed"]
            self.encoder_name = found["encoder"]
            if self.is_balanced and not self._weight_is_given:
                self.balance_at(saved.weight_of(found))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Start anew from a bare model's checkpoint; name options that differ from the saved."""
        # what is under way belongs to weights that are about to be gone
        self.refuse_not_finite = FiniteCheck()
        extra = state_dict.get(prefix + "_extra_state")
        is_bare = bool(prefix) and not any(key.startswith(prefix) for key in state_dict)
        state = None if extra is None else saved.unpack(extra)
        told, is_other = saved.differences(state, self._options)
        if is_bare:
            warnings.warn(
                "recon_aux: a checkpoint of a bare model; the decoder starts as it is, new if it "
                "was just attached",
                stacklevel=2,
            )
        elif is_other:
            error_msgs.append(f"recon_aux: expected the options it was saved with: {told}")
        elif told:
            warnings.warn(f"recon_aux: saved with other options: {told}", stacklevel=2)
        elif extra is not None and state is None:
            warnings.warn(
                "recon_aux: what was saved next to the weights can't be read, as in an average of "
                "checkpoints; whether the options were others isn't known",
                stacklevel=2,
            )
        if is_bare or is_other:
            # the modules within load from here
            own = self.state_dict()
            state_dict.update({prefix + key: value for key, value in own.items()})
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    @property
    def options(self) -> dict[str, Any]:
        """The options it was built with, defaults included, but the seed: plain, to be logged.

        Example:
            >>> options = ReconAux(feature_dim=512, edges=0).options
            >>> options["equivariant_dim"], options["edges"], options["weight"]
            (256, 0, 1.0)
        """
        return dict(self._options)

    def extra_repr(self) -> str:
        """Show the options in the module's printout, the weight as it is now."""
        shown = self._options | {"weight": self.weight}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def _pooled(feature: Tensor) -> Tensor:
    """Average over positions: ``(B, D)``, ``(B, D, H, W)`` or ``(B, N, D)`` -> ``(B, D)``."""
    return feature if feature.ndim == 2 else feature.mean(dim=1 if feature.ndim == 3 else (2, 3))


def _require(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"expected {option}= to be one of {known}, got {value!r}")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` on the CPU; leave the global random state as it was."""
    # torch.manual_seed would reseed the accelerators, too
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield
