"""The cross-attention decoder: features of two views -> image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from recon_aux.task.checks import check_divides, check_whole


class Tokenizer(nn.Module):
    """Make tokens of a feature: several of a pooled one, else one of each position.

    Args:
        feature_dim: D, channels of the feature.
        dim: channels of the tokens.
        tokens: how many tokens a pooled feature ``(B, D)`` becomes.
        spatial: features keep positions, ``(B, D, H, W)`` or ``(B, N, D)``.
    """

    def __init__(self, feature_dim: int, dim: int, tokens: int, *, spatial: bool) -> None:
        super().__init__()
        self.spatial = spatial
        self.norm = nn.LayerNorm(feature_dim)
        self.project = nn.Linear(feature_dim, dim if spatial else tokens * dim)
        self.dim = dim

    def forward(self, feature: Tensor) -> Tensor:
        """``(B, D)``, ``(B, D, H, W)`` or ``(B, N, D)``, any type -> ``(B, tokens, dim)``."""
        if (feature.ndim != 2) != self.spatial:
            expected = "(B, D, H, W) or (B, N, D)" if self.spatial else "pooled, (B, D)"
            raise ValueError(
                f"expected features {expected}, got {tuple(feature.shape)}; "
                f"spatial={not self.spatial} builds a decoder for those. Pass it to ReconAux. To "
                "attach pass example_input=: images of the size that is trained on."
            )
        if feature.ndim == 4:
            feature = rearrange(feature, "b d h w -> b (h w) d")
        tokens: Tensor = self.project(self.norm(feature.to(self.norm.weight.dtype)))
        if self.spatial:
            return tokens + _positions(tokens)
        return rearrange(tokens, "b (n d) -> b n d", d=self.dim)


def _positions(tokens: Tensor) -> Tensor:
    """Return a sine-cosine position code ``(N, dim)``, for any number of tokens."""
    n, dim = tokens.shape[-2:]
    half = dim // 2
    channels = torch.arange(half, dtype=torch.float32, device=tokens.device)
    rate = torch.exp(channels * (-math.log(1e4) / max(half, 1)))
    angle = torch.arange(n, dtype=torch.float32, device=tokens.device)[:, None] * rate
    return F.pad(torch.cat([angle.sin(), angle.cos()], 1), (0, dim - 2 * half)).to(tokens.dtype)


class CrossAttentionBlock(nn.Module):
    """Queries attend to tokens, then an MLP; both residual, pre-norm."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """``(B, P, dim)`` or ``(1, P, dim)``, ``(B, N, dim)`` -> ``(B, P, dim)``."""
        q = rearrange(self.query(self.norm(queries)), "b p (h d) -> b h p d", h=self.heads)
        # not every attention kernel accepts the stride of 0 that expand makes
        q = q.expand(len(tokens), -1, -1, -1).contiguous()
        k, v = rearrange(self.key_value(tokens), "b n (k h d) -> k b h n d", k=2, h=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        queries = queries + self.out(rearrange(attended, "b h p d -> b p (h d)"))
        decoded: Tensor = queries + self.mlp(queries)
        return decoded


class CrossAttentionDecoder(nn.Module):
    """Rebuild a view from its own equivariant feature and from features of the other view.

    Cross-attention fuses the features of both views, as in Wang, Krajsek & Scharr (2024, arXiv
    2412.03314). Not in the paper: learned queries attend to tokens that are made of the features,
    and each query becomes one patch of the image.

    Args:
        equivariant_dim: E, channels of the feature of the view to rebuild.
        context_dim: channels of the other view's feature; with 0 the decoder sees none.
        target_size: height and width of the image, in pixels.
        patch_size: side of the patch that one query becomes, in pixels.
        image_channels: C.
        dim: width of queries and tokens.
        depth: number of cross-attention blocks.
        heads: attention heads.
        tokens: how many tokens a pooled feature becomes. Attention needs more than one to choose.
        spatial: features keep positions, ``(B, D, H, W)`` or ``(B, N, D)``, one token each.

    Raises:
        ValueError: if a size is below 1, or ``patch_size`` doesn't divide ``target_size``, or
            ``heads`` ``dim``.

    Example:
        >>> decoder = CrossAttentionDecoder(256, 256, target_size=32)
        >>> decoder(torch.rand(4, 256), torch.rand(4, 256)).shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(
        self,
        equivariant_dim: int,
        context_dim: int,
        *,
        target_size: int = 32,
        patch_size: int = 8,
        image_channels: int = 3,
        dim: int = 128,
        depth: int = 1,
        heads: int = 8,
        tokens: int = 8,
        spatial: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"target_size": target_size, "patch_size": patch_size, "dim": dim}
        for name, size in {**sizes, "depth": depth, "heads": heads, "tokens": tokens}.items():
            check_whole(name, size, least=1)
        check_divides("patch_size", patch_size, "target_size", target_size)
        check_divides("heads", heads, "dim", dim)
        self.spatial = spatial
        self.side = target_size // patch_size
        self.patch_size = patch_size
        self.queries = nn.Parameter(torch.randn(self.side**2, dim) * 0.02)
        self.equivariant_tokens = Tokenizer(equivariant_dim, dim, tokens, spatial=spatial)
        self.context_tokens = (
            Tokenizer(context_dim, dim, tokens, spatial=spatial) if context_dim else None
        )
        # added to the tokens of either view, so that attention can tell them apart
        self.source = nn.Parameter(torch.randn(2, dim) * 0.02)
        self.blocks = nn.ModuleList(CrossAttentionBlock(dim, heads) for _ in range(depth))
        self.to_patch = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, image_channels * patch_size**2)
        )

    def forward(
        self, equivariant: Tensor, context: Tensor | None = None, *, as_patches: bool = False
    ) -> Tensor:
        """Rebuild images.

        Args:
            equivariant: of the views to rebuild: ``(B, E)``, ``(B, E, H, W)`` or ``(B, N, E)``.
            context: of the other views, likewise; ignored if ``context_dim`` is 0.
            as_patches: leave the patches apart; :meth:`assemble` makes images of them.

        Returns:
            ``(B, C, target_size, target_size)``, or patches, row by row, ``(B, P, N)``.

        Raises:
            ValueError: if a feature's rank doesn't fit ``spatial``, or context is missing.
        """
        own_source, other_source = self.source.unbind()
        tokens = self.equivariant_tokens(equivariant) + own_source
        if self.context_tokens is not None:
            if context is None:
                raise ValueError(
                    "expected context from the other view, since context_dim isn't 0. Pass "
                    "context=, or build with context_dim=0."
                )
            other = self.context_tokens(context) + other_source
            tokens = torch.cat([tokens, other], dim=1)
        # one set for all images: the first block projects it once
        queries = self.queries[None]
        for block in self.blocks:
            queries = block(queries, tokens)
        patches: Tensor = self.to_patch(queries)
        return patches if as_patches else self.assemble(patches)

    def assemble(self, patches: Tensor) -> Tensor:
        """Make images of patches, ``(B, P, N)`` -> ``(B, C, target_size, target_size)``."""
        p = self.patch_size
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=self.side, p=p, q=p)
