"""Frozen encoders of a study, and the homography that is read from their features."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_examples import pictures
from torch import Tensor, nn

from benchmarks import decoders, frozen, homography, natural_images
from benchmarks.encoders import build_encoder
from benchmarks.homography import ERROR, MEANS, SPREAD, corner_error, draw_pairs
from helpers.running import call_example, rows

# --- homography ---


def ramp(side: int) -> Tensor:
    """A photograph whose red and green say where a pixel is: three times its x and its y."""
    x = torch.arange(side, dtype=torch.uint8).expand(side, side) * 3
    return torch.stack([x, x.T, torch.full_like(x, 255)])[None]


def at_corners(crops: Tensor) -> Tensor:
    """The colours of a crop's corners, ``(N, 4, 3)``, from the upper left, clockwise."""
    return torch.stack([crops[:, :, y, x] for y, x in ((0, 0), (0, -1), (-1, -1), (-1, 0))], dim=1)


def test_the_second_crop_shows_what_is_between_the_moved_corners() -> None:
    first, second, moves = draw_pairs(ramp(64), 300, side=32, seed=0)
    start, end = (at_corners(crops).float() for crops in (first, second))
    torch.testing.assert_close((end - start)[..., :2] / 3, moves, atol=0.4, rtol=0)
    # an upright square of the photograph, as large as asked
    assert ((start[:, 1] - start[:, 0])[:, :2] == torch.tensor([93.0, 0.0])).all()
    assert ((start[:, 3] - start[:, 0])[:, :2] == torch.tensor([0.0, 93.0])).all()
    # never beyond the photograph: nothing is blackened
    assert min(first[:, 2].min(), second[:, 2].min()) == 255
    # up to a quarter of the side, in all directions, at many places
    assert moves.abs().max() <= 8
    assert moves.amin((0, 1)).max() < -7.5 < 7.5 < moves.amax((0, 1)).min()
    assert len(start[:, 0].unique(dim=0)) > 100


def test_pairs_are_the_same_again_and_leave_the_random_state_as_it_is() -> None:
    state = torch.get_rng_state()
    first, again, other = (draw_pairs(ramp(48), 5, 32, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[2], other[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_error_is_the_mean_distance_of_corners() -> None:
    moves = torch.randn(5, 4, 2)
    assert corner_error(moves, moves) == 0
    assert corner_error(moves + torch.tensor([3.0, -4.0]), moves) == pytest.approx(5)
    one = moves.clone()
    one[:, 2, 0] += 4
    assert corner_error(one, moves) == pytest.approx(1)


class Corners(nn.Module):
    """Knows where a crop of a ramp is."""

    def forward(self, x: Tensor) -> Tensor:
        return at_corners(x).flatten(1)


class Ignorant(nn.Module):
    """Says the same of every crop."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), 4)


def test_an_encoder_that_knows_finds_the_corners_and_an_ignorant_one_the_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a colour a corner is learned soon
    monkeypatch.setattr("recon_aux.probe.mlp._STEPS", 500)
    train, test = (draw_pairs(ramp(64), count, 32, seed) for seed, count in ((0, 2000), (1, 500)))
    found, predicted = homography.measure(Corners(), train, test, torch.device("cpu"))
    assert found[ERROR] < 1
    assert found[ERROR] == pytest.approx(corner_error(predicted, test[2]), abs=0.2)
    assert found[SPREAD] > 0
    guessed, _ = homography.measure(Ignorant(), train, test, torch.device("cpu"))
    # of a square's middle, from points all over it
    assert guessed[MEANS] == found[MEANS] == pytest.approx(8 * 0.7652, rel=0.02)
    assert guessed[ERROR] == pytest.approx(guessed[MEANS], rel=0.02)


# --- decoders ---


def test_a_decoder_uses_what_it_sees_of_the_other_view() -> None:
    def views(seed: int) -> decoders.Views:
        shades = torch.rand(128, 3, generator=torch.Generator().manual_seed(seed))
        images = shades[:, :, None, None].expand(2, -1, -1, 16, 16)
        # the first half knows the shades, the last half nothing
        features = torch.cat([shades, torch.ones_like(shades)], dim=1)
        return decoders.Views(images, features.expand(2, -1, -1))

    state = torch.get_rng_state()
    found = {
        context: decoders.train_decoder(context, views(0), views(1), steps=120)
        for context in decoders.CONTEXTS
    }
    assert torch.equal(torch.get_rng_state(), state)
    assert max(found["none"], found["equivariant"]) < 5
    assert min(found["invariant"], found["both"]) > 40


# --- encoders of a study ---


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photographs, in which a study has trained."""
    root = tmp_path_factory.mktemp("study")
    pictures(root / "photos", ("train", "test"), classes=2, count=8)
    options: list[Any] = ["--data", f"some={root / 'photos'}", "--out", root / "runs"]
    options += ["--seeds", "1", "--epochs", "1", "--batch-size", "8", "--pairs", "8"]
    options += ["--image-size", "16", "--device", "cpu", "--protocols"]
    arms = ["untrained", "SimCLR", "SimCLR, attached"]
    call_example(natural_images.main, *options, "--arms", *arms)
    return root


def build(options: dict[str, str]) -> nn.Module:
    """Build an encoder as a study's record says."""
    return build_encoder(options["backbone"])


def test_an_encoder_is_the_one_that_was_trained(study: Path) -> None:
    for arm in ("SimCLR", "SimCLR-attached"):
        path = study / "runs" / f"some-{arm}-1.json"
        encoder = frozen.load_encoder(path, build)
        trained = torch.load(path.with_suffix("") / "checkpoints" / "last.ckpt", weights_only=False)
        state = encoder.state_dict()
        assert state
        assert all(torch.equal(v, trained["state_dict"][f"backbone.{k}"]) for k, v in state.items())
        assert not encoder.training
        assert not any(weight.requires_grad for weight in encoder.parameters())


def test_an_untrained_encoder_has_the_weights_that_were_measured(study: Path) -> None:
    path = study / "runs" / "some-untrained-1.json"
    torch.manual_seed(7)
    encoder = frozen.load_encoder(path, build)
    args = argparse.Namespace(backbone="tiny-resnet18", image_size=16, lr=1e-3)
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(2)
    model, _ = natural_images.train("untrained", images, 1, path, args)
    state = model.backbone.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())


def test_every_encoder_is_measured_once_and_laid_beside_the_others(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what a head has learned isn't seen here
    monkeypatch.setattr("recon_aux.probe.mlp._STEPS", 2)
    command: list[Any] = [study / "runs", study / "photos"]
    options = ["--pairs", "32", "--device", "cpu"]
    call_example(homography.main, *command, *options, "--arms", "SimCLR")
    out = study / "runs" / "homography"
    first = (out / "some-SimCLR-1.json").read_text()
    arms = ["SimCLR", "SimCLR, attached"]
    printed = call_example(homography.main, *command, *options, "--arms", *arms)
    assert (out / "some-SimCLR-1.json").read_text() == first
    record = json.loads(first)
    assert record["trained"]["options"]["epochs"] == "1"
    assert {"commit", "command", "machine", "options"} <= record.keys()
    table = (out / "table.md").read_text()
    assert table in printed
    head, *shown = rows(table)
    assert head[2:] == [ERROR, SPREAD, MEANS]
    cells = {row[0]: row[1:] for row in shown}
    assert cells.keys() == {"SimCLR", "SimCLR, attached"}
    assert cells["SimCLR"] == ["1", *(f"{record['results'][key]:.2f}" for key in head[2:])]
    drawn = {path.stem for path in out.glob("*.png")}
    assert drawn == {"table", *(path.stem for path in out.glob("*.json"))}
    with pytest.raises(SystemExit, match="--pairs 32, not 16"):
        call_example(homography.main, *command, "--pairs", "16", "--device", "cpu")


def test_decoders_are_compared_on_the_encoders_of_a_study(study: Path) -> None:
    command: list[Any] = [study / "runs", study / "photos"]
    options = ["--limit", "10", "--steps", "2", "--device", "cpu", "--arms", "SimCLR, attached"]
    head, shown = rows(call_example(decoders.main, *command, *options))
    assert head[2:] == list(decoders.CONTEXTS)
    record = json.loads((study / "runs" / "decoders" / "some-SimCLR-attached-1.json").read_text())
    assert shown[2:] == [f"{record['results'][context]:.2f}" for context in decoders.CONTEXTS]


def test_encoders_that_are_gone_are_left_out(study: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(study / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "some-SimCLR-1")
    # a training of less than half a second would count as none
    path = tmp_path / "runs" / "some-SimCLR-1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 5}))
    found = frozen.find_trained(tmp_path / "runs", "natural_images.py")
    assert {run["arm"] for run in found} == {"SimCLR, attached", "untrained"}
    assert "some-SimCLR-1 is left out: its checkpoint is gone" in capsys.readouterr().out


def test_a_folder_without_encoders_and_an_unknown_arm_are_refused(
    study: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"natural_images\.py with checkpoints .* found none"):
        frozen.find_trained(tmp_path, "natural_images.py")
    with pytest.raises(SystemExit, match=r"compare\.py with checkpoints .* found none"):
        frozen.find_trained(study / "runs", "compare.py")
    with pytest.raises(SystemExit, match=r"--arms expects any of .*'SimCLR'.* got \['BYOL'\]"):
        frozen.find_trained(study / "runs", "natural_images.py", ["BYOL"])


def test_the_table_has_means_over_seeds_for_each_data_set(tmp_path: Path) -> None:
    def run(data: str, arm: str, seed: int, error: float) -> dict[str, Any]:
        results = {"error, px": error, "of nothing": 6.0}
        return {"data": data, "arm": arm, "seed": seed, "results": results}

    done = [run("some", "SimCLR", 0, 4.0), run("some", "SimCLR", 1, 5.0)]
    done += [run("others", "SimCLR, attached", 0, 3.0)]
    text = frozen.table(done)
    assert "trained on some" in text
    assert "trained on others" in text
    assert rows(text) == [
        ["encoder", "seeds", "error, px", "of nothing"],
        ["SimCLR", "2", "4.50 ± 0.71", "6.00 ± 0.00"],
        ["encoder", "seeds", "error, px", "of nothing"],
        ["SimCLR, attached", "1", "3.00", "6.00"],
    ]
    # arms that a data set lacks leave a gap
    frozen.draw(done, "error, px", "of nothing", tmp_path / "table.png")
    assert (tmp_path / "table.png").is_file()
