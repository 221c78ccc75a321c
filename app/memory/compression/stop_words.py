"""
Stop words: frequent words that say little, in some languages.

A text's language is that whose stop words it has most of. Texts in other languages are pruned by the frequency of their
words alone. Negations are no stop words here, and neither are words that change when or how much something holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

_ENGLISH = """
a about above after again all also am an and any are as at be because been being below between both but by can could
did do does doing down during each few for from further had has have having he her here hers him his how i if in into
is it its itself just let me more most my of off on or other our ours out over own really same she should so some such
than that the their theirs them then there these they this those through to too under up very was we were what when
where which while who whom why will with would you your yours i'm i've i'd i'll it's that's there's you're we're
they're he's she's let's well oh okay ok yes yeah please thanks thank actually basically literally quite rather simply
maybe perhaps anyway like know think going get got
"""
_GERMAN = """
der die das ein eine einer eines einem einen und oder aber doch auch als am an auf aus bei bin bis da dann dass dem
den denn des dich dir du er es euch für hab habe haben hat hatte ich ihm ihn ihr ihre im in ist ja mal man mein mich
mir mit nach noch nun schon sehr sein seine sich sie sind so über um und uns unser vom von vor war waren was weil wenn
wer wie wir wird wurde zu zum zur halt eben
"""
_FRENCH = """
le la les un une des de du et ou mais donc car à au aux avec ce ces cette dans elle elles en est et eu il ils je j'ai
l'on leur lui ma me mes moi mon nos notre nous on par pour qu que qui sa se ses son sont sur ta te tes toi ton tu vos
votre vous c'est était être très aussi alors bien
"""
_SPANISH = """
el la los las un una unos unas de del y o pero que en a al con por para es son era fue ser estar está están ha han he
su sus se lo le les me mi mis te tu tus nos como más muy ya también este esta esto ese esa eso donde cuando porque
entre sobre hay pues bueno
"""
_ITALIAN = """
il lo la i gli le un uno una di a da in con su per tra fra e o ma che chi è sono era del della dei delle al alla dal
nel nella si mi ti ci vi lui lei noi voi loro ho hai ha abbiamo hanno anche come più molto questo questa quello quella
"""
_PORTUGUESE = """
o a os as um uma uns umas de do da dos das e ou mas que em no na nos nas com por para é são era foi ser está estão ao
à se me te lhe eu ele ela nós eles elas meu minha seu sua como mais muito também este esta isso já
"""
_DUTCH = """
de het een en of maar dat die dit deze is zijn was waren ben heb hebt heeft had ik jij je hij zij ze wij we u mij me
hem haar hun van in op te aan met voor door om bij uit over als dan ook nog wel er maar naar tot
"""

STOP_WORDS: Mapping[str, frozenset[str]] = {
    language: frozenset(text.split())
    for language, text in {
        "en": _ENGLISH,
        "de": _GERMAN,
        "fr": _FRENCH,
        "es": _SPANISH,
        "it": _ITALIAN,
        "pt": _PORTUGUESE,
        "nl": _DUTCH,
    }.items()
}
#: Least share of a text's words that are stop words of its language.
_LEAST_SHARE = 0.1


def language_of(words: Iterable[str]) -> str | None:
    """Return the language of words; None when it is none of those that are known here."""
    counts = Counter(words)
    shares = {language: sum(counts[word] for word in known) for language, known in STOP_WORDS.items()}
    language = max(shares, key=shares.__getitem__)
    return language if shares[language] >= max(1, _LEAST_SHARE * counts.total()) else None
