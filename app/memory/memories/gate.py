"""
The write gate: which memories that a model proposed are written, and why the others are not.

A memory is written if it is a statement of some words, if the messages that it comes from say it, and if it adds to
what is known. Messages say it when a few of their sentences have its numbers, names and ids, nearly all its other
words, and a negation where it has one. What only the assistant said is no fact about anybody: it may be a repetition
of what its prompt told it.

What the gate does not see: a wrong combination of words that stand in the same few sentences, and lies.
It decides by words, so it costs no model. Only whether a memory is known in other words is also decided by meaning:
the caller gives the cosines of known memories, where it has them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from app.memory.compression import protection, texts
from app.memory.compression.protection import SpanKind
from app.memory.compression.stop_words import STOP_WORDS
from app.memory.memories.contrast import is_contrary
from app.memory.memories.kinds import MemoryKind, normalised

#: Characters and words of a proposed memory.
MAX_CHARACTERS, MIN_WORDS, MAX_WORDS = 300, 3, 60
#: Sentences of the messages that together have to say it.
MAX_EVIDENCE = 3
#: Least share of its words that they have.
LEAST_COVERED = 0.8
#: Words in common, of all words of both, from which on two memories say the same.
LEAST_SAME = 0.8
#: The cosine from which on two memories mean the same in other words, and content words that only the new one may have.
#: Below it are paraphrases too, but more often statements about the same subject (docs/memories.md).
LEAST_COSINE, MOST_OTHER_WORDS = 0.92, 2
#: Words in common, from which on they speak of the same thing, so that one may take the other's place.
LEAST_RELATED = 0.25

_CHECKED = frozenset({SpanKind.NUMBER, SpanKind.ID, SpanKind.NAME, SpanKind.URL, SpanKind.EMAIL, SpanKind.CODE})
#: Kinds that may come from what only the assistant said: it may have put in words what both found.
_SHARED_KINDS = frozenset({MemoryKind.DECISION, MemoryKind.BREAKTHROUGH})
_SPEAKERS = frozenset({"user", "tool"})
_PLAIN = frozenset().union(*STOP_WORDS.values())
#: Words that a memory may add to what was said: who it is about, and what kind of memory it is.
_FRAME_WORDS = """
user user's users person customer client they team group he she
is are has have had be being been use uses used using
prefer prefers preferred preference like likes liked want wants wanted enjoy enjoys love loves favourite favorite
decide decides decided decision agree agreed choose chose chosen choice plan plans planned
name named called live lives work works state states stated say says said mention mentions mentioned tell told
always usually often every each fact important current currently now new
"""
_FRAME = frozenset(_FRAME_WORDS.split())
#: Frame words that say nothing at all.
_SUBJECT_WORDS = "user user's users person customer client they team group he she is are has have had be being been now"
_SUBJECTS = frozenset(_SUBJECT_WORDS.split())
_NEGATION = re.compile(
    r"\b(?:not|no|never|none|nobody|nothing|without|cannot|neither|nor|\w{2,8}n['\u2019]t|nicht|nie|kein\w{0,2}|ohne|"
    r"pas|jamais|sans|nunca|sin|non|mai|senza|niet|geen)\b|\b(?:stopped|quit|dislikes?|hates?|avoids?)\b",
    re.IGNORECASE,
)
_JUNK = re.compile(
    r"[{}<>]|\.\.\.|\u2026|^\W*(?:user|assistant|system|message)\s*\d*\s*:|\b(?:n/a|unknown|lorem ipsum|placeholder|"
    r"no (?:new )?(?:memories|memory|facts?|information)|nothing (?:new|to remember)|example)\b",
    re.IGNORECASE,
)
#: Statements about the conversation and not about its subject.
_ABOUT_ITSELF = re.compile(
    r"\b(?:the )?(?:user|assistant|person|customer)\s+(?:is |was |has |just )?"
    r"(?:ask(?:s|ed|ing)?|answer(?:s|ed|ing)?|greet(?:s|ed|ing)?|thank(?:s|ed|ing)?|repl(?:y|ies|ied|ying)|"
    r"respond(?:s|ed|ing)?|request(?:s|ed|ing)?|say(?:s|ing)? (?:hello|hi|bye|thanks))\b",
    re.IGNORECASE,
)
_QUESTION_MARKS = ("?", "\uff1f", "\u061f")
_CLAUSE = re.compile(r"[,;:]\s|\s(?:but|although|while|aber|mais|pero)\s", re.IGNORECASE)
#: The beginning of a statement about somebody.
_SUBJECT = re.compile(r"(?:the\s+)?(?:user|they|he|she|team|customer)\b", re.IGNORECASE)
#: A statement of the user, and a sentence that begins with something of theirs.
_OF_USER = re.compile(r"(?:the\s+)?user\s", re.IGNORECASE)
_POSSESSED = re.compile(r"^\W*(?:\w+,\s+){0,2}my\s+([^\W\d_]+)", re.IGNORECASE)
_SUFFIX = re.compile(r"(?:['\u2019]s|ingly|edly|ings?|ied|ies|ed|es|s|ly|e)$")


class GateReason(StrEnum):
    """Why a proposed memory is not written."""

    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    #: It is no statement: a question, a placeholder, a repetition of words, or it is about the conversation itself.
    JUNK = "junk"
    #: The messages do not say it.
    NOT_GROUNDED = "not_grounded"
    #: Only the assistant said it.
    ONLY_ASSISTANT = "only_assistant"
    #: A memory that holds says the same.
    DUPLICATE = "duplicate"
    #: It repeats a part of a known memory, or one that no longer holds and that only the assistant repeated.
    RESTATEMENT = "restatement"
    #: It contradicts a memory that began to hold later.
    OUTDATED = "outdated"


@dataclass(frozen=True, slots=True)
class GateMessage:
    """A message that memories are extracted from."""

    #: Its number in the prompt.
    number: int
    role: str
    content: str
    speaker: str = ""


@dataclass(frozen=True, slots=True)
class KnownMemory:
    """A memory that is known already."""

    #: Its number in the prompt; one that the prompt did not have is below 0.
    number: int
    text: str
    holds: bool = True


@dataclass(frozen=True, slots=True)
class ProposedMemory:
    """A memory as a model wrote it."""

    text: str
    kind: MemoryKind = MemoryKind.FACT
    #: The numbers of the messages that say it, as the model has it.
    messages: Sequence[int] = ()
    #: The number of the known memory that it takes the place of.
    replaces: int | None = None
    importance: float = 0.5


@dataclass(frozen=True, slots=True)
class GateDecision:
    """What becomes of a proposed memory."""

    proposed: ProposedMemory
    #: None: it is written.
    reason: GateReason | None = None
    detail: str = ""
    #: The messages that say it.
    messages: tuple[int, ...] = ()
    #: The known memory whose place it takes.
    replaces: int | None = None
    #: The known memory that says the same.
    same_as: int | None = None
    #: The share of its words that the messages have.
    covered: float = 0.0


@dataclass(frozen=True, slots=True)
class _Evidence:
    """A sentence of a message."""

    message: int
    role: str
    words: frozenset[str]
    text: str

    def is_negative_about(self, wanted: Collection[str]) -> bool:
        """Whether a clause with one of these words has a negation."""
        clauses = _CLAUSE.split(self.text)
        return any(
            _NEGATION.search(clause)
            for clause in clauses
            if not set(wanted).isdisjoint(map(_stem, texts.words(clause)))
        )


def decide(
    proposals: Sequence[ProposedMemory],
    messages: Sequence[GateMessage],
    known: Sequence[KnownMemory],
    cosines: Sequence[Mapping[int, float]] = (),
) -> list[GateDecision]:
    """
    Return what becomes of each proposal, in their order. Later ones are also compared with those accepted before.

    `cosines` are those of each proposal to known memories, by their numbers.
    """
    sentences = [one for message in messages for one in _sentences(message)]
    every = list(known)
    found: list[GateDecision] = []
    for place, proposal in enumerate(proposals):
        decision = _decide(proposal, sentences, every, cosines[place] if cosines else {})
        if decision.reason is None:
            every.append(KnownMemory(-1, proposal.text))
        found.append(decision)
    return found


def _decide(
    proposed: ProposedMemory,
    sentences: Sequence[_Evidence],
    known: Sequence[KnownMemory],
    cosines: Mapping[int, float],
) -> GateDecision:
    if (refusal := refused_by_form(proposed)) is not None:
        return refusal
    wanted = content_words(proposed.text)
    if not wanted:
        return GateDecision(proposed, GateReason.JUNK, "it has no words that say anything")
    evidence = _evidence(proposed, wanted, sentences)
    missing = sorted(wanted - frozenset().union(*(one.words for one in evidence)))
    covered = 1 - len(missing) / len(wanted)
    exact = missing_spans(proposed.text, [one.text for one in evidence])
    if exact or covered < LEAST_COVERED or not evidence:
        lacking = ", ".join([*exact, *(word for word in missing if word not in exact)][:8])
        return GateDecision(proposed, GateReason.NOT_GROUNDED, f"the messages do not have: {lacking}", covered=covered)
    if bool(_NEGATION.search(proposed.text)) != any(one.is_negative_about(wanted) for one in evidence):
        detail = "it has a negation that the messages do not have, or the other way round"
        return GateDecision(proposed, GateReason.NOT_GROUNDED, detail, covered=covered)
    if (other := _other_subject(proposed.text, wanted, evidence)) is not None:
        detail = f"the messages say it of the user's {other}"
        return GateDecision(proposed, GateReason.NOT_GROUNDED, detail, covered=covered)
    numbers = tuple(sorted({one.message for one in evidence}))
    said = any(one.role in _SPEAKERS for one in evidence)
    replaces = _replaced(proposed, wanted, known)
    if (same := _same(proposed, wanted, known, replaces, cosines, said=said)) is not None:
        return GateDecision(proposed, *same[:2], numbers, same_as=same[2], covered=covered)
    if not said and proposed.kind not in _SHARED_KINDS:
        return GateDecision(proposed, GateReason.ONLY_ASSISTANT, "no message of the user says it", numbers)
    return GateDecision(proposed, None, "", numbers, replaces, covered=covered)


def _other_subject(text: str, wanted: Collection[str], evidence: Sequence[_Evidence]) -> str | None:
    """Whom the sentence with most of the words is about (`my sister`), if the memory says it of the user."""
    most = max(evidence, key=lambda one: len(one.words.intersection(wanted)))
    found = _POSSESSED.search(most.text)
    if found is None or not _OF_USER.match(text):
        return None
    other = found[1].casefold()
    return None if other in _FRAME or _stem(other) in _said_words(text) else other


def refused_by_form(proposed: ProposedMemory) -> GateDecision | None:
    """Return the refusal of a proposal that is no statement, whatever the messages say."""
    text = proposed.text.strip()
    words = texts.words(text)
    if len(words) < MIN_WORDS:
        return GateDecision(proposed, GateReason.TOO_SHORT, f"{len(words)} words; at least {MIN_WORDS}")
    if len(text) > MAX_CHARACTERS or len(words) > MAX_WORDS:
        detail = f"{len(text)} characters, {len(words)} words; at most {MAX_CHARACTERS} and {MAX_WORDS}"
        return GateDecision(proposed, GateReason.TOO_LONG, detail)
    if text.endswith(_QUESTION_MARKS):
        return GateDecision(proposed, GateReason.JUNK, "it is a question")
    if "\n" in text or _JUNK.search(text):
        return GateDecision(proposed, GateReason.JUNK, "it is no statement")
    if _ABOUT_ITSELF.search(text):
        return GateDecision(proposed, GateReason.JUNK, "it is about the conversation itself")
    if len(content_words(text) | frame_words(text)) < 2 and not _SUBJECT.match(text):
        return GateDecision(proposed, GateReason.JUNK, "it says too little")
    if max(Counter(words).values()) > max(2, len(words) // 3):
        return GateDecision(proposed, GateReason.JUNK, "it repeats a word")
    return None


def content_words(text: str) -> frozenset[str]:
    """Return the stems of the words of a text that say what it is about."""
    words = (word for word in texts.words(text) if word not in _PLAIN and word not in _FRAME)
    return frozenset(_stem(word) for word in words if not _NEGATION.fullmatch(word))


def frame_words(text: str) -> frozenset[str]:
    """Return the stems of the verbs of a text that do not need to be in the messages: live, work, prefer."""
    words = (word for word in texts.words(text) if word in _FRAME and word not in _SUBJECTS and word not in _PLAIN)
    return frozenset(_stem(word) for word in words)


def is_negative(text: str) -> bool:
    """Whether a text has a negation."""
    return bool(_NEGATION.search(text))


def similarity(one: str, other: str) -> float:
    """Return the words that two texts have in common, of all words of both; frame words count, stop words do not."""
    first, second = _said_words(one), _said_words(other)
    return len(first & second) / len(first | second) if first or second else 0.0


def says_the_same(one: str, other: str) -> bool:
    """Whether two memories say the same: nearly the same words, and the same numbers, names and negations."""
    if normalised(one) == normalised(other):
        return True
    return (
        similarity(one, other) >= LEAST_SAME
        and not is_contrary(frozenset(texts.words(one)), frozenset(texts.words(other)))
        and _agree(one, other)
    )


def means_the_same(new: str, known: str, cosine: float) -> bool:
    """Whether a new memory says what a known one says in other words, by the cosine of their vectors."""
    return (
        cosine >= LEAST_COSINE
        and len(content_words(new) - content_words(known)) <= MOST_OTHER_WORDS
        and not is_contrary(frozenset(texts.words(new)), frozenset(texts.words(known)))
        and _agree(new, known)
    )


def _agree(one: str, other: str) -> bool:
    """Whether two memories have the same numbers, names and negations."""
    return (
        is_negative(one) == is_negative(other) and not missing_spans(one, [other]) and not missing_spans(other, [one])
    )


def _said_words(text: str) -> frozenset[str]:
    return frozenset(_stem(word) for word in texts.words(text) if word not in _PLAIN)


@lru_cache(maxsize=10_000)
def _stem(word: str) -> str:
    """Cut endings of English words, twice at most: `moved`, `moves` and `moving` are one word."""
    for _ in range(2):
        if len(word) <= 3:
            break
        cut = _SUFFIX.sub("", word)
        if len(cut) < 3:
            break
        word = cut
    return word


def _sentences(message: GateMessage) -> list[_Evidence]:
    """The sentences of a message, each with the name of its speaker. System messages are nobody's words."""
    if message.role in ("system", "developer"):
        return []
    found = []
    names = frozenset(_stem(word) for word in texts.words(message.speaker))
    # What somebody asks, nobody says; but a question of the assistant may have words that its answer needs.
    for place in texts.sentences(message.content):
        text = message.content[place.start : place.end]
        if message.role in _SPEAKERS and text.rstrip().endswith(_QUESTION_MARKS):
            continue
        words = frozenset(_stem(word) for word in texts.words(text))
        found.append(
            _Evidence(
                message.number,
                message.role,
                words | names,
                f"{message.speaker} {text}",
            )
        )
    return found


def _evidence(proposed: ProposedMemory, wanted: Collection[str], sentences: Sequence[_Evidence]) -> list[_Evidence]:
    """The sentences that have most of the wanted words, those of the named messages and of the user first."""
    named = set(proposed.messages)
    left, chosen = set(wanted), list[_Evidence]()
    while left and len(chosen) < MAX_EVIDENCE:
        best = max(
            sentences,
            key=lambda one: (len(left & one.words), one.role in _SPEAKERS, one.message in named, one.message),
            default=None,
        )
        if best is None or not left & best.words:
            break
        chosen.append(best)
        left -= best.words
    return chosen


def missing_spans(text: str, sources: Sequence[str]) -> list[str]:
    """The numbers, names, ids and the like of a text that no source has."""
    lower = protection.lower_words([*sources, text])
    words = {word for source in sources for word in texts.words(source)}
    whole = "\n".join(sources).casefold()
    found = []
    for span in protection.spans(text, lower=lower, plain=_PLAIN | _FRAME):
        if span.kind not in _CHECKED:
            continue
        part = text[span.start : span.end]
        parts = [word for word in texts.words(part) if word not in _PLAIN and word not in _FRAME]
        if span.kind is SpanKind.NAME:
            known = {_stem(word) for word in words}
            absent = any(_stem(word) not in known for word in parts)
        elif span.kind is SpanKind.NUMBER:
            absent = not re.search(rf"(?<![\d.,]){re.escape(part.casefold())}(?!\d|[.,]\d)", whole)
        else:
            absent = part.casefold() not in whole
        if absent:
            found.append(part)
    return found


def _replaced(proposed: ProposedMemory, wanted: Collection[str], known: Sequence[KnownMemory]) -> int | None:
    """The known memory whose place the proposal takes, if it may be so: the same subject, but not the same said."""
    for memory in known:
        if memory.number >= 0 and memory.number == proposed.replaces and memory.holds:
            related = similarity(proposed.text, memory.text) >= LEAST_RELATED
            differs = content_words(memory.text) != wanted or bool(_NEGATION.search(memory.text)) != bool(
                _NEGATION.search(proposed.text)
            )
            return memory.number if related and differs else None
    return None


def _same(
    proposed: ProposedMemory,
    wanted: frozenset[str],
    known: Sequence[KnownMemory],
    replaces: int | None,
    cosines: Mapping[int, float],
    *,
    said: bool,
) -> tuple[GateReason, str, int] | None:
    """The known memory that makes the proposal superfluous, with the reason."""
    for memory in known:
        if replaces is not None and memory.number == replaces:
            continue
        cosine = cosines.get(memory.number, 0.0)
        by_words = says_the_same(proposed.text, memory.text)
        same = by_words or means_the_same(proposed.text, memory.text, cosine)
        if same and memory.holds:
            detail = "a memory says the same" if by_words else f"a memory says it in other words (cosine {cosine:.2f})"
            return GateReason.DUPLICATE, detail, memory.number
        if same and not said:
            detail = "the assistant repeated a memory that no longer holds"
            return GateReason.RESTATEMENT, detail, memory.number
        repeats = (
            wanted <= content_words(memory.text)
            and not missing_spans(proposed.text, [memory.text])
            and bool(_NEGATION.search(proposed.text)) == bool(_NEGATION.search(memory.text))
        )
        if repeats and (memory.holds or not said):
            return GateReason.RESTATEMENT, "a known memory says this, and more", memory.number
    return None
