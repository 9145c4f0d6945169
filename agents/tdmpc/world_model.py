"""The task-oriented latent dynamics of TD-MPC: six networks that meet in a latent, built from widths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample, pad

from agents.tdmpc.activations import ELU, Tanh
from agents.tdmpc.config import TDMPCOptions

KERNELS = (7, 5, 3, 3)
"""Of the pixel encoder's convolutions, each of stride 2."""


def dense_widths(options: TDMPCOptions) -> dict[str, int]:
    """Group -> size of the unpruned world model, in the order of the computation.

    A hidden layer's group is named after the module that makes it; `latent` is the coupling group.
    """
    if options.observation == "pixels":
        encoder = {f"encoder.{2 * i}": options.channels for i in range(len(KERNELS))}
    else:
        encoder = {"encoder.0": options.encoder_width}
    heads = {"dynamics": (0, 2), "reward": (0, 2), "q1": (0, 3), "q2": (0, 3), "policy": (0, 2)}
    return {
        **encoder,
        "latent": options.latent,
        **{f"{head}.{i}": options.mlp_width for head, places in heads.items() for i in places},
    }


class Network(nn.Sequential):
    """Layers in a row; under autocast the last one still runs in its own precision.

    Its outputs are latents, rewards and values: of several tens, and told apart by a few hundredths.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """What the last layer makes."""
        *hidden, last = self
        for layer in hidden:
            inputs = layer(inputs)
        if torch.is_autocast_enabled(inputs.device.type):
            with torch.autocast(inputs.device.type, enabled=False):
                outputs: Tensor = last(inputs.float())
        else:
            outputs = last(inputs)
        return outputs


class WorldModel(nn.Module):
    """Encoder, latent dynamics, reward, twin Q functions and policy; new orthogonal weights.

    Args:
        widths: group -> size, as `dense_widths` names them.
        observation_shape: `(n,)`, or `(channels, height, width)` of pixels in 0..255.
        action_size: numbers of an action, each in [-1, 1].
    """

    def __init__(
        self, widths: Mapping[str, int], observation_shape: tuple[int, ...], action_size: int
    ) -> None:
        super().__init__()
        latent = widths["latent"]
        self.is_visual = len(observation_shape) == 3
        if self.is_visual:
            self.encoder = _convolutional(widths, observation_shape, latent)
        else:
            self.encoder = Network(
                nn.Linear(observation_shape[0], widths["encoder.0"]),
                ELU(),
                nn.Linear(widths["encoder.0"], latent),
            )
        both = latent + action_size
        self.dynamics = _mlp(both, widths["dynamics.0"], widths["dynamics.2"], latent)
        self.reward = _mlp(both, widths["reward.0"], widths["reward.2"], 1)
        self.q1 = _q_function(both, widths["q1.0"], widths["q1.3"])
        self.q2 = _q_function(both, widths["q2.0"], widths["q2.3"])
        self.policy = _mlp(latent, widths["policy.0"], widths["policy.2"], action_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthogonal weights, zero biases; reward and Q functions begin at zero."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                gain = nn.init.calculate_gain("relu") if isinstance(layer, nn.Conv2d) else 1.0
                nn.init.orthogonal_(layer.weight, gain)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.LayerNorm):
                layer.reset_parameters()
        for head in (self.reward, self.q1, self.q2):
            last = head[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)

    def encode(self, observations: Tensor) -> Tensor:
        """Observations `(n, *observation_shape)` to latents `(n, latent)`."""
        with torch.autocast(observations.device.type, enabled=False):  # a sensor's digits matter
            latents: Tensor = self.encoder(self.scaled(observations))
        return latents

    def snapshot_of_encoder(self) -> Callable[[Tensor], Tensor]:
        """`encode` with the present weights: later changes do not reach it."""
        encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        return lambda observations: encoder(self.scaled(observations))

    def scaled(self, observations: Tensor) -> Tensor:
        """What the encoder reads: states as they are, pixels in [0, 1]."""
        if not self.is_visual:
            return observations
        return observations.to(self.reward[0].weight.dtype) / 255.0  # type: ignore[arg-type]

    def next_latent(self, latents: Tensor, actions: Tensor) -> Tensor:
        """The latents one decision later: `(..., latent)`, `(..., actions)` to `(..., latent)`."""
        after: Tensor = self.dynamics(torch.cat([latents, actions], dim=-1))
        return after

    def roll_out(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Latents `(horizon + 1, n, latent)` from observations `(n, ...)`, actions `(horizon, n, ...)`."""
        latents = [self.encode(observations)]
        for decision in actions:
            latents.append(self.next_latent(latents[-1], decision))
        return torch.stack(latents)

    def reward_of(self, latents: Tensor, actions: Tensor) -> Tensor:
        """The reward of one decision, `(..., 1)`."""
        reward: Tensor = self.reward(torch.cat([latents, actions], dim=-1))
        return reward

    def q_values(self, latents: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Both estimates of the return from here on, `(..., 1)` each."""
        both = torch.cat([latents, actions], dim=-1)
        return self.q1(both), self.q2(both)

    def policy_mean(self, latents: Tensor) -> Tensor:
        """The policy's actions without noise, `(..., actions)` in (-1, 1)."""
        return torch.tanh(self.policy(latents))


def with_noise(means: Tensor, noise: Tensor) -> Tensor:
    """The policy's actions with truncated noise; the gradient passes through as if nothing were clipped.

    Args:
        means: `(..., actions)`.
        noise: normal, with the policy's deviation; clipped to [-0.3, 0.3].
    """
    actions = means + noise.clamp(-0.3, 0.3)
    return actions + (actions.clamp(-1 + 1e-6, 1 - 1e-6) - actions).detach()


def random_shifts(images: Tensor, shifts: Tensor) -> Tensor:
    """Images moved by whole pixels, their border repeated (Yarats et al., 2021, 2107.09645).

    Args:
        images: `(n, channels, side, side)`, any type.
        shifts: `(n, 2)` by how many pixels the window moves right and down: whole numbers in
            [-padding, padding], padding = side // 21.

    Returns:
        float32, of the images' shape.
    """
    side = images.shape[-1]
    padding = shift_padding(side)
    padded = pad(images.float(), (padding,) * 4, mode="replicate")
    full = side + 2 * padding
    centres = (2 * torch.arange(side, device=images.device) + 1 + 2 * padding) / full - 1  # in [-1, 1]
    moved = centres + 2 * shifts.to(images.device).unsqueeze(2) / full  # (n, 2, side)
    columns = moved[:, 0].unsqueeze(1).expand(-1, side, -1)
    rows = moved[:, 1].unsqueeze(2).expand(-1, -1, side)
    grid = torch.stack([columns, rows], dim=3)
    return grid_sample(padded, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def shift_padding(side: int) -> int:
    """By how many pixels images of this side may be shifted."""
    return max(1, side // 21)


def _mlp(inputs: int, first: int, second: int, outputs: int) -> Network:
    return Network(
        nn.Linear(inputs, first), ELU(), nn.Linear(first, second), ELU(), nn.Linear(second, outputs)
    )


def _q_function(inputs: int, first: int, second: int) -> Network:
    return Network(
        nn.Linear(inputs, first),
        nn.LayerNorm(first),
        Tanh(),
        nn.Linear(first, second),
        ELU(),
        nn.Linear(second, 1),
    )


def _convolutional(widths: Mapping[str, int], shape: tuple[int, ...], latent: int) -> Network:
    def layers() -> Iterable[nn.Module]:
        maps, side = shape[0], shape[1]
        for i, kernel in enumerate(KERNELS):
            width = widths[f"encoder.{2 * i}"]
            yield nn.Conv2d(maps, width, kernel, stride=2)
            yield nn.ReLU()
            maps, side = width, (side - kernel) // 2 + 1
        yield nn.Flatten()
        yield nn.Linear(maps * side * side, latent)

    return Network(*layers())
