"""What the optimiser `gradient` found: the points of its sweep, in a file and as proposals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.durable_files import CorruptFileError, read_json, write_json
from search.optimisers import coarse_to_fine
from search.space import Params, SearchSpace


@dataclass(frozen=True)
class SweepPoint:
    """What the sweep found at one λ.

    Attributes:
        weight: λ.
        params: the point of the search space.
        losses: the soft loss, task loss + λ * expected size, at every step, while the masks are annealed.
        before, after: the soft loss with annealed masks, of what this λ started from and of what it found.
        task_loss: promised: the task loss with annealed masks.
        size: promised: the expected share of the base's parameters.
    """

    weight: float
    params: Params
    losses: tuple[float, ...]
    before: float
    after: float
    task_loss: float
    size: float

    def to_record(self) -> dict[str, Any]:
        """The JSON-able form, exact."""
        return {**vars(self), "losses": list(self.losses)}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> SweepPoint:
        """The inverse of `to_record`.

        Raises:
            KeyError, TypeError: the record was not made by it.
        """
        return SweepPoint(**{**record, "losses": tuple(record["losses"])})


class GradientSweep:
    """The points of a sweep as proposals, the ends and the middle of the front first.

    A point that decides what an anchor or one before it does is proposed for no trial.

    Args:
        points: in the order of λ.
        space: that they are points of.
        first: number of the first trial that is no anchor.
    """

    origin = "gradient"

    def __init__(self, points: Sequence[SweepPoint], space: SearchSpace, first: int) -> None:
        self._points = tuple(points)
        self._order: list[int] = []
        self._first = first
        decided = {space.decision_at(anchor.params) for anchor in space.anchors()[:first]}
        for index in coarse_to_fine(len(points)):
            decision = space.decision_at(points[index].params)
            if decision not in decided:
                decided.add(decision)
                self._order.append(index)

    def propose(self, number: int) -> Params | None:
        """A point of the sweep; None for anchors, and once all its points have been proposed."""
        point = self.point(number)
        return None if point is None else dict(point.params)

    def point(self, number: int) -> SweepPoint | None:
        """What trial `number` is the trial of."""
        index = number - self._first
        return self._points[self._order[index]] if 0 <= index < len(self._order) else None

    def write(self, path: Path) -> None:
        """Keep the points in the order of λ, each with the trial it is proposed for, or null; atomically."""
        trials = {index: self._first + place for place, index in enumerate(self._order)}
        records = [
            {"trial": trials.get(index), **point.to_record()} for index, point in enumerate(self._points)
        ]
        write_json(path, {"points": records})


def read_sweep(path: Path) -> list[SweepPoint] | None:
    """What `GradientSweep.write` kept; None where nothing whole is there: it is then made again."""
    try:
        records = read_json(path)["points"]
        return [
            SweepPoint.from_record({key: value for key, value in record.items() if key != "trial"})
            for record in records
        ]
    except (CorruptFileError, KeyError, TypeError, AttributeError):
        return None
