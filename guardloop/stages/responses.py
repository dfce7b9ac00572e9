"""Responses to the prompts that passed."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from guardloop.core.progress import Stage
from guardloop.core.records import RESPONSE, Row, read_metadata, write_table
from guardloop.core.settings import read_list
from guardloop.responses.settings import ResponderSettings, distinct, without_prefill
from guardloop.stages.files import Sections


def generate_responses(
    screened: str | Path,
    responses: str | Path,
    responders: Sequence[Sections],
    seed: int = 0,
    max_error_share: float = 0.05,
    *,
    shard: int = 0,
) -> dict[str, float]:
    """Sample k responses of each responder to every prompt of a screened table that was not flagged.

    Killed and run again on the same table with the same settings, it goes on where it was.
    """
    from guardloop.responses.respond import KINDS
    from guardloop.responses.resume import answered

    settings = distinct(read_list(ResponderSettings, responders, "responders"))
    counts = {"responses": 0, "refusals": 0, "errors": 0, "tokens": 0}
    kinds = Counter[str]()
    metadata = read_metadata(screened)
    with Stage("generate_responses", shard if metadata.get("shards", 1) > 1 else None) as stage:
        if shard == 0 and (lost := without_prefill(settings)):
            stage.say(lost)

        def counted() -> Iterator[Row]:
            for row in answered(screened, settings, seed, max_error_share, stage):
                counts["responses"] += 1
                counts["refusals"] += row["refusal"]
                counts["errors"] += row["finish_reason"] == "error"
                counts["tokens"] += row["tokens"]
                kinds[row["finish_reason"]] += 1
                yield row

        everyone = [{"responder": one.tag, "revision": one.revision or ""} for one in settings]
        described = {"data": metadata.get("data", {}), "responders": everyone}
        write_table(
            counted(), RESPONSE, responses, lambda: {**described, **counts, "kinds": dict(sorted(kinds.items()))}
        )
        samples = sum(one.samples for one in settings)
        prompts = counts["responses"] // samples
        outcome = f"{samples} responses to each of {prompts} passed prompts, {counts['refusals']} refusals"
        outcome += "".join(f", {kinds[kind]} {words}" for kind, words in KINDS.items() if kinds[kind])
        stage.done(counts["responses"], outcome)
    silent = {kind: kinds[kind] for kind in KINDS if kind != "error" and kinds[kind]}
    return {k: float(v) for k, v in {**counts, **silent}.items()}
