"""From passed prompts to responses: every sample of every prompt becomes a row, also those that could not be made."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from guardloop.core.errors import GuardLoopError
from guardloop.core.records import CONVERSATION, Row
from guardloop.responses.engine import Reply, Request, Responder, sample_seed
from guardloop.responses.refusal import is_refusal
from guardloop.responses.settings import ResponderSettings

log = logging.getLogger("guardloop")
Progress = Callable[[int, int], None]
"""Called with the responses and the tokens generated so far."""
EARLY_ROWS = 400  # from this many rows on, too large a share of failures stops the run before its end
MAX_SILENT_SHARE = 0.5  # beyond, the responder or its settings are wrong, and what is left is no fair sample
KINDS = {
    "filtered": "withheld by the provider's filter",
    "prompt_filtered": "whose prompt the provider's filter refused",
    "thinking": "nothing but thoughts",
    "tool_call": "nothing but a call of a tool",
    "empty": "empty",
    "error": "not generated",
}
"""Responses without a text that a user would have seen, in words."""


def passed(row: Row) -> bool:
    """Whether the guard let this screened prompt through; one that it could not judge did not pass."""
    return not row["flagged"] and row["score"] is not None


def respond(
    rows: Iterable[Row],
    responder: Responder,
    settings: ResponderSettings,
    seed: int = 0,
    max_error_share: float = 0.05,
    *,
    progress: Progress = lambda responses, tokens: None,
    answered: int = 0,
) -> Iterator[Row]:
    """Responses (records.RESPONSE) to screened rows (records.SCREENED); those that did not pass are left out.

    `settings.samples` rows per prompt, in the order in which they are done. What says nothing to a user gets an empty
    response, and the kind of it as finish_reason. `answered` is the number of good responses of an earlier, broken run.
    Raises GuardLoopError when more than `max_error_share` of all responses are errors or, counted apart, empty; when
    more than half are nothing but thoughts or calls of tools; or when an id occurs twice. A provider's filter never
    ends a run: what it withheld is evidence.
    """
    waiting: dict[str, tuple[Row, int]] = {}  # by id: the screened row, and the samples still to come
    errors, kinds = Counter[str](), Counter[str]()
    asked = made = tokens = 0

    def requests() -> Iterator[Request]:
        nonlocal asked
        for row in rows:
            if not passed(row):
                continue
            id = row["id"]
            if id in waiting:
                raise GuardLoopError(
                    f"the id {id} occurs twice in the screened prompts", "give every prompt its own id"
                )
            waiting[id] = (row, settings.samples)
            for sample in range(settings.samples):
                asked += 1
                yield Request(id, row["prompt"], sample, sample_seed(seed, id, sample))

    def check(total: int) -> None:
        for kind, limit in limits.items():
            if kinds[kind] > limit * total:
                raise _too_many(kind, kinds[kind], total, errors, max_error_share)

    limits = {"error": max_error_share, "empty": max_error_share}
    limits |= {"thinking": MAX_SILENT_SHARE, "tool_call": MAX_SILENT_SHARE}
    for reply in responder.generate(requests()):
        row, left = waiting.pop(reply.id)
        if left > 1:
            waiting[reply.id] = (row, left - 1)
        kinds[reply.finish_reason] += 1
        if reply.finish_reason == "error":
            errors[reply.error or "unknown"] += 1
        if reply.finish_reason in limits and asked >= EARLY_ROWS:
            check(answered + asked)
        made, tokens = made + 1, tokens + reply.tokens
        progress(made, tokens)
        yield _response(row, reply, responder.name, settings.prefill)
    check(answered + made)
    for kind, words in KINDS.items():
        if kinds[kind]:
            reasons = f": {_reasons(errors)}" if kind == "error" else ""
            log.warning("%s: %d of %d responses %s%s", responder.name, kinds[kind], made, words, reasons)


def _response(row: Row, reply: Reply, name: str, prefill: str) -> Row:
    """The screened row as a response row: the verdict on the prompt becomes `prompt_score`."""
    return {
        **{column: row.get(column) for column in CONVERSATION.names},
        "prompt": _storable(row["prompt"]),
        "response": _storable(reply.text),
        "prompt_score": row["score"],
        "sample": reply.sample,
        "responder": name,
        "finish_reason": reply.finish_reason,
        "tokens": reply.tokens,
        "refusal": reply.refused or is_refusal(reply.text.removeprefix(prefill.strip())),  # as the text itself was
    }


def _storable(text: str) -> str:
    """`text` without halves of characters, which JSON can hold, and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _too_many(kind: str, count: int, total: int, errors: Counter[str], max_error_share: float) -> GuardLoopError:
    kept = "what was generated is kept, and a new run goes on from there"
    if kind == "error":
        return GuardLoopError(
            f"{count} of {total} responses could not be generated: {_reasons(errors)}",
            f"mend the cause, or raise max_error_share, which is {max_error_share:g}; {kept}",
        )
    remedies = {
        "empty": f"look at the endpoint's log, or raise max_error_share, which is {max_error_share:g}",
        "thinking": "raise the responder's max_new_tokens, or switch its thinking off with extra_body",
        "tool_call": "switch its tools off with extra_body, such as tool_choice: none",
    }
    return GuardLoopError(f"{count} of {total} responses are {KINDS[kind]}", f"{remedies[kind]}; {kept}")


def _reasons(errors: Counter[str]) -> str:
    return "; ".join(f"{reason} ({count})" for reason, count in errors.most_common(3))
