"""
The eight languages of client communication: which one a text is in, and what in it is formal or promised too much.

A language is told by its script, else by frequent words. A text without any of them has no language.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Literal

LanguageCode = Literal["en", "fr", "de", "es", "hi", "pt", "it", "th"]
LANGUAGES: Mapping[LanguageCode, str] = {
    "en": "English",
    "fr": "French",
    "de": "German",
    "es": "Spanish",
    "hi": "Hindi",
    "pt": "Portuguese",
    "it": "Italian",
    "th": "Thai",
}
#: Most characters of a text that are looked at.
_MOST = 8_000
#: Frequent words; those of several languages count for each.
_FREQUENT: Mapping[LanguageCode, str] = {
    "en": "the a an and is are you for to of in we i it with your our can have would this that please thank hello be on"
    " when what how much still my at will not do house flat home there",
    "fr": "le la les un une et est vous pour de des du nous je il avec votre notre peut avoir ce cette que qui merci"
    " bonjour sur dans pas au mon est-ce quel quelle combien encore maison appartement madame monsieur êtes sont",
    "de": "der die das und ist sind sie für von in wir ich es mit ihr ihre ihren unser kann haben dies dass bitte danke"
    " hallo guten auf nicht zu den dem ein eine einen wann was wie noch mein haus wohnung geehrte wird am zum",
    "es": "el la los las un una y es son usted para de del nosotros yo con su nuestro puede tener este esta que gracias"
    " hola en no por al mi cuándo cuánto qué todavía casa piso está buenos buenas sobre nos le se lo",
    "pt": "o a os as um uma e é são você para de do da nós eu com seu sua nosso pode ter este esta que obrigado"
    " olá em não por ao minha quando quanto ainda casa está bom dia boa no na pelo foi",
    "it": "il lo la i gli le un una e è sono lei per di del della noi io con suo sua nostro può avere questo questa che"
    " grazie buongiorno salve in non da al alla mio quando quanto ancora casa appartamento sul nel vorrei ci si",
    "hi": "",
    "th": "",
}
#: Common to several languages, which do not tell them apart.
_WORDS = {code: frozenset(words.split()) for code, words in _FREQUENT.items()}
_TOKEN = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
_HINDI, _THAI = ("\u0900", "\u097f"), ("\u0e00", "\u0e7f")
#: Words that promise what a reply cannot keep.
PROMISES: Mapping[LanguageCode, tuple[str, ...]] = {
    "en": ("guarantee", "guaranteed", "promise", "certainly profit", "risk-free"),
    "fr": ("garantis", "garantissons", "garanti", "promettons", "sans risque"),
    "de": ("garantieren", "garantiert", "versprechen", "risikofrei"),
    "es": ("garantizamos", "garantizado", "prometemos", "sin riesgo"),
    "hi": ("गारंटी", "वादा"),
    "pt": ("garantimos", "garantido", "prometemos", "sem risco"),
    "it": ("garantiamo", "garantito", "promettiamo", "senza rischio"),
    "th": ("รับประกัน", "การันตี", "สัญญาว่า"),
}
#: Words that say that a home is still to be had, in lower case: a fact only if the record has it.
AVAILABLE: Mapping[LanguageCode, tuple[str, ...]] = {
    "en": ("available",),
    "fr": ("disponible", "libre"),
    "de": ("verfügbar", "frei"),
    "es": ("disponible", "libre"),
    "hi": ("उपलब्ध",),
    "pt": ("disponível", "livre"),
    "it": ("disponibile", "libera", "libero"),
    "th": ("ว่าง",),
}
#: Words of familiar address, which a formal reply does not have.
FAMILIAR: Mapping[LanguageCode, tuple[str, ...]] = {
    "en": ("hey", "hi", "guys", "gonna"),
    "fr": ("tu", "toi", "ton", "tes", "salut"),
    "de": ("du", "dich", "dir", "dein", "deine", "euch"),
    "es": ("tú", "ti", "tus", "vosotros", "contigo"),
    "hi": ("तुम", "तू", "तुम्हारा"),
    "pt": ("tu", "teu", "tua", "contigo"),
    "it": ("tu", "tuo", "tua", "ti", "ciao"),
    "th": ("แก", "เธอ"),
}


def detect(text: str) -> LanguageCode | None:
    """Return the language of a text; None where nothing tells it."""
    text = unicodedata.normalize("NFC", text[:_MOST])
    letters = sum(character.isalpha() for character in text)
    for code, (first, last) in (("hi", _HINDI), ("th", _THAI)):
        if letters and sum(first <= character <= last for character in text) > 0.4 * letters:
            return "hi" if code == "hi" else "th"
    words = [word.lower() for word in _TOKEN.findall(text)]
    # A word that is frequent in fewer languages tells more.
    scores = {
        code: sum(1.0 / sum(word in others for others in _WORDS.values()) for word in words if word in known)
        for code, known in _WORDS.items()
    }
    ranked = sorted(scores, key=lambda code: -scores[code])
    best, second = ranked[:2]
    if scores[best] < 0.5 or scores[best] == scores[second]:
        return None
    return best


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, for the languages that have blanks between them."""
    return [word.lower() for word in _TOKEN.findall(unicodedata.normalize("NFC", text))]


def contains(text: str, phrase: str, code: LanguageCode) -> bool:
    """Return whether a word or phrase occurs in a text; in Thai, which has no blanks, as a part of it."""
    if code == "th" or " " in phrase or "-" in phrase:
        return phrase in text.lower()
    if code == "hi":
        return phrase in re.split(r"[\s।,.!?;:]+", text)
    return phrase in words_of(text)
