"""The decoder: which image it draws of which features."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.features import SHAPES, few
from recon_aux import CrossAttentionDecoder, ReconAux


@few
@given(
    batch=st.integers(1, 3),
    patches=st.integers(1, 4),
    patch=st.sampled_from([1, 2, 4]),
    channels=st.integers(1, 5),
    depth=st.integers(1, 2),
    kind=st.sampled_from(["vector", "map", "tokens"]),
)
def test_the_decoder_gives_an_image_of_any_size(
    batch: int, patches: int, patch: int, channels: int, depth: int, kind: str
) -> None:
    decoder = CrossAttentionDecoder(
        12, 6, target_size=patch * patches, patch_size=patch, image_channels=channels,
        dim=16, depth=depth, heads=4, tokens=2, spatial=kind != "vector",
    )  # fmt: skip
    own = torch.rand(batch, *SHAPES[kind][1:])
    other = own.narrow(2 if kind == "tokens" else 1, 0, 6)
    assert decoder(own, other).shape == (batch, channels, patch * patches, patch * patches)


def drawn_by_torchs_layers(
    decoder: CrossAttentionDecoder, features: list[Tensor], depth: int, heads: int, patch: int
) -> Tensor:
    """The image that a decoder's weights draw of pooled features, by torch's own layers."""
    w = decoder.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    dim, tokens = w["queries"].shape[1], []
    for feature, name, source in zip(
        features, ("equivariant_tokens", "context_tokens"), w["source"], strict=True
    ):
        made = linear(norm(feature, f"{name}.norm"), f"{name}.project")
        tokens += [part + source for part in made.split(dim, dim=1)]
    queries = w["queries"].expand(len(features[0]), -1, -1)
    for block in (f"blocks.{i}" for i in range(depth)):
        attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        given = {f"in_proj_{x}": torch.cat([w[f"{block}.query.{x}"], w[f"{block}.key_value.{x}"]])
                 for x in ("weight", "bias")}  # fmt: skip
        out = {f"out_proj.{x}": w[f"{block}.out.{x}"] for x in ("weight", "bias")}
        attention.load_state_dict({**given, **out})
        keys = torch.stack(tokens, dim=1)
        queries = queries + attention(norm(queries, f"{block}.norm"), keys, keys)[0]
        hidden = F.gelu(linear(norm(queries, f"{block}.mlp.0"), f"{block}.mlp.1"))
        queries = queries + linear(hidden, f"{block}.mlp.3")
    patches = linear(norm(queries, "to_patch.0"), "to_patch.1")
    side = patch * math.isqrt(patches.shape[1])
    return F.fold(patches.mT, (side, side), patch, stride=patch)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
def test_the_decoder_draws_what_torchs_own_layers_do(depth: int) -> None:
    """So a checkpoint goes on drawing what it drew."""
    torch.manual_seed(0)
    decoder = CrossAttentionDecoder(
        12, 6, target_size=6, patch_size=2, image_channels=3, dim=16, depth=depth, heads=4, tokens=3
    )
    for parameter in decoder.parameters():
        parameter.normal_(std=0.5)
    features = [torch.randn(4, 12), torch.randn(4, 6)]
    expected = drawn_by_torchs_layers(decoder, features, depth, heads=4, patch=2)
    torch.testing.assert_close(decoder(*features), expected, rtol=1e-4, atol=1e-4)


def test_both_features_reach_every_patch() -> None:
    decoder = CrossAttentionDecoder(12, 6)
    own = torch.rand(1, 12, requires_grad=True)
    other = torch.rand(1, 6, requires_grad=True)
    image = decoder(own, other)
    for corner in (image[..., :2, :2], image[..., -2:, -2:]):
        gradients = torch.autograd.grad(corner.sum(), [own, other], retain_graph=True)
        assert all(g.any() for g in gradients)


def test_patches_land_where_their_query_stands() -> None:
    decoder = CrossAttentionDecoder(4, 4, target_size=8, patch_size=4, image_channels=1)
    with torch.no_grad():
        decoder.queries.zero_()
        decoder.queries[1, 0] = 1.0  # the patch right of the first
        image = decoder(torch.rand(1, 4), torch.rand(1, 4))[0, 0]
    others = [image[:4, :4], image[4:, :4], image[4:, 4:]]
    assert torch.equal(others[0], others[1])
    assert torch.equal(others[0], others[2])
    assert not torch.allclose(image[:4, 4:], others[0])


@pytest.mark.parametrize("kind", ["map", "tokens"])
def test_the_decoder_sees_where_each_token_of_a_spatial_feature_stands(kind: str) -> None:
    torch.manual_seed(0)
    decoder = CrossAttentionDecoder(12, 12, spatial=True)
    own, other = torch.randn(2, *SHAPES[kind])
    where = 1 if kind == "tokens" else 2
    image = decoder(own, other)
    for moved in ((own.roll(1, where), other), (own, other.roll(1, where))):
        assert (decoder(*moved) - image).abs().max() > 1e-3


def test_positions_are_sines_and_cosines_and_a_maps_run_row_by_row() -> None:
    decoder = CrossAttentionDecoder(12, 12, dim=6, heads=2, spatial=True)
    tokens = decoder.equivariant_tokens
    feature = torch.randn(2, 12, 3, 5)
    code = tokens(feature) - tokens.project(tokens.norm(feature.flatten(2).mT))
    rates = [1e4 ** (-i / 3) for i in range(3)]
    waves = (math.sin, math.cos)
    expected = [[wave(n * rate) for wave in waves for rate in rates] for n in range(15)]
    torch.testing.assert_close(code, torch.tensor(expected).expand(2, -1, -1), atol=1e-5, rtol=0)
    # an odd width leaves the last channel
    odd = CrossAttentionDecoder(12, 12, dim=5, heads=1, spatial=True).equivariant_tokens
    last = odd(feature) - odd.project(odd.norm(feature.flatten(2).mT))
    assert last[..., :4].abs().max() > 0.5
    torch.testing.assert_close(last[..., 4], torch.zeros(2, 15), atol=1e-5, rtol=0)


def test_the_decoder_names_sizes_that_do_not_divide_and_features_of_another_rank() -> None:
    with pytest.raises(ValueError, match=r"divides target_size=32, got 5"):
        ReconAux(8, patch_size=5)
    with pytest.raises(ValueError, match=r"decoder_heads .* decoder_dim=32, got 5"):
        ReconAux(8, decoder_dim=32, decoder_heads=5)
    for option in ("decoder_depth", "decoder_heads", "decoder_tokens", "patch_size"):
        none: dict[str, Any] = {option: 0}
        with pytest.raises(ValueError, match=rf"{option}= of 1 or more, got 0"):
            ReconAux(8, **none)
    views = torch.rand(2, 4, 3, 32, 32)
    with pytest.raises(ValueError, match=r"pooled, \(B, D\), got \(4, 4, 2, 2\); spatial=True"):
        ReconAux(8)(views, torch.rand(2, 4, 8, 2, 2))


def test_a_decoder_that_expects_context_says_so() -> None:
    with pytest.raises(ValueError, match="expected context from the other view"):
        CrossAttentionDecoder(8, 8)(torch.rand(2, 8))
