"""Features -> invariant part, equivariant part."""

from __future__ import annotations

from torch import Tensor, nn


def channel_dim(feature: Tensor, feature_dim: int | None = None) -> int:
    """Say which dimension of ``feature`` holds its channels.

    Args:
        feature: ``(B, D)``, a feature map ``(B, D, H, W)``, or tokens ``(B, N, D)``.
        feature_dim: D, where it is known.

    Returns:
        1 for ``(B, D)`` and ``(B, D, H, W)``, 2 for ``(B, N, D)``.

    Raises:
        ValueError: if the rank is none of these or the channels are not D.
    """
    dim = {2: 1, 3: 2, 4: 1}.get(feature.ndim)
    if dim is None or feature_dim not in (None, feature.shape[dim]):
        d = "D" if feature_dim is None else feature_dim
        raise ValueError(
            f"expected features (B, {d}), (B, {d}, H, W) or (B, N, {d}), got "
            f"{tuple(feature.shape)}"
            + "; feature_dim= tells how wide the encoder's features are"
            * (feature_dim is not None)
        )
    return dim


class FeatureSplitter(nn.Module):
    """Split features along their channels: first the invariant part, last the equivariant part.

    The split of SIE (Garrido et al., ICML 2023, section 3), without parameters.

    Args:
        feature_dim: D, the number of channels of the features.
        equivariant_dim: how many of them, from 0 to D, are equivariant; half by default.

    Raises:
        ValueError: if ``equivariant_dim`` is out of range.

    Example:
        >>> import torch
        >>> invariant, equivariant = FeatureSplitter(512, equivariant_dim=128)(torch.rand(4, 512))
        >>> invariant.shape, equivariant.shape
        (torch.Size([4, 384]), torch.Size([4, 128]))
    """

    def __init__(self, feature_dim: int, equivariant_dim: int | None = None) -> None:
        super().__init__()
        if feature_dim < 1:
            raise ValueError(f"expected feature_dim of 1 or more, got {feature_dim}")
        if equivariant_dim is None:
            equivariant_dim = feature_dim // 2
        if not 0 <= equivariant_dim <= feature_dim:
            raise ValueError(
                f"expected equivariant_dim from 0 to the feature's {feature_dim} channels, "
                f"got {equivariant_dim}"
            )
        self.feature_dim = feature_dim
        self.equivariant_dim = equivariant_dim
        self.invariant_dim = feature_dim - equivariant_dim

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Split a feature; both parts are views of it, not copies.

        Args:
            feature: ``(B, D)``, ``(B, D, H, W)`` or ``(B, N, D)``.

        Returns:
            The invariant part and the equivariant part, shaped like ``feature`` but for D.

        Raises:
            ValueError: if ``feature`` has none of these shapes.
        """
        dim = channel_dim(feature, self.feature_dim)
        return (
            feature.narrow(dim, 0, self.invariant_dim),
            feature.narrow(dim, self.invariant_dim, self.equivariant_dim),
        )

    def extra_repr(self) -> str:
        """Show both widths in the module's printout."""
        return f"invariant_dim={self.invariant_dim}, equivariant_dim={self.equivariant_dim}"
