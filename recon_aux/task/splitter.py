"""Features and their parts: first the invariant channels, last the equivariant ones."""

from __future__ import annotations

from torch import Tensor, nn

from recon_aux.task.checks import check_whole


def channel_dim(feature: Tensor, feature_dim: int | None = None) -> int:
    """Return which dimension of a feature holds its channels.

    Args:
        feature: ``(B, D)``, a feature map ``(B, D, H, W)``, or tokens ``(B, N, D)``.
        feature_dim: the D that it must have; by default any.

    Returns:
        1 for ``(B, D)`` and ``(B, D, H, W)``, 2 for ``(B, N, D)``.

    Raises:
        ValueError: if the rank is none of these or the channels are not D.
    """
    dim = {2: 1, 3: 2, 4: 1}.get(feature.ndim)
    if dim is None or feature_dim not in (None, feature.shape[dim]):
        d = "D" if feature_dim is None else feature_dim
        advice = ". Pass them flattened, (B, D)."
        if feature_dim is not None:
            advice = "; feature_dim= must be their number of channels. Pass it so."
        raise ValueError(
            f"expected features (B, {d}), (B, {d}, H, W) or (B, N, {d}), got "
            f"{tuple(feature.shape)}{advice}"
        )
    return dim


def as_feature(output: Tensor, *, spatial: bool = False) -> Tensor:
    """Flatten a 1x1 feature map, as a ResNet without its last layer returns it, to ``(B, D)``.

    Any other output stays as it is. So does the map if ``spatial``: it is that of a small image.
    """
    is_pooled = not spatial and output.ndim == 4 and output.shape[2:] == (1, 1)
    return output.flatten(1) if is_pooled else output


def pooled(feature: Tensor) -> Tensor:
    """Average over positions: ``(B, D)``, ``(B, D, H, W)`` or ``(B, N, D)`` -> ``(B, D)``."""
    return feature if feature.ndim == 2 else feature.mean(dim=1 if feature.ndim == 3 else (2, 3))


class FeatureSplitter(nn.Module):
    """Split features along their channels: first the invariant part, last the equivariant part.

    The split of SIE (Garrido, Najman & LeCun, ICML 2023, section 3). It has no parameters.

    Args:
        feature_dim: D, the number of channels of the features.
        equivariant_dim: how many of them, from 0 to D, are equivariant; half by default.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import torch
        >>> invariant, equivariant = FeatureSplitter(512, equivariant_dim=128)(torch.rand(4, 512))
        >>> invariant.shape, equivariant.shape
        (torch.Size([4, 384]), torch.Size([4, 128]))
    """

    def __init__(self, feature_dim: int, equivariant_dim: int | None = None) -> None:
        super().__init__()
        check_whole("feature_dim", feature_dim, least=1)
        if equivariant_dim is None:
            # one channel is no part: it can't be normalised
            equivariant_dim = feature_dim // 2 if feature_dim > 3 else 0
        if not 0 <= equivariant_dim <= feature_dim:
            raise ValueError(
                f"expected equivariant_dim from 0 to the feature's {feature_dim} channels, "
                f"got {equivariant_dim}. Pass one of these."
            )
        self.feature_dim = feature_dim
        self.equivariant_dim = equivariant_dim
        self.invariant_dim = feature_dim - equivariant_dim

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Split a feature. Both parts share its memory.

        Args:
            feature: ``(B, D)``, ``(B, D, H, W)`` or ``(B, N, D)``.

        Returns:
            The invariant part and the equivariant part, shaped like ``feature`` but for D.

        Raises:
            ValueError: if ``feature`` has none of these shapes.
        """
        dim = channel_dim(feature, self.feature_dim)
        invariant = feature.narrow(dim, 0, self.invariant_dim)
        return invariant, feature.narrow(dim, self.invariant_dim, self.equivariant_dim)

    def extra_repr(self) -> str:
        """Show both widths in the module's printout."""
        return f"invariant_dim={self.invariant_dim}, equivariant_dim={self.equivariant_dim}"
