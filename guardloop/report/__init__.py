"""The pages that people decide from: the evaluation report, its short summary, and the harvest page."""

from guardloop.report.render import render_harvest, render_html, render_markdown
from guardloop.report.story import ChannelStory, HarvestExample, HarvestStory, RunStory, Source, StageCounts

__all__ = [
    "ChannelStory",
    "HarvestExample",
    "HarvestStory",
    "RunStory",
    "Source",
    "StageCounts",
    "render_harvest",
    "render_html",
    "render_markdown",
]
