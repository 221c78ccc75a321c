"""A conversation of 2,000 turns on a model with a context of 2,048 tokens, with Redis wiped in the middle."""

from __future__ import annotations

import random
from datetime import timedelta

import pytest
import redis

from app.access import namespaces
from app.kernel.database import Database
from app.kernel.settings import Settings
from app.memory.conversations.conversation import NewConversation
from app.memory.conversations.message import MessageRole, NewMessage
from app.memory.conversations.service import Conversations, shown_conversation
from benchmarks import memory_long
from tests.api.openai.conftest import StartPool
from tests.api.openai.test_conversations_continued import ask, assembly_of
from workers.engine.simulated import SimulatedEngine

TURNS, FACTS = 2_000, 40


@pytest.mark.slow
def test_what_was_said_in_the_third_turn_is_in_the_prompt(
    api: str, start_pool: StartPool, database: Database, settings: Settings, valkey: redis.Redis
) -> None:
    start_pool(engine=SimulatedEngine(2, 1_000_000, timedelta(0), context=2_048))
    service = Conversations(database, settings.conversations)
    chance = random.Random(7)
    told = memory_long.facts(chance, FACTS)
    texts = ["Hello.", "Let us talk.", *(fact.text for fact in told)]
    texts += [memory_long.other(chance) for _ in range(TURNS - len(texts))]
    made = service.create(NewConversation(namespaces.DEFAULT))
    conversation = shown_conversation(made.id)
    for start in range(0, TURNS, 250):
        if start == TURNS // 2:
            ask(api, "Still there?", conversation, memory={"store": False})
            valkey.flushdb()
        messages = []
        for said in texts[start : start + 250]:
            messages += [NewMessage(MessageRole.USER, said), NewMessage(MessageRole.ASSISTANT, "I see.")]
        service.append(made.id, namespaces.DEFAULT, messages)
    found = []
    for fact in told:
        report = assembly_of(database, ask(api, fact.question, conversation, max_tokens=1, memory={"store": False}))
        assert report["context"]["prompt"] < 2_048
        found.append(2 * fact.turn - 1 in [one.get("seq") for one in report["parts"]["recalled"]["used"]])
    assert found[0], "the third turn"
    assert sum(found) / len(found) >= 0.95, sum(found)
