"""An autoencoder of images: an encoder and a decoder that meet in a latent.

Two shapes, both built from widths: `mlp` on flattened images, and `conv`, whose encoder halves the image with
every layer and whose decoder doubles it back. The groups are the hidden layers, by module path, and `latent`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from agents import datasets
from agents.adam import half_cosine, moments_of, set_moments
from agents.agent import UNTRACKED, Objective, Progress, Split, Tracker
from agents.options import parse_options
from agents.shrinking import narrowed, take_layers
from agents.widths import complete
from components.errors import UserError, nearest

Positive = Annotated[int, Field(ge=1)]
BatchSize = Annotated[int, Field(ge=2)]  # batch normalisation needs two
LearningRate = Annotated[float, Field(gt=0, allow_inf_nan=False)]

DEFAULT_HIDDEN = {"mlp": (256, 128), "conv": (16, 32)}
ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
BETAS = (0.9, 0.95)
"""Decay of Adam's moments. The second follows the fast change after pruning: with 0.999 instead of 0.95,
fine-tuning ends with a 4 to 8 % higher error (600 updates, 2 to 10 % of the parameters kept)."""
EVALUATION_BATCH = 512
"""Fixed, so that evaluation gives the same bits every time."""


class AutoencoderOptions(BaseModel):
    """The `agent:` block of an experiment, without `kind`.

    Attributes:
        shape: `mlp` or `conv`.
        dataset: `digits` (8 x 8) or `mnist` (28 x 28).
        hidden: widths of the encoder's hidden layers, from the image on: units (`mlp`) or feature maps
            (`conv`); the decoder mirrors them. Default 256, 128 (`mlp`) and 16, 32 (`conv`).
        latent: units of the latent, >= 1.
        activation: after every hidden layer. On the digits, ELU has the lowest error dense and pruned: a ReLU
            network cut to 2 % and fine-tuned ends at 1.7 times its error.
        normalization: before every activation: `layer` (over a layer's channels), `batch`, or `none`.
        updates: gradient updates of the training.
        batch_size: images per training update.
        learning_rate: Adam's at the start; it falls to 0 along a half cosine.
        fine_tune_batch_size: images per fine-tuning update.
        fine_tune_learning_rate: as `learning_rate`. On the digits, 8e-3 is within 2 % of the best of seven
            rates for 3 to 100 % of the parameters kept.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    shape: Literal["mlp", "conv"] = "mlp"
    dataset: datasets.Name = "digits"
    hidden: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1, max_length=8)] = ()
    latent: Positive = 16
    activation: Literal["elu", "gelu", "relu", "silu", "tanh"] = "elu"
    normalization: Literal["none", "layer", "batch"] = "none"
    updates: Positive = 4000
    batch_size: BatchSize = 64
    learning_rate: LearningRate = 4e-3
    fine_tune_batch_size: BatchSize = 256
    fine_tune_learning_rate: LearningRate = 8e-3

    @model_validator(mode="before")
    @classmethod
    def _hidden_of_shape(cls, given: Any) -> Any:
        shape = given.get("shape", "mlp")
        if "hidden" in given or shape not in DEFAULT_HIDDEN:
            return given
        return {**given, "hidden": DEFAULT_HIDDEN[shape]}


def dense_widths(options: AutoencoderOptions) -> dict[str, int]:
    """Group -> size of the unpruned autoencoder, in the order of the computation.

    A hidden layer's group is named after the module that makes it: `encoder.0`, `encoder.2`, `decoder.0`.
    """
    block = 2 if options.normalization == "none" else 3  # modules per hidden layer
    unflatten = 1 if options.shape == "conv" else 0  # one more in the decoder's first
    decoder_paths = [block * i + (unflatten if i else 0) for i in range(len(options.hidden))]
    return {
        **{f"encoder.{block * i}": size for i, size in enumerate(options.hidden)},
        "latent": options.latent,
        **{f"decoder.{i}": size for i, size in zip(decoder_paths, reversed(options.hidden), strict=True)},
    }


class EncoderDecoder(nn.Module):
    """An encoder and a decoder; images in, images of the same shape out."""

    def __init__(self, encoder: Iterable[nn.Module], decoder: Iterable[nn.Module]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder)

    def forward(self, images: Tensor) -> Tensor:
        """The reconstruction of every image, unbounded."""
        reconstruction: Tensor = self.decoder(self.encoder(images))
        return reconstruction


class FeatureMapNorm(nn.LayerNorm):
    """Layer normalisation over the feature maps at every position of `(batch, maps, height, width)`."""

    def forward(self, maps: Tensor) -> Tensor:
        """The same shape as `maps`."""
        return super().forward(maps.movedim(1, -1)).movedim(-1, 1)


def build(options: AutoencoderOptions, widths: Mapping[str, int]) -> EncoderDecoder:
    """The networks with these widths, their weights drawn from torch's global generator.

    `mlp` reads `(batch, pixels)`, `conv` reads `(batch, 1, height, width)`.
    """
    split = len(options.hidden)
    sizes = list(widths.values())
    encoder, latent, decoder = sizes[:split], sizes[split], sizes[split + 1 :]
    side = datasets.IMAGE_SIDES[options.dataset]
    if options.shape == "mlp":
        return _mlp(options, side * side, encoder, latent, decoder)
    return _conv(options, side, encoder, latent, decoder)


def _mlp(
    options: AutoencoderOptions, pixels: int, encoder: Sequence[int], latent: int, decoder: Sequence[int]
) -> EncoderDecoder:
    norm: Callable[[int], nn.Module] = nn.BatchNorm1d if options.normalization == "batch" else nn.LayerNorm

    def layers(sizes: Sequence[int]) -> Iterable[nn.Module]:
        for before, size in pairwise(sizes[:-1]):
            yield nn.Linear(before, size)
            yield from _after(size, options, norm)
        yield nn.Linear(sizes[-2], sizes[-1])

    return EncoderDecoder(layers([pixels, *encoder, latent]), layers([latent, *decoder, pixels]))


def _conv(
    options: AutoencoderOptions, side: int, encoder: Sequence[int], latent: int, decoder: Sequence[int]
) -> EncoderDecoder:
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d if options.normalization == "batch" else FeatureMapNorm
    sides = [side]  # of the image after every convolution: 28, 14, 7, 4, ...
    for _ in encoder:
        sides.append((sides[-1] + 1) // 2)
    smallest = sides[-1]

    def encoder_layers() -> Iterable[nn.Module]:
        for before, size in zip([1, *encoder], encoder, strict=False):
            yield nn.Conv2d(before, size, kernel_size=3, stride=2, padding=1)
            yield from _after(size, options, norm)
        yield nn.Flatten()
        yield nn.Linear(encoder[-1] * smallest**2, latent)

    def decoder_layers() -> Iterable[nn.Module]:
        yield nn.Linear(latent, decoder[0] * smallest**2)
        yield nn.Unflatten(1, (decoder[0], smallest, smallest))
        yield from _after(decoder[0], options, norm)
        grown = list(reversed(sides))
        for i, (before, size) in enumerate(zip(decoder, [*decoder[1:], 1], strict=True)):
            # A stride of 2 gives 2n - 1 pixels; one more where the encoder halved an even number.
            extra = grown[i + 1] - (2 * grown[i] - 1)
            yield nn.ConvTranspose2d(before, size, 3, stride=2, padding=1, output_padding=extra)
            if i + 1 < len(decoder):
                yield from _after(size, options, norm)

    return EncoderDecoder(encoder_layers(), decoder_layers())


def _after(size: int, options: AutoencoderOptions, norm: Callable[[int], nn.Module]) -> Iterable[nn.Module]:
    """What follows a hidden layer: normalisation, activation; new modules every time."""
    if options.normalization != "none":
        yield norm(size)
    yield ACTIVATIONS[options.activation]()


class Autoencoder:
    """The `autoencoder` agent: see `agents.agent.Agent` for what its members promise.

    Its states are `model` and Adam's moments, `adam_mean` and `adam_square`. Fine-tuning goes on from them.
    """

    performance: ClassVar[Objective] = Objective("reconstruction_error", "minimize", "MSE per pixel")
    fine_tune_methods: ClassVar[tuple[str, ...]] = ("supervised",)
    components: Mapping[str, Sequence[str]] = {"encoder": ("encoder",), "decoder": ("decoder",)}
    ties: Sequence[tuple[str, str]] = (("latent", "latent"),)

    def __init__(
        self,
        options: Mapping[str, Any],
        widths: Mapping[str, int] | None = None,
        data: Mapping[str, Tensor] | None = None,
        device: str = "cpu",
    ) -> None:
        self._options = parse_options(AutoencoderOptions, options, "autoencoder")
        self.options: Mapping[str, Any] = self._options.model_dump(mode="json")
        self.widths: Mapping[str, int] = complete(widths, dense_widths(self._options), "autoencoder")
        self.device = torch.device(device)
        self.model: nn.Module = self._new_model(seed=0).to(self.device)
        self._moments = self._zero_moments()
        self._optimizer: torch.optim.Adam | None = None  # of the training or fine-tuning under way
        self._data = None if data is None else {name: images.to(self.device) for name, images in data.items()}

    # --- the model and its data --------------------------------------------------------------------------

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of one input and one output of `act`: `(pixels,)` for `mlp`, `(1, height, width)` for `conv`."""
        side = datasets.IMAGE_SIDES[self._options.dataset]
        return (side * side,) if self._options.shape == "mlp" else (1, side, side)

    def data(self) -> dict[str, Tensor]:
        """`train`, `validation` and `test` images, `(n, height, width)`, in [0, 1]."""
        if self._data is None:
            dataset = datasets.load(self._options.dataset)
            splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
            self._data = {name: images.to(self.device) for name, images in splits.items()}
        return dict(self._data)

    def program(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode `images`, `(n, *image_shape)`, and decode them."""
        assert isinstance(model, EncoderDecoder)
        latent = model.encoder(inputs["images"].to(self.device))
        return {"latent": latent, "reconstruction": model.decoder(latent)}

    def task_loss(self, outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """The squared error of the reconstructions over the variance of the images: see `agent.task_loss`."""
        images = inputs["images"].to(self.device)
        deviation = (images - images.mean(0)).square().mean()
        return mse_loss(outputs["reconstruction"], images) / deviation

    def calibration_inputs(self, rows: int, seed: int) -> dict[str, Tensor]:
        """`images`: that many different training images, or all of them where there are fewer."""
        images = self._split("train")
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:rows]
        return {"images": images[chosen.to(self.device)]}

    def states(self) -> dict[str, dict[str, Tensor]]:
        """`model`, `adam_mean` and `adam_square`."""
        moments = self._moments if self._optimizer is None else self._moments_of(self._optimizer)
        sections = {"model": self.model.state_dict(), **moments}
        return {
            section: {name: tensor.detach().clone() for name, tensor in state.items()}
            for section, state in sections.items()
        }

    def load_states(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over `model` and, where given, the moments."""
        self.model.load_state_dict(dict(states["model"]))
        moments = self._zero_moments()
        for section, zeros in moments.items():
            for name, moment in states.get(section, {}).items():
                if name not in zeros or moment.shape != zeros[name].shape:
                    raise UserError(
                        f"{section} {name!r} of shape {tuple(moment.shape)} does not fit the model"
                    )
                zeros[name].copy_(moment)
        self._moments = moments

    # --- learning ----------------------------------------------------------------------------------------

    @property
    def training_updates(self) -> int:
        """Those same updates."""
        return self.training_steps

    @property
    def training_steps(self) -> int:
        """Gradient updates of the training."""
        return self._options.updates

    def train(self, seed: int, tracker: Tracker | None, progress: Progress) -> None:
        """Minimise the reconstruction error on the training images, from new random weights."""
        self.model.load_state_dict(self._new_model(seed).state_dict())
        self._moments = self._zero_moments()
        chosen = self._options
        tracker = tracker or UNTRACKED
        self._fit(chosen.updates, chosen.batch_size, chosen.learning_rate, seed, tracker, progress)

    def fine_tune(
        self, method: str, updates: int, seed: int, progress: Progress, tracker: Tracker | None = None
    ) -> None:
        """`supervised`: go on with the training images, with the fine-tuning batch size and learning rate."""
        if method not in self.fine_tune_methods:
            known = nearest(method, self.fine_tune_methods)
            raise UserError(f"the autoencoder has no fine-tuning method {method!r}: {known}")
        chosen = self._options
        size, rate = chosen.fine_tune_batch_size, chosen.fine_tune_learning_rate
        self._fit(updates, size, rate, seed, tracker or UNTRACKED, progress)

    def shrink(self, kept: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on with fewer channels, Adam's moments and its count of steps included."""
        self.widths = narrowed(self.widths, kept)
        take_layers(self.model, self._new_model(seed=0).to(self.device), states["model"])
        self._moments = {section: dict(states[section]) for section in ("adam_mean", "adam_square")}
        if self._optimizer is not None:
            [group] = self._optimizer.param_groups
            steps = max(float(state["step"]) for state in self._optimizer.state.values())
            self._optimizer = self._new_optimizer(group["lr"], steps)

    def _fit(
        self,
        updates: int,
        batch_size: int,
        learning_rate: float,
        seed: int,
        tracker: Tracker,
        progress: Progress,
    ) -> None:
        """Adam on the squared error, its rate falling to 0 along a half cosine."""
        if updates == 0:
            return
        images = self._split("train")
        batches = _batches(len(images), updates, batch_size, seed).to(self.device)  # (updates, batch_size)
        self._optimizer = self._new_optimizer(learning_rate)
        note_every = max(1, updates // 50)  # reading a loss waits for the device
        note = ""
        self.model.train()
        try:
            for step in range(updates):
                optimizer = self._optimizer  # a new one, once channels were lost
                optimizer.param_groups[0]["lr"] = half_cosine(learning_rate, step, updates)
                batch = images[batches[step]]
                optimizer.zero_grad(set_to_none=True)
                with tracker.capture():
                    loss = mse_loss(self.model(batch), batch)
                    loss.backward()  # type: ignore[no-untyped-call]
                tracker.update()
                optimizer.step()
                if (step + 1) % note_every == 0 or step + 1 == updates:
                    note = f"training error {loss.item():.5f}"
                progress(step + 1, updates, note)
            self._moments = self._moments_of(self._optimizer)
        finally:
            self._optimizer = None
            self.model.eval()
            self.model.zero_grad(set_to_none=True)

    def _new_optimizer(self, learning_rate: float, steps: float | None = None) -> torch.optim.Adam:
        """Adam, going on from the moments; fused, an update of a small model takes a quarter less time."""
        optimizer = torch.optim.Adam(self.model.parameters(), lr=learning_rate, betas=BETAS, fused=True)
        mean, square = self._moments["adam_mean"], self._moments["adam_square"]
        set_moments([optimizer], dict(self.model.named_parameters()), mean, square, steps)
        return optimizer

    def _moments_of(self, optimizer: torch.optim.Adam) -> dict[str, dict[str, Tensor]]:
        mean, square = moments_of([optimizer], dict(self.model.named_parameters()))
        return {"adam_mean": mean, "adam_square": square}

    def rung_loss(self) -> float:
        """The error on the validation images, in evaluation mode, also while training."""
        training = self.model.training
        self.model.eval()
        try:
            return self.evaluate("validation")[self.performance.name]
        finally:
            self.model.train(training)

    # --- measuring and acting ----------------------------------------------------------------------------

    def evaluate(self, split: Split) -> dict[str, float]:
        """The mean squared error per pixel, summed in double precision."""
        images = self._split(split)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in torch.split(images, EVALUATION_BATCH):
            total += (self.act(batch).double() - batch.double()).square().sum()
        return {self.performance.name: float(total) / images.numel()}

    def trivial(self, split: Split) -> float:
        """The error of the mean training image: the variance of the data."""
        images = self._split(split).double()
        mean = self._split("train").double().mean(dim=0)
        return float((images - mean).square().mean())

    def act(self, inputs: Tensor) -> Tensor:
        """The reconstructions of images, `(n, *image_shape)` to the same shape."""
        with torch.no_grad():
            reconstruction: Tensor = self.model(inputs.to(self.device))
        return reconstruction

    def example_inputs(self, count: int) -> Tensor:
        """The first test images, from the beginning again where there are not so many."""
        images = self._split("test")
        return images[torch.arange(count, device=self.device) % len(images)]

    def contract(self) -> dict[str, Any]:
        """One image in [0, 1] in, its reconstruction, which is not clipped, out."""
        image = {"shape": list(self.image_shape), "dtype": "float32"}
        return {
            "inputs": [{"name": "image", **image, "range": [0.0, 1.0]}],
            "outputs": [{"name": "reconstruction", **image, "range": None}],
            "control_step_s": None,
        }

    # --- parts -------------------------------------------------------------------------------------------

    def _split(self, name: str) -> Tensor:
        """The images of a split, `(n, *image_shape)`."""
        images = self.data()[name]
        return images.reshape(len(images), *self.image_shape)

    def _new_model(self, seed: int) -> EncoderDecoder:
        """New networks with weights from this seed, on the CPU; the global generator stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return build(self._options, self.widths).eval()

    def _zero_moments(self) -> dict[str, dict[str, Tensor]]:
        return {
            section: {name: torch.zeros_like(p.data) for name, p in self.model.named_parameters()}
            for section in ("adam_mean", "adam_square")
        }


def _batches(count: int, updates: int, batch_size: int, seed: int) -> Tensor:
    """Which images every update sees, `(updates, batch_size)`: one shuffle of all `count` after the other."""
    generator = torch.Generator().manual_seed(seed)
    needed = updates * batch_size
    shuffles = [torch.randperm(count, generator=generator) for _ in range(math.ceil(needed / count))]
    return torch.cat(shuffles)[:needed].reshape(updates, batch_size)
