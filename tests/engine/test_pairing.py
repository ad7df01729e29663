"""Whether two views show the same images: what is known of it for any images."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor

from recon_aux.engine.pairing import PairCheck, _cells, _standard_errors

Pair = tuple[Tensor, Tensor]


def noisy(images: Tensor) -> Tensor:
    return images + 0.05 * torch.rand_like(images)


def pairs(batch_size: int, *size: int) -> Pair:
    images = torch.rand(batch_size, *(size or (3, 32, 32)))
    return noisy(images), noisy(images)


def shifted(batch_size: int) -> Pair:
    view0, view1 = pairs(batch_size)
    return view0, view1.roll(1, 0)


def interleaved(batch_size: int) -> Pair:
    """The halves of one batch where rows 2i and 2i + 1 are of one image."""
    images = torch.rand(batch_size, 3, 32, 32).repeat_interleave(2, 0)
    view0, view1 = noisy(images).split(batch_size)
    return view0, view1


def decide(views: Callable[[], Pair], steps: int = 300) -> tuple[bool | None, list[int]]:
    """Check steps until it is decided; return what was, and the steps with a report."""
    check, reports = PairCheck(), []
    for step in range(steps):
        if check(*views()):
            reports.append(step)
    return check.paired, reports


@pytest.mark.parametrize("batch_size", [1, 2, 8, 64, 300])
def test_pairs_are_never_reported(batch_size: int) -> None:
    assert decide(lambda: pairs(batch_size), 64) == (True, [])


@pytest.mark.parametrize("views", [shifted, interleaved], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("batch_size", [2, 8, 64, 300])
def test_other_rows_are_reported_once(views: Callable[[int], Pair], batch_size: int) -> None:
    paired, reports = decide(lambda: views(batch_size), 300 // batch_size + 1)
    assert paired is False
    assert len(reports) == 1
    # a look needs 32 rows; 256 are enough for any decision
    assert 32 <= (reports[0] + 1) * batch_size <= max(256, batch_size)


def test_unrelated_batches_of_one_image_are_reported() -> None:
    paired, reports = decide(lambda: (torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)))
    assert (paired, len(reports)) == (False, 1)


def test_a_few_rows_decide_nothing() -> None:
    check = PairCheck()
    assert not any(check(*shifted(8)) for _ in range(3))
    assert check.paired is None


@pytest.mark.parametrize(
    "image",
    [
        lambda: torch.zeros(3, 32, 32),
        # of one colour
        lambda: torch.rand(3, 1, 1).expand(3, 32, 32),
        lambda: torch.full((3, 32, 32), torch.nan),
        lambda: torch.full((3, 32, 32), torch.inf),
    ],
    ids=["black", "one colour", "nan", "infinite"],
)
@pytest.mark.parametrize("augment", [noisy, torch.clone], ids=["noise", "no noise"])
def test_images_that_show_nothing_decide_nothing(
    image: Callable[[], Tensor], augment: Callable[[Tensor], Tensor]
) -> None:
    def views() -> Pair:
        images = torch.stack([image() for _ in range(16)])
        return augment(images), augment(images).roll(1, 0)

    assert decide(views, 40) == (None, [])


@pytest.mark.parametrize(
    "augment",
    [noisy, torch.clone, lambda x: x + 0.3 * torch.rand_like(x)],
    ids=["noise", "no noise", "strong noise"],
)
def test_equal_images_decide_nothing(augment: Callable[[Tensor], Tensor]) -> None:
    images = torch.rand(3, 32, 32).expand(16, -1, -1, -1)
    assert decide(lambda: (augment(images), augment(images)), 40) == (None, [])


def test_blank_rows_do_not_count() -> None:
    def views() -> Pair:
        view0, view1 = pairs(16)
        for rows in (slice(4, 12), slice(14, 16)):
            view0[rows] = view1[rows] = 0
        view1[0] = view0[3] = torch.nan
        # the rows that tell something are 1, 2, 12 and 13
        return view0, view1

    both = (torch.cat(views) for views in zip(views(), views(), strict=True))
    _, telling = _standard_errors(*map(_cells, both))
    assert telling.nonzero().flatten().tolist() == [1, 2, 12, 13, 17, 18, 28, 29]
    assert decide(views, 40) == (True, [])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_over_all_pairings_the_errors_are_standard(count: int) -> None:
    # of correlated images, so that some are alike to many
    images = torch.rand(count, 3, 8, 8) + torch.rand(count, 1, 1, 1) * torch.rand(3, 8, 8)
    cells = _cells(images)
    orders = list(permutations(range(count)))
    errors = torch.tensor([_standard_errors(cells, cells[list(order)])[0] for order in orders])
    assert abs(errors.mean()) < 1e-4
    assert abs(errors.std(correction=0) - 1) < 1e-4
    # every image is nearest to itself
    assert errors.argmax() == 0


def test_near_duplicates_count_most() -> None:
    # images that share more or less of one image: similarities spread from 0 to 0.9
    images = torch.rand(100, 3, 32, 32) + 2 * torch.rand(100, 1, 1, 1) * torch.rand(3, 32, 32)
    errors, _ = _standard_errors(_cells(noisy(images)), _cells(noisy(images)))
    assert errors > 80


Looks = list[Pair]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Looks]:
    """Say what each look finds; return a list to which each adds the cells that it was given."""

    def say(errors: float, dropped: int = 0) -> Looks:
        seen: Looks = []

        def standard_errors(cells0: Tensor, cells1: Tensor) -> tuple[float, Tensor]:
            seen.append((cells0, cells1))
            return errors, torch.arange(len(cells0)) >= dropped

        monkeypatch.setattr("recon_aux.engine.pairing._standard_errors", standard_errors)
        return seen

    return say


@pytest.mark.parametrize(
    ("rows", "errors", "paired"),
    [
        (40, 6.1, True),
        (40, 5.9, None),
        # 0.4 times the root of the rows, less 4
        (36, -1.5, None),
        (36, -1.7, False),
        (100, 0.1, None),
        (100, -0.1, False),
        # but 2 at most
        (250, 1.9, False),
        (250, 2.2, None),
        # and then it is decided
        (256, 4.1, True),
        (256, 3.9, False),
        # as where no two rows differ
        (40, torch.nan, None),
    ],
)
def test_a_look_decides(
    looks: Callable[..., Looks], rows: int, errors: float, paired: bool | None
) -> None:
    looks(errors)
    check = PairCheck()
    assert check(*pairs(rows)) is (paired is False)
    assert check.paired is paired


def test_looks_are_at_the_first_rows_of_a_call_and_the_last_of_all(
    looks: Callable[..., Looks],
) -> None:
    seen = looks(3, dropped=10)
    check = PairCheck()
    steps = [pairs(31), pairs(1), pairs(300)]
    for step in steps:
        check(*step)
    # the first 31 rows are no look; then 10 are dropped, and 256 are kept
    assert [len(cells0) for cells0, _ in seen] == [32, 256]
    for i in (0, 1):
        assert torch.equal(seen[0][i], torch.cat([_cells(step[i]) for step in steps[:2]]))
        assert torch.equal(seen[1][i], _cells(steps[2][i][:256]))
    check(*pairs(5))
    assert [len(cells0) for cells0, _ in seen] == [32, 256, 251]


def test_autocast_changes_nothing() -> None:
    cells0, cells1 = map(_cells, pairs(40))
    expected, _ = _standard_errors(cells0, cells1)
    with torch.autocast("cpu", torch.bfloat16):
        assert _standard_errors(cells0, cells1)[0] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_brightness_is_compared(dtype: torch.dtype) -> None:
    view = torch.rand(4, 3, 32, 32).to(dtype)
    cells = _cells(view)
    assert cells.dtype == torch.float32
    torch.testing.assert_close(cells, _cells(view.float().mean(1, keepdim=True)))
    torch.testing.assert_close(cells.mean((1, 2)), torch.zeros(4))
    torch.testing.assert_close(cells.square().sum((1, 2)), torch.ones(4))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.flip(-1),
        lambda x: x.flip(-2),
        lambda x: x.rot90(1, (-2, -1)),
        lambda x: x.roll(8, -1),
        lambda x: 0.3 * x + 0.5,
        lambda x: x.mean(1, keepdim=True).expand_as(x),
        lambda x: 255 * x,
    ],
    ids=["mirrored", "upside down", "turned", "moved", "pale", "grey", "bytes"],
)
def test_changed_images_are_recognised(change: Callable[[Tensor], Tensor]) -> None:
    def views() -> Pair:
        view0, view1 = pairs(40)
        return view0, change(view1)

    assert _standard_errors(*map(_cells, views()))[0] > 20
    assert decide(views, 5) == (True, [])
    assert decide(lambda: (shifted(40)[0], change(shifted(40)[1])), 8)[0] is False


@pytest.mark.parametrize("size", [(1, 32, 32), (5, 9, 30), (3, 4, 4), (3, 1, 40)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_channels_sizes_and_precisions_are_taken(
    size: tuple[int, ...], dtype: torch.dtype
) -> None:
    def views() -> Pair:
        view0, view1 = pairs(40, *size)
        return view0.to(dtype), view1.to(dtype)

    with torch.autocast("cpu", torch.bfloat16):
        assert decide(views, 8) == (True, [])


def test_views_of_two_shapes_decide_nothing() -> None:
    def views() -> Pair:
        return torch.rand(40, 3, 32, 32), torch.rand(40, 3, 24, 24)

    assert decide(views, 10) == (None, [])


def test_it_leaves_no_trace() -> None:
    view0, view1 = (view.requires_grad_() for view in shifted(20))
    before, state = (view0.detach().clone(), view1.detach().clone()), torch.get_rng_state()
    check = PairCheck()
    check(view0, view1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(view0, before[0]) and torch.equal(view1, before[1])
    assert [rows.requires_grad for rows in check._rows] == [False]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on(duplicate: Callable[[PairCheck], PairCheck]) -> None:
    check, steps = PairCheck(), [shifted(8) for _ in range(32)]
    for views in steps[:3]:
        check(*views)
    other = duplicate(check)
    reports = [[step for step in steps[3:] if c(*step)] for c in (check, other)]
    assert check.paired is other.paired is False
    assert [len(found) for found in reports] == [1, 1]


def test_it_keeps_no_rows_once_it_is_decided() -> None:
    check = PairCheck()
    check(*pairs(64))
    assert check.paired
    assert check._rows == []
    # and looks no more
    assert not check(*shifted(300))
