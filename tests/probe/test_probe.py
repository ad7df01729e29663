"""The probe: does it find what is there, and only that?"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import recon_aux
from recon_aux.probe import (
    COMBINED,
    SETS,
    compare,
    draw_parameters,
    linear_regression,
    mlp_regression,
    probe,
    render,
    transform,
)


def photographs(n: int, size: int = 16, seed: int = 0) -> Tensor:
    """Smooth coloured pictures, brighter at the top left."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator) * 0.4 + 0.2
    smooth = nn.functional.interpolate(coarse, size, mode="bilinear")
    ramp = torch.linspace(0.3, 0, size)
    return smooth + (ramp[:, None] + ramp) / 2


def pixels(images: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(images, 4).flatten(1)


def labelled(n: int, seed: int) -> tuple[Tensor, Tensor]:
    return photographs(n, seed=seed), torch.arange(n) % 3


RANGES = {name: limits for made in SETS.values() for name, limits in made.ranges.items()}


@pytest.mark.parametrize("name", RANGES)
def test_each_transformation_changes_images_and_none_leaves_them(name: str) -> None:
    images = photographs(4)
    high = {name: torch.full((4,), RANGES[name][1])}
    assert transform(images, high).shape == images.shape
    assert not torch.allclose(transform(images, high), images, atol=1e-2)
    assert torch.equal(transform(images, {}), images)


def test_parameters_mean_what_their_names_say() -> None:
    image = torch.zeros(1, 3, 16, 16)
    image[0, :, 8, 8] = 1
    moved = transform(image, {"translation_x": torch.tensor([0.25])})
    assert moved[0, 0].argmax().item() == 8 * 16 + 12
    moved = transform(image, {"translation_y": torch.tensor([0.25])})
    assert moved[0, 0].argmax().item() == 12 * 16 + 8
    grey = torch.full((1, 3, 4, 4), 0.5)
    assert transform(grey, {"brightness": torch.tensor([1.2])}).mean().item() == pytest.approx(0.6)
    assert torch.allclose(transform(grey, {"hue": torch.tensor([0.1])}), grey, atol=1e-5)
    turned = transform(photographs(1), {"rotation": torch.tensor([30.0])})
    back = transform(turned, {"rotation": torch.tensor([-30.0])})
    centre = (..., slice(5, 11), slice(5, 11))
    assert (back[centre] - photographs(1)[centre]).abs().max() < 0.05


def test_unseen_parameters_mean_what_their_names_say() -> None:
    def made(images: Tensor, **values: float) -> Tensor:
        return transform(images, {n: torch.full((len(images),), v) for n, v in values.items()})

    images = photographs(2)
    assert torch.equal(made(images, upside_down=1), images.flip(2))
    assert torch.equal(made(images, upside_down=0), images)
    torch.testing.assert_close(made(images, gamma=2), images**2)
    torch.testing.assert_close(made(images, red=0.6)[:, 0], images[:, 0] * 0.6)
    assert torch.equal(made(images, red=0.6)[:, 1:], images[:, 1:])
    assert torch.equal(made(images, noise=0), images)
    middle = torch.full((8, 3, 32, 32), 0.5)
    assert made(middle, noise=0.1).std().item() == pytest.approx(0.1, rel=0.03)
    # a quarter of the side, to the right of the middle and above it
    covered = made(torch.zeros(1, 3, 16, 16), occluder_x=0.25, occluder_y=-0.25) > 0
    assert covered.sum() == 3 * 4 * 4
    assert covered[:, :, 2:6, 10:14].all()
    point = torch.zeros(1, 3, 17, 17)
    point[:, :, 4, 8] = 1
    # four pixels above the middle, along a slope of one half
    sheared = made(point, shear=float(np.degrees(np.arctan(0.5))))
    assert sheared[0, 0].argmax().item() == 4 * 17 + 6
    # what is nearer is farther from the middle, by 1 / (1 - 0.25 * 0.5) there
    point = torch.zeros(1, 3, 33, 33)
    point[:, :, 16, 23:26] = 1
    nearer = made(point, perspective_x=0.25)
    place = (nearer[0, 0, 16] * torch.arange(33)).sum() / nearer[0, 0, 16].sum() - 16
    assert place.item() == pytest.approx(8 / (1 - 0.25 * 0.5), abs=0.2)


@pytest.mark.parametrize("name", SETS)
def test_each_image_gets_its_own_parameters(name: str) -> None:
    images = photographs(1).repeat(2, 1, 1, 1)
    ranges = SETS[name].ranges
    both = draw_parameters(2, list(ranges), ranges=ranges)
    first = transform(images[:1], {name: values[:1] for name, values in both.items()})
    together = transform(images, both)
    assert torch.allclose(together[:1], first, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_drawn_parameters_stay_in_range_and_unknown_names_are_refused() -> None:
    for made in SETS.values():
        for name, values in draw_parameters(100, list(made.ranges), ranges=made.ranges).items():
            low, high = made.ranges[name]
            assert low <= values.min() < values.max() <= high
    binary = draw_parameters(100, ["upside_down"], ranges=SETS["unseen"].ranges)["upside_down"]
    assert binary.unique().tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"expected names among .*rotation.*got \['shear'\]"):
        draw_parameters(2, ["shear"])


def test_pixels_know_colour_changes_and_noise_knows_nothing() -> None:
    train, test = labelled(400, 0), labelled(200, 1)
    knows = probe(pixels, train, test).parts["whole"]
    noise = torch.Generator().manual_seed(0)
    ignorant = probe(lambda x: torch.randn(len(x), 20, generator=noise), train, test)
    assert knows.alone["brightness"] > 0.9
    # other changes cover it
    assert 0.5 < knows.combined["brightness"] < knows.alone["brightness"] - 0.02
    assert abs(ignorant.parts["whole"].mean_combined) < 0.1
    assert ignorant.parts["whole"].linear < 45


def test_an_mlp_reads_what_is_there_and_no_more() -> None:
    random = np.random.default_rng(0)
    hidden = random.normal(size=(1500, 20))
    numbers = np.stack([30 * hidden[:, 0], 0.5 + 0.1 * np.square(hidden[:, 1])], axis=1)
    state = torch.random.get_rng_state()
    # probe() may be called where gradients are off
    with torch.inference_mode():
        predicted, again, other = (
            mlp_regression(hidden[:1000], numbers[:1000], hidden[1000:], seed=seed)
            for seed in (0, 0, 1)
        )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (predicted == again).all()
    assert (predicted != other).any()
    linear, curved = r2_score(numbers[1000:], predicted, multioutput="raw_values")
    assert linear > 0.95
    # a linear map would have 0
    assert curved > 0.7
    noise = random.normal(size=(1500, 20))
    guessed = mlp_regression(noise[:1000], numbers[:1000], noise[1000:])
    assert -0.5 < r2_score(numbers[1000:], guessed) < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_mlp_leaves_the_gpus_random_state_alone(device: str) -> None:
    x = np.random.default_rng(0).normal(size=(300, 4))
    before = torch.cuda.get_rng_state_all()
    mlp_regression(x, x, x, device=device)
    assert all(map(torch.equal, before, torch.cuda.get_rng_state_all()))


@pytest.fixture
def quick_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recon_aux.probe.mlp._STEPS", 60)


@pytest.mark.usefixtures("quick_mlp")
def test_the_papers_protocol() -> None:
    train, test = labelled(300, 0), labelled(100, 1)
    result = probe(
        pixels, train, test, regressor="mlp", transformations="paper", equivariant_dim=24
    )
    assert list(result.parts) == ["whole", "invariant", "equivariant"]
    part = result.parts["whole"]
    assert list(part.alone) == ["rotation", "colour", "blur", "translation"]
    assert part.combined == {}
    assert part.mean_alone == pytest.approx(np.mean(list(part.alone.values())))
    assert part.spread.keys() == {"alone"}
    assert part.spread["alone"].keys() == {*part.alone, "mean"}
    assert all(0 < spread < 0.2 for spread in part.spread["alone"].values())
    assert "combined" not in result.to_dict()["whole"]
    text = str(result)
    assert "combined" not in text
    assert f"{part.mean_alone:.3f} ± {part.spread['alone']['mean']:.3f}" in text


def test_a_transformations_r2_is_the_mean_over_its_parameters() -> None:
    def feature(images: Tensor) -> Tensor:
        # knows how far the point is to the right, not how far down
        weight = images.mean(1)
        return (weight.sum(1) * torch.arange(16)).sum(1, keepdim=True) / weight.sum((1, 2))[:, None]

    point = torch.zeros(200, 3, 16, 16)
    point[:, :, 7:9, 7:9] = 1
    both = ((point, None), (point, None))
    paper = probe(feature, *both, transformations="paper").parts["whole"]
    assert paper.alone["translation"] == pytest.approx(0.5, abs=0.05)


def test_unseen_transformations_alone_and_all_at_once() -> None:
    data = labelled(200, 0), labelled(100, 1)
    result = probe(pixels, *data, transformations="unseen")
    part = result.parts["whole"]
    assert list(part.alone) == list(SETS["unseen"].alone)
    assert list(part.combined) == list(SETS["unseen"].ranges)
    assert part.alone["upside down"] > 0.5
    assert part.spread == {}
    assert str(result).count("perspective_x") == 1


def test_the_parts_know_what_stands_in_them() -> None:
    def feature(images: Tensor) -> Tensor:
        return torch.cat([torch.zeros(len(images), 5), pixels(images)], dim=1)

    result = probe(feature, labelled(300, 0), labelled(100, 1), equivariant_dim=48)
    assert list(result.parts) == ["whole", "invariant", "equivariant"]
    assert result.parts["invariant"].mean_combined < 0.01
    assert result.parts["equivariant"].combined == pytest.approx(
        result.parts["whole"].combined, abs=1e-3
    )


@pytest.mark.parametrize("tokens", [False, True])
def test_maps_and_tokens_are_split_along_their_channels(tokens: bool) -> None:
    def feature(images: Tensor) -> Tensor:
        known = nn.functional.avg_pool2d(images, 4)
        whole = torch.cat([torch.zeros_like(known), known], dim=1)
        return whole.flatten(2).transpose(1, 2) if tokens else whole

    result = probe(feature, labelled(100, 0), labelled(60, 1), equivariant_dim=3)
    assert result.parts["invariant"].mean_combined < 0.05
    assert result.parts["equivariant"].alone["brightness"] > 0.5


def test_a_number_is_read_as_well_next_to_one_of_larger_units() -> None:
    # in degrees, say, and not to be told; the other stands in a faint direction of the features
    random = np.random.default_rng(0)
    told, untold = random.uniform(0.6, 1.4, 1000), random.uniform(-30, 30, 1000)
    hidden = random.normal(size=(1000, 20)) * np.linspace(3, 0.05, 20)
    hidden[:, -1] += 0.3 * told
    x = hidden @ random.normal(size=(20, 64)) + random.normal(0, 0.02, (1000, 64))
    alone = linear_regression().fit(x[:500], told[:500]).predict(x[500:])
    numbers = np.stack([untold, told], axis=1)
    both = linear_regression().fit(x[:500], numbers[:500]).predict(x[500:])
    assert r2_score(told[500:], alone) > 0.5
    np.testing.assert_allclose(both[:, 1], alone, rtol=1e-6)


def test_labels_are_found_by_both_classifiers() -> None:
    def tinted(n: int, seed: int) -> tuple[Tensor, Tensor]:
        images, labels = labelled(n, seed)
        tint = nn.functional.one_hot(labels, 3)[:, :, None, None]
        return images * (0.3 + 0.7 * tint), labels

    part = probe(pixels, tinted(300, 0), tinted(100, 1)).parts["whole"]
    assert part.linear > 90
    assert part.knn > 90


def test_a_module_keeps_its_modes_and_the_random_state_is_left_alone() -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.Flatten())
    encoder[1].eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.random.get_rng_state()
    probe(encoder, labelled(60, 0), labelled(30, 1))
    assert encoder.training
    assert not encoder[1].training
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_results_repeat_and_become_json() -> None:
    results = [probe(pixels, labelled(60, 0), labelled(30, 1), seed=s) for s in (0, 0, 1)]
    run = [result.to_dict() for result in results]
    assert run[0] == run[1] != run[2]
    assert json.loads(json.dumps(run[0])) == run[0]
    result = results[0]
    table = render({"bare": result, "attached": result})
    assert table == render({"bare": result, "attached": result})
    assert "| attached whole" in table
    assert str(result).count("| whole") == 2
    assert all(name.replace("translation_", "t") in table for name in COMBINED)


def test_results_of_other_transformations_stand_under_their_own_names() -> None:
    results = {
        f"encoder[{kind}]": probe(pixels, labelled(60, 0), labelled(30, 1), transformations=kind)
        for kind in ("standard", "unseen", "paper")
    }
    _, alone = render(results).split("R² with each transformation alone")
    heading, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in alone.splitlines()
        if line.startswith("|")
    )
    assert [row[0] for row in rows] == [f"{name} whole" for name in results]
    for row, result in zip(rows, results.values(), strict=True):
        shown = {name: cell for name, cell in zip(heading[2:], row[2:], strict=True) if cell != "-"}
        r2 = result.parts["whole"].alone
        expected = {name.replace("translation_", "t"): value for name, value in r2.items()}
        assert list(shown.values()) == [f"{expected[name]:.2f}" for name in shown]
        assert len(shown) == len(expected)


def test_an_accuracy_without_labels_is_none_in_json() -> None:
    result = probe(pixels, (photographs(60), None), (photographs(30, seed=1), None))
    assert result.to_dict()["whole"]["linear"] is None


def test_images_from_0_to_255_are_transformed_as_bytes_or_refused() -> None:
    images = (photographs(4) * 255).byte()
    drawn = draw_parameters(4)
    torch.testing.assert_close(transform(images, drawn), transform(images / 255, drawn))
    with pytest.raises(ValueError, match="Divide them by 255"):
        transform(images.float(), drawn)


def grey(n: int, low: float, high: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures of one grey each, with labels."""
    shades = torch.rand(n, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    return (low * (high / low) ** shades).expand(-1, 3, 8, 8), torch.arange(n) % 2


def test_scores_are_those_of_the_test_split() -> None:
    def feature(images: Tensor) -> Tensor:
        # knows nothing of dark images
        shade = images.mean((2, 3))
        known = shade * (shade > 0.2)
        return torch.cat([known, 1 - known], dim=1)

    bright, dark = grey(100, 0.5, 0.6), grey(50, 0.05, 0.1)
    for train, test, low, high in ((bright, dark, -100, 0.01), (bright, bright, 0.9, 1)):
        part = probe(feature, train, test).parts["whole"]
        assert low < part.alone["brightness"] < high
    # labels by shade, which dark images don't show
    labels = (bright[0].mean((1, 2, 3)) > 0.55).long()
    part = probe(feature, (bright[0], labels), (dark[0], torch.ones(50).long())).parts["whole"]
    assert part.linear == part.knn == 0


def test_pixels_that_resizing_overshot_are_taken() -> None:
    images, labels = labelled(40, 0)
    low, high = images.aminmax()
    train = ((images - low) / (high - low) * 1.1 - 0.05, labels)
    assert probe(lambda x: x.mean((2, 3)), train, train).parts["whole"].linear > 0


def test_a_change_is_read_next_to_the_original_of_the_same_image() -> None:
    def feature(images: Tensor) -> Tensor:
        return images.mean((2, 3)).log()

    # brightness is the difference of both features; the images differ far more than that
    part = probe(feature, grey(200, 0.01, 0.6), grey(100, 0.01, 0.6, seed=1)).parts["whole"]
    assert part.alone["brightness"] > 0.9


def test_the_encoder_sees_images_normalised_after_their_transformation() -> None:
    seen: list[Tensor] = []

    def feature(images: Tensor) -> Tensor:
        seen.append(images)
        return images.mean((2, 3))

    probe(feature, labelled(40, 0), labelled(20, 1), normalize=lambda x: 10 * x - 70)
    values = torch.cat([images.flatten() for images in seen])
    assert -70 <= values.min() < -65
    assert -64 < values.max() <= -60
    # the clean images come first
    torch.testing.assert_close(seen[0], 10 * labelled(40, 0)[0] - 70)


def test_bytes_are_the_same_images_as_floats() -> None:
    pairs = labelled(60, 0), labelled(30, 1)
    as_bytes = [((images * 255).round().to(torch.uint8), labels) for images, labels in pairs]
    as_floats = [(images.float() / 255, labels) for images, labels in as_bytes]
    first, second = (probe(pixels, *splits).to_dict() for splits in (as_bytes, as_floats))
    assert first == second
    assert first["whole"]["alone"]["brightness"] > 0.5


def test_images_of_any_number_type_are_encoded_as_the_weights_are() -> None:
    encoder = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(3, 8, 1), nn.Flatten())
    images, labels = labelled(60, seed=0)
    split = images.double().numpy(), labels.tolist()
    expected = probe(encoder, (images, labels), (images, labels)).to_dict()
    assert probe(encoder, split, split).to_dict() == expected
    assert probe(encoder.double(), split, split).to_dict()["whole"]["linear"] > 0
    assert probe(encoder.bfloat16(), split, split).to_dict()["whole"]["linear"] > 0


def of_a_lambda(encoder: nn.Module) -> Any:
    return lambda images: encoder(images + 0)


@pytest.mark.parametrize("function", [of_a_lambda, lambda encoder: encoder.forward])
def test_what_a_function_calls_is_evaluated_and_keeps_its_modes(function: Any) -> None:
    norm: Any = nn.BatchNorm2d(3)
    encoder = nn.Sequential(nn.AvgPool2d(4), norm, nn.Dropout(), nn.Flatten())
    encoder[2].eval()
    split = labelled(60, seed=0)
    found = probe(function(encoder), split, split)
    assert [x.training for x in encoder.modules()] == [True, True, True, False, True]
    assert torch.equal(norm.running_var, torch.ones(3))
    assert found.to_dict() == probe(encoder, split, split).to_dict()


class Learner(nn.Module):
    """An encoder, a projector, and what a whole model returns."""

    def __init__(self, encoder: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Linear(width, 4)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.projector(self.encoder(images))
        return found


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_models_are_compared_by_their_encoders_and_never_by_their_heads() -> None:
    model = Learner(convolutions())
    split = labelled(60, seed=0)
    expected = probe(model.encoder, split, split).to_dict()
    bare = {"model": model, "encoder": model.encoder, "function": of_a_lambda(model.encoder)}
    assert {str(x.to_dict()) for x in compare(bare, split, split).values()} == {str(expected)}
    recon_aux.attach(model, backbone="encoder", heads=["projector"], weight=1.0)
    average = torch.optim.swa_utils.AveragedModel(model)
    found = compare({"attached": model, "average": average}, split, split)
    parts = probe(model.encoder, split, split, equivariant_dim=16).to_dict()
    assert {str(x.to_dict()) for x in found.values()} == {str(parts)}
    found = compare({"detached": recon_aux.detach(model)}, split, split)
    assert found["detached"].to_dict() == expected


def test_a_model_that_trains_is_no_encoder() -> None:
    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(convolutions(), nn.Linear(32, 4))

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.model(images)
            return found

        def training_step(self, batch: Any) -> Tensor:
            return self(batch).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    model, split = Method(), labelled(60, seed=0)
    with pytest.raises(ValueError, match="Pass its encoder alone"):
        compare({"mine": model}, split, split)
    compare({"mine": model.model[0]}, split, split)


def test_an_encoder_may_have_a_projection_of_its_patches() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_projection = nn.Conv2d(3, 8, 8, 8)
            self.norm = nn.Flatten()

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.norm(self.patch_projection(images))
            return found

    encoder, split = Patches(), labelled(60, seed=0)
    assert compare({"mine": encoder}, split, split)["mine"] == probe(encoder, split, split)


def test_images_may_be_a_list_of_tensors() -> None:
    images, labels = labelled(60, seed=0)
    found = probe(pixels, (list(images), labels.tolist()), (list(images), labels.tolist()))
    assert found == probe(pixels, (images, labels), (images, labels))


class TwoOutputs(nn.Module):
    """An encoder with classes of its own, beside a feature of each position."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 4, 4)
        self.classes = nn.Linear(8, 100)

    def positions(self, images: Tensor) -> Tensor:
        return self.convolution(images).flatten(2).movedim(1, 2)

    def forward(self, images: Tensor) -> Any:
        tokens = self.positions(images)
        return {"tokens": tokens, "classes": self.classes(tokens.mean(1))}


@pytest.mark.parametrize(
    "options", [{"backbone_method": "positions"}, {"features": lambda output: output["tokens"]}]
)
def test_of_an_attached_model_the_tasks_own_feature_is_measured(options: dict[str, Any]) -> None:
    model = Learner(TwoOutputs(), width=8)
    split = labelled(60, seed=0)
    recon_aux.attach(
        model, backbone="encoder", heads=["projector"], image_size=16, weight=1.0, **options
    )
    found = compare({"mine": model}, split, split)["mine"].to_dict()
    positions: Any = model.encoder.positions
    assert found == probe(positions, split, split, equivariant_dim=4).to_dict()


def test_a_transformers_blocks_are_no_encoder_of_images() -> None:
    model = VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=8)
    assert isinstance(model.encoder, nn.Module)
    split = labelled(60, seed=0)
    found = compare({"whole": model}, split, split)
    assert found["whole"].to_dict() == probe(model, split, split).to_dict()


def test_comparing_in_the_midst_of_a_step_changes_nothing() -> None:
    def losses(midst: Any) -> list[float]:
        torch.manual_seed(0)
        model = Learner(nn.Sequential(*convolutions(), nn.BatchNorm1d(32)))
        recon_aux.attach(model, backbone="encoder", heads=["projector"], weight=1.0)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        found = []
        for seed in range(3):
            first, second = photographs(8, seed=seed), photographs(8, seed=seed).flip(3)
            with torch.no_grad():
                target = model(second)
            midst(model)
            loss = recon_aux.add_loss(
                model, (model(first) - target).square().mean(), [first, second]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    split = labelled(60, seed=0)
    expected = losses(lambda model: None)
    assert losses(lambda model: compare({"mine": model}, split, split, batch_size=8)) == expected
