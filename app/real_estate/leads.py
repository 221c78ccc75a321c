"""
Leads: what a conversation says about a buyer, as a score with its evidence.

Code sorts the sentences whose words leave no choice (CUES, in English), a model the others, into TOPICS. Code checks
that each quote occurs in what the lead wrote, gives the points, and finds contact details and whether the budget covers
the price. A topic without a quote has no points.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from app.real_estate import table

MAX_MESSAGES, MAX_SENTENCES = 200, 40
_Short = Annotated[str, Field(max_length=4_000)]


class Message(TypedDict):
    """A message of a conversation with a lead."""

    sender: Literal["lead", "agent"]
    text: _Short


class LeadFinding(TypedDict):
    """What a model says of a sentence."""

    quote: _Short
    topic: str


LeadConversation = Annotated[list[Message], Field(max_length=MAX_MESSAGES)]

#: The topics: the factor that they speak of, and its share of the factor's points.
TOPICS: Mapping[str, tuple[str, float]] = {
    "budget": ("budget", 1.0),
    "cash": ("financing", 1.0),
    "approved": ("financing", 0.9),
    "loan": ("financing", 0.4),
    "soon": ("timeline", 1.0),
    "later": ("timeline", 0.25),
    "viewing": ("intent", 1.0),
    "curious": ("intent", 0.0),
    "wish": ("need", 1.0),
}
#: Words of English that say the topic of a sentence, the first that occurs; a sentence without any is for the model.
CUES: Mapping[str, re.Pattern[str]] = {
    topic: re.compile(rf"\b(?:{words})\b", re.IGNORECASE)
    for topic, words in {
        "curious": "just curious|only browsing|just browsing|only looking|just looking|nothing serious",
        "later": "no hurry|no rush|next year|(?:in|within) (?:a|one|two|three|a few) years?",
        "approved": "pre-?approved|approved|approval",
        "loan": "loan|mortgage|financing",
        "cash": "in cash|pay cash|cash buyers?",
        "viewing": "viewing|visit|(?:see|view|tour) (?:it|the|your|this)",
        "wish": "bedrooms?|garden|garage|kitchen|balcony|parking",
        "soon": r"as soon as possible|immediately|(?:next|this) (?:week|month)|in \w+ weeks?|(?:must|need to) move",
    }.items()
}
#: The most points of each factor; together 100.
POINTS: Mapping[str, int] = {"budget": 25, "financing": 20, "timeline": 20, "intent": 20, "need": 5, "contact": 10}
#: Least points of each grade, and what is done then.
GRADES = (
    ("A", 70, "call", "Call today and offer a viewing."),
    ("B", 50, "ask", "Answer today and ask for what is missing."),
    ("C", 30, "nurture", "Send matching homes, and ask again in two weeks."),
    ("D", 0, "park", "Add to the newsletter."),
)
_QUESTIONS = {
    "budget": "What is your budget?",
    "financing": "How will the purchase be financed?",
    "timeline": "When would you like to move?",
    "intent": "Would you like to see the home?",
    "need": "What should the home have?",
    "contact": "How can we reach you?",
}
_SENTENCE = re.compile(r"(?<=[.!?।])\s+|\n+")
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,64}(?:\.[\w-]{2,63}){1,4}")
_PHONE = re.compile(r"(?<![\w.])\+?\d[\d ()/-]{7,20}\d(?!\w)")
_AMOUNT = re.compile(r"(?<![\w.,])(\d{1,3}(?:[,. ]\d{3})+|\d{1,9}(?:\.\d{1,2})?)\s?(k\b|m\b|million\b)?", re.IGNORECASE)
#: The lowest number that is an amount for a home, so that `3 bedrooms` is none.
_LEAST_AMOUNT = 20_000
#: Share of the price that a budget has to reach for all of its points, and for none of them.
_ENOUGH, _TOO_LITTLE = 0.95, 0.7


def lead_sentences(conversation: LeadConversation) -> dict[str, Any]:
    """
    Return the sentences that the lead wrote, up to MAX_SENTENCES, and how many were `left_out`.

    Each has its `text` and a `cue`: its topic, or empty where a model has to say it.
    """
    found = [
        {"text": sentence.strip(), "cue": _cue(sentence)}
        for message in conversation
        if message["sender"] == "lead"
        for sentence in _SENTENCE.split(message["text"])
        if len(sentence.strip()) > 1
    ]
    return {"sentences": found[:MAX_SENTENCES], "left_out": max(0, len(found) - MAX_SENTENCES)}


def score_lead(
    conversation: LeadConversation,
    findings: Annotated[list[LeadFinding], Field(max_length=1_000)],
    asking_price: Annotated[float | None, Field(gt=0, le=1e10)] = None,
) -> dict[str, Any]:
    """
    Return the score (0 to 100), the grade, each factor with its evidence, and the next action.

    A finding whose quote does not occur in what the lead wrote counts nothing, and is listed under `rejected`.
    """
    said = [_plain(message["text"]) for message in conversation if message["sender"] == "lead"]
    best: dict[str, tuple[float, str, str]] = {}
    rejected: list[dict[str, str]] = []
    curious = False
    for finding in findings:
        quote, topic = finding["quote"].strip(), finding["topic"]
        if topic == "other":
            continue
        reason = _refusal(quote, topic, said)
        if reason:
            rejected.append({"quote": quote[:200], "topic": topic[:60], "reason": reason})
            continue
        factor, share = TOPICS[topic]
        curious = curious or topic == "curious"
        if factor not in best or share > best[factor][0]:
            best[factor] = (share, quote, topic)
    contact = _contact(conversation)
    if contact is not None:
        best["contact"] = (1.0, contact, "contact")
    budget = _amount(best["budget"][1]) if "budget" in best else None
    if budget is not None and asking_price is not None:
        share = (budget / asking_price - _TOO_LITTLE) / (_ENOUGH - _TOO_LITTLE)
        best["budget"] = (min(max(share, 0.0), 1.0), *best["budget"][1:])
    factors = [_factor(name, best.get(name)) for name in POINTS]
    score = round(sum(factor["points"] for factor in factors))
    if curious and best.get("intent", (0.0,))[0] == 0.0:
        score = min(score, GRADES[1][1] - 1)
    grade, _, action, what = next(one for one in GRADES if score >= one[1])
    missing = [factor["factor"] for factor in factors if factor["evidence"] is None]
    return {
        "score": score,
        "grade": grade,
        "factors": factors,
        "budget": None if budget is None else round(budget),
        "contact": contact,
        "action": {"kind": action, "text": what, "ask": [_QUESTIONS[name] for name in missing]},
        "rejected": rejected[:50],
    }


def _cue(sentence: str) -> str:
    """Return the topic that the words of a sentence leave no choice about; else an empty text."""
    if _amount(sentence) is not None and not _PHONE.search(sentence):
        return "budget"
    if _EMAIL.search(sentence):
        return "other"
    return next((topic for topic, words in CUES.items() if words.search(sentence)), "")


def _factor(name: str, found: tuple[float, str, str] | None) -> dict[str, Any]:
    if found is None:
        return {"factor": name, "points": 0.0, "most": POINTS[name], "topic": None, "evidence": None}
    share, quote, topic = found
    return {
        "factor": name,
        "points": round(POINTS[name] * share, 1),
        "most": POINTS[name],
        "topic": topic,
        "evidence": quote,
    }


def _refusal(quote: str, topic: str, said: Sequence[str]) -> str:
    if topic not in TOPICS:
        return f"the topic is none of {', '.join(TOPICS)}"
    plain = _plain(quote)
    if len(plain) < 3 or not any(plain in text for text in said):
        return "the lead did not write this"
    if topic == "budget" and _amount(quote) is None:
        return "it has no amount"
    return ""


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _contact(conversation: Sequence[Message]) -> str | None:
    for message in conversation:
        if message["sender"] == "lead":
            match = _EMAIL.search(message["text"]) or _phone(message["text"])
            if match:
                return match[0].strip()
    return None


def _phone(text: str) -> re.Match[str] | None:
    return next((one for one in _PHONE.finditer(text) if 9 <= sum(map(str.isdigit, one[0])) <= 15), None)


def _amount(text: str) -> float | None:
    """Return the highest amount of a text that can be a budget: `350k`, `1.2 million`, `350,000`."""
    amounts = []
    for match in _AMOUNT.finditer(text):
        digits = match[1]
        grouped = re.fullmatch(r"\d{1,3}(?:[,. ]\d{3})+", digits) and not (match[2] and "." in digits)
        value = table.number(re.sub(r"[,. ]", "", digits) if grouped else digits)
        scale = {"k": 1e3, "m": 1e6, "million": 1e6}.get((match[2] or "").lower(), 1.0)
        if value is not None and _LEAST_AMOUNT <= value * scale <= 1e10:
            amounts.append(value * scale)
    return max(amounts, default=None)
