"""The task's losses through torch.compile."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from helpers.counting import operations_begun
from helpers.features import smooth_pictures
from helpers.models import Siamese, tiny_encoder
from helpers.versions import not_the_oldest
from recon_aux import ReconAux
from recon_aux.integrations.lightly import attach

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    not_the_oldest("compile=True needs torch 2.7")
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def trained(aux: ReconAux, views: Tensor, features: Tensor, live: int, steps: int) -> list[Tensor]:
    """Train a decoder and some features, and return each step's loss and all that was trained."""
    inner = [y.clone().requires_grad_(i < live) for i, y in enumerate(features)]
    optimizer = torch.optim.SGD([*aux.parameters(), *inner[:live]], lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        output = aux(views, inner)
        output.loss.backward()
        optimizer.step()
        losses += [output.loss, output.reconstruction_loss, output.edges_loss, output.target]
    return [x.detach() for x in (*losses, output.reconstruction, *inner, *aux.parameters())]


@pytest.mark.parametrize(
    ("shape", "live"), [((4, 16), 2), ((4, 5, 16), 1)], ids=["pooled", "tokens-momentum"]
)
def test_compiled_the_losses_and_gradients_are_the_same_by_one_graph_for_both_views(
    shape: tuple[int, ...], live: int
) -> None:
    views = smooth_pictures(8).view(2, 4, 3, 32, 32)
    features = torch.linspace(-1, 1, 2 * math.prod(shape)).view(2, *shape)
    options: dict[str, Any] = {"seed": 0, "spatial": len(shape) > 2}
    plain = trained(ReconAux(16, **options), views, features, live, steps=5)
    assert not counters["stats"]
    compiled = trained(ReconAux(16, compile=True, **options), views, features, live, steps=5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    for got, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_compiled_an_attached_model_begins_at_most_60_operations_more() -> None:
    pictures = smooth_pictures(64)
    bare = operations_begun(Siamese(tiny_encoder(dim=16)), pictures)
    model = attach(Siamese(tiny_encoder(dim=16)), compile=True)
    with_it = operations_begun(model, pictures)
    assert counters["stats"]["unique_graphs"] == 1
    assert 0 < sum(with_it) - sum(bare) <= 60


def test_a_module_that_compiles_is_copied_pickled_and_loaded_like_any_other() -> None:
    views, features = torch.rand(2, 4, 3, 32, 32), torch.rand(2, 4, 16)
    aux, plain = (ReconAux(16, seed=0, reconstruct="both", compile=x) for x in (True, False))
    assert aux.options == plain.options
    loss = aux(views, features).loss
    for other in (copy.deepcopy(aux), pickle.loads(pickle.dumps(aux))):
        assert torch.equal(other(views, features).loss, aux(views, features).loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.load_state_dict(aux.state_dict())
    assert torch.isfinite(loss)


@pytest.mark.parametrize("blank", [True, False])
def test_until_the_units_are_set_nothing_is_compiled(blank: bool) -> None:
    aux = ReconAux(16, compile=True, registration=0, statistics=0, edges=0)
    views: Any = torch.zeros(2, 4, 3, 32, 32) if blank else smooth_pictures(8).view(2, 4, 3, 32, 32)
    features = torch.rand(2, 4, 16, requires_grad=True)
    for _ in range(2):
        aux(views, features.unbind()).loss.backward()
    assert counters["stats"]["unique_graphs"] == (0 if blank else 1)
