"""The monitor: a callback for Lightning, and for loops of one's own an object with ``measure``."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recon_aux.engine.api import attachment_of, is_attached
from recon_aux.engine.compiling import run_eagerly
from recon_aux.engine.modules import describe_children
from recon_aux.monitor.images import FEWEST, take_images
from recon_aux.monitor.loggers import log_picture
from recon_aux.monitor.measure import (
    HeldOut,
    Measurement,
    as_floats,
    describe,
    encode_held_out,
)
from recon_aux.monitor.picture import draw_picture, inverse_of
from recon_aux.task.checks import check_whole

_FRAMEWORKS = ("lightning.pytorch", "pytorch_lightning")

# type checkers can't see that it is a callback: for them it may be anything
if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object


class Monitor(_Base):  # type: ignore[misc]
    """Measures the encoder every few epochs, on a few held-out images, and logs what it finds.

    It is a callback for ``lightning`` and ``pytorch_lightning``. Import either before the monitor
    is made. In a loop of your own, call :meth:`measure`. Training goes on as without it, bit for
    bit: weights, buffers, modes and random states are as they were.

    For the whole feature, and where ``recon_aux`` is attached for the invariant and the equivariant
    part, it logs:

    - ``monitor/whole/r2_rotation``, and so on: R² of a ridge regression that predicts a
      transformation's parameter from the features of the image before and after it;
      ``monitor/whole/r2`` is their mean, and is shown in the progress bar.
    - ``monitor/whole/knn``: accuracy of 20 nearest neighbours in percent, if there are labels.
    - ``monitor/whole/rank``: the effective rank, RankMe (Garrido et al., ICML 2023).
    - ``monitor/whole/std``: standard deviation of normalised features over images: 0 is collapsed,
      1 is spread evenly.
    - ``monitor/seconds``: how long measuring took.
    - ``monitor/picture``: view, other view, rebuilt, and rebuilt in another image's context.

    Args:
        images: held-out, without augmentation: a tensor or an array ``(N, C, H, W)``, a dataset,
            or a loader; uint8, or floats from 0 to 1. Labels beside them are used.
        labels: ``(N,)``, if they aren't beside the images.
        every: measure after each so many epochs; 1 is after every epoch.
        count: how many images are used, at most.
        normalize: what the training transform does to images last, as torchvision's ``Normalize``.
        encode: called with the model and images, returns features; by default the encoder that
            ``attach`` was given, or the submodule ``backbone`` or ``encoder``.
        batch_size: images in one call of the encoder.
        rows: how many images the picture shows; 0 leaves it out.
        name: begins the names in the log.
        seed: of the transformations, which are the same each time.

    Raises:
        ImportError: if kornia or scikit-learn is missing.
        TypeError: if ``normalize`` is no function, or a number isn't whole.
        ValueError: if a number is too small.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.Conv2d(3, 8, 16), "head": nn.Flatten()})
        >>> monitor = Monitor(torch.rand(64, 3, 16, 16))
        >>> sorted(monitor.measure(model).numbers)[-3:]
        ['monitor/whole/r2_translation_y', 'monitor/whole/rank', 'monitor/whole/std']
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Monitor:
        """Make a callback of each Lightning package that is imported."""
        made: Monitor = object.__new__(as_callback(cls))
        return made

    def __init__(
        self,
        images: Any,
        labels: Any = None,
        *,
        every: int = 1,
        count: int = 1000,
        normalize: Callable[[Tensor], Tensor] | None = None,
        encode: Callable[[Any, Tensor], Any] | None = None,
        batch_size: int = 64,
        rows: int = 6,
        name: str = "monitor",
        seed: int = 0,
    ) -> None:
        from recon_aux.probe.inputs import check_normalize  # noqa: PLC0415

        check_normalize(normalize)
        for option, value, least in (
            ("every", every, 1),
            ("count", count, FEWEST),
            ("batch_size", batch_size, 1),
            ("rows", rows, 0),
        ):
            check_whole(option, value, least=least)
        self.images = images
        self.labels = labels
        self.every = every
        self.count = count
        self.normalize = normalize
        self.encode = encode
        self.batch_size = batch_size
        self.rows = rows
        self.name = name
        self.seed = seed
        self._held_out: HeldOut | None = None

    def __reduce__(self) -> Any:
        """Pickle as the class itself, not as the one that ``as_callback`` made of it."""
        return _restore, (_own_class(type(self)), vars(self))

    @property
    def state_key(self) -> str:
        """The key in Lightning's checkpoints. Nothing is saved, but no two keys may be equal."""
        return f"Monitor[{self.name}]"

    # --- for a loop ---

    def measure(self, model: nn.Module, *, regress: bool = True) -> Measurement:
        """Encode the held-out images, and describe the features.

        Args:
            model: attached or not, or a wrapper of one.
            regress: False leaves out the numbers, and only encodes: for all processes but one, so
                that an encoder that is sharded over them can be called.

        Returns:
            Numbers by name, and the picture.

        Raises:
            ValueError: if the model has no encoder that is found, or the images don't suit it.
            TypeError: if the encoder returns no feature.

        Example:
            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 8), nn.Flatten())
            >>> model = nn.ModuleDict({"backbone": encoder})
            >>> found = Monitor(torch.rand(32, 3, 8, 8)).measure(model)
            >>> 0 <= found.numbers["monitor/whole/std"] <= 1
            True
        """
        from recon_aux.probe.encoding import (  # noqa: PLC0415
            equivariant_dim_of,
            undisturbed,
            without_wrapper,
        )

        model, start = without_wrapper(model), time.perf_counter()
        with undisturbed(model):
            held_out, encode = self._prepared(model), self._encoder(model)
            features = encode_held_out(encode, held_out, self.batch_size, _device_of(model))
            self._check_pixels(model, held_out)
            is_its = _is_the_tasks(model, features[""])
            picture = self._picture(model, held_out, encode) if is_its else None
            dim = equivariant_dim_of(model) if is_its else 0
            found = describe(features, held_out, dim) if regress else {}
        found["seconds"] = time.perf_counter() - start
        return Measurement({f"{self.name}/{key}": value for key, value in found.items()}, picture)

    def _prepared(self, model: nn.Module) -> HeldOut:
        """Take the images, once, and see whether the encoder takes them."""
        if self._held_out is None:
            images, labels = take_images(self.images, self.labels, self.count)
            held_out, encode = HeldOut.draw(images, labels, self.seed), self._encoder(model)
            try:
                encode(as_floats(images[:2]).to(_device_of(model)))
            # what torch._assert and transformers raise, too
            except (RuntimeError, ValueError, AssertionError) as error:
                raise ValueError(
                    f"expected held-out images that the encoder takes, got {tuple(images.shape)}, "
                    f"for which it raised {type(error).__name__}: {error}. Pass images of the "
                    "training's size and channels, or encode=lambda model, images: features."
                ) from error
            self._held_out = held_out
        return self._held_out

    def _check_pixels(self, model: nn.Module, held_out: HeldOut) -> None:
        """Warn if the encoder gets pixels of another range than in training."""
        plan = attachment_of(model).plan if is_attached(model) else None
        if plan is None or not plan.pixels:
            return
        images = as_floats(held_out.images[: self.batch_size]).to(_device_of(model))
        seen = self._normalized(images).aminmax()
        ours, theirs = tuple(float(x) for x in seen), plan.pixels
        if _is_plain(*ours) != _is_plain(*theirs):
            warnings.warn(
                f"recon_aux.Monitor: expected pixels as in training, from {theirs[0]:.2f} to "
                f"{theirs[1]:.2f}, got {ours[0]:.2f} to {ours[1]:.2f}. Pass Monitor(..., "
                "normalize=) with what the training's transform does last, as "
                "torchvision.transforms.Normalize(mean, std), or nothing if it doesn't normalise.",
                stacklevel=3,
            )

    def _encoder(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Give the function that encodes images from 0 to 1."""
        call = self._call_of(model)
        return lambda images: run_eagerly(call, self._normalized(images))

    def _normalized(self, images: Tensor) -> Tensor:
        return images if self.normalize is None else self.normalize(images)

    def _call_of(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        from recon_aux.probe.encoding import ENCODERS, as_input, feature_of, find_call  # noqa: PLC0415

        own = self.encode
        if own is not None:
            spatial = is_attached(model) and bool(attachment_of(model).aux.options["spatial"])
            return lambda images: feature_of(
                partial(own, model), as_input(model, images), spatial=spatial
            )
        call = find_call(model)
        if call is None:
            raise ValueError(
                f"expected an encoder named one of {ENCODERS} in {type(model).__name__}, which "
                f"has {describe_children(model)}. Pass encode=lambda model, images: "
                "model.its_encoder(images)."
            )
        return call

    def _picture(
        self, model: nn.Module, held_out: HeldOut, encode: Callable[[Tensor], Tensor]
    ) -> Any:
        """Rebuild a few views; None where there is no decoder, or an untrained one."""
        from recon_aux.probe import transform  # noqa: PLC0415

        aux = attachment_of(model).aux if is_attached(model) else None
        if aux is None or aux.options["weight"] == 0 or not self.rows:
            return None
        # the last row needs another image's context, too
        count = self.rows + 1
        clean = as_floats(held_out.images[:count]).to(_device_of(model))
        views = [
            transform(clean, {name: x[:count] for name, x in parameters.items()})
            for parameters in held_out.views
        ]
        own, other = map(encode, views)
        restore = inverse_of(self.normalize, clean)
        contexts = (other, other.roll(1, 0))
        rebuilt = [restore(aux.rebuild(own, context)) for context in contexts]
        return draw_picture([x[: self.rows] for x in (*views, *rebuilt)])

    # --- for Lightning's trainer ---

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the images, and encode some, so that what is wrong shows before the training."""
        from recon_aux.probe.encoding import undisturbed, without_wrapper  # noqa: PLC0415

        model = without_wrapper(pl_module)
        with undisturbed(model):
            held_out = self._prepared(model)
        if trainer.is_global_zero:
            epochs = "each epoch" if self.every == 1 else f"every {self.every} epochs"
            count, total = len(held_out.images), held_out.images_encoded
            print(
                f"recon_aux.Monitor: {epochs} {count} held-out images are encoded "
                f"{total // count} times, {total} in all",
                file=sys.stderr,
            )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure and log, if it is time."""
        if (trainer.current_epoch + 1) % self.every:
            return
        found = self.measure(pl_module, regress=trainer.is_global_zero)
        # all processes log the same, and may choose checkpoints by it
        for name, value in trainer.strategy.broadcast(found.numbers).items():
            shown = name == f"{self.name}/whole/r2"
            pl_module.log(name, value, prog_bar=shown, sync_dist=True, batch_size=1)
        if trainer.is_global_zero and found.picture is not None:
            log_picture(trainer.loggers, f"{self.name}/picture", found.picture, trainer.global_step)


def as_callback(cls: type[Any]) -> type[Any]:
    """Give a subclass of a class that is also a Callback of each Lightning that is imported."""
    modules = (sys.modules.get(name) for name in _FRAMEWORKS)
    callbacks = [x for x in (getattr(module, "Callback", None) for module in modules) if x]
    missing = tuple(callback for callback in callbacks if not issubclass(cls, callback))
    if not missing:
        return cls
    names = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls, *missing), {**names, "_made_of": _own_class(cls)})


def _own_class(cls: type[Any]) -> type[Any]:
    made_of: type[Any] = vars(cls).get("_made_of", cls)
    return made_of


def _restore(cls: type[Any], state: dict[str, Any]) -> Any:
    monitor = object.__new__(as_callback(cls))
    vars(monitor).update(state)
    return monitor


def _is_the_tasks(model: nn.Module, features: Tensor) -> bool:
    """Whether these are as wide as the task's: what ``encode=`` gives may have no such parts."""
    width: int = attachment_of(model).aux.options["feature_dim"] if is_attached(model) else 0
    return width == features.shape[1]


def _is_plain(low: float, high: float) -> bool:
    """Whether pixels are from 0 to 1, give or take what augmentation adds."""
    return low > -0.3 and high < 1.5


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters(), torch.empty(0)).device
