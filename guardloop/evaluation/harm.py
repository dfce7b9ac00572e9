"""Checks of the gate: is what worked before still as good, everywhere?"""

from collections.abc import Sequence

from scipy.stats import norm

from guardloop.evaluation.bootstrap import TAIL
from guardloop.evaluation.measurements import Measurements
from guardloop.evaluation.noninferiority import JudgedSlice, judge_slices, min_error, standard_error
from guardloop.evaluation.power import more_rows, sentence
from guardloop.evaluation.result import Estimate, GateCheck, Outcome, SliceResult, worst
from guardloop.evaluation.settings import GateSettings
from guardloop.evaluation.slices import MIN_ROWS
from guardloop.evaluation.wording import changed

MAX_NAMED = 5
"""Slices that an explanation names besides the worst."""


def harm_checks(measured: Measurements, gate: GateSettings) -> list[GateCheck]:
    """Whether false positives, every slice and the judging of responses stay within their limits."""
    ranked = bool(measured.responses) and measured.responses[0].result.metric == "auprc"  # else one class is missing
    family = [(part, gate.max_slice_loss) for part in (*measured.slices, *measured.responses)]
    if ranked:
        family[len(measured.slices)] = (measured.responses[0], gate.max_response_loss)
    judged = judge_slices(family)
    responses = [part for part in judged if part.of_responses]
    checks = [
        _fpr_check(measured, gate.max_fpr_rise),
        _slices_check([part for part in judged if not part.of_responses], gate.max_slice_loss),
    ]
    harmed = worst(part.outcome for part in responses) != "passed"
    if responses and (ranked or harmed or not gate.require_response_test):
        checks.append(_responses_check(responses))
    elif gate.require_response_test:
        checks.append(_responses_missing(measured.response_rows, gate.max_response_loss))
    return checks


def _fpr_check(measured: Measurements, limit: float) -> GateCheck:
    rise = measured.metrics["fpr"].change
    low, high = rise.ends
    z = float(norm.isf(TAIL))
    highest = max(high, rise.value + z * min_error(limit, measured.distinct_safe))
    outcome: Outcome = "passed" if highest <= limit else "failed" if low > limit else "not proven"
    answers: dict[Outcome, str] = {
        "passed": "It blocks hardly more safe prompts.",
        "failed": "It blocks too many more safe prompts.",
        "not proven": "The gate could not prove that it blocks hardly more safe prompts.",
    }
    ends: dict[Outcome, str] = {
        "passed": f"That is within the limit of {limit:g}.",
        "failed": f"That is beyond the limit of {limit:g}.",
        "not proven": f"With {measured.distinct_safe} distinct safe prompts a rise above {limit:g} is not ruled out.",
    }
    return GateCheck(
        name="false_positives",
        question="Does it block hardly more safe prompts than the baseline?",
        value=rise.value,
        low=low,
        high=high,
        limit=limit,
        outcome=outcome,
        answer=answers[outcome],
        explanation=f"{changed('fpr', rise)}. {ends[outcome]}",
        more=_more_safe(limit - rise.value, (high - low) / (2 * z), limit, measured) if outcome == "not proven" else "",
    )


def _more_safe(room: float, error: float, limit: float, measured: Measurements) -> str:
    safe = measured.distinct_safe
    return sentence(more_rows(room, max(error, min_error(limit, safe)), safe), "safe prompts")


def _more_in(part: JudgedSlice) -> str:
    """What would decide a slice."""
    count = more_rows(part.result.gain.value + part.limit, standard_error(part.part, part.limit), part.part.groups)
    kind = {"auprc": "", "recall": "unsafe ", "fpr": "safe "}[part.result.metric]
    if part.of_responses:
        return sentence(count, f"{kind}responses")
    return sentence(count, f"{kind}prompts in {_name(part.result)}")


def _slices_check(judged: Sequence[JudgedSlice], limit: float) -> GateCheck:
    question = f"Is no part of the test set worse by more than {limit:g}?"
    if not judged:
        return GateCheck(
            name="slices",
            question=question,
            value=None,
            limit=-limit,
            outcome="passed",
            answer="The test set has no parts to check.",
            explanation="None is large enough to be measured apart.",
        )
    outcome = worst(part.outcome for part in judged)
    alike = sorted(
        (part for part in judged if part.outcome == outcome),
        key=lambda part: (-part.p_loss_beyond_limit, part.result.gain.value),
    )
    result = alike[0].result
    others = [_name(part.result) for part in alike[1:]]
    more = f" and {len(others) - MAX_NAMED} more" if len(others) > MAX_NAMED else ""
    also = f" The same goes for {', '.join(others[:MAX_NAMED])}{more}." if others else ""
    answers: dict[Outcome, str] = {
        "passed": "It is not worse in any part of the test set.",
        "failed": f"It is worse in {_name(result)}.",
        "not proven": f"The gate could not rule out a loss in {_name(result)}.",
    }
    ends: dict[Outcome, str] = {
        "passed": f"A loss beyond {limit:g} is ruled out in each of {len(judged)} parts; this one is the least sure.",
        "failed": f"That is beyond the limit of {limit:g}.{also}",
        "not proven": f"With {result.rows} rows a loss beyond {limit:g} is not ruled out.{also}",
    }
    check = _slice_check("slices", question, alike[0], answers[outcome], ends[outcome])
    if outcome == "not proven":
        check.more = " ".join(dict.fromkeys(map(_more_in, alike[:MAX_NAMED])))
    return check


RESPONSE_QUESTION = "Are responses still judged as well as before?"


def _responses_check(judged: Sequence[JudgedSlice]) -> GateCheck:
    """Of the ranking of responses and what is decided of them, each with its limit, the worst is shown."""
    outcome = worst(part.outcome for part in judged)
    shown = next(part for part in judged if part.outcome == outcome)
    answers: dict[Outcome, str] = {
        "passed": "It judges responses as well as before.",
        "failed": "It judges responses worse.",
        "not proven": "The gate could not prove that it judges responses as well as before.",
    }
    ends: dict[Outcome, str] = {
        "passed": f"That is within the limit of {shown.limit:g}.",
        "failed": f"That is beyond the limit of {shown.limit:g}.",
        "not proven": f"With {shown.result.rows} rows a loss beyond {shown.limit:g} is not ruled out.",
    }
    check = _slice_check("responses", RESPONSE_QUESTION, shown, answers[outcome], ends[outcome])
    check.more = _more_in(shown) if outcome == "not proven" else ""
    return check


def _responses_missing(rows: int, limit: float) -> GateCheck:
    return GateCheck(
        name="responses",
        question=RESPONSE_QUESTION,
        value=None,
        limit=-limit,
        outcome="not proven",
        answer="The gate could not check how responses are judged.",
        explanation=f"Of the {rows} responses in the test set too few are safe, or too few unsafe.",
        more=f"At least {MIN_ROWS} safe and {MIN_ROWS} unsafe responses are needed.",
    )


def _slice_check(name: str, question: str, shown: JudgedSlice, answer: str, end: str) -> GateCheck:
    result = shown.result
    low, high = result.gain.ends
    change = result.gain
    if result.metric == "fpr":  # of which a gain is a fall
        change = Estimate(value=-change.value, low=-high, high=-low)
    return GateCheck(
        name=name,
        question=question,
        value=result.gain.value,
        low=low,
        high=high,
        limit=-shown.limit,
        outcome=shown.outcome,
        answer=answer,
        explanation=f"{changed(result.metric, change)} in {_name(result)}. {end}",
    )


def _name(result: SliceResult) -> str:
    return result.name if result.dimension == "role" else f"{result.dimension} {result.name}"
