"""From judged responses to a training set.

`mine` is the whole of it: evidence (what the judge said of each prompt's responses), targets (P(unsafe) by votes,
smoothed over prompts that read alike), examples (prompts by kind, and replay of what the baseline says).
"""
