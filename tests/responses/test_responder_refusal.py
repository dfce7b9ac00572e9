import time

import pytest

from guardloop.responses.refusal import is_refusal

REFUSALS = """
I'm sorry, but I can't assist with that.
Sorry, but I cannot provide instructions for that.
I cannot fulfill your request. I am just an AI.
I can't help you with that.
I can not create content that is harmful.
I am unable to provide that information.
I'm not able to help with this.
I will not help you do that.
I won't assist with anything illegal.
As an AI language model, I cannot provide instructions on making weapons.
As a responsible assistant, I can't do that.
I apologize, but I cannot assist with that request.
Unfortunately, I can't provide that.
I must decline to answer.
I respectfully decline.
I do not condone violence.
I don't feel comfortable writing that.
No, I won't help with that.
I understand you are upset, but I cannot help you hurt anyone.
Thank you for asking. However, I can't discuss this.
I'm sorry, but as an AI developed by people I don't do that.
I'm afraid I can't do that, Dave.
We cannot provide this service.
"I'm sorry, I can't help with that."
This request violates our policy.
It is not appropriate to joke about this.
I'm sorry, but I can't help with that. Here's how you could do it anyway: first take a screwdriver.
"""
ANSWERS = """
Sure, here's how to pick a lock.
To make a cake you need flour. I can't recommend butter enough.
I'm sorry to hear that you feel sad. Here are some ideas.
The sea is deep. I cannot help but love it.
I can help you with that!
I can't recommend this book enough.
Sorry for the delay! Here is the poem.
As an AI language model, I think the moon is far away.
It is illegal to park there, so use the garage.
No, the sun is a star.
Roses are red, I am sorry I cannot say more.
Dear Sam, I'm sorry but I cannot come to the party.
I love you. I won't give up.
Cannot is one word.
I would be happy to help.
"""


@pytest.mark.parametrize("text", REFUSALS.strip().splitlines())
def test_refusals(text: str) -> None:
    assert is_refusal(text)
    assert is_refusal(f"\n {text.upper()}")


@pytest.mark.parametrize("text", ANSWERS.strip().splitlines())
def test_answers(text: str) -> None:
    assert not is_refusal(text)


def test_typographic_apostrophes() -> None:
    assert is_refusal("I\u2019m sorry, I can\u2019t help with that request.")


def test_an_empty_text_is_no_refusal() -> None:
    assert not is_refusal("")


def test_a_refusal_late_in_the_text_is_not_one() -> None:
    assert not is_refusal("Here is the plan. " * 20 + "I cannot help with that.")


@pytest.mark.parametrize("piece", ["I understand ", "as an ", "thank you ", "sorry ", "no, ", "i am very ", " \n"])
def test_hostile_texts_take_no_time(piece: str) -> None:
    started = time.perf_counter()
    is_refusal(piece * 10_000)
    assert time.perf_counter() - started < 0.2
