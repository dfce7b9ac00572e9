"""The pages that people decide from: the evaluation report, its short summary, and the mining page."""

from guardloop.report.render import render_html, render_markdown, render_mining
from guardloop.report.story import MinedExample, MiningSummary, RunStory, Source, StageCounts

__all__ = [
    "MinedExample",
    "MiningSummary",
    "RunStory",
    "Source",
    "StageCounts",
    "render_html",
    "render_markdown",
    "render_mining",
]
