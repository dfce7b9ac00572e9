"""Settings of the data: where the traffic and the test set come from."""

from typing import Literal

from pydantic import Field, model_validator

from guardloop.core.settings import Section

COLUMNS = ("id", "prompt", "response", "label", "category", "source", "language", "jailbreak")


class SourceSettings(Section):
    """One table of prompts: the sample, a hub dataset, or a file."""

    kind: Literal["sample", "hub", "file"] = "sample"
    """`sample` ships with GuardLoop; `hub` is a Hugging Face dataset; `file` is JSONL, CSV or Parquet."""
    path: str = "traffic"
    """Part of the sample (traffic, test), hub id, or path or `s3://` URI of a .jsonl, .csv (also .gz) or .parquet."""
    config: str | None = None
    """Configuration of the hub dataset, such as toxicchat0124."""
    split: str = "train"
    """Split of the hub dataset."""
    revision: str | None = None
    """Commit of the hub dataset; pin it, so that a run can be repeated."""
    columns: dict[str, str] = {}
    """Our column -> the table's column, for id, prompt, response, label, category, source, language, jailbreak."""
    unsafe_labels: list[str] = ["unsafe", "1", "true", "toxic"]
    """Values of the label column (as text, any case) that mean unsafe; every other value means safe."""
    any_label: list[str] = []
    """Label columns of which any one with an unsafe value makes a row unsafe, in place of one label column."""
    where: dict[str, str] = {}
    """Keep only rows whose table column has this value (as text), such as human_annotation: "True"."""
    where_not: dict[str, str] = {}
    """Leave out rows whose table column has this value (as text), such as prompt: REDACTED."""
    limit: int | None = Field(default=None, ge=1)
    """Keep a seeded random sample of this many rows."""

    @model_validator(mode="after")
    def _known_columns(self) -> "SourceSettings":
        if unknown := set(self.columns) - set(COLUMNS):
            raise ValueError(f"columns maps unknown names {', '.join(sorted(unknown))}; known: {', '.join(COLUMNS)}")
        return self


class DatasetSettings(Section):
    """The traffic that the loop learns from, and the labelled test set that decides."""

    name: str = "guardloop-sample"
    """Name of the data set, for reports and the registry."""
    traffic: SourceSettings = SourceSettings(path="traffic")
    """Prompts as users send them. Labels, if there are any, are never trained on."""
    test: SourceSettings = SourceSettings(path="test")
    """Labelled prompts that no stage trains or tunes on."""
    response_test: SourceSettings | None = None
    """Labelled prompts with responses, added to the test set to check that responses are still judged well."""
    near_duplicate: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity of word 3-grams from which two prompts count as near-duplicates (1: exact only)."""
    max_overlap: float = Field(default=0.1, ge=0, le=1)
    """Share of test prompts (near-duplicates count once) that may also be in the traffic; they are removed from it.
    Above, the run is refused."""
    max_chars: int = Field(default=8000, ge=100)
    """Longer prompts are dropped and counted."""
    seed: int = 0
    """Seed of the sampling of rows."""
