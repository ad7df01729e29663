"""The command itself: what it prints and writes, and how it ends."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import recon_aux
from helpers.checkpoints import KINDS, lightlys, own_encoder, resnet18
from helpers.running import run_python
from recon_aux.cli.commands import app
from recon_aux.cli.errors import UserError
from recon_aux.cli.images import digits, load_images, parse_normalization
from recon_aux.cli.report import side_by_side
from recon_aux.monitor.picture import inverse_of
from recon_aux.probe import TRANSFORMATIONS, PartResult, ProbeResult

COMMANDS = ["probe", "export", "strip", "show", "demo"]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: Any) -> str:
    """Run a command that must succeed; give what it prints, in one line."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return " ".join(result.output.split())


def fail(*arguments: Any) -> str:
    """Run a command that a user's mistake ends; give the sentence."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output + repr(result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("recon-aux: ")
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


def fail_late(*arguments: Any) -> str:
    """Run a command that a user's mistake ends after it has said what it found."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output + repr(result.exception)
    return " ".join(result.stderr.split())


def save(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.ckpt"
    torch.save(KINDS[kind]()[1], path)
    return path


def save_images(folder: Path, count: int, size: tuple[int, int] = (20, 16), seed: int = 0) -> None:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (count, size[1], size[0], 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for seed, name in enumerate(("cats", "dogs")):
        save_images(tmp_path / "photos" / name, 20, seed=seed)
    return tmp_path / "photos"


# --- probe ---


@pytest.mark.slow
def test_six_checkpoints_one_of_each_kind_need_no_option(tmp_path: Path, photos: Path) -> None:
    paths = [save(kind, tmp_path) for kind in KINDS]
    picture, numbers = tmp_path / "probe.png", tmp_path / "probe.json"
    files = ["--picture", picture, "--json", numbers]
    printed = succeed("probe", *paths, "--data", photos, "--images", 20, "--device", "cpu", *files)
    assert "a fifth of its 40 images, drawn at random, is held out. 20 images to train" in printed
    found = json.loads(numbers.read_text())["checkpoints"]
    assert [entry["arch"] for entry in found.values()] == [make()[2] for make in KINDS.values()]
    parts = {name: list(entry["parts"]) for name, entry in found.items()}
    assert parts.pop("lightly.ckpt") == ["whole", "invariant", "equivariant"]
    assert set(map(tuple, parts.values())) == {("whole",)}
    for entry in found.values():
        assert 0 <= entry["parts"]["whole"]["linear"] <= 100
        assert entry["parts"]["whole"]["combined"].keys() >= {"rotation", "hue"}
    with Image.open(picture) as drawn:
        assert min(drawn.size) > 300
    for name in ("linear %", "mean R²", "rotation", "translation_x", *found):
        assert name in printed


def test_an_mlp_reads_instead_of_ridge_regression(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recon_aux.probe.mlp._STEPS", 2)
    numbers = tmp_path / "n.json"
    path = save("plain", tmp_path)
    options = ["--images", 20, "--regressor", "mlp", "--json", numbers]
    assert "mean" in succeed("probe", path, "--data", photos, *options)
    part = json.loads(numbers.read_text())["checkpoints"]["plain.ckpt"]["parts"]["whole"]
    assert part["spread"]["alone"].keys() == {*part["alone"], "mean"}


def test_pictures_of_another_normalisation_are_noticed(tmp_path: Path, photos: Path) -> None:
    _, checkpoint, _ = lightlys()
    # a decoder that was trained on dark images, and these normalised
    checkpoint["state_dict"]["recon_aux.decoder.to_patch.1.bias"].fill_(-2)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    ask = ["probe", tmp_path / "a.ckpt", "--data", photos, "--images", 20]
    ask += ["--picture", tmp_path / "a.png"]
    noticed = "what is rebuilt by a.ckpt is mostly darker than black or brighter than white"
    assert noticed in succeed(*ask, "--normalize", "none")
    assert noticed not in succeed(*ask, "--normalize", "0.9,0.4")


def test_a_flat_folder_has_no_accuracies(tmp_path: Path) -> None:
    save_images(tmp_path / "flat", 30)
    numbers = tmp_path / "n.json"
    path = save("plain", tmp_path)
    printed = succeed("probe", path, "--data", tmp_path / "flat", "--json", numbers)
    assert "there are no class folders, so no accuracies" in printed
    part = json.loads(numbers.read_text())["checkpoints"]["plain.ckpt"]["parts"]["whole"]
    assert part["linear"] is part["knn"] is None
    assert part["alone"]["rotation"] <= 1


def test_an_encoder_of_ones_own_is_named(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"net": own_encoder().state_dict()}, tmp_path / "own.pt")
    assert "Pass --arch with its architecture" in fail(
        "probe", tmp_path / "own.pt", "--data", photos
    )
    own = ["--arch", "helpers.checkpoints:own_encoder", "--normalize", "0.5,0.25"]
    assert "begin with net." in succeed("probe", tmp_path / "own.pt", "--data", photos, *own)


def test_an_encoder_that_cant_take_the_images_is_a_sentence(tmp_path: Path, photos: Path) -> None:
    torch.save(KINDS["timm"]()[1], tmp_path / "vit.pt")
    result = run("probe", tmp_path / "vit.pt", "--data", photos, "--size", 48)
    assert result.exit_code == 1
    said = result.stderr
    assert "features of 48x48 images, got: " in said
    assert said.rstrip().endswith("Pass another --size, or --arch with a function that builds it.")


def test_what_is_held_out_is_said_and_never_trained_on(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for seed, name in enumerate(("cats", "dogs")):
            save_images(tmp_path / "both" / split / name, 6, seed=seed + 2 * (split == "val"))
    images = load_images(str(tmp_path / "both"), None, 100)
    assert images.description.endswith("both; val/ is held out")
    assert (len(images.train[0]), len(images.test[0]), images.size) == (12, 12, 16)
    save_images(tmp_path / "flat", 20)
    images = load_images(str(tmp_path / "flat"), 16, 100)
    rows = [
        {image.numpy().tobytes() for image in split[0]} for split in (images.train, images.test)
    ]
    assert [len(row) for row in rows] == [16, 4]
    assert not rows[0] & rows[1]


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Test"), ("training", "testing"), ("train", "dev")]
)
def test_splits_of_other_names_are_no_classes(train: str, test: str, tmp_path: Path) -> None:
    for seed, split in enumerate((train, test)):
        for name in ("cats", "dogs", ".ipynb_checkpoints"):
            save_images(tmp_path / split / name, 4, seed=seed)
    images = load_images(str(tmp_path), None, 100)
    assert images.description.endswith(f"; {test}/ is held out")
    assert images.train[1] is not None
    assert images.train[1].bincount().tolist() == [4, 4]


def test_splits_of_unknown_names_are_refused_and_what_follows_the_advice_is_not(
    tmp_path: Path,
) -> None:
    for seed, split in enumerate(("spring", "autumn")):
        for name in ("cats", "dogs"):
            save_images(tmp_path / split / name, 4, seed=seed)
    with pytest.raises(UserError, match="autumn, spring, which have the same folders, as cats"):
        load_images(str(tmp_path), None, 100)
    (tmp_path / "spring").rename(tmp_path / "train")
    (tmp_path / "autumn").rename(tmp_path / "test")
    assert load_images(str(tmp_path), None, 100).description.endswith("; test/ is held out")


def test_a_test_split_without_classes_does_not_hide_the_one_with_them(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cats", "dogs"):
            save_images(tmp_path / split / name, 4)
    save_images(tmp_path / "test", 4)
    assert load_images(str(tmp_path), None, 100).description.endswith("; val/ is held out")


def test_files_of_16_bits_keep_their_contrast(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    (tmp_path / "photos").mkdir()
    for i in range(10):
        Image.fromarray(ramp).save(tmp_path / "photos" / f"{i}.png")
    images = load_images(str(tmp_path / "photos"), None, 100)
    assert images.train[0][0].flatten().tolist() == list(range(256)) * 3
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "photos" / "floats.tif")
    with pytest.raises(UserError, match="8 or 16 bits, got mode F"):
        load_images(str(tmp_path / "photos"), None, 100)


def attached(encoder: nn.Module, width: int, folder: Path, **options: Any) -> Path:
    model = nn.ModuleDict({"encoder": encoder, "projector": nn.Linear(width, 4)})
    recon_aux.attach(model, backbone="encoder", heads=["projector"], image_size=32, **options)
    torch.save(model.state_dict(), folder / "a.pt")
    return folder / "a.pt"


def small_resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=64)


def test_another_feature_than_the_split_one_is_refused(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = attached(small_resnet(), 64, tmp_path)
    said = fail_late("probe", path, "--data", photos, "--images", 20)
    assert "to have the 64 channels that recon_aux was attached to, got 512" in said
    assert "Pass --arch with a function that builds the encoder that was trained" in said
    (tmp_path / "my_code.py").write_text(
        "import torchvision\n"
        "def build_encoder(): return torchvision.models.resnet18(num_classes=64)\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ["--arch", "my_code:build_encoder", "--json", "n.json"]
    succeed("probe", path, "--data", photos, "--images", 20, *options)
    parts = json.loads(Path("n.json").read_text())["checkpoints"]["a.pt"]["parts"]
    assert list(parts) == ["whole", "invariant", "equivariant"]


def test_what_cannot_be_rebuilt_is_said(tmp_path: Path, photos: Path) -> None:
    encoder = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    path = attached(encoder, 192, tmp_path, backbone_method="forward_features")
    options = ["--images", 20, "--picture", tmp_path / "a.png"]
    printed = succeed("probe", path, "--data", photos, *options)
    assert "nothing is rebuilt: it learned from features of each position" in printed
    averaged = torch.load(path)
    averaged["recon_aux._extra_state"] = torch.zeros(1024)
    torch.save(averaged, path)
    printed = succeed("probe", path, "--data", photos, *options)
    assert "nothing is rebuilt: its options can't be read, as in an average of weights" in printed


def test_a_decoder_that_was_never_trained_draws_nothing(tmp_path: Path, photos: Path) -> None:
    encoder = torchvision.models.resnet18()
    encoder.fc = nn.Identity()
    path = attached(encoder, 512, tmp_path, weight=0)
    printed = succeed("probe", path, "--data", photos, "--images", 20)
    assert "nothing is rebuilt: it was attached with weight=0" in printed


def test_an_encoder_that_diverged_is_a_sentence(tmp_path: Path, photos: Path) -> None:
    weights = resnet18().state_dict()
    torch.save({k: x * float("nan") for k, x in weights.items()}, tmp_path / "diverged.pt")
    said = fail_late("probe", tmp_path / "diverged.pt", "--data", photos, "--images", 20)
    assert "diverged.pt: expected finite features" in said


def test_files_may_have_brackets_in_their_names(tmp_path: Path) -> None:
    (tmp_path / "runs[a]").mkdir()
    source, target = save("lightly", tmp_path), tmp_path / "runs[a]" / "bare.pt"
    assert str(target) in succeed("strip", source, "-o", target).replace("\n", "")


def test_a_train_folder_alone_has_classes(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        save_images(tmp_path / "train" / name, 6)
    save_images(tmp_path / "unlabelled", 6)
    images = load_images(str(tmp_path), None, 100)
    assert "train; a fifth of its 12 images" in images.description
    assert images.train[1] is not None


def test_images_of_different_sizes_are_said_to_be(tmp_path: Path, photos: Path) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    both = [save("plain", tmp_path), tmp_path / "vit.pt"]
    ask = ["probe", *both, "--data", photos, "--images", 20, "--json", tmp_path / "n.json"]
    printed = succeed(*ask)
    assert "These images differ. Pass --size with one that all encoders take." in printed
    found = json.loads((tmp_path / "n.json").read_text())["checkpoints"]
    assert found["plain.ckpt"]["images"].endswith("of 16x16 pixels")
    assert found["vit.pt"]["images"].endswith("of 32x32 pixels")
    assert "These images differ" not in succeed(*ask, "--size", 32)


def test_digits_of_any_size_can_be_told_apart() -> None:
    for size in (8, 9, 16, 17):
        (images, _), _ = digits(size)
        assert images.shape[-2:] == (size, size)
        assert len(images.flatten(1).unique(dim=0)) > 1390


def test_digits_are_those_of_the_example() -> None:
    source = (Path(__file__).parents[2] / "examples" / "lightly_simclr.py").read_text()
    code = source[source.index("x, y = map(") : source.index("loader = ")]
    names: dict[str, Any] = {}
    exec("import torch; from torch import nn; from sklearn.datasets import load_digits", names)
    exec("from torch.utils.data import TensorDataset, random_split", names)
    exec(code, names)
    for mine, theirs in zip(digits(16), (names["train"][:], names["test"][:]), strict=True):
        assert torch.equal(mine[1], theirs[1])
        assert (mine[0].int() - theirs[0].int()).abs().max() <= 1


@pytest.mark.parametrize("text", ["imagenet", "none", "0.5,0.25"])
def test_what_was_normalised_comes_back(text: str) -> None:
    images = torch.rand(2, 3, 4, 4)
    normalize = parse_normalization(text)
    assert torch.allclose(inverse_of(normalize, images)(normalize(images)), images, atol=1e-6)


# --- export, strip, show ---


@pytest.mark.parametrize("kind", ["lightly", "solo-learn", "plain"])
def test_what_is_exported_loads_strictly_and_sees_the_same(kind: str, tmp_path: Path) -> None:
    encoder, checkpoint, arch = KINDS[kind]()
    torch.save(checkpoint, tmp_path / "last.ckpt")
    out = tmp_path / "encoder.pt"
    like = [] if kind == "solo-learn" else ["--like", "timm:resnet18"]
    printed = succeed("export", tmp_path / "last.ckpt", "-o", out, *like)
    assert "load_state_dict(torch.load(" in printed
    loaded = timm.create_model("resnet18", num_classes=0)
    if kind == "solo-learn":
        loaded.conv1, loaded.maxpool = nn.Conv2d(3, 64, 3, 1, 2, bias=False), nn.Identity()
    loaded.load_state_dict(torch.load(out))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        same = torch.allclose(loaded.eval()(images), encoder(images).flatten(1), atol=1e-5)
    assert same, arch


def test_the_line_that_export_prints_loads_it(tmp_path: Path) -> None:
    for kind in ("torchvision", "timm"):
        printed = succeed("export", save(kind, tmp_path), "-o", tmp_path / "encoder.pt")
        line = re.search(r"Load it as: (.*\))$", printed)
        assert line is not None, printed
        # a path may be broken over lines
        code = line[1].replace(" ", "").replace("load_state_dict", " load_state_dict")
        result = eval(
            code.replace(". load", ".load"),
            {"torch": torch, "torchvision": torchvision, "timm": timm},
        )
        assert result.unexpected_keys == []
        assert set(result.missing_keys) <= {"fc.weight", "fc.bias"}


def test_a_bare_model_loads_what_is_stripped(tmp_path: Path) -> None:
    attached, out = save("lightly", tmp_path), tmp_path / "bare.ckpt"
    assert "the decoder's are left out" in succeed("strip", attached, "-o", out)
    before, after = torch.load(attached), torch.load(out)
    assert after["state_dict"].keys() == {
        key for key in before["state_dict"] if not key.startswith("recon_aux.")
    }
    assert after["pytorch-lightning_version"] == "2.6.0"
    assert "holds nothing of recon_aux" in fail("strip", out, "-o", tmp_path / "again.ckpt")


def test_show_lists_parts_options_and_what_the_weight_came_to(tmp_path: Path) -> None:
    printed = succeed("show", save("lightly", tmp_path))
    assert "state_dict.backbone " in printed
    assert "encoder: torchvision:resnet18, its names begin with state_dict.backbone." in printed
    assert "left alone: state_dict.backbone_momentum." in printed
    for row in ("weight auto, not set yet", "equivariant_dim 256", "calls so far 0", "epoch: 1"):
        assert row in re.sub(r"[│┃|]", "", printed)
    encoder, _, _ = lightlys()
    model = nn.ModuleDict({"backbone": encoder, "head": nn.Linear(512, 4)})
    attached: Any = recon_aux.attach(model, backbone="backbone", heads=["head"])
    attached.recon_aux.measured_weight = 2.5
    torch.save(model.state_dict(), tmp_path / "set.pt")
    assert "weight auto: 2.5" in succeed("show", tmp_path / "set.pt")


def test_show_also_shows_what_has_no_known_encoder(tmp_path: Path) -> None:
    torch.save({"net": own_encoder().state_dict()}, tmp_path / "own.pt")
    printed = succeed("show", tmp_path / "own.pt")
    assert "recon_aux: not attached" in printed
    assert "Pass --arch" in printed


# --- demo ---


@pytest.mark.slow
def test_the_demo_trains_compares_and_draws(tmp_path: Path) -> None:
    few = ["--epochs", "1", "--images", "128", "--device", "cpu"]
    result = run_python("-m", "recon_aux.cli", "demo", *few, folder=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    for word in ("bare", "attached", "invariant", "equivariant", "rotation", "recon_aux_demo.png"):
        assert word in result.stdout
    with Image.open(tmp_path / "recon_aux_demo.png") as drawn:
        assert min(drawn.size) > 300


# --- mistakes ---


class Wicked:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("command", ["probe", "export", "strip", "show"])
def test_code_in_a_checkpoint_is_not_run(command: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"state_dict": resnet18().state_dict(), "x": Wicked(str(made))}, tmp_path / "w.ckpt")
    options = {"probe": ["--data", "digits"], "show": []}.get(command, ["-o", tmp_path / "o.pt"])
    said = fail(command, tmp_path / "w.ckpt", *options)
    assert re.search(r"holds code \(\w+\.mkdir\).*pass --trust-checkpoint\.$", said.rstrip()), said
    assert not made.exists()


def test_code_is_run_if_it_is_trusted(tmp_path: Path) -> None:
    torch.save({"model": resnet18(), "x": Wicked(str(tmp_path / "made"))}, tmp_path / "w.ckpt")
    assert "torchvision:resnet18" in succeed("show", tmp_path / "w.ckpt", "--trust-checkpoint")
    assert (tmp_path / "made").exists()


def test_rows_keep_their_names_beside_many_checkpoints() -> None:
    r2 = dict.fromkeys(TRANSFORMATIONS, 0.5)
    part = PartResult(90.0, 80.0, alone=r2, combined=r2)
    many = {f"run{i}/last.ckpt": ProbeResult({"whole": part}) for i in range(16)}
    console = Console(width=160)
    with console.capture() as capture:
        console.print(side_by_side(many))
    printed = capture.get().split()
    assert printed.count("translation_x") == printed.count("translation_y") == 2


def test_options_that_scripts_of_timm_and_torchvision_save_are_no_code(tmp_path: Path) -> None:
    saved = {"model": resnet18().state_dict(), "args": argparse.Namespace(lr=0.1, model="resnet18")}
    torch.save(saved, tmp_path / "last.pth")
    assert "torchvision:resnet18" in succeed("show", tmp_path / "last.pth")
    # but what is in them may be
    saved["args"].of = Wicked(str(tmp_path / "made"))
    torch.save(saved, tmp_path / "last.pth")
    assert "holds code" in fail("show", tmp_path / "last.pth")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"hello, this is no checkpoint", "cut", "zip"])
def test_a_broken_file_is_a_sentence(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "broken.pt"
    if isinstance(content, str):
        torch.save(resnet18().state_dict(), path, _use_new_zipfile_serialization=content == "zip")
        whole = path.read_bytes()
        content = whole[: len(whole) // 2]
    path.write_bytes(content)
    assert "broken.pt, which can't be read" in fail("show", path)
    # nor does trusting it help
    assert "can't be read" in fail("show", path, "--trust-checkpoint")


MISTAKES: dict[str, tuple[str, str]] = {
    "missing": ("show none.pt", "none.pt, which doesn't exist. Pass the path"),
    "folder": ("show empty", "is a folder"),
    "arch": ("probe good.pt --data digits --arch timm:resnet5O", "Pass --arch timm:resnet"),
    "no arch": ("probe good.pt --data digits --arch resnet", "as timm:resnet50, "),
    "another arch": ("probe good.pt --data digits --arch timm:resnet50", "none of it fits"),
    "data": ("probe good.pt --data digit", "got digit, which is no folder. Pass one of these"),
    "no images": ("probe good.pt --data empty", "without images. Pass a folder with files"),
    "no like": ("export good.pt -o encoder.pt --like resnet", "as timm:resnet50, "),
    "broken images": ("probe good.pt --data words", "which can't be read. Remove it"),
    "normalize": ("probe good.pt --data digits --normalize 1", "as --normalize 0.5,0.25"),
    "picture": ("probe good.pt --data digits --picture a.doc", "Pass one that ends in .png"),
    "json": ("probe good.pt --data digits --json no/a.json", "in no, which doesn't exist"),
    "json over it": ("probe good.pt --data digits --json good.pt", "another file than"),
    "safetensors": ("export good.pt -o encoder.safetensors", "Pass -o with one that ends in .pt"),
    "device": ("probe good.pt --data digits --device tpu0", "Pass cpu"),
    "output": ("export good.pt -o empty", "is a folder"),
    "itself": ("strip good.pt -o good.pt", "another file than"),
    "like": ("export good.pt -o e.pt --like timm:vgg16", "none of it fits"),
    "numbers": ("export numbers.pt -o e.pt", "holds no tensors"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(resnet18().state_dict(), "good.pt")
    torch.save({"epoch": 3}, "numbers.pt")
    for folder in ("empty", "words"):
        Path(folder).mkdir()
    for i in range(6):
        (Path("words") / f"{i}.png").write_text("no image")
    before = sorted(tmp_path.rglob("*"))
    arguments, expected = MISTAKES[name]
    assert expected in fail(*arguments.split())
    assert sorted(tmp_path.rglob("*")) == before


# --- the command as a whole ---


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_teaches_by_examples(command: str) -> None:
    printed = succeed(*filter(None, [command]), "--help")
    assert f"recon-aux {command or 'probe'}" in printed
    for name in COMMANDS:
        assert command or name in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["probe", "a.pt"],
        ["show"],
        ["demo", "--epochs", "x"],
        ["probe", "a.pt", "--data", "digits", "--regressor", "knn"],
    ],
)
def test_a_wrong_call_ends_with_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_a_package_that_is_missing_is_named() -> None:
    # timm is needed for its own architectures alone
    code = """
import sys, recon_aux.cli
sys.argv = ["recon-aux", "--help"]
for package in ("typer", "kornia", "matplotlib", "timm"):
    sys.modules[package] = None
    try:
        recon_aux.cli.main()
    except SystemExit as end:
        print("ended:", end.code)
    del sys.modules[package]
"""
    # old versions of kornia warn as they are imported
    result = run_python("-W", "ignore", "-c", code)
    ends = [line for line in result.stdout.splitlines() if line.startswith("ended: ")]
    advice = "install it with, in a clone: pip install '.[cli]'"
    needed = [f"recon-aux needs {name}; {advice}" for name in ("typer", "kornia", "matplotlib")]
    assert [*ends, *result.stderr.splitlines()] == [*(f"ended: {x}" for x in needed), "ended: 0"]


def test_the_script_is_declared() -> None:
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.scripts]\nrecon-aux = "recon_aux.cli:main"' in declared
    assert '  "recon_aux.cli",' in declared
