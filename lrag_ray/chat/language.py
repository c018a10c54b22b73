"""A guess at the language of a short text: by script, then by small words. For prompts, not for linguistics."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

_WORDS = {
    "en": "the a an and of in on with is are to at by from as its his her into over while through their that this it "
    "for under or but not who which where has have he she they be its him across behind beside between among",
    "de": "der die das und ein eine einer mit im auf von ist sind den dem des zu bei aus während ihr sein durch über",
    "fr": "le la les un une et de des du dans sur avec est sont au aux par pour son sa ses qui en sous pendant",
    "es": "el la los las un una y de del en con es son por para su sus que al sobre mientras se entre como",
    "it": "il lo la gli un una e di del della nel nella con su sono per che dal al mentre tra come si le i",
    "pt": "o a os as um uma e de do da dos das no na com em para por que seu sua são enquanto ao sobre",
    "nl": "de het een en van in op met is zijn te aan door voor naar bij uit terwijl hun over die dat als",
    "pl": "i w na z ze do się jest są przez od po za nad pod oraz który która jej jego",
    "sv": "en ett och i på med är som av den det till för från över sin under när de",
    "da": "en et og i på med er som af den det til for fra over sin under når de ved gennem mens",
    "no": "en et og i på med er som av den det til for fra over sin under når de ved gjennom mens",
    "cs": "a v na s se je do z za od po pod nad pro přes mezi který která jeho její ve ke",
    "fi": "ja on ei se joka kun kuin sekä hän mutta ovat yli alla läpi kanssa vieressä taakse",
    "hu": "a az egy és is van nem hogy míg miközben alatt fölött mögött felett között át meg",
    "ro": "o un și în cu de la pe din este sunt prin peste care sub lângă în timp ce",
    "id": "yang di dari ke dengan untuk pada ini itu sebuah seekor adalah saat oleh balik",
    "vi": "một và của trong là có trên với khi những các qua sau dưới cho con",
    "tr": "bir ve ile bu için da de olan gibi üzerinde içinde çok daha kadar sonra",
}
_LATIN = {name: frozenset(words.split()) for name, words in _WORDS.items()}
_SCRIPTS = {
    "CJK": "zh", "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "CYRILLIC": "cyrillic", "ARABIC": "arabic",
    "GREEK": "el", "HEBREW": "he", "DEVANAGARI": "devanagari", "THAI": "th",
}  # fmt: skip
_LEAST_LETTERS = 3
_ACCENTED = {"": 0.2, "en": 0.4}
"""Share of words with a letter beyond a to z that English does not reach, without a small word of its and with one."""


def language_of(text: str) -> str:
    """Code of the likeliest language or script; empty where the text says too little, such as a name alone."""
    letters = [character for character in text if character.isalpha()]
    scripts = Counter(_script(character) for character in letters)
    if len(letters) < _LEAST_LETTERS and set(scripts) <= {"latin"}:
        return ""
    if not scripts:
        return ""
    if scripts["ja"] and scripts["ja"] + scripts["zh"] > len(letters) / 2:
        return "ja"
    # A Chinese character says what several Latin letters say.
    weights = {name: count * (3 if name in ("zh", "ja", "ko") else 1) for name, count in scripts.items()}
    script = max(weights, key=lambda name: weights[name])
    if script != "latin":
        return script
    words = re.findall(r"[^\W\d_]+", text.lower())
    hits = {name: sum(word in known for word in words) for name, known in _LATIN.items()}
    best = max(hits, key=lambda name: hits[name])
    # What English and another language share, such as "in", is not a sign of the other one.
    found = "" if not hits[best] else "en" if hits["en"] == hits[best] else best
    if found in _ACCENTED and sum(not word.isascii() for word in words) > _ACCENTED[found] * len(words):
        return "other"
    return found


def _script(character: str) -> str:
    name = unicodedata.name(character, "LATIN").split(" ")[0]
    return _SCRIPTS.get(name, "latin")
