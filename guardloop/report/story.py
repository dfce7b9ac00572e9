"""What the report shows besides the evaluation: how the run went, and what mining found."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict

Scalar = str | int | float | bool | None


class Story(BaseModel):
    """The base of every part of a story: a misspelt key is refused rather than left untold."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Source(Story):
    """A data set or model that a run used."""

    name: str
    revision: str = ""
    """The pinned commit, version or digest."""


class StageCounts(Story):
    """How much each stage of the loop let through; None where a stage did not run or did not count."""

    prompts: int | None = None
    """Prompts that the baseline screened."""
    flagged: int | None = None
    passed: int | None = None
    responses: int | None = None
    refusals: int | None = None
    blocked: int | None = None
    """Responses that the judge blocked."""
    positives: int | None = None
    hard_negatives: int | None = None
    replay: int | None = None


class RunStory(Story):
    """One run from data to decision. Everything is optional: the report leaves out what it is not told."""

    title: str = "Candidate against baseline"
    run_id: str = ""
    created: datetime | None = None
    configuration: str = ""
    """Name of the configuration that the run was started with."""
    dataset: Source | None = None
    guard: Source | None = None
    """The baseline, which is also the judge."""
    responders: list[Source] = []
    git_sha: str = ""
    data_hash: str = ""
    data_notes: list[str] = []
    """What became of labels, of contradictions and of an overlap, in sentences."""
    counts: StageCounts = StageCounts()
    training: dict[str, Scalar] = {}
    """Training figures, e.g. steps, seconds, final_loss."""


class MinedExample(Story):
    """One mined training example with its evidence."""

    prompt: str
    response: str | None = None
    """The most telling sampled response."""
    blocked: int | None = None
    """How many of the `k` sampled responses the judge blocked; None for replay."""
    k: int | None = None
    prior_score: float | None = None
    """The baseline's score on the prompt."""
    target: float | None = None
    """The P(unsafe) that the candidate is trained on."""
    kind: str
    reason: str = ""


class MiningSummary(Story):
    """What mining found in one round of traffic, and whether it is enough to train on."""

    enough: bool
    reason: str
    """Why it is or is not enough, in plain words."""
    screened: int = 0
    passed: int = 0
    responses: int = 0
    refusals: int = 0
    blocked: int = 0
    held_out: int = 0
    """Judged prompts kept out of the training set, to measure the candidate on."""
    counts: dict[str, int] = {}
    """Training examples by kind: positive, hard_negative, replay_..."""
    lexical_weight: float = 0.0
    """Share of each target that is lexical smoothing."""
    smoothing: str = ""
    """The same in words, with the reason where there is none."""
    examples: list[MinedExample] = []

    def stage_counts(self) -> StageCounts:
        """What each stage let through."""
        return StageCounts(
            prompts=self.screened,
            flagged=self.screened - self.passed,
            passed=self.passed,
            responses=self.responses,
            refusals=self.refusals,
            blocked=self.blocked,
            positives=self.counts.get("positive", 0),
            hard_negatives=self.counts.get("hard_negative", 0),
            replay=sum(n for kind, n in self.counts.items() if kind.startswith("replay")),
        )
