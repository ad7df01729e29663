"""The table of natural images: a small version, which goes on where it was."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import seed_everything
from test_examples import pictures
from torch import Tensor

from benchmarks import field, frozen, natural_images
from benchmarks.arms import build_model
from benchmarks.encoders import ENCODERS, build_encoder, vit, width_of
from benchmarks.images import (
    CHANGE_DIM,
    TwoViews,
    change_back,
    change_between,
    load,
    mirror,
)
from benchmarks.methods import IBOT, MORE_METHODS, VIT_METHODS, SimCLR
from benchmarks.options import note_options, options_of
from benchmarks.records import keep, kept
from benchmarks.resuming import is_done, refuse_mixed
from benchmarks.rivals import RIVALS, WAY, Intermediate, numbers_of, part_of_the_way
from benchmarks.sie import HyperPredictor
from helpers.running import call_example, fail_once, rows, run_example
from recon_aux.integrations.lightly import attach
from recon_aux.probe import COMBINED, SETS, TRANSFORMATIONS, draw_parameters, transform


def test_every_arm_is_trained_measured_and_kept(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("some", "others")}
    for folder in folders.values():
        pictures(folder, ("train", "test"), classes=2, count=12)
    out = tmp_path / "out"
    # what the table was made with, but smaller
    options: list[Any] = [f"@{Path(natural_images.__file__).with_suffix('.args')}"]
    options += ["--out", out, "--seeds", "0", "--epochs", "1", "--batch-size", "8"]
    options += ["--pairs", "16", "--image-size", "16", "--device", "cpu", "--protocols"]
    data = [f"{name}={folder}" for name, folder in folders.items()]
    ends = ["untrained", "ceiling"]
    arms = ["SimCLR", "SimCLR, attached", "SimCLR, attached, context='both', weight=2"]
    run_example("benchmarks/natural_images.py", "--data", *data, *options, "--arms", *arms)
    first = (out / "some-SimCLR-attached-0.json").read_text()
    more = ["--epochs", "2", "--seeds", "1"]
    with pytest.raises(SystemExit, match="--epochs 1, not 2"):
        call_example(natural_images.main, "--data", *data, *options, *more)
    call_example(natural_images.main, "--data", *data, *options, "--arms", *arms, *ends)
    assert (out / "some-SimCLR-attached-0.json").read_text() == first
    runs = [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert {run["options"]["limit"] for run in runs} == {"10000"}
    done = {(run["data"], run["arm"]) for run in runs}
    assert done == {(n, a) for n in folders for a in (*arms, *ends)}
    whole = json.loads(first)["results"]["whole"]
    assert {"linear", "knn", "1 % of labels", "10 % of labels", "transfer"} <= whole.keys()
    assert set(whole["alone"]) == set(TRANSFORMATIONS)
    assert {"commit", "command", "machine", "seconds", "torch"} <= json.loads(first).keys()
    attached_with = {run["arm"]: run["recon_aux"] for run in runs if "recon_aux" in run}
    assert attached_with.keys() == set(arms[1:])
    assert [attached_with[arm]["context"] for arm in arms[1:]] == ["invariant", "both"]
    assert attached_with[arms[2]]["weight"] == 2
    table = (out / "table.md").read_text()
    assert (out / "table.png").is_file()
    drawn = {path.stem for path in out.glob("*-0.png")}
    assert drawn == {path.stem for path in out.glob("*attached*.json")}
    assert table.count("| SimCLR, attached, equivariant") == 4
    assert all(table.count(f"| {arm}, whole") == 4 for arm in ends)


def test_the_table_says_how_much_of_the_gap_to_the_ceiling_is_closed(tmp_path: Path) -> None:
    def add(arm: str, seed: int, r2: float) -> None:
        part = {"linear": 50.0, "knn": 40.0, "alone": dict.fromkeys(TRANSFORMATIONS, r2)}
        results = {"whole": part | {"combined": dict.fromkeys(COMBINED, r2)}}
        if "attached" in arm:
            results["equivariant"] = part | {"combined": dict.fromkeys(COMBINED, r2 - 0.1)}
        run = {"data": "some", "arm": arm, "seed": seed, "results": results}
        (tmp_path / f"{arm}-{seed}.json").write_text(json.dumps(run))

    for seed, shift in ((0, -0.01), (1, 0.01)):
        add("SimCLR", seed, 0.2 + shift)
        add("SimCLR, attached", seed, 0.5 + shift)
    add("BYOL, attached", 0, 0.5)
    # of seed 0 alone: attached 0.49 of bare 0.19
    add("ceiling", 0, 0.59)
    add("SimCLR, attached, weight=3", 0, 0.39)
    # a transfer that one of the seeds lacks
    run = json.loads((tmp_path / "SimCLR-0.json").read_text())
    run["results"]["whole"]["transfer"] = 30.0
    (tmp_path / "SimCLR-0.json").write_text(json.dumps(run))
    text = natural_images.tables(kept(tmp_path))
    head, *shown = rows(text)
    assert [row[head.index("transfer")] for row in shown[:4]] == [""] * 4
    gap, alone = head.index("of the gap"), head.index("equivariant alone")
    assert [(row[0], row[gap], row[alone]) for row in shown[:4]] == [
        ("SimCLR", "", ""),
        ("SimCLR, attached", "75 %", "0.400 ± 0.014"),
        ("BYOL, attached", "", "0.400"),
        ("ceiling", "", ""),
    ]
    # other options have a table of their own, next to the same bare method
    assert shown[4] == head
    assert (shown[5][0], shown[5][gap]) == ("SimCLR, attached, weight=3", "50 %")


def test_what_changed_maps_the_first_view_onto_the_second() -> None:
    torch.manual_seed(0)
    size, count = 65, 16
    # a spot right of the middle and above it
    place = (torch.arange(size) - 32) / size
    spot = torch.exp(-500 * ((place - 0.1) ** 2 + (place[:, None] + 0.05) ** 2))
    # a smaller image would show the spot's reflection, too
    ranges = TRANSFORMATIONS | {"scale": (1.0, 1.3)}
    views = [
        draw_parameters(count, ranges=ranges) | {"flipped": torch.rand(count) < 0.5}
        for _ in range(2)
    ]
    x0, x1 = (transform(mirror(spot.expand(count, 3, -1, -1), v["flipped"]), v) for v in views)
    change = change_between(*views)
    assert change.shape == (count, CHANGE_DIM)

    def center(view: Tensor) -> Tensor:
        weight = view.mean(1) ** 4
        sides = [(weight.sum(side) * place).sum(1) / weight.sum((1, 2)) for side in (1, 2)]
        return torch.stack(sides, dim=1)

    rotation = change[:, :4].unflatten(1, (2, 2))
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(2).expand_as(rotation))
    assert set(torch.linalg.det(rotation).round().tolist()) == {-1, 1}
    shift, growth = change[:, 4:6] * 0.4 / 6**0.5, (change[:, 6] * 0.6 / 6**0.5).exp()
    moved = growth[:, None] * (rotation @ center(x0)[:, :, None])[:, :, 0] + shift
    torch.testing.assert_close(moved, center(x1), atol=5e-3, rtol=0)


def test_what_changed_is_standardised_and_nothing_is_where_nothing_did() -> None:
    torch.manual_seed(0)
    first, second = (
        draw_parameters(2000) | {"flipped": torch.zeros(2000, dtype=torch.bool)} for _ in range(2)
    )
    same = change_between(first, first)
    expected = torch.tensor([1.0, 0, 0, 1, *[0] * 7])
    torch.testing.assert_close(same, expected.expand_as(same), atol=1e-5, rtol=0)
    spread = change_between(first, second)[:, 4:].std(0)
    assert (spread - 1).abs().max() < 0.2
    brighter = change_between(first, first | {"brightness": first["brightness"] + 0.1})
    assert ((brighter - expected).abs().sum(0) > 1e-2).tolist() == [
        *[False] * 7,
        True,
        *[False] * 3,
    ]


def drawn_views(count: int) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    return [draw_parameters(count) | {"flipped": torch.rand(count) < 0.5} for _ in range(2)]


def test_what_changed_can_be_turned_back() -> None:
    first, second = drawn_views(100)
    there, back = change_between(first, second), change_between(second, first)
    torch.testing.assert_close(change_back(there), back, atol=1e-4, rtol=0)
    assert (there - back).abs().max() > 1


def test_all_kinds_of_change_are_of_one_size() -> None:
    first, second = drawn_views(2000)
    numbers = numbers_of(change_between(first, second))
    mirrored = first["flipped"] != second["flipped"]
    assert torch.equal(numbers.pop("mirrored")[:, 0] == 1, mirrored)
    assert {kind: x.shape[1] for kind, x in numbers.items()} == {
        "rotation": 1,
        "place": 3,
        "colour": 4,
    }
    for x in numbers.values():
        assert (x.std(0) - 1).abs().max() < 0.2
    turn = numbers["rotation"][:, 0] * 60 / 6**0.5
    change = second["rotation"] - first["rotation"]
    # the direction is a matter of taste; where views aren't mirrored, it's the difference
    kept = ~(first["flipped"] | second["flipped"])
    torch.testing.assert_close(turn[kept].abs(), change[kept].abs(), atol=1e-2, rtol=0)
    assert turn.abs().max() > 45


def test_sie_begins_as_if_nothing_changed() -> None:
    x, nothing = torch.randn(4, 8), torch.tensor([[1.0, 0, 0, 1, *[0] * 7]]).expand(4, -1)
    assert torch.equal(HyperPredictor(8, CHANGE_DIM)(x, nothing), x)
    given = RIVALS["SIE given rotation"](build_encoder("tiny-resnet18"), 256, 1e-3)
    assert given.predictor.products.in_features == 4 * 512


def test_all_views_are_the_same_whoever_is_given_what_changed() -> None:
    samples = [(image, torch.tensor(0)) for image in training()[1][0]]
    views = []
    for changes in (False, True):
        torch.manual_seed(0)
        views.append(TwoViews(flip=True, changes=changes)(samples)[0])
    assert torch.equal(torch.stack(views[0]), torch.stack(views[1]))


def training(**options: Any) -> tuple[argparse.Namespace, tuple[Tensor, Tensor]]:
    """Options and data of a small run."""
    small = {"backbone": "tiny-resnet18", "image_size": 16, "batch_size": 8, "lr": 1e-3}
    small |= {"optimizer": "AdamW", "views": "probed", "workers": 0, "epochs": 1}
    small |= {"precision": "32-true", "device": "cpu"}
    args = argparse.Namespace(**small | options)
    shape = (24, 3, args.image_size, args.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    return args, (images, torch.arange(24) % 2)


@pytest.mark.parametrize("method", MORE_METHODS)
def test_more_methods_train_bare_and_attached(tmp_path: Path, method: str) -> None:
    args, data = training()
    for arm in (method, f"{method}, attached"):
        model, _ = natural_images.train(arm, data, 0, tmp_path / f"{arm}.json", args)
        assert torch.isfinite(model.trainer.callback_metrics["loss"])
    assert "recon_aux/loss" in model.trainer.callback_metrics


@pytest.fixture
def smaller_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tiny-vit smaller; it still has 8x8 patches."""
    monkeypatch.setitem(ENCODERS, "tiny-vit", lambda: vit(32, 4, layers=1, width=64))


def built(arm: str) -> Any:
    """Build an arm with a vision transformer."""
    seed_everything(0, verbose=False)
    encoder = build_encoder("tiny-vit")
    width = width_of(encoder, 32)
    return build_model(natural_images.parse_arm(arm), natural_images.MODELS, encoder, width, 1e-3)


@pytest.mark.usefixtures("smaller_vit")
@pytest.mark.parametrize("arm", [f"{m}{kind}" for m in VIT_METHODS for kind in ("", ", attached")])
def test_masked_methods_train_every_tensor(tmp_path: Path, arm: str) -> None:
    args, data = training(backbone="tiny-vit", image_size=32)
    before = {name: p.detach().clone() for name, p in built(arm).named_parameters()}
    model, _ = natural_images.train(arm, data, 0, tmp_path / "x.json", args)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert any(name.startswith("recon_aux.decoder") for name in after) == ("attached" in arm)
    still = [name for name, p in after.items() if torch.equal(p, before[name])]
    # the last layer is normalised by weights that are never trained, as in DINO
    assert [name for name in still if not name.endswith("last_layer.weight_g")] == []
    assert [n for n, p in after.items() if p.requires_grad and p.grad is None] == []
    assert all(p.isfinite().all() for p in after.values())


@pytest.mark.usefixtures("smaller_vit")
@pytest.mark.parametrize("method", VIT_METHODS)
def test_a_masked_method_that_is_attached_without_weight_and_split_trains_as_bare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    args, data = training(backbone="tiny-vit", image_size=32)
    losses: list[float] = []

    def note(model: Any, outputs: dict[str, Tensor], *_: Any) -> None:
        losses.append(float(outputs["loss"]))

    monkeypatch.setattr(IBOT, "on_train_batch_end", note)

    def own(arm: str, number: int) -> dict[str, Tensor]:
        model, _ = natural_images.train(arm, data, 0, tmp_path / f"{number}.json", args)
        return {n: p for n, p in model.named_parameters() if not n.startswith("recon_aux")}

    bare = own(method, 0)
    attached = own(f"{method}, attached, weight=0, equivariant_dim=0", 1)
    assert losses[:3] == losses[3:]
    assert attached.keys() == bare.keys()
    assert all(torch.equal(p, bare[name]) for name, p in attached.items())


@pytest.mark.usefixtures("smaller_vit")
@pytest.mark.parametrize("method", VIT_METHODS)
def test_the_loss_of_a_masked_method_sees_the_invariant_part_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    args, data = training(backbone="tiny-vit", image_size=32)
    reached: list[Tensor] = []

    def note(model: Any) -> None:
        # it scales class tokens and patches, channel by channel
        last = model.backbone.vit.encoder.ln
        reached.append((last.weight.grad != 0) | (last.bias.grad != 0))

    monkeypatch.setattr(IBOT, "on_after_backward", note)
    # with weight=0 the method's loss is all there is
    for i, arm in enumerate([method, f"{method}, attached, weight=0"]):
        natural_images.train(arm, data, 0, tmp_path / f"{i}.json", args)
    bare, attached = torch.stack(reached).chunk(2)
    assert bare.all()
    assert attached[:, :32].all()
    assert not attached[:, 32:].any()


@pytest.mark.usefixtures("smaller_vit")
def test_masked_patches_are_drawn_from_the_random_state_that_a_checkpoint_keeps() -> None:
    model = built("iBOT")
    drawn: list[Tensor] = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        # Python's is another one each time
        random.seed(len(drawn))
        drawn.append(model.draw_blocks(8))
    assert drawn[0].shape == (8, 8, 8)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_masked_methods_need_a_vision_transformer(tmp_path: Path) -> None:
    args, data = training()
    with pytest.raises(SystemExit, match=r"got Sequential\. Pass --backbone tiny-vit"):
        natural_images.train("DINOv2", data, 0, tmp_path / "x.json", args)


@pytest.mark.usefixtures("smaller_vit")
def test_masked_methods_are_measured_by_their_class_token(tmp_path: Path) -> None:
    options = ["--data", "digits=digits", "--out", str(tmp_path), "--seeds", "0", "--epochs", "1"]
    options += ["--batch-size", "8", "--pairs", "16", "--device", "cpu", "--limit", "30"]
    options += ["--backbone", "tiny-vit", "--protocols", "--arms", "iBOT", "DINOv2, attached"]
    call_example(natural_images.main, *options)
    bare, attached = (
        json.loads((tmp_path / f"digits-{arm}-0.json").read_text())
        for arm in ("iBOT", "DINOv2-attached")
    )
    assert list(bare["results"]) == ["whole"]
    assert list(attached["results"]) == ["whole", "invariant", "equivariant"]
    # what is split is pooled, as what is probed
    assert attached["recon_aux"]["feature_dim"] == 64
    assert not attached["recon_aux"]["spatial"]
    assert (tmp_path / "digits-DINOv2-attached-0.png").is_file()
    assert "| DINOv2, attached, equivariant" in (tmp_path / "table.md").read_text()
    # a downstream task finds the encoder within the masked one
    for arm in ("iBOT", "DINOv2-attached"):
        path = tmp_path / f"digits-{arm}-0.json"
        encoder = frozen.load_encoder(path, lambda options: build_encoder(options["backbone"]))
        saved = torch.load(path.with_suffix("") / "checkpoints" / "last.ckpt", weights_only=False)
        kept = saved["state_dict"]
        state = encoder.state_dict()
        assert all(torch.equal(v, kept[f"backbone.vit.{k}"]) for k, v in state.items())


PAPERS = "SimCLR, attached, preset='paper'"


@pytest.mark.parametrize("arm", [*RIVALS, PAPERS])
def test_every_parameter_of_every_rival_is_trained(tmp_path: Path, arm: str) -> None:
    args, data = training()
    seed_everything(0, verbose=False)
    encoder = build_encoder("tiny-resnet18")
    made = build_model(natural_images.parse_arm(arm), natural_images.MODELS, encoder, 256, 1e-3)
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    model, _ = natural_images.train(arm, data, 0, tmp_path / "x.json", args)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    trained = [name for name, p in after.items() if p.requires_grad]
    # weight decay alone would change them, too
    assert [name for name in trained if after[name].grad is None] == []
    assert [name for name in trained if torch.equal(after[name], before[name])] == []
    assert all(p.isfinite().all() for p in after.values())


def test_the_images_on_the_way_are_a_third_and_two_thirds_of_it() -> None:
    assert WAY == (1 / 3, 2 / 3)
    ranges = SETS["paper"].ranges
    drawn = draw_parameters(2, list(ranges), ranges=ranges)
    third = part_of_the_way(drawn, 1 / 3)
    assert third.keys() == drawn.keys()
    torch.testing.assert_close(third["rotation"] * 3, drawn["rotation"])
    torch.testing.assert_close(1 + 3 * (third["contrast"] - 1), drawn["contrast"])
    for name, values in part_of_the_way(drawn, 1).items():
        torch.testing.assert_close(values, drawn[name])
    image = torch.rand(2, 3, 16, 16)
    still = part_of_the_way(drawn, 1e-6)
    torch.testing.assert_close(transform(image, still), image, atol=1e-4, rtol=0)


def test_the_method_sees_the_invariant_part_and_the_decoders_the_other() -> None:
    model = RIVALS["SimCLR + intermediate"](build_encoder("tiny-resnet18"), 256, 1e-3)
    seen: dict[str, Tensor] = {}
    for name, module in (("head", model.projection_head), ("decoder", model.decoders[1])):
        module.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, x[0]))
    features = []
    model.backbone.register_forward_hook(lambda _, __, y: features.append(y))
    views = list(torch.randn(2, 4, 3, 32, 32))
    state = torch.random.get_rng_state()
    losses = [model.training_step((views, torch.zeros(4)), 0) for _ in range(2)]
    # its own generator, from the step's number
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(losses[0], losses[1])
    assert torch.equal(seen["head"], features[0][:, :128])
    equivariant = torch.cat([y[:, 128:] for y in features[:2]], dim=1)
    assert torch.equal(seen["decoder"], equivariant)


def test_methods_that_are_given_what_changed_need_views_that_have_it() -> None:
    args, _ = training(views="lightly")
    with pytest.raises(SystemExit, match=r"got --views lightly\. Pass --views probed"):
        natural_images.collate("SIE given all", args)
    args, _ = training(views="probed")
    samples = [(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.tensor(0))] * 2
    _, (_, change) = natural_images.collate("SIE given all", args)(samples)
    assert change.shape == (2, CHANGE_DIM)


def test_an_arm_is_measured_again_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recon_aux.probe.mlp._STEPS", 2)
    options = ["--data", "digits=digits", "--out", str(tmp_path), "--seeds", "0", "--epochs", "1"]
    options += ["--batch-size", "8", "--pairs", "16", "--image-size", "16", "--device", "cpu"]
    options += ["--limit", "30"]
    arms = ["untrained", "SimCLR + intermediate"]

    call_example(natural_images.main, *options, "--arms", *arms, "--protocols")
    path = tmp_path / "digits-SimCLR-intermediate-0.json"
    first = json.loads(path.read_text())
    # of another data set, which isn't given again
    first["results"]["whole"]["transfer"] = 30.0
    path.write_text(json.dumps(first))
    assert "protocol" not in (tmp_path / "table.md").read_text()
    with pytest.raises(SystemExit, match=r"found none. Run natural_images.py --remeasure on them"):
        call_example(field.main, tmp_path)

    def training_step(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Intermediate, "training_step", training_step)
    arms_again = [*arms, "VICReg", "--remeasure"]
    printed = call_example(natural_images.main, *options, "--arms", *arms_again)
    assert "digits-VICReg-0 isn't done" in printed
    again = json.loads(path.read_text())
    for part in ("whole", "invariant", "equivariant"):
        found, was = again["results"][part], first["results"][part]
        assert {key: found[key] for key in was} == was
    # how it was trained stays, and how it was measured is added
    measured = again.pop("measured")
    assert {key: again[key] for key in again if key != "results"} == {
        key: first[key] for key in first if key != "results"
    }
    assert measured["command"].endswith("--remeasure")
    whole = again["results"]["whole"]
    assert list(whole["paper"]["alone"]) == ["rotation", "colour", "blur", "translation"]
    assert whole["paper"]["spread"]["alone"]["mean"] > 0
    assert list(whole["unseen"]["alone"]) == list(SETS["unseen"].alone)
    assert list(whole["unseen"]["combined"]) == list(SETS["unseen"].combined)
    table = (tmp_path / "table.md").read_text()
    assert table.count("| SimCLR + intermediate ") == 3
    # the same tables by themselves, and drawn
    shown = rows(call_example(field.main, tmp_path, "--figure", tmp_path / "field.png"))
    names = [row[0] for row in shown]
    assert names == ["encoder", *sorted(arms), "encoder", *sorted(arms)]
    cells = dict(zip(shown[0], shown[1], strict=True))
    for name, value in whole["paper"]["alone"].items():
        assert cells[name] == f"{value:.3f}"
    mean = np.mean(list(whole["paper"]["alone"].values()))
    assert cells["R² one at a time"] == f"{mean:.3f}"
    assert (tmp_path / "field.png").is_file()


def test_options_are_chosen_by_other_train_images(tmp_path: Path) -> None:
    pictures(tmp_path, ("train", "test"), classes=2, count=12)
    args, _ = training(limit=10, validate=6)
    whole, _ = load(str(tmp_path), 16)
    train, test = natural_images.load_splits(str(tmp_path), args)
    usual, _ = load(str(tmp_path), 16, 10)
    # training sees the same images as without
    assert torch.equal(train[0], usual[0])
    assert len(test[0]) == 6
    together = torch.cat([train[0], test[0]])
    assert torch.equal(whole[0][:16], together)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_an_interrupted_run_goes_on_from_its_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    args, data = training(optimizer=optimizer, epochs=4)
    arm = "SimCLR, attached"
    whole, _ = natural_images.train(arm, data, 0, tmp_path / "whole.json", args)
    path = tmp_path / "SimCLR.json"
    begun = []
    for _ in range(3):
        with monkeypatch.context() as patch:
            begun += [fail_once(patch, SimCLR, at=5)]
            with pytest.raises(OSError, match="the power went"):
                natural_images.train(arm, data, 0, path, args)
    assert begun == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [6, 7, 8, 9, 10]]
    expected = dict(whole.named_parameters())
    assert [type(made).__name__ for made in whole.trainer.optimizers] == [optimizer]
    # and once more, where it was to be measured
    for _ in range(2):
        model, seconds = natural_images.train(arm, data, 0, path, args)
        assert seconds > 0
        # the decoder has been through all epochs
        assert model.recon_aux._calls == 12
        # as if nothing had happened
        assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


def test_what_was_made_with_other_options_is_refused(tmp_path: Path) -> None:
    was = argparse.Namespace(epochs=8, lr=2e-3, precision="32-true")
    path = tmp_path / "SimCLR-0.json"
    assert not is_done(path, was)
    keep(path, {"options": options_of(was)})
    assert is_done(path, argparse.Namespace(epochs=8, lr=2e-3, precision="bf16-mixed"))
    other = argparse.Namespace(epochs=100, lr=2e-3, precision="32-true")
    with pytest.raises(SystemExit, match=r"--epochs 8, not 100; other options need another folder"):
        is_done(path, other)
    # nor may another run's record be next to it, in the same table
    with pytest.raises(SystemExit, match="--epochs 8, not 100"):
        refuse_mixed(tmp_path, other)
    refuse_mixed(tmp_path, was)


def test_an_option_that_a_record_is_older_than_is_compared_with_what_was_done(
    tmp_path: Path,
) -> None:
    path = tmp_path / "SimCLR-0.json"
    keep(path, {"options": options_of(argparse.Namespace(epochs=8))})
    assert is_done(path, argparse.Namespace(epochs=8, views="probed"))
    with pytest.raises(SystemExit, match="--views probed, not lightly"):
        is_done(path, argparse.Namespace(epochs=8, views="lightly"))
    with pytest.raises(SystemExit, match="--mlp-steps None, not 4000"):
        is_done(path, argparse.Namespace(epochs=8, mlp_steps=4000))


def test_a_run_goes_on_in_its_own_precision(tmp_path: Path) -> None:
    note_options(tmp_path, argparse.Namespace(epochs=8, device="cpu", precision="32-true"))
    note_options(tmp_path, argparse.Namespace(epochs=8, device="gpu", precision="32-true"))
    with pytest.raises(SystemExit, match="--precision 32-true, not bf16-mixed"):
        note_options(tmp_path, argparse.Namespace(epochs=8, device="cpu", precision="bf16-mixed"))


def test_options_are_attachs_or_else_the_methods_own() -> None:
    assert natural_images.parse_arm("BYOL") == ("BYOL", False, {})
    assert natural_images.parse_arm("BYOL, attached") == ("BYOL", True, {})
    assert natural_images.parse_arm("BYOL, momentum=0.9") == ("BYOL", False, {"momentum": 0.9})
    attached = natural_images.parse_arm("BYOL, attached, context='both', weight=1")
    assert attached == ("BYOL", True, {"context": "both", "weight": 1})


@pytest.mark.parametrize("options", ["attached", "0.3", "context=both", "weight="])
def test_options_that_are_none_are_refused(options: str) -> None:
    with pytest.raises(SystemExit, match="expected options as name=value"):
        natural_images.parse_arm(f"SimCLR, attached, {options}")


def test_data_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--data expects NAME=FOLDER, got CIFAR"):
        call_example(natural_images.main, "--data", "CIFAR", "--out", tmp_path / "out")


def test_views_of_lightly_are_in_the_encoders_units() -> None:
    torch.manual_seed(0)
    # random pixels differ in every crop, and their mean stays near the middle, which is 0
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    samples = [(image, torch.tensor(i)) for i, image in enumerate(images)]
    views, labels = natural_images.SimCLRViews(16)(samples)
    assert [view.shape for view in views] == [(64, 3, 16, 16)] * 2
    assert labels.tolist() == list(range(64))
    assert not torch.isclose(views[0], views[1]).all((1, 2, 3)).any()
    assert all(view.mean().abs() < 0.2 and view.abs().max() <= 2 for view in views)


@pytest.mark.parametrize(("name", "width"), [("tiny-resnet18", 256), ("tiny-vit", 192)])
def test_every_encoder_can_be_attached_to(name: str, width: int) -> None:
    encoder = build_encoder(name)
    model = attach(SimCLR(encoder, width, 1e-3))
    views = list(torch.rand(2, 4, 3, 32, 32))
    model.training_step((views, torch.zeros(4)), 0).backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_the_ceiling_is_trained_with_the_transformations_parameters() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    views, parameters = natural_images.transformed_pairs(
        [(image, torch.tensor(0)) for image in images]
    )
    assert [view.shape for view in views] == [(64, 3, 16, 16)] * 2
    assert parameters.shape == (64, len(COMBINED))
    assert parameters.mean(0).abs().max() < 0.4
    assert (parameters.std(0) - 1).abs().max() < 0.3
    # brighter where the parameter says so
    brighter = parameters[:, COMBINED.index("brightness")] > 0
    brightness = (views[1] - views[0]).mean((1, 2, 3))
    assert brightness[brighter].mean() > brightness[~brighter].mean() + 0.3


def test_few_labels_are_the_same_share_of_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def accuracy(features: Any, labels: Any, rows: Any) -> float:
        chosen.append(np.bincount(labels[0][rows]).tolist())
        return 50.0

    monkeypatch.setattr(natural_images, "accuracy", accuracy)
    labels = np.repeat(np.arange(3), [100, 200, 30])
    scores = natural_images.with_few_labels([labels, labels], [labels, labels])
    assert scores == {"1 % of labels": 50, "10 % of labels": 50}
    assert chosen == [[1, 2, 1], [10, 20, 3]]
