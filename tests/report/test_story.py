import pytest
from pydantic import ValidationError

from guardloop.report.story import MiningSummary, RunStory, StageCounts


def test_a_run_story_may_leave_everything_out() -> None:
    assert RunStory().counts == StageCounts()


def test_stories_travel_as_json(story: RunStory, mined: MiningSummary) -> None:
    assert RunStory.model_validate_json(story.model_dump_json()) == story
    assert MiningSummary.model_validate_json(mined.model_dump_json()) == mined


def test_a_misspelt_key_is_refused() -> None:
    with pytest.raises(ValidationError, match="hard_negativs"):
        StageCounts.model_validate({"hard_negativs": 3})
