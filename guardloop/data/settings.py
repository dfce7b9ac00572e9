"""Settings of the data: where the traffic and the test set come from."""

from typing import Any, Literal

from pydantic import Field, field_validator

from guardloop.core.settings import Section

COLUMNS = ("id", "prompt", "response", "label", "category", "source", "language", "jailbreak")


class SourceSettings(Section):
    """One table of prompts: the sample, a hub dataset, or files."""

    kind: Literal["sample", "hub", "file"] = "sample"
    """`sample` ships with GuardLoop; `hub` is a Hugging Face dataset; `file` is JSON lines, a JSON array, CSV or
    Parquet."""
    path: str = "traffic"
    """Part of the sample (traffic, test), hub id, or the path or `s3://` URI of a file, of a folder of parts, or a
    glob: .jsonl, .json, .csv, .tsv (also with .gz, .bz2 or .zst) or .parquet."""
    config: str | None = None
    """Configuration of the hub dataset, such as toxicchat0124."""
    split: str = "train"
    """Split of the hub dataset."""
    revision: str | None = None
    """Commit of the hub dataset; pin it, so that a run can be repeated."""
    columns: dict[str, str | list[str]] = {}
    """Our column -> the table's column, for id, prompt, response, label, category, source, language, jailbreak. For
    nested fields, a JMESPath expression: messages[0].content. For label, it may be a list of columns, of which any
    unsafe one decides."""
    unsafe_labels: list[str] = ["unsafe", "1", "true", "toxic", "harmful"]
    """Values of the label column (as text, any case) that mean unsafe."""
    safe_labels: list[str] = ["safe", "0", "false", "nontoxic", "non-toxic", "harmless", "unharmful", "benign"]
    """Values that mean safe, unless unsafe_labels has them. Any third value is refused in labelled sets."""
    unlabelled: Literal["refuse", "drop"] = "refuse"
    """What becomes of rows of a labelled set without a label: empty, null, NaN, n/a."""
    where: dict[str, str | dict[Literal["not"], str]] = {}
    """Keep only rows whose table column has this value (as text), such as human_annotation: "True", or has it not:
    prompt: {not: REDACTED}."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """Between the fields of a CSV file; by default it is found from the header."""
    limit: int | None = Field(default=None, ge=1)
    """Keep a seeded random sample of this many rows."""

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
        if unknown := set(columns) - set(COLUMNS):
            raise ValueError(f"columns maps unknown names {', '.join(sorted(unknown))}; known: {', '.join(COLUMNS)}")
        if lists := [ours for ours, theirs in columns.items() if isinstance(theirs, list) and ours != "label"]:
            raise ValueError(f"{lists[0]} must be one column; only label may be a list of columns")
        return columns

    @field_validator("where")
    @classmethod
    def _not_empty(cls, where: dict[str, Any]) -> dict[str, Any]:
        if empty := [column for column, value in where.items() if value == {}]:
            raise ValueError(f"{empty[0]} is empty; write a value, or {{not: VALUE}}")
        return where

    @property
    def name(self) -> str:
        """What reports and the registry call the data: the sample's or hub data set's name, or the file's."""
        if self.kind == "sample":
            return "guardloop-sample"
        return self.path if self.kind == "hub" else self.path.rstrip("/").rpartition("/")[2].partition(".")[0]


class DatasetSettings(Section):
    """The traffic that the loop learns from, and the labelled test set that decides."""

    traffic: SourceSettings = SourceSettings(path="traffic")
    """Prompts as users send them. Labels, if there are any, are never trained on."""
    test: SourceSettings = SourceSettings(path="test")
    """Labelled prompts that no stage trains or tunes on."""
    response_test: SourceSettings | None = None
    """Labelled prompts with responses, added to the test set to check that responses are still judged well."""
    contradictions: Literal["majority", "any", "refuse"] = "majority"
    """What becomes of the same text with different labels, as of several annotators. majority: the label of most rows;
    ties are dropped from a test set, and named. any: unsafe where any row says so. refuse: the run ends."""
    max_overlap: float = Field(default=0.1, ge=0, le=1)
    """Share of test prompts (near-duplicates count once) that are in the traffic too, above which the run warns. They
    are always removed from the traffic."""
