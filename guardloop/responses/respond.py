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
EARLY_ROWS = 400  # from this many rows on, too large a share of errors stops the run before its end


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

    `settings.samples` rows per prompt, in the order in which they are done. What cannot be answered gets an empty
    response with finish_reason error. `answered` is the number of good responses of an earlier, broken run. Raises
    GuardLoopError when more than `max_error_share` of all responses are errors, or an id occurs twice.
    """
    waiting: dict[str, tuple[Row, int]] = {}  # by id: the screened row, and the samples still to come
    errors: Counter[str] = Counter()
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
        if errors.total() > max_error_share * (answered + total):
            raise _too_many(errors, answered + total, max_error_share)

    for reply in responder.generate(requests()):
        row, left = waiting.pop(reply.id)
        if left > 1:
            waiting[reply.id] = (row, left - 1)
        if reply.finish_reason == "error":
            errors[reply.error or "unknown"] += 1
            if asked >= EARLY_ROWS:
                check(asked)
        made, tokens = made + 1, tokens + reply.tokens
        progress(made, tokens)
        yield _response(row, reply, responder.name, settings.prefill)
    check(made)
    if errors:
        log.warning("%d of %d responses could not be generated: %s", errors.total(), made, _reasons(errors))


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
        "refusal": is_refusal(reply.text.removeprefix(prefill.strip())),  # as the text itself was,
    }


def _storable(text: str) -> str:
    """`text` without halves of characters, which JSON can hold, and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _too_many(errors: Counter[str], total: int, max_error_share: float) -> GuardLoopError:
    return GuardLoopError(
        f"{errors.total()} of {total} responses could not be generated: {_reasons(errors)}",
        f"mend the cause, or raise max_error_share, which is {max_error_share:g}; "
        "what was generated is kept, and a new run goes on from there",
    )


def _reasons(errors: Counter[str]) -> str:
    return "; ".join(f"{reason} ({count})" for reason, count in errors.most_common(3))
