"""The pages that people decide from: the evaluation report, its short summary, and the page of what mining found.

`render` makes the pages, `markdown` the summary, from an evaluation and a story (`story`).
"""
