"""
Replies to clients: the language, the facts of the record that answer, and a reply that code writes from them.

The record is what is known of a home: only its listed fields become facts. A reply of code is a few fixed sentences in
the client's language with those facts; it is what is sent when a model's reply does not pass its check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from app.real_estate import languages, table
from app.real_estate.languages import LanguageCode

Tone = Literal["formal", "friendly", "brief"]
#: The fields of a record that are facts, and their names in each language.
FACTS: Mapping[str, Mapping[LanguageCode, str]] = {
    "address": {
        "en": "Address",
        "fr": "Adresse",
        "de": "Adresse",
        "es": "Dirección",
        "hi": "पता",
        "pt": "Endereço",
        "it": "Indirizzo",
        "th": "ที่อยู่",
    },
    "price": {
        "en": "Price",
        "fr": "Prix",
        "de": "Preis",
        "es": "Precio",
        "hi": "कीमत",
        "pt": "Preço",
        "it": "Prezzo",
        "th": "ราคา",
    },
    "size": {
        "en": "Size",
        "fr": "Surface",
        "de": "Wohnfläche",
        "es": "Superficie",
        "hi": "क्षेत्रफल",
        "pt": "Área",
        "it": "Superficie",
        "th": "ขนาด",
    },
    "bedrooms": {
        "en": "Bedrooms",
        "fr": "Chambres",
        "de": "Schlafzimmer",
        "es": "Dormitorios",
        "hi": "शयनकक्ष",
        "pt": "Quartos",
        "it": "Camere da letto",
        "th": "ห้องนอน",
    },
    "available": {
        "en": "Available from",
        "fr": "Disponible à partir du",
        "de": "Verfügbar ab",
        "es": "Disponible desde",
        "hi": "उपलब्ध",
        "pt": "Disponível a partir de",
        "it": "Disponibile da",
        "th": "ว่างตั้งแต่",
    },
    "viewing": {
        "en": "Viewing",
        "fr": "Visite",
        "de": "Besichtigung",
        "es": "Visita",
        "hi": "देखने का समय",
        "pt": "Visita",
        "it": "Visita",
        "th": "นัดชม",
    },
    "contact": {
        "en": "Contact",
        "fr": "Contact",
        "de": "Kontakt",
        "es": "Contacto",
        "hi": "संपर्क",
        "pt": "Contato",
        "it": "Contatto",
        "th": "ติดต่อ",
    },
}
_OPENING: Mapping[LanguageCode, tuple[str, str]] = {
    "en": ("Dear {name}, thank you for your message.", "Hello {name}, thank you for your message!"),
    "fr": ("Bonjour {name}, nous vous remercions de votre message.", "Bonjour {name}, merci pour votre message !"),
    "de": ("Guten Tag {name}, wir danken Ihnen für Ihre Nachricht.", "Hallo {name}, vielen Dank für die Nachricht!"),
    "es": ("Estimado cliente {name}, le agradecemos su mensaje.", "Hola {name}, ¡muchas gracias por su mensaje!"),
    "hi": ("नमस्ते {name}, आपके संदेश के लिए हम आपके आभारी हैं।", "नमस्ते {name}, आपके संदेश के लिए धन्यवाद!"),
    "pt": ("Bom dia {name}, agradecemos a sua mensagem.", "Olá {name}, obrigado pela sua mensagem!"),
    "it": ("Buongiorno {name}, la ringraziamo per il suo messaggio.", "Salve {name}, grazie per il suo messaggio!"),
    "th": ("เรียน {name} ขอขอบคุณสำหรับข้อความของท่าน", "สวัสดี {name} ขอบคุณสำหรับข้อความของคุณ"),
}
_MIDDLE: Mapping[LanguageCode, str] = {
    "en": "Here is what we can tell you about the home:",
    "fr": "Voici ce que nous pouvons vous dire sur le bien :",
    "de": "Das können wir Ihnen zu der Immobilie sagen:",
    "es": "Esto es lo que podemos decirle sobre la vivienda:",
    "hi": "इस घर के बारे में हमारी जानकारी यह है:",
    "pt": "Isto é o que podemos dizer sobre o imóvel:",
    "it": "Ecco che cosa possiamo dire della casa:",
    "th": "ข้อมูลเกี่ยวกับบ้านหลังนี้มีดังนี้:",
}
_CLOSING: Mapping[LanguageCode, str] = {
    "en": "If you have more questions, we are happy to answer them.",
    "fr": "Nous sommes à votre disposition pour toute autre question.",
    "de": "Wir beantworten gern alle weiteren Fragen.",
    "es": "Con gusto le respondemos a sus demás preguntas.",
    "hi": "यदि आपके और प्रश्न हैं, तो कृपया हमें लिखें।",
    "pt": "Estamos à disposição para responder às suas perguntas.",
    "it": "Siamo a sua disposizione per altre domande.",
    "th": "หากมีคำถามเพิ่มเติม ยินดีให้ข้อมูลเสมอ",
}


def reply_facts(
    message: Annotated[str, Field(min_length=1, max_length=8_000)],
    record: Annotated[dict[str, Any], Field(max_length=60)],
    language: LanguageCode | Literal["auto"] = "auto",
    fallback: LanguageCode = "en",
    tone: Tone = "formal",
) -> dict[str, Any]:
    """
    Return the language of a reply, the facts that it may state, and the reply of code. Raises InvalidInput.

    `detected` is false where neither the caller nor the message tells the language; it is then `fallback`.
    """
    found = languages.detect(message) if language == "auto" else language
    code = found or fallback
    shown = {name: text for name in FACTS if (text := table.name(record.get(name), 200))}
    if not shown:
        raise table.refused("record", "it has none of the fields that are facts", ", ".join(FACTS))
    client = table.name(record.get("client"), 80)
    lines = [f"{FACTS[name][code]}: {text}" for name, text in shown.items()]
    opening = _OPENING[code][0 if tone == "formal" else 1].replace("{name}", client).replace("  ", " ")
    parts = [opening.replace(" ,", ",").replace(" !", " !" if code == "fr" else "!"), _MIDDLE[code], *lines]
    if tone != "brief":
        parts.append(_CLOSING[code])
    return {
        "language": code,
        "language_name": languages.LANGUAGES[code],
        "detected": found is not None,
        "facts": [*lines, *([client] if client else [])],
        "text": "\n".join(parts),
    }
