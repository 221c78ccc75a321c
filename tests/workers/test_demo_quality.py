"""The model of the demo is useful: it is right on most of a part of the held-out messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import demo_quality

#: The largest part of the words of the shorter message that a held-out message may share with another message.
MOST_SHARED = 0.75


@pytest.mark.slow
def test_the_model_of_the_demo_sorts_most_messages_right(tmp_path: Path) -> None:
    """It was right on 93 % of all 130; one of five would be right by chance."""
    model, _ = demo_quality.MODELS
    engine = demo_quality.load(model, tmp_path, threads=1)
    try:
        answers = demo_quality.choose(engine, demo_quality.read("held_out", every=10))
    finally:
        engine.close()

    assert len(answers) == 13
    assert demo_quality.share(answers) >= 0.7, [answer for answer in answers if not answer.right]


def words(text: str) -> set[str]:
    return {word.strip(".,!?¿¡").lower() for word in text.split()}


def test_the_held_out_messages_are_balanced_and_no_copies_of_those_that_the_prompt_was_chosen_on() -> None:
    held_out, development = demo_quality.read("held_out"), demo_quality.read("development")
    topics = [message.topic for message in held_out]

    assert len(held_out) >= 100
    assert {topics.count(topic) for topic in topics} == {26}
    for message in held_out:
        own = words(message.message)
        for other in development:
            its = words(other.message)
            assert len(own & its) <= MOST_SHARED * min(len(own), len(its)), (message.message, other.message)
