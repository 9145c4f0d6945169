"""The optimiser `gradient`: mixing coefficients and thresholds by gradient descent, one front at a time.

Channels are weighted by soft masks (`components.soft_masks`), and Adam lowers the task loss of the masked
model plus λ times its expected size in what the scores are mixed by (a softmax of free numbers for every
searched mixture) and in the threshold of every group (moved through the share of its channels that lie above
it, so that groups that share their ratio share that). λ is swept from one that leaves the model almost whole
to one that leaves the least, each starting where the one before has ended; at each the masks are annealed
until they are practically 0 or 1. What a trial then keeps is exactly the channels whose masks are above 1/2.

arXiv 2507.14882 finds its soft coefficients by grid search or gradient descent; only its abstract was
available, so this is the project's own definition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from agents.agent import Agent, Progress, task_loss, unwatched
from components.choosing import choose
from components.errors import UserError
from components.mixing import normalise
from components.plan import PruningPlan, mixture_of
from components.pruning import prune
from components.soft_masks import SoftModel, soft_mask
from search.gradient_sweep import SweepPoint
from search.prepared_base import PreparedBase
from search.space import Params, SearchSpace

ROWS = 512
"""Rows of calibration inputs that the task loss is measured on."""

POINTS = 128
"""The most values of λ: beyond so many trials, the others are quasi-random."""

FIRST_STEPS = 40
"""Steps at the first λ, which begin with everything kept and all metrics mixed equally."""

STEPS, FEWEST_STEPS = 400, 8
"""Steps at all others together, and at each at least: enough to get from everything to the least."""

RATES = {"shares": 0.06, "coefficients": 0.1}
"""Adam's, of the logarithms of kept shares and of the coefficients'."""

WIDE, NARROW = 0.1, 0.02
"""Width of the masks at the start of an annealing, as a share of a group, and at its end, in channels."""

LEAST_WEIGHT, MOST_WEIGHT = 0.02, 0.5
"""Of the loss of the smallest model, what the size of the base counts at the first λ, and what the smallest
size does at the last."""


class SoftAgent:
    """A base with soft masks on its channels, and the numbers that they follow from.

    Args:
        dense: the base; its model is not changed.
        space: what is searched.

    Attributes:
        log_shares: `(kept shares of the space,)`, natural logarithms.
        logits: `(searched mixtures, metrics)`, whose softmax are the coefficients.
    """

    def __init__(self, dense: PreparedBase, space: SearchSpace) -> None:
        self._dense = dense
        self._space = space
        self.model = SoftModel(dense.graph, dense.agent.model)
        self._inputs = {name: rows[:ROWS] for name, rows in dense.calibration.items()}
        self._keeps = list(dict.fromkeys(space.keeps.values()))
        mixtures = space.mixtures
        self.log_shares = torch.zeros(len(self._keeps), dtype=torch.float64, requires_grad=True)
        self.logits = torch.zeros(
            len(mixtures.searched), len(space.metrics), dtype=torch.float64, requires_grad=True
        )
        self._normalised = {
            group.name: torch.stack([normalise(dense.scores[m][group.name].cpu()) for m in space.metrics])
            for group in dense.graph.groups
        }  # (metrics, channels)
        self._keys = {
            group.name: mixture_of(group, mixtures.keys) if mixtures.are_separate else mixtures.keys[0]
            for group in dense.graph.groups
        }
        with torch.no_grad():
            outputs = dense.agent.program(dense.agent.model, self._inputs)
        self._targets = {name: outputs[name] for name in external(dense.agent, outputs)}

    def masks(self, sharpness: float) -> dict[str, Tensor]:
        """The masks of all groups at a sharpness in [0, 1]: 0 before annealing, 1 after it."""
        shares = dict(zip(self._keeps, self.log_shares.exp(), strict=True))
        weights = self._weights()
        found = {}
        for group, dimension in self._space.keeps.items():
            scores = weights[self._keys[group] or ""] @ self._normalised[group]
            size = self._space.sizes[group]
            wide = max(1.0, WIDE * size)
            found[group] = soft_mask(scores, shares[dimension], wide * (NARROW / wide) ** sharpness)
        whole = {name: torch.ones(size, dtype=torch.float64) for name, size in self._space.sizes.items()}
        return {**whole, **found}

    def loss(self, masks: Mapping[str, Tensor]) -> Tensor:
        """The task loss of the masked model; lower is better.

        The agent's own, or how far all external outputs are from the base's: for each the squared error over
        the variance, added up.
        """
        agent, inputs = self._dense.agent, self._inputs
        outputs = self.model.outputs(masks, lambda model: agent.program(model, inputs))
        own = task_loss(agent, outputs, inputs)
        if own is not None:
            return own
        errors = [
            (outputs[name] - target).square().mean() / target.var(correction=0).clamp(min=1e-12)
            for name, target in self._targets.items()
        ]
        return torch.stack(errors).sum()

    def params(self) -> Params:
        """The point of the space that the present numbers mean."""
        shares = zip(self._keeps, self.log_shares.exp().tolist(), strict=True)
        low = 1.0 - self._space.max_ratio
        params = {name: min(max(share, low), 1.0) for name, share in shares} | self._space.own_options()
        for key, logits in zip(self._space.mixtures.searched, self.logits.detach(), strict=True):
            params |= self._space.coordinates(key, torch.softmax(logits, 0).tolist())
        return params

    def load(self, params: Params) -> None:
        """Take the numbers of a point of the space."""
        with torch.no_grad():
            self.log_shares.copy_(torch.tensor([math.log(params[name]) for name in self._keeps]))
            weights = self._space.mixtures.weights(self._space.to_plan(params))
            for row, key in zip(self.logits, self._space.mixtures.searched, strict=True):
                row.copy_(torch.tensor(weights[key], dtype=torch.float64).clamp(min=1e-300).log())

    def clip(self) -> None:
        """Bring the kept shares back between the smallest and 1."""
        with torch.no_grad():
            self.log_shares.clamp_(math.log(1.0 - self._space.max_ratio), 0.0)

    def require_exact(self, plan: PruningPlan) -> None:
        """Refuse an agent whose masked model is not what the sliced one is.

        Raises:
            UserError: it has an operator across channels that soft masks do not reach.
        """
        dense = self._dense
        keep = choose(dense.graph, dense.scores, plan)
        small = dense.build({group: int(mask.sum()) for group, mask in keep.items()})
        small.model.load_state_dict(prune(dense.graph, dense.states["model"], keep))
        few = {name: rows[:8] for name, rows in self._inputs.items()}
        masks = {group: mask.double() for group, mask in keep.items()}
        with torch.no_grad():
            expected = small.program(small.model, few)
        soft = {group: mask.requires_grad_() for group, mask in masks.items()}
        found = self.model.outputs(soft, lambda model: dense.agent.program(model, few))
        if not any(found[name].requires_grad for name in self._targets):
            raise UserError(
                f"search.sampler 'gradient' cannot follow {dense.base.kind}: its program keeps no gradients"
            )
        for name in self._targets:
            scale = float(expected[name].abs().max()) + 1e-12
            if not float((found[name].detach() - expected[name]).abs().max()) <= 1e-3 * scale:
                raise UserError(
                    f"search.sampler 'gradient' cannot follow {dense.base.kind}: output {name!r} of the "
                    "masked model is not that of the sliced one, because something besides layers, layer and "
                    "group normalisation works across channels there: choose another sampler"
                )

    def _weights(self) -> dict[str, Tensor]:
        """Key -> the coefficients of a mixture, `(metrics,)`, all of them."""
        mixtures = self._space.mixtures
        rows = dict(zip(mixtures.searched, torch.softmax(self.logits, 1), strict=True))
        equal = torch.full((len(self._space.metrics),), 1 / len(self._space.metrics), dtype=torch.float64)
        given = {
            key: torch.tensor(list(weights.values()), dtype=torch.float64)
            for key, weights in mixtures.given.items()
        }
        return {key: {**given, **rows}.get(key, equal) for key in mixtures.keys}


def sweep(
    dense: PreparedBase,
    space: SearchSpace,
    count: int,
    progress: Progress = unwatched,
) -> list[SweepPoint]:
    """Trace the front of the soft model.

    Deterministic: nothing in it is random.

    Args:
        dense: the trained base.
        space: what is searched.
        count: how many points.
        progress: is told how many steps are done.

    Raises:
        UserError: soft masks cannot follow the agent's model.
    """
    if count < 1:
        return []
    soft = SoftAgent(dense, space)
    soft.require_exact(space.to_plan(space.anchors()[-1].params))
    optimizer = torch.optim.Adam(
        [
            {"params": [soft.log_shares], "lr": RATES["shares"]},
            {"params": [soft.logits], "lr": RATES["coefficients"]},
        ],
        betas=(0.9, 0.95),
    )
    done, total = 0, sweep_steps(count)
    points: list[SweepPoint] = []
    for place, weight in enumerate(_weights_of(soft, space, count)):
        before = sum(_measured(soft, weight))
        losses = []
        steps = _steps_at(count) if place else FIRST_STEPS
        for step in range(steps):
            optimizer.zero_grad()
            masks = soft.masks(sharpness=step / max(steps - 1, 1))
            loss = soft.loss(masks) + weight * soft.model.expected_size(masks)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise UserError(
                    f"search.sampler 'gradient' has come to a soft loss of {losses[-1]}: choose "
                    "another sampler"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            soft.clip()
            done += 1
            progress(done, total, f"λ {weight:.3g}, soft loss {losses[-1]:.4g}")
        task, size = _measured(soft, weight)
        points.append(
            SweepPoint(weight, soft.params(), tuple(losses), before, task + size, task, size / weight)
        )
    return points


def sweep_steps(count: int) -> int:
    """How many steps of descent so many points take."""
    return FIRST_STEPS + _steps_at(count) * (count - 1) if count else 0


def _steps_at(count: int) -> int:
    """How many steps each λ but the first takes, where there are so many."""
    return max(FEWEST_STEPS, math.ceil(STEPS / count))


def sweep_points(trials: int) -> int:
    """How many points the sweep of a budget has."""
    return max(0, min(trials, POINTS))


def _weights_of(soft: SoftAgent, space: SearchSpace, count: int) -> list[float]:
    """Values of λ, log-spaced: from one at which the size of the base counts little beside what the smallest
    model loses, to one at which even the size that is left then does."""
    with torch.no_grad():
        soft.log_shares.fill_(math.log(1.0 - space.max_ratio))
        loss, size = _measured(soft, 1.0)
        soft.log_shares.zero_()
    loss = max(loss, 1e-6)
    low, high = LEAST_WEIGHT * loss, MOST_WEIGHT * loss / size
    return [low * (high / low) ** (place / max(count - 1, 1)) for place in range(count)]


def _measured(soft: SoftAgent, weight: float) -> tuple[float, float]:
    """The task loss and λ times the expected size, with annealed masks."""
    with torch.no_grad():
        masks = soft.masks(sharpness=1.0)
        return float(soft.loss(masks)), weight * float(soft.model.expected_size(masks))


def external(agent: Agent, outputs: Mapping[str, Tensor]) -> list[str]:
    """The outputs of an agent's program that no tie names."""
    internal = {name for pair in agent.ties for name in pair}
    return [name for name in outputs if name not in internal]
