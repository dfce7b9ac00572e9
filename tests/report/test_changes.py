from typing import Any

from guardloop.report.changes import SHOWN, find_changes


def row(unsafe: bool, baseline: float, candidate: float, group: str, prompt: str = "a prompt") -> dict[str, Any]:
    return {
        "prompt": prompt,
        "unsafe": unsafe,
        "group": group,
        "baseline_score": baseline,
        "candidate_score": candidate,
    }


def test_changed_decisions_are_counted_by_what_they_mean() -> None:
    found = find_changes(
        [
            row(True, -1, 1, "a"), row(True, -1, 2, "b"), row(False, 1, -1, "c"),
            row(True, 1, -1, "d"), row(False, -1, 1, "e"), row(True, 1, 3, "f"),
        ], 0, 0,
    )  # fmt: skip
    assert (found.caught, found.freed, found.missed, found.blocked) == (2, 1, 1, 1)


def test_each_guard_has_its_own_threshold() -> None:
    found = find_changes([row(True, 0.5, 0.5, "a")], 1.0, 0.0)
    assert found.caught == 1
    assert (found.improved[0].baseline_height, found.improved[0].candidate_height) == (-0.5, 0.5)


def test_a_changed_decision_outweighs_a_large_move() -> None:
    found = find_changes([row(True, 1, 9, "a", "moved"), row(True, -0.1, 0.1, "b", "turned")], 0, 0)
    assert [change.prompt for change in found.improved] == ["turned", "moved"]


def test_near_duplicates_are_shown_once_and_lists_are_short() -> None:
    same = find_changes([row(False, 2, -i, "same") for i in range(1, 9)], 0, 0)
    assert same.freed == 8
    assert [change.candidate_height for change in same.improved] == [-8]
    many = find_changes([row(False, 2, -1, f"g{i}") for i in range(50)], 0, 0)
    assert len(many.improved) == SHOWN and not many.worsened


def test_nothing_to_compare_is_fine() -> None:
    assert find_changes([], 0, 0).improved == []
