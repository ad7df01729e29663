"""The monitor: what it finds, where it logs it, and that training goes on as without it."""

from __future__ import annotations

import copy
import pickle
import random
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
)
from torchvision.transforms import Normalize

import recon_aux
from helpers.data import Views, batch
from helpers.models import InADict, InALoop, Siamese, plain_encoder, siamese_loss, tiny_encoder
from helpers.training import fit
from recon_aux.integrations.lightly import attach
from recon_aux.monitor.images import take_images
from recon_aux.monitor.measure import effective_rank, spread

PACKAGES = [lightning.pytorch, pytorch_lightning]
PARTS = ("whole", "invariant", "equivariant")


def images(count: int = 48, side: int = 16, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(1))


LABELS = torch.arange(48) % 3


def monitor(given: Any = None, **options: Any) -> Any:
    return recon_aux.Monitor(images() if given is None else given, **options)


class OfLightning(lightning.pytorch.LightningModule):
    """The same as Siamese, of the other package."""

    def __init__(self) -> None:
        super().__init__()
        its = Siamese(tiny_encoder(dropout=0.5))
        self.backbone, self.projection_head = its.backbone, its.projection_head

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z0, z1 = (self.projection_head(self.backbone(x).flatten(1)) for x in batch[0])
        return siamese_loss(z0, z1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def module_of(package: Any) -> Any:
    if package is lightning.pytorch:
        return OfLightning()
    return Siamese(tiny_encoder(dropout=0.5))


# --- what it finds ---


def test_the_effective_rank_counts_directions() -> None:
    basis = torch.linalg.qr(torch.randn(64, 8))[0]
    assert effective_rank(basis @ torch.randn(8, 8).T) < 8.01
    assert effective_rank(basis) == pytest.approx(8, abs=0.01)
    assert effective_rank(basis[:, :1] @ torch.ones(1, 8)) == pytest.approx(1, abs=0.01)


def test_the_spread_is_that_of_directions_whatever_their_length() -> None:
    features = torch.randn(2000, 32)
    assert spread(features) == pytest.approx(1, abs=0.01)
    assert spread(10 * features) == pytest.approx(spread(features))
    assert spread(features + 100) < 0.02


def test_each_part_is_measured_by_itself() -> None:
    class Encoder(nn.Module):
        """Its last channels know brightness, its first ones nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            known = x.mean((2, 3))
            return self.scale * torch.cat([torch.ones_like(known), known], 1)

    model = nn.ModuleDict({"backbone": Encoder(), "head": nn.Linear(6, 4)})
    recon_aux.attach(model, backbone="backbone", heads=["head"], image_size=16)
    numbers = monitor().measure(model).numbers
    assert numbers["monitor/equivariant/r2_brightness"] > 0.5
    assert numbers["monitor/whole/r2_brightness"] > 0.5
    assert numbers["monitor/invariant/r2_brightness"] < 0.1
    assert numbers["monitor/invariant/rank"] == pytest.approx(1, abs=0.01)
    assert numbers["monitor/equivariant/rank"] > 1.05
    assert numbers["monitor/invariant/std"] == pytest.approx(0, abs=1e-5)


def test_the_mean_is_of_all_transformations() -> None:
    numbers = monitor(labels=LABELS).measure(attach(Siamese())).numbers
    for part in PARTS:
        r2 = [v for k, v in numbers.items() if k.startswith(f"monitor/{part}/r2_")]
        assert len(r2) == 9
        assert numbers[f"monitor/{part}/r2"] == pytest.approx(sum(r2) / 9)
        assert 0 <= numbers[f"monitor/{part}/knn"] <= 100
    assert set(numbers) == {
        "monitor/seconds",
        *(
            f"monitor/{part}/{name}"
            for part in PARTS
            for name in ("r2", "knn", "rank", "std", *(f"r2_{x}" for x in transformations()))
        ),
    }


def transformations() -> list[str]:
    from recon_aux.probe import TRANSFORMATIONS  # noqa: PLC0415

    return list(TRANSFORMATIONS)


def test_labels_are_predicted_by_neighbours() -> None:
    labels = torch.arange(128) % 2
    bright = images(128) / 4 + labels[:, None, None, None] * 0.5
    model = nn.ModuleDict({"encoder": nn.Flatten()})
    options: dict[str, Any] = {"encode": lambda model, x: model["encoder"](x - 0.4)}
    assert monitor((bright, labels), **options).measure(model).numbers["monitor/whole/knn"] > 95
    assert "monitor/whole/knn" not in monitor(bright, **options).measure(model).numbers


def test_it_finds_the_same_each_time_whatever_is_drawn_in_between() -> None:
    model, watching = attach(Siamese()), monitor()
    found = []
    for _ in range(2):
        numbers = watching.measure(model).numbers
        del numbers["monitor/seconds"]
        found.append(numbers)
        torch.rand(3)
    assert found[0] == found[1]


def test_features_that_are_not_finite_give_no_number_and_no_error() -> None:
    model = attach(Siamese())
    with torch.no_grad():
        model.backbone[0].weight.fill_(torch.inf)
    numbers = monitor(labels=LABELS).measure(model).numbers
    assert all(np.isnan(numbers[f"monitor/whole/{name}"]) for name in ("r2", "knn", "rank"))


# --- which models ---


@pytest.mark.parametrize(
    "options", [{}, {"weight": 0}, {"equivariant_dim": 0}, {"context": "none"}, {"context": "both"}]
)
def test_it_suits_all_options(options: dict[str, Any]) -> None:
    found = monitor().measure(attach(Siamese(), **options))
    assert ("monitor/equivariant/r2" in found.numbers) == (options.get("equivariant_dim") != 0)
    # without training the decoder has nothing to show
    assert (found.picture is None) == (options.get("weight") == 0)


@pytest.mark.parametrize("spatial", ["map", "tokens"])
def test_it_averages_over_positions(spatial: str) -> None:
    class Encoder(nn.Sequential):
        embed_dim = 16

        def forward(self, x: Tensor) -> Tensor:
            features: Tensor = super().forward(x)
            return features if spatial == "map" else features.flatten(2).mT

    encoder = Encoder(nn.Conv2d(3, 16, 4, 4), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(256, 8))
    model = nn.ModuleDict({"trunk": encoder, "head": head})
    recon_aux.attach(model, backbone="trunk", heads=["head"], image_size=16)
    aux = model.recon_aux
    assert isinstance(aux, recon_aux.ReconAux)
    assert aux.options["spatial"]
    found = monitor().measure(model)
    assert 1 <= found.numbers["monitor/whole/rank"] <= 16
    assert found.picture is not None


def test_before_attaching_and_after_detaching_it_measures_the_whole() -> None:
    model, watching = Siamese(), monitor()
    bare = watching.measure(model)
    attached = watching.measure(attach(model, seed=0))
    again = watching.measure(recon_aux.detach(model))
    for found in (bare, attached, again):
        del found.numbers["monitor/seconds"]
    assert bare.numbers == again.numbers
    assert bare.picture is again.picture is None
    assert bare.numbers.items() < attached.numbers.items()
    assert attached.picture is not None


def test_an_encoder_of_another_name_or_call_is_passed() -> None:
    model = nn.ModuleDict({"trunk": plain_encoder()})
    with pytest.raises(ValueError, match="Pass encode=lambda model, images: model"):
        monitor().measure(model)
    numbers = monitor(encode=lambda model, x: model["trunk"](x)).measure(model).numbers
    assert "monitor/whole/r2" in numbers


def test_a_map_with_its_channels_last_is_averaged_over_its_positions() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.patches(x).movedim(1, -1)

    model = nn.ModuleDict({"backbone": Encoder()})
    pooled = monitor(encode=lambda model, x: model["backbone"](x).mean((1, 2)))
    given = monitor(encode=lambda model, x: model["backbone"](x))
    expected, *found = (
        one.measure(model).numbers["monitor/whole/rank"] for one in (pooled, given, monitor())
    )
    assert found == [pytest.approx(expected, rel=1e-4)] * 2


@pytest.mark.parametrize("width", [3, 64])
def test_another_feature_than_the_tasks_has_no_parts_and_no_picture(width: int) -> None:
    model = attach(Siamese())
    head = nn.Linear(model.recon_aux.options["feature_dim"], width)
    found = monitor(encode=lambda model, x: head(model.backbone(x).flatten(1))).measure(model)
    assert {name.split("/")[1] for name in found.numbers} == {"whole", "seconds"}
    assert found.picture is None


def test_an_encoder_that_returns_no_tensor_is_told_of_encode() -> None:
    model = nn.ModuleDict({"backbone": InADict()})
    with pytest.raises(TypeError, match="or to Monitor encode=lambda model, images"):
        monitor().measure(model)
    monitor(encode=lambda model, x: model["backbone"](x)["pooled"]).measure(model)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_leave_out_colours(channels: int) -> None:
    model = InALoop(tiny_encoder(channels))
    attach(model)
    found = monitor(images(channels=channels)).measure(model)
    names = {name for name in found.numbers if "whole/r2_" in name}
    assert "monitor/whole/r2_contrast" in names
    assert not names & {"monitor/whole/r2_hue", "monitor/whole/r2_saturation"}
    assert found.picture.mode == "RGB"


def test_half_and_double_precision_are_the_models() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        found = monitor().measure(attach(Siamese()).to(dtype))
        assert np.isfinite(found.numbers["monitor/whole/r2"])


def test_a_normalisation_is_applied_and_undone() -> None:
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.1, 0.3]
    normalize = Normalize(mean, std)
    seen: list[Tensor] = []

    def encode(model: Any, x: Tensor) -> Tensor:
        seen.append(x)
        return model.backbone(x)

    model = attach(Siamese())
    found = monitor(normalize=normalize, encode=encode).measure(model)
    low = (0 - torch.tensor(mean)) / torch.tensor(std)
    assert min(float((x.amin((0, 2, 3)) - low).min()) for x in seen) > -1e-4
    # what is rebuilt at first is the mean of what the encoder gets
    model.recon_aux.rebuild = lambda feature, other: normalize(torch.full((6, 3, 8, 8), 0.5))
    found = monitor(normalize=normalize, encode=encode).measure(model)
    pixels = np.array(found.picture)
    assert abs(int(pixels[60, 2 * 132 + 40, 0]) - 128) <= 1


# --- which images ---


def test_a_single_row_has_another_images_context_too() -> None:
    model: Any = recon_aux.attach(
        nn.ModuleDict({"backbone": tiny_encoder(), "head": nn.Linear(16, 4)}),
        backbone="backbone",
        heads=["head"],
        context="both",
    )
    # so that the context shows
    nn.init.normal_(model.recon_aux.decoder.to_patch[1].weight)
    picture = np.array(monitor(rows=1).measure(model).picture)
    rebuilt, in_another_context = (picture[-132:, 4 + 132 * i :][:, :128] for i in (2, 3))
    assert (rebuilt != in_another_context).any()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from zip(images(), LABELS.tolist(), strict=True)


def as_picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image.movedim(0, -1) * 255).round().byte().numpy())


@pytest.mark.parametrize(
    "source",
    [
        (images(), LABELS),
        TensorDataset(images(), LABELS),
        DataLoader(TensorDataset(images(), LABELS), batch_size=5),
        Stream(),
        DataLoader(Stream(), batch_size=7),
        [{"idx": 3, "image": x, "label": y} for x, y in zip(images(), LABELS, strict=True)],
        [(as_picture(x), int(y), "file") for x, y in zip(images(), LABELS, strict=True)],
        (images().numpy(), LABELS.numpy()),
        [images(), LABELS.tolist()],
        [(x.numpy(), np.array([y])) for x, y in zip(images(), LABELS, strict=True)],
        DataLoader(TensorDataset(images(), LABELS[:, None]), batch_size=5),
    ],
    ids=[
        "tensors", "dataset", "loader", "stream", "stream-loader", "dicts", "pillow", "arrays",
        "list", "label-arrays", "label-columns",
    ],
)  # fmt: skip
def test_images_may_come_in_any_form(source: Any) -> None:
    taken, labels = take_images(source, None, 100)
    taken = taken.float() / 255 if taken.dtype == torch.uint8 else taken
    assert labels is not None
    torch.testing.assert_close(taken, images(), rtol=0, atol=0.002)
    assert labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("labels", [LABELS, LABELS.numpy(), LABELS.tolist(), LABELS[:, None]])
@pytest.mark.parametrize("source", [images(), images().numpy(), list(images())])
def test_labels_may_stand_beside_the_images(source: Any, labels: Any) -> None:
    found, classes = take_images(source, labels, 24)
    assert torch.equal(found, images()[::2])
    assert classes is not None
    assert torch.equal(classes, LABELS[::2])


@pytest.mark.parametrize(
    ("source", "labels", "error", "message"),
    [
        (images(), LABELS[1:], ValueError, r"got torch.int64 of shape \(47,\). Pass such"),
        (
            list(images()),
            LABELS / 2,
            ValueError,
            "48 whole numbers, one for each",
        ),
        (Stream(), LABELS, TypeError, "Leave labels= out, and let it give each image's label"),
        ([*zip(images(), LABELS, strict=True), images()[0]], None, ValueError, "a label with"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    source: Any, labels: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        take_images(source, labels, 100)


def test_images_of_16_bits_keep_their_contrast() -> None:
    ramp = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    found, _ = take_images([Image.fromarray(ramp)] * 16, None, 16)
    assert found[0].flatten().tolist() == list(range(256))
    with pytest.raises(ValueError, match="got mode F from 0 to 1"):
        take_images([Image.fromarray((ramp / 65535).astype(np.float32))] * 16, None, 16)


def test_an_average_of_weights_is_measured_as_the_model() -> None:
    model = attach(Siamese())
    average = torch.optim.swa_utils.AveragedModel(model)
    expected, found = (monitor(rows=0).measure(x).numbers for x in (model, average))
    for numbers in (expected, found):
        del numbers["monitor/seconds"]
    assert found == expected


def test_no_more_are_taken_than_are_asked_for_from_all_classes() -> None:
    sorted_by_class = [(torch.zeros(3, 8, 8), i // 100) for i in range(1000)]
    _, labels = take_images(sorted_by_class, None, 20)
    assert labels is not None
    assert labels.unique().tolist() == list(range(10))
    assert len(take_images(images(), None, 20)[0]) == 20
    loader: Any = DataLoader(sorted_by_class, 50)  # type: ignore[arg-type]
    _, labels = take_images(loader, None, 20)
    assert labels is not None
    assert labels.unique().tolist() == list(range(10))
    # a sampler of its own says which images are held out
    for sampler in (SubsetRandomSampler(range(300, 500)), BatchSampler(range(300, 500), 8, False)):
        key = "batch_sampler" if isinstance(sampler, BatchSampler) else "sampler"
        loader = DataLoader(sorted_by_class, **{key: sampler})  # type: ignore[arg-type]
        _, labels = take_images(loader, None, 150)
        assert labels is not None
        assert labels.unique().tolist() == [3, 4]

    def endless() -> Any:
        while True:
            yield torch.zeros(3, 8, 8)

    assert len(take_images(endless(), None, 20)[0]) == 20


def test_a_stream_that_knows_its_length_is_read_in_order() -> None:
    class Stream(IterableDataset[Tensor]):
        def __len__(self) -> int:
            return 48

        def __iter__(self) -> Any:
            return iter(images())

    for source in (Stream(), DataLoader(Stream(), 8)):
        assert torch.equal(take_images(source, None, 20)[0], images()[:20])


def test_of_one_class_alone_there_are_no_neighbours() -> None:
    with pytest.warns(UserWarning, match="got class 3 alone, so k-NN is left out. Pass a dataset"):
        found = monitor([(x, 3) for x in images()]).measure(Siamese())
    assert "monitor/whole/knn" not in found.numbers


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (images() * 4 - 2, ValueError, "Leave Normalize out of their transform"),
        (images() * 255, ValueError, "Divide them by 255"),
        (images(4), ValueError, "expected 16 held-out images or more, got 4"),
        (Views(), TypeError, "no list of views"),
        (images()[0], TypeError, r"expected images \(N, C, H, W\)"),
        ([torch.zeros(3, 8, 8 + i) for i in range(20)], ValueError, "images of one size"),
        (7, TypeError, "expected images as a tensor, a dataset or a loader, got int"),
    ],
)
def test_images_that_are_none_are_refused(
    source: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        monitor(source).measure(Siamese())


def test_images_that_the_encoder_does_not_take_stop_the_run_at_its_start() -> None:
    with pytest.raises(ValueError, match="expected held-out images that the encoder takes"):
        fit(attach(Siamese()), callbacks=[monitor(images(channels=1))], max_steps=100)


@pytest.mark.parametrize("option", ["every", "count", "batch_size", "rows"])
def test_numbers_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"expected {option}= of "):
        monitor(**{option: -1})
    with pytest.raises(TypeError, match=f"expected {option}= as a whole number"):
        monitor(**{option: 1.5})


def test_means_and_deviations_are_no_function() -> None:
    with pytest.raises(TypeError, match=r"Pass normalize=torchvision.transforms.Normalize"):
        monitor(normalize=((0.5,), (0.25,)))


@pytest.mark.parametrize("training", [None, Normalize([0.5] * 3, [0.25] * 3)])
@pytest.mark.parametrize("ours", [None, Normalize([0.5] * 3, [0.25] * 3)])
def test_it_warns_of_other_pixels_than_in_training(training: Any, ours: Any) -> None:
    model = attach(InALoop())
    # before the first step nothing is known
    assert not warnings_of(lambda: monitor(normalize=ours).measure(model))
    views = [x if training is None else training(x) for x in batch(side=16)[0]]
    recon_aux.add_loss(model, siamese_loss(*map(model, views)))
    warned = warnings_of(lambda: monitor(normalize=ours).measure(model))
    assert len(warned) == ((training is None) != (ours is None))
    expected = "0.00" if training is None else "-2"
    assert all(f"as in training, from {expected}" in text for text in warned)
    assert all("Pass Monitor(..., normalize=)" in text for text in warned)


def warnings_of(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(x.message) for x in caught if "recon_aux" in str(x.message)]


def test_arrays_are_images_too() -> None:
    dataset = [(x.numpy(), int(y)) for x, y in zip(images(), LABELS, strict=True)]
    found, labels = take_images(dataset, None, 48)
    assert torch.equal(found, images())
    assert labels is not None
    assert torch.equal(labels, LABELS)


# --- training is untouched ---


class Drawing(nn.Module):
    """Dropout that also draws from numpy and Python, in eval mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        noise = float(np.random.rand()) + random.random() + torch.rand(1)
        return x + 0.01 * noise


def trained(package: Any, change: Any, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    model = module_of(package)
    model.backbone.insert(4, Drawing())
    change(model)
    model.backbone[0].bias.requires_grad_(False)
    fit(model, package, max_steps=20, shuffle=True, **options)
    return {
        "modes": [module.training for module in model.modules()],
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "weights": {k: x.clone() for k, x in model.state_dict().items()},
        "torch": torch.get_rng_state(),
        "numpy": str(np.random.get_state()),
        "random": random.getstate(),
    }


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
@pytest.mark.parametrize("is_attached", [True, False])
def test_twenty_steps_are_bit_identical_with_and_without_it(
    package: Any, is_attached: bool
) -> None:
    change = attach if is_attached else lambda model: model
    loader = DataLoader(TensorDataset(images(), LABELS), batch_size=8, shuffle=True)
    found = [
        trained(package, change, callbacks=callbacks, max_epochs=-1)
        for callbacks in ([], [monitor(loader)])
    ]
    weights = [each.pop("weights") for each in found]
    assert len(weights[0]) > 8
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    states = [each.pop("torch") for each in found]
    assert torch.equal(*states)
    assert found[0] == found[1]


def test_in_a_loop_a_running_step_goes_on() -> None:
    def trained_by(watching: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = attach(InALoop(tiny_encoder(dropout=0.5)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(5):
            z0 = model(batch(4, side=16)[0][0])
            if watching is not None:
                watching.measure(model)
            z1 = model(batch(4, side=16)[0][1])
            optimizer.zero_grad()
            recon_aux.add_loss(model, siamese_loss(z0, z1)).backward()
            optimizer.step()
        return dict(model.state_dict())

    off, on = trained_by(None), trained_by(monitor())
    for name, value in off.items():
        assert torch.equal(value, on[name]), name


def test_modes_and_buffers_are_as_they_were_also_after_an_error() -> None:
    model = attach(Siamese(tiny_encoder()))
    model.projection_head.eval()
    before = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    watching = monitor()
    watching.measure(model)

    def fail(*given: Any) -> Any:
        raise KeyError("fails")

    watching.encode = fail
    with pytest.raises(KeyError, match="fails"):
        watching.measure(model)
    assert [m.training for m in model.modules()] == before[1]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name]), name


# --- the trainer ---


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_it_is_a_callback_of_either_package(package: Any) -> None:
    watching = monitor(labels=LABELS, every=2)
    assert isinstance(watching, package.Callback)
    assert isinstance(watching, recon_aux.Monitor)
    model = attach(module_of(package))
    done = fit(model, package, callbacks=watching, max_steps=-1, max_epochs=2)
    assert {"monitor/whole/r2", "monitor/equivariant/knn"} <= {*done.callback_metrics}
    assert [*done.progress_bar_metrics] == ["monitor/whole/r2"]


def test_it_measures_every_few_epochs() -> None:
    watching, epochs = monitor(every=2), []
    measure = watching.measure
    model = attach(Siamese())

    def noting(*given: Any, **options: Any) -> Any:
        epochs.append(model.current_epoch)
        return measure(*given, **options)

    watching.measure = noting
    fit(model, callbacks=[watching], max_steps=-1, max_epochs=5)
    assert epochs == [1, 3]


def test_it_says_once_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    fit(attach(Siamese()), callbacks=[monitor(count=20, every=2)], max_steps=-1, max_epochs=4)
    said = capsys.readouterr().err
    assert said.count("recon_aux.Monitor") == 1
    assert "every 2 epochs 20 held-out images are encoded 10 times, 200 in all" in said


def test_two_may_watch_one_training() -> None:
    both = [monitor(), monitor(name="other")]
    done = fit(attach(Siamese()), callbacks=both, max_steps=-1, max_epochs=1)
    assert {"monitor/whole/r2", "other/whole/r2"} <= {*done.callback_metrics}


def test_a_checkpoint_may_be_chosen_by_it(tmp_path: Path) -> None:
    chosen = pytorch_lightning.callbacks.ModelCheckpoint(
        tmp_path, monitor="monitor/whole/r2", mode="max"
    )
    fit(
        attach(Siamese()),
        callbacks=[monitor(), chosen],
        max_steps=-1,
        max_epochs=2,
        enable_checkpointing=True,
    )
    assert chosen.best_model_score is not None


def test_it_can_be_pickled_and_copied() -> None:
    watching = monitor(every=3)
    for again in (pickle.loads(pickle.dumps(watching)), copy.deepcopy(watching)):
        assert again.every == 3
        assert isinstance(again, pytorch_lightning.Callback)


# --- loggers ---


def picture_of(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        return picture


def test_the_csv_logger_gets_numbers_and_a_file(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(attach(OfLightning()), lightning.pytorch, callbacks=[monitor()], logger=logger)
    assert "monitor/invariant/r2_rotation" in (Path(logger.log_dir) / "metrics.csv").read_text()
    (path,) = Path(logger.log_dir).rglob("*.png")
    assert path.name == "picture-00000003.png"
    assert picture_of(path).size == (4 + 4 * 132, 4 + 34 + 6 * 132)


def test_tensorboard_gets_numbers_and_an_image(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415
        EventAccumulator,
    )

    logger = pytorch_lightning.loggers.TensorBoardLogger(str(tmp_path))
    fit(attach(Siamese()), callbacks=[monitor()], logger=logger)
    logger.experiment.flush()
    found = EventAccumulator(logger.log_dir).Reload()
    assert "monitor/whole/rank" in found.Tags()["scalars"]
    assert found.Tags()["images"] == ["monitor/picture"]


def test_wandb_offline_gets_numbers_and_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = pytorch_lightning.loggers.WandbLogger(save_dir=str(tmp_path), offline=True)
    fit(attach(Siamese()), callbacks=[monitor()], logger=logger)
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert "monitor/whole/rank" in summary
    assert list(tmp_path.rglob("media/images/monitor/*.png"))


class OwnLogger(pytorch_lightning.loggers.Logger):
    """Takes numbers alone, as the logger of MLflow. Its files may be on another machine."""

    name, version = "own", "0"

    def __init__(self, save_dir: Path | None, version: str = "0") -> None:
        super().__init__()
        self.folder, self.version = save_dir, version

    @property
    def save_dir(self) -> str | None:
        return None if self.folder is None else str(self.folder)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def test_a_logger_with_a_folder_gets_a_file_there(tmp_path: Path) -> None:
    for version in "ab":
        fit(attach(Siamese()), callbacks=[monitor()], logger=OwnLogger(tmp_path, version))
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert found == [f"own/{version}/monitor/picture-00000003.png" for version in "ab"]


def test_a_logger_that_can_not_have_the_picture_is_named() -> None:
    with pytest.warns(UserWarning, match=r"or has a folder, got OwnLogger.* Pass .*rows=0"):
        fit(attach(Siamese()), callbacks=[monitor()], logger=OwnLogger(None))


def test_without_a_logger_only_the_progress_bar_has_it(tmp_path: Path) -> None:
    fit(attach(Siamese()), callbacks=[monitor()], default_root_dir=tmp_path)
    assert not list(tmp_path.rglob("*"))


# --- what may be missing ---


def test_without_kornia_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)
    for name in [name for name in sys.modules if name.startswith("recon_aux.probe")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install '\.\[probe\]'"):
        monitor()


def test_without_lightning_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    from recon_aux.monitor import Monitor  # noqa: PLC0415

    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    watching = Monitor(images())
    assert type(watching) is Monitor
    assert (
        "monitor/whole/r2" in watching.measure(nn.ModuleDict({"encoder": plain_encoder()})).numbers
    )


def test_a_wrapper_is_looked_through() -> None:
    model = attach(Siamese())
    found = monitor().measure(nn.DataParallel(model))
    assert "monitor/equivariant/r2" in found.numbers


def test_it_uses_1000_images_at_most_by_default() -> None:
    given = torch.rand(1100, 3, 2, 2)
    found: list[int] = []

    def encode(model: Any, images: Tensor) -> Tensor:
        found.append(len(images))
        return images.flatten(1)

    recon_aux.Monitor(given, encode=encode, rows=0).measure(nn.Flatten())
    # two more show how wide a feature is
    assert sum(found) == 10 * 1000 + 2
