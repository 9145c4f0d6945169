"""A dashboard in Weights & Biases: a saved view of a project that begins with the front of one search.

It is made with `wandb-workspaces`, an optional dependency, in a process of its own: `search.wandb_runs`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section


@dataclass(frozen=True)
class DashboardContent:
    """What a dashboard shows.

    Attributes:
        experiment: the group of the runs, and the dashboard's name.
        search_run: id of the search's run.
        project: W&B project.
        entity: user or team; None is the account's default.
        objectives: names of the measurements that the search minimizes or maximizes.
        choices: names of what a trial chose, as its run's configuration has them: `ratio/latent`.
        address: of the dashboard that was made before; it is made anew in its place.
    """

    experiment: str
    search_run: str
    project: str
    entity: str | None
    objectives: Sequence[str]
    choices: Sequence[str]
    address: str | None = None


def save_dashboard(content: DashboardContent) -> str:
    """Make the dashboard and return its address.

    Raises:
        ImportError: wandb-workspaces is not installed.
        LookupError: the search has no run in the project.
        Exception: whatever wandb raises where the server does not do what it is asked.
    """
    import wandb
    import wandb_workspaces.workspaces as ws

    api = wandb.Api()
    entity = content.entity or os.environ.get("WANDB_ENTITY") or api.default_entity
    place = f"{entity}/{content.project}"
    try:
        api.run(f"{place}/{content.search_run}")
    except wandb.errors.CommError as error:
        if "Could not find run" not in str(error):  # these words alone tell it apart
            raise
        raise LookupError(f"{place} has no run {content.search_run}") from error
    workspace = None
    if content.address is not None:
        with suppress(Exception):  # deleted, or of another account: there will be a new one
            workspace = ws.Workspace.from_url(content.address)
    if workspace is None or (workspace.entity, workspace.project) != (entity, content.project):
        workspace = ws.Workspace(entity=str(entity), project=content.project)
    workspace.name = content.experiment
    workspace.sections = _sections(content)
    workspace.runset_settings = ws.RunsetSettings(filters=f"Metric('Group') == {content.experiment!r}")
    workspace.save()
    return str(workspace.url)


def _sections(content: DashboardContent) -> list[Section]:
    """The front first, then how the search went, what mattered, the trials, and the report."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces.workspaces import Section, SectionLayoutSettings

    def media(title: str, key: str) -> Any:
        return wr.MediaBrowser(title=title, media_keys=[key], num_columns=1)

    def over_trials(title: str, *names: str) -> Any:
        return wr.LinePlot(title=title, x="finished", y=list(names), title_x="trials finished")

    def along_fine_tuning(title: str, name: str) -> Any:
        return wr.LinePlot(title=title, x="fine_tune/updates", y=[f"fine_tune/{name}"])

    def column(name: str) -> Any:
        return wr.ParallelCoordinatesPlotColumn(metric=wr.Config(name), display_name=name)

    measured = [
        wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(name), display_name=name)
        for name in dict.fromkeys([*content.objectives, "size_ratio", "retention"])
    ]
    wide, pair = SectionLayoutSettings(columns=1, rows=1), SectionLayoutSettings(columns=2, rows=1)
    return [
        Section(
            name="Front",
            panels=[
                media("Retention against size", "front_plot"),
                wr.WeavePanelSummaryTable(table_name="live_front"),
            ],
            layout_settings=pair,
            is_open=True,
            pinned=True,
        ),
        Section(
            name="Search",
            panels=[
                over_trials("Hypervolume of the front", "hypervolume"),
                over_trials("Trials on the front", "front_size"),
                over_trials("Failed and stopped trials", "failed", "stopped"),
                over_trials("Trials per minute", "trials_per_minute"),
            ],
            is_open=True,
        ),
        Section(
            name="What matters",
            panels=[
                media("What matters", "matters_plot"),
                media("Importance of groups over training", "importance_plot"),
                media("Ranks of groups over training", "ranks_plot"),
                wr.ParallelCoordinatesPlot(
                    title="Choices and measurements",
                    columns=[*map(column, content.choices), *measured],
                ),
                wr.ParameterImportancePlot(with_respect_to="retention"),
            ],
            layout_settings=pair,
            is_open=True,
        ),
        Section(
            name="Trials",
            panels=[
                wr.ScatterPlot(
                    title="Retention against size",
                    x=wr.SummaryMetric("size_ratio"),
                    y=wr.SummaryMetric("retention"),
                    log_x=True,
                ),
                along_fine_tuning("Loss at the rungs of fine-tuning", "rung_loss"),
                along_fine_tuning("Performance along fine-tuning", "performance"),
            ],
        ),
        Section(name="Report", panels=[media("Report", "report")], layout_settings=wide),
    ]
