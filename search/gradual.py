"""Prune an agent step by step while it trains, not at once before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agents.agent import UNTRACKED, Agent, Progress, Shrinkable, Tracker, calibration_program
from agents.shrinking import narrowed
from components import DependencyGraph, importance
from components.calibration import Program, Recording, record
from components.choosing import Ranking, choose, competitors, kept_count
from components.dependency import Keep, Scores
from components.gram import Grams
from components.mixing import normalise_together, weighted_metrics
from components.plan import PruningPlan
from components.pruning import kept_indices, restricted, slice_state
from components.reconstruction import Method, reconstruct
from components.tracker import ImportanceTracker
from search.base import CALIBRATION_ROWS
from search.stages import Stages
from search.trial_types import GradualSettings

TRACKED_STEPS = 4
"""How many updates between two prunings are tracked, where there are so many."""

LEAST_TRACKED = 2
"""So many tracked updates a score needs that is read off them: `bayesian` a variance, which takes two."""

DECAY = 0.9
"""Of the tracker's averages, per tracked update: shorter than a base's, because a shrinking model changes."""

NEVER = 10**9
"""Steps between two snapshots of the course, which nobody looks at here."""


class GradualPruning:
    """Takes channels from an agent while that is trained or fine-tuned; called as its `progress`.

    At every step of the schedule the channels are scored anew, each metric smoothed with what it said before,
    the lowest are cut from the model and all that mirrors it, and what read them is refitted if wanted. At
    the end every group is as wide as the plan says. What is due before there are scores at all, because too
    few updates were made, waits for them.

    Args:
        agent: dense; shrinks.
        graph: of its model.
        plan: what is left at the end, and how scores are mixed.
        settings: the schedule, and what happens at its steps.
        ranking: as in `components.choose`.
        reconstruction: how what read a channel is refitted; `none` where `settings` say so.
        seed: of calibration data, and of scores that are random.
        stages: gets the time.
        updates_per_step: gradient updates to a step of the schedule.
        scores: to begin with, by metric; None where there are none yet.

    Attributes:
        agent: as given.
        kept: group -> indices of the dense channels that are left, ascending.
        tracker: to be told of the updates; of the agent's present model.
    """

    def __init__(
        self,
        agent: Agent,
        graph: DependencyGraph,
        plan: PruningPlan,
        settings: GradualSettings,
        *,
        ranking: Ranking,
        reconstruction: Method,
        seed: int,
        stages: Stages,
        updates_per_step: float = 1.0,
        scores: Mapping[str, Scores] | None = None,
    ) -> None:
        if not isinstance(agent, Shrinkable):
            raise TypeError(
                f"{type(agent).__name__} cannot lose channels while it trains: it is not Shrinkable"
            )
        self.agent: Agent = agent
        self._shrink = agent.shrink
        self.kept = {name: torch.arange(size) for name, size in graph.widths.items()}
        self._dense_widths = graph.widths
        self._graph = graph
        self._plan = plan
        self._schedule, self._smoothing = settings.schedule, settings.smoothing
        self._ranking = ranking
        self._reconstruction: Method = reconstruction if settings.reconstruction else "none"
        self._seed = seed
        self._stages = stages
        self._metrics = weighted_metrics(plan, graph.groups)
        self._scores = {metric: dict(scores[metric]) for metric in self._metrics} if scores else {}
        self._reached = 0.0
        self._tracker: ImportanceTracker | None = None
        if any(importance.METRICS[metric].needs == "statistics" for metric in self._metrics):
            every = max(1, int(self._schedule.interval * updates_per_step) // TRACKED_STEPS)
            self._tracker = ImportanceTracker(graph, agent.model, decay=DECAY, every=every, interval=NEVER)

    @property
    def tracker(self) -> Tracker:
        """What the agent tells of its updates; nobody, where no metric asks for that."""
        return self._tracker or UNTRACKED

    @property
    def finished(self) -> bool:
        """Whether all is gone that the plan removes."""
        return self._reached == 1.0

    def require_finished(self) -> None:
        """Raise where the training was over before everything was pruned.

        Raises:
            RuntimeError: the agent did not tell its progress up to the end of the schedule.
        """
        if not self.finished:
            raise RuntimeError(
                f"the training ended before the schedule did, at {self._schedule.end} steps: it makes fewer "
                f"than {LEAST_TRACKED} updates, or {type(self.agent).__name__} tells too little of its "
                "progress"
            )

    def during(self, progress: Progress) -> Progress:
        """A progress that prunes whenever that is due, and then tells another."""

        def prune_and_tell(done: int, total: int, note: str) -> None:
            self.prune(done)
            progress(done, total, note)

        return prune_and_tell

    def prune(self, done: int) -> None:
        """Remove what has to be gone after so many steps of the training."""
        due = self._schedule.share(done)
        if due <= self._reached:
            return
        counts = {
            name: kept_count(size, self._plan.ratios.get(name, 0.0) * due, self._ranking.round_to)
            for name, size in self._dense_widths.items()
        }
        if sum(counts.values()) < sum(self._graph.widths.values()):
            if not self._ready:
                return
            stage = self._stages.current
            self._stages.enter("score")
            seen = self._recorded()
            self._score(None if seen is None else seen.recording.grams)
            self._stages.enter("mix")
            least = {name: self._ranking.least(size) for name, size in self._dense_widths.items()}
            keep = choose(self._graph, self._scores, self._plan, self._ranking, counts, least)
            self._cut(keep, seen)
            self._stages.enter(stage)
        self._reached = due

    @property
    def _ready(self) -> bool:
        """Whether there is something to score by."""
        return self._tracker is None or self._seen_enough or bool(self._scores)

    @property
    def _seen_enough(self) -> bool:
        return self._tracker is not None and self._tracker.steps >= LEAST_TRACKED

    def _recorded(self) -> _Seen | None:
        """What the present model makes of calibration data, for scores and repair; None if neither asks."""
        asked = any(importance.METRICS[metric].needs == "grams" for metric in self._metrics)
        if not asked and self._reconstruction == "none":
            return None
        calls = calibration_program(self.agent)
        inputs = self.agent.calibration_inputs(CALIBRATION_ROWS, self._seed)

        def program(model: nn.Module) -> Mapping[str, Tensor]:
            return calls(model, inputs)

        with_grams = asked or self._reconstruction == "gram"
        return _Seen(program, record(self._graph, self.agent.model, program, with_grams=with_grams))

    def _score(self, grams: Grams | None) -> None:
        """Score the present channels, and smooth that with what was said of them before."""
        agent = self.agent
        statistics = self._tracker.statistics() if self._tracker is not None and self._seen_enough else None
        state = {name: tensor.detach() for name, tensor in agent.model.state_dict().items()}
        for metric in self._metrics:
            if importance.METRICS[metric].needs == "statistics" and statistics is None:
                continue  # what was said before stays
            fresh = importance.score(
                metric, self._graph, state=state, statistics=statistics, grams=grams, seed=self._seed
            )
            before = self._scores.get(metric)
            self._scores[metric] = fresh if before is None else self._smoothed(before, fresh)

    def _smoothed(self, before: Scores, fresh: Scores) -> Scores:
        """Both brought to one scale, over all channels that compete with one another, and averaged."""
        smoothed: dict[str, Tensor] = {}
        for groups in competitors(self._graph.groups, self._ranking):
            old, new = (
                normalise_together([scores[group.name].cpu() for group in groups])
                for scores in (before, fresh)
            )
            for group, was, now in zip(groups, old, new, strict=True):
                smoothed[group.name] = torch.lerp(now, was, self._smoothing)
        return smoothed

    def _cut(self, keep: Keep, seen: _Seen | None) -> None:
        """Cut the agent, the tracker and the scores, and refit what read the channels that are gone."""
        agent, graph = self.agent, self._graph
        self._stages.enter("slice")
        indices = kept_indices(graph, keep)
        states = {section: slice_state(graph, state, indices) for section, state in agent.states().items()}
        kept = {name: mask.cpu().nonzero().flatten() for name, mask in keep.items()}
        device = next(agent.model.parameters()).device
        if self._reconstruction != "none" and seen is not None:
            self._stages.enter("reconstruct")
            narrower = type(agent)(agent.options, narrowed(agent.widths, kept), agent.data(), str(device))
            narrower.load_states({"model": states["model"]})
            states["model"] = reconstruct(
                graph,
                agent.model.state_dict(),
                narrower.model,
                keep,
                method=self._reconstruction,
                grams=seen.recording.grams if self._reconstruction == "gram" else None,
                recording=seen.recording if self._reconstruction == "sequential" else None,
                program=seen.program,
            )
            self._stages.enter("slice")
        self._shrink({name: channels.to(device) for name, channels in kept.items()}, states)
        self._graph = restricted(graph, keep)
        if self._tracker is not None:
            self._tracker.shrink(self._graph, agent.model, keep)
        self.kept = {name: self.kept[name][channels] for name, channels in kept.items()}
        self._scores = {
            metric: {group: scores[kept[group].to(scores.device)] for group, scores in by_group.items()}
            for metric, by_group in self._scores.items()
        }


@dataclass(frozen=True)
class _Seen:
    """A call program on calibration data, and what the present model made of it."""

    program: Program
    recording: Recording
