"""all-MiniLM-L6-v2, converted from its package, computes the vectors of the original."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from app.catalog import files
from app.inference.requests import EmbedRequest, LongText
from app.memory.memories import gate
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions

pytestmark = pytest.mark.slow

NAME = "all-minilm:l6-v2"
#: Texts, their tokens by the original tokenizer (the library tokenizers), and the first numbers of their vectors, which
#: were computed from the original weights in double precision.
REFERENCE: tuple[tuple[str, list[int], list[float]], ...] = (
    (
        "The weather is lovely today.",
        [101, 1996, 4633, 2003, 8403, 2651, 1012, 102],
        [0.0192, 0.12009, 0.1596, 0.06707],
    ),
    (
        "It's so sunny outside!",
        [101, 2009, 1005, 1055, 2061, 11559, 2648, 999, 102],
        [-0.01869, 0.04152, 0.07432, 0.07843],
    ),
    (
        "He drove to the stadium.",
        [101, 2002, 5225, 2000, 1996, 3346, 1012, 102],
        [0.1365, 0.08227, -0.02526, 0.03045],
    ),
    (
        "Où est ma commande ? Je l'attends déjà depuis une semaine.",
        [
            101,
            15068,
            9765,
            5003,
            3094,
            2063,
            1029,
            15333,
            1048,
            1005,
            23933,
            2139,
            3900,
            2139,
            14289,
            2483,
            16655,
            7367,
            24238,
            2063,
            1012,
            102,
        ],
        [-0.07579, 0.02932, 0.06833, -0.06498],
    ),
    (
        "ÜBERGRÖSSE: Straße, NAÏVE café, ÅNGSTRÖM, ñandú",
        [
            101,
            19169,
            16523,
            15094,
            2063,
            1024,
            2358,
            27807,
            1010,
            15743,
            7668,
            1010,
            17076,
            15687,
            1010,
            16660,
            8566,
            102,
        ],
        [0.07477, 0.0279, -0.0178, 0.04217],
    ),
    (
        "UPPER lower MiXeD",
        [101, 3356, 2896, 3816, 102],
        [0.01273, -0.01369, 0.07446, 0.00932],
    ),
    (
        "我的包裹在哪里?它昨天就应该到了。",
        [101, 1855, 1916, 100, 100, 100, 100, 1962, 1029, 100, 100, 1811, 100, 100, 100, 100, 100, 1636, 102],
        [0.06986, 0.10171, 0.13433, 0.01677],
    ),
    (
        "e\u0301te\u0301 decomposed, I\u0307stanbul İstanbul",
        [101, 3802, 2063, 21933, 8737, 24768, 1010, 9960, 9960, 102],
        [0.00873, -0.00845, 0.06081, 0.03718],
    ),
    (
        "ххх русский текст, Ёлка",  # noqa: RUF001 Cyrillic is meant
        [
            101,
            1200,
            29750,
            29750,
            1195,
            29748,
            29747,
            29747,
            23925,
            15414,
            1197,
            15290,
            23925,
            29747,
            22919,
            1010,
            1185,
            29436,
            28598,
            102,
        ],
        [0.04627, 0.09925, -0.04695, -0.01789],
    ),
)
#: Similarities of the first three texts, as the documentation of sentence-transformers prints them for this model.
PUBLISHED = ((1.0, 0.6660, 0.1046), (0.6660, 1.0, 0.1411), (0.1046, 0.1411, 1.0))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    model = files.read_catalog().get(NAME)
    path = files.pull(model, tmp_path_factory.mktemp("minilm"))
    options = EngineOptions(
        slots=model.slots, threads=1, vectors=True, embedding_context=model.engine.embedding_context
    )
    engine = LlamaEngine(Path(path), options)
    yield engine
    engine.close()


def vectors(engine: LlamaEngine, *texts: str, policy: LongText = LongText.CHUNK) -> np.ndarray:
    return np.array(engine.embed(EmbedRequest(texts, policy), timeout=120).vectors)


def test_similarities_are_those_that_are_published_for_the_original(engine: LlamaEngine) -> None:
    found = vectors(engine, *(text for text, _, _ in REFERENCE[:3]))
    np.testing.assert_allclose(found @ found.T, PUBLISHED, atol=2e-4)


@pytest.mark.parametrize(("text", "tokens", "beginning"), REFERENCE, ids=[text[:20] for text, _, _ in REFERENCE])
def test_accents_case_and_scripts_become_the_tokens_and_the_vector_of_the_original(
    engine: LlamaEngine, text: str, tokens: list[int], beginning: list[float]
) -> None:
    assert engine.model.tokenize(text, add_special=True, parse_special=False) == tokens
    np.testing.assert_allclose(vectors(engine, text)[0][:4], beginning, atol=5e-4)


def test_a_truncated_text_is_its_beginning_with_the_closing_token(engine: LlamaEngine) -> None:
    limit = 256
    words = "llama " * 600
    tokens = engine.model.tokenize(words, add_special=True, parse_special=False)
    kept = words
    while len(engine.model.tokenize(kept, add_special=True, parse_special=False)) > limit:
        kept = kept[:-6]
    assert len(tokens) > limit == len(engine.model.tokenize(kept, add_special=True, parse_special=False))
    found = engine.embed(EmbedRequest((words,), LongText.TRUNCATE), timeout=120)
    np.testing.assert_allclose(found.vectors[0], vectors(engine, kept)[0], atol=1e-5)
    assert found.tokens_in == limit, "what was computed is counted"


def test_a_long_text_is_represented_as_a_whole(engine: LlamaEngine) -> None:
    about_llamas = "The llama carries parcels over the mountains. " * 60
    about_rates = "The central bank raised its interest rates again. " * 60
    whole, cut, rates = (
        vectors(engine, about_llamas + about_rates)[0],
        vectors(engine, about_llamas + about_rates, policy=LongText.TRUNCATE)[0],
        vectors(engine, "The central bank raised its interest rates again.")[0],
    )
    assert whole @ rates > cut @ rates + 0.2, "the second half counts too"


#: Statements that mean the same, and such that only look alike.
PARAPHRASES = (
    ("The user resides in Porto.", "The user lives in Porto."),
    ("The user is employed at Acme as a nurse.", "The user works as a nurse at Acme."),
    ("The user has a cat called Minka.", "The name of the user's cat is Minka."),
    ("The user purchased a house in Graz.", "The user bought a home in Graz."),
    ("The user has two children.", "The user is the parent of two kids."),
    ("The user dislikes mushrooms.", "The user does not like mushrooms."),
)
OTHERS = (
    ("The user bought a house in Graz.", "The user sold a house in Graz."),
    ("The user starts work at 9.", "The user ends work at 9."),
    ("The user is learning Spanish.", "The user teaches Spanish."),
    ("The user's sister lives in Graz.", "The user's brother lives in Graz."),
    ("The user prefers long answers.", "The user prefers short answers."),
    ("The user's car is red.", "The user's bike is red."),
    ("The user likes tea.", "The user likes coffee."),
    ("The user works as a nurse.", "The user works as a doctor."),
    ("The user's birthday is on 3 May.", "The user's birthday is on 4 May."),
    ("The user eats meat.", "The user does not eat meat."),
    ("The user is allergic to peanuts.", "The user loves peanuts."),
)


def test_the_write_gate_of_memories_knows_paraphrases_by_these_vectors(engine: LlamaEngine) -> None:
    def means_the_same(one: str, other: str) -> bool:
        first, second = vectors(engine, one, other)
        return gate.means_the_same(one, other, float(first @ second))

    assert [pair for pair in PARAPHRASES if not means_the_same(*pair)] == []
    assert [pair for pair in OTHERS if means_the_same(*pair)] == []
