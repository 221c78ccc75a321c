"""Tests of the catalogue and its entries."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.catalog import catalog, files
from app.catalog.catalog import Catalog
from app.catalog.model import Model, slug
from app.catalog.source import ConvertedSource, FileSource, HubSource, PackageSource, UrlSource, split_parts
from app.kernel.errors import InvalidCatalog, NotFound, Problem

ENTRY = """
[[models]]
name = "tiny:1m"
use_cases = ["chat"]
source = { hf = "owner/repo", file = "tiny.gguf" }
"""


def entry(**values: str) -> str:
    """Returns a TOML entry in which these values replace the defaults."""
    given = {"name": '"tiny:1m"', "use_cases": '["chat"]', "source": '{ hf = "o/r", file = "t.gguf" }'} | values
    return "[[models]]\n" + "\n".join(f"{key} = {value}" for key, value in given.items()) + "\n"


def engine(table: str, **values: str) -> str:
    """Returns a TOML entry with this table `[models.engine]`."""
    return f"{entry(**values)}[models.engine]\n{table}\n"


def problems(text: str, origin: str = "/etc/arriero/models.toml") -> tuple[Problem, ...]:
    with pytest.raises(InvalidCatalog) as caught:
        catalog.parse(text, origin)
    assert origin in str(caught.value)
    return caught.value.problems


def test_an_entry_has_defaults_for_most_machines() -> None:
    model = catalog.parse(ENTRY, "x").get("tiny:1m")
    assert (model.context, model.slots, model.kv.k, model.kv.v) == (4096, 4, "f16", "f16")
    assert model.flash_attention == "auto"
    assert model.source == HubSource(hf="owner/repo", file="tiny.gguf", revision="main")
    assert not model.serves_embeddings


def test_every_value_of_an_entry_is_read() -> None:
    text = """
[[models]]
name = "nomic-embed:v1.5"
description = "d"
licence = "Apache-2.0"
use_cases = ["embed", "search"]
context = 2048
slots = 8
kv = { k = "q8_0", v = "q4_0" }
flash_attention = "on"
source = { url = "https://example.org/a/b.gguf?x=1", size = 12, sha256 = "%s" }

[models.prompt]
chat_template = "{{ messages }}"
system = "user"
arguments = { enable_thinking = false, depth = 3 }
stop = ["</s>"]
query_prefix = "q: "
document_prefix = "d: "
default_system = "Be kind."
tools = "hermes"

[models.engine]
layout = "streams"
threads = 6
step_latency = 1
tensor_split = [3, 1.5]
rope = { scaling = "yarn", freq_base = 10000 }

[[models.engine.loras]]
name = "style"
scale = 0.5
source = { path = "style.gguf" }
""" % ("A" * 64)
    model = catalog.parse(text, "/etc/models.toml").get("nomic-embed:v1.5")
    assert model.serves_embeddings
    assert (model.context, model.slots, model.kv.k, model.kv.v, model.flash_attention) == (
        2048,
        8,
        "q8_0",
        "q4_0",
        "on",
    )
    assert isinstance(model.source, UrlSource)
    assert (model.source.name, model.source.size, model.source.sha256) == ("b.gguf", (12,), ("a" * 64,))
    assert model.prompt.arguments == {"enable_thinking": False, "depth": 3}
    assert (model.prompt.system, model.prompt.stop) == ("user", ("</s>",))
    assert (model.prompt.query_prefix, model.prompt.document_prefix) == ("q: ", "d: ")
    assert (model.prompt.default_system, model.prompt.tools) == ("Be kind.", "hermes")
    assert (model.engine.layout, model.engine.threads, model.engine.step_latency) == ("streams", 6, 1.0)
    assert model.engine.tensor_split == (3.0, 1.5)
    assert (model.engine.rope.scaling, model.engine.rope.freq_base) == ("yarn", 10000.0)
    (lora,) = model.engine.loras
    assert (lora.name, lora.scale, lora.source) == ("style", 0.5, FileSource(path="/etc/style.gguf"))


@pytest.mark.parametrize(
    ("text", "where", "message", "accepted"),
    [
        (entry(name='"Tiny"'), "models[0].name", "'Tiny' is not accepted", "family:size"),
        (entry(name='"tiny:1m:x"'), "models[0].name", "is not accepted", "family:size"),
        (entry(name="7"), "models[0].name", "7 is not accepted", "family:size"),
        (entry(context="0"), "models[0].context", "0 is not accepted", "32 to 16777216"),
        (entry(context='"4096"'), "models[0].context", "'4096' is not accepted", "tokens of one slot"),
        (entry(context="true"), "models[0].context", "True is not accepted", "tokens of one slot"),
        (entry(slots="2.5"), "models[0].slots", "2.5 is not accepted", "1 to 128"),
        (entry(slots="129"), "models[0].slots", "129 is not accepted", "1 to 128"),
        (entry(kv='{ k = "q9" }'), "models[0].kv.k", "'q9' is not accepted", "q8_0"),
        (entry(kv='{ key = "f16" }'), "models[0].kv.key", "no such key", "k, v"),
        (entry(flash_attention="true"), "models[0].flash_attention", "True is not accepted", "auto, on or off"),
        (entry(use_cases="[]"), "models[0].use_cases", "[] is not accepted", "summarise"),
        (entry(use_cases='["Chat"]'), "models[0].use_cases[0]", "'Chat' is not accepted", "lower case"),
        (entry(use_cases='"chat"'), "models[0].use_cases", "'chat' is not accepted", "a list"),
        (entry(contxt="1"), "models[0].contxt", "no such key", "did you mean context?"),
        (entry(origin='"x"'), "models[0].origin", "no such key", "description"),
        (entry(source='{ hf = "o/r" }'), "models[0].source.file", "is missing", ".gguf"),
        (entry(source='{ hf = "o/r", file = "t.gguf", rev = "x" }'), "models[0].source.rev", "no such key", "revision"),
        (
            entry(source='{ hf = "repo", file = "t.gguf" }'),
            "models[0].source.hf",
            "'repo' is not accepted",
            "owner/name",
        ),
        (
            entry(source='{ hf = "o/r", file = "../t.gguf" }'),
            "models[0].source.file",
            "leaves the folder of the source",
            "'..'",
        ),
        (
            entry(source='{ hf = "o/r", file = "/t.gguf" }'),
            "models[0].source.file",
            "leaves the folder of the source",
            "'..'",
        ),
        (entry(source='{ hf = "o/r", file = "t.bin" }'), "models[0].source.file", "does not end in .gguf", ".gguf"),
        (
            entry(source='{ hf = "o/r", file = "t.gguf", revision = "../x" }'),
            "models[0].source.revision",
            "'../x' is not accepted",
            "a commit, tag or branch",
        ),
        (
            entry(source='{ hf = "o/r", file = "t-00002-of-00003.gguf" }'),
            "models[0].source.file",
            "is part 2 of 3: name the first part",
            "",
        ),
        (
            entry(source='{ hf = "o/r", path = "t.gguf" }'),
            "models[0].source",
            "exactly one of the keys path, package",
            "",
        ),
        (entry(source="{ }"), "models[0].source", "exactly one of the keys path, package", ""),
        (entry(source='"t.gguf"'), "models[0].source", "exactly one of the keys path, package", ""),
        (entry(source='{ url = "ftp://h/t.gguf" }'), "models[0].source.url", "not an http:// or https://", ""),
        (entry(source='{ url = "https://u:p@h/t.gguf" }'), "models[0].source.url", "user or password", ""),
        (entry(source='{ url = "https://h/t" }'), "models[0].source", "set `file` to that name", ""),
        (
            entry(source='{ url = "https://h/t", file = "../t.gguf" }'),
            "models[0].source",
            "leaves the folder of the source",
            "",
        ),
        (
            entry(source='{ url = "https://h/%2e%2e%2ft.gguf" }'),
            "models[0].source",
            "leaves the folder of the source",
            "",
        ),
        (
            entry(source='{ hf = "o/r", file = "t.gguf", sha256 = "abc" }'),
            "models[0].source.sha256[0]",
            "'abc' is not accepted",
            "64 hexadecimal digits",
        ),
        (
            entry(source='{ hf = "o/r", file = "t-00001-of-00003.gguf", size = [1, 2] }'),
            "models[0].source",
            "size has 2 values, the source has 3 files",
            "",
        ),
        (
            entry(source='{ package = "p", file = "t.gguf", chunks = [{ package = "q", fil = "x" }] }'),
            "models[0].source.chunks[0].fil",
            "no such key",
            "did you mean file?",
        ),
        (
            entry(flash_attention='"off"', kv='{ v = "q8_0" }'),
            "models[0].kv.v",
            "keeps q8_0 only with flash attention",
            "bf16, f16, f32",
        ),
        (entry(prompt='{ sytem = "user" }'), "models[0].prompt.sytem", "no such key", "did you mean system?"),
        (entry(prompt='{ stop = [""] }'), "models[0].prompt.stop[0]", "'' is not accepted", "a list of texts"),
        (engine("btch = 64"), "models[0].engine.btch", "no such key", "did you mean batch?"),
        (engine("batch = 8"), "models[0].engine.batch", "8 is not accepted", "32 to 65536"),
        (engine('layout = "rows"'), "models[0].engine.layout", "'rows' is not accepted", "unified or streams"),
        (engine("threads = 0"), "models[0].engine.threads", "0 is not accepted", "1 to 1024"),
        (engine("reuse = 1"), "models[0].engine.reuse", "1 is not accepted", "true or false"),
        (engine("step_latency = 0"), "models[0].engine.step_latency", "0 is not accepted", "more than 0"),
        (engine("step_latency = true"), "models[0].engine.step_latency", "True is not accepted", "seconds"),
        (engine('tensor_split = ["a"]'), "models[0].engine.tensor_split[0]", "'a' is not accepted", "up to 16 numbers"),
        (engine('rope = { scale = "yarn" }'), "models[0].engine.rope.scale", "no such key", "did you mean scaling?"),
        (engine('rope = { scaling = "more" }'), "models[0].engine.rope.scaling", "'more' is not accepted", "yarn"),
        (engine('loras = [{ name = "a" }]'), "models[0].engine.loras[0].source", "is missing", "exactly one"),
        (
            engine('loras = [{ name = "A", source = { path = "/a.gguf" } }]'),
            "models[0].engine.loras[0].name",
            "'A' is not accepted",
            "lower-case",
        ),
        (
            engine('loras = [{ name = "a", source = { path = "/a.bin" } }]'),
            "models[0].engine.loras[0].source.path",
            "does not end in .gguf",
            "",
        ),
        (
            engine("loras = [" + '{ name = "a", source = { path = "/a.gguf" } },' * 2 + "]"),
            "models[0].engine.loras",
            "same name",
            "each name once",
        ),
        (
            engine("draft = { most = 4 }"),
            "models[0].engine.draft.source",
            "is missing",
            "exactly one",
        ),
        (
            engine('draft = { source = { path = "/a.gguf" }, most = 17 }'),
            "models[0].engine.draft.most",
            "17 is not accepted",
            "from 1 to 16",
        ),
        (
            engine('speculation = "off"\ndraft = { source = { path = "/a.gguf" } }'),
            "models[0].engine.draft",
            "speculation is off",
            "speculation = 'auto'",
        ),
        (
            engine('reproducible = true\ndraft = { source = { path = "/a.gguf" } }'),
            "models[0].engine.draft",
            "reproducible is on",
            "reproducible = false",
        ),
        (
            entry(slots="64") + "[models.engine]\nbatch = 32\n",
            "models[0].engine.batch",
            "fewer than the 64 slots",
            "64",
        ),
        (engine("reproducible = true", kv='{ v = "q8_0" }'), "models[0].kv.v", "reproducible turns it off", "f16"),
        (engine("reproducible = true", flash_attention='"on"'), "models[0].flash_attention", "reproducible", "auto"),
        (engine("tensor_split = [0, 0]"), "models[0].engine.tensor_split", "nothing to split", "a share above 0"),
        (entry() + entry(), "models[1].name", "is already the name of models[0]", "each name once"),
        (entry(name='"a:b-c"') + entry(name='"a-b:c"'), "models[1].name", "has the slug 'a-b-c'", "a unique slug"),
        (entry(name='"a:1.5"') + entry(name='"a:1-5"'), "models[1].name", "has the slug 'a-1-5'", "a unique slug"),
        ("model = 3\n", "model", "no such top-level key", "[[models]]"),
        ("models = 3\n", "models", "not a list of tables", "[[models]]"),
    ],
)
def test_an_invalid_entry_is_rejected_with_the_accepted_values(
    text: str, where: str, message: str, accepted: str
) -> None:
    found = {problem.where: problem for problem in problems(text)}
    assert where in found
    assert message in found[where].message
    assert accepted in found[where].accepted


def test_all_problems_are_reported_together_with_their_lines() -> None:
    text = entry() + "\n" + entry(name='"b:1"', context="1", slots="0") + "\n[models.prompt]\nstop = 1\n"
    found = {problem.where: problem.line for problem in problems(text)}
    lines = text.splitlines()
    assert found == {
        "models[1].context": lines.index("context = 1") + 1,
        "models[1].slots": lines.index("slots = 0") + 1,
        "models[1].prompt.stop": lines.index("stop = 1") + 1,
    }


def test_all_conflicting_options_are_reported_together_with_their_lines() -> None:
    text = engine("batch = 32\nreproducible = true\ntensor_split = [0]", slots="40", kv='{ k = "q8_0", v = "q8_0" }')
    found = {problem.where: problem.line for problem in problems(text)}
    lines = text.splitlines()
    assert found == {
        "models[0].engine.batch": lines.index("batch = 32") + 1,
        "models[0].engine.tensor_split": lines.index("tensor_split = [0]") + 1,
        "models[0].kv.v": next(number for number, line in enumerate(lines, 1) if line.startswith("kv =")),
    }


def test_invalid_toml_is_rejected_with_its_line() -> None:
    (problem,) = problems(ENTRY + "\ncontext = = 3\n")
    assert problem.line == len(ENTRY.splitlines()) + 2
    assert "not valid TOML" in problem.message


def test_an_empty_catalogue_is_valid() -> None:
    assert catalog.parse("", "x").models == ()


def test_a_relative_path_is_relative_to_the_catalogue() -> None:
    text = entry(source='{ path = "../files/t.gguf" }')
    assert catalog.parse(text, "/etc/arriero/models.toml").get("tiny:1m").source == FileSource(
        path="/etc/arriero/../files/t.gguf"
    )
    for path in ("/abs/t.gguf", "~/t.gguf"):
        text = entry(source=f'{{ path = "{path}" }}')
        assert catalog.parse(text, "/etc/m.toml").get("tiny:1m").source == FileSource(path=path)


def test_the_later_entry_of_a_name_wins_at_the_earlier_position() -> None:
    first = catalog.parse(entry(name='"a:1"') + entry(name='"b:1"'), "one.toml")
    second = catalog.parse(entry(name='"c:1"') + entry(name='"a:1"', slots="9"), "two.toml")
    merged = catalog.merge([first, second])
    assert merged.names == ("a:1", "b:1", "c:1")
    assert merged.get("a:1").slots == 9
    assert merged.origins == {"a:1": "two.toml", "b:1": "one.toml", "c:1": "two.toml"}


def test_two_catalogues_cannot_have_names_with_the_same_slug() -> None:
    first = catalog.parse(entry(name='"a:b-c"'), "one.toml")
    second = catalog.parse(entry(name='"a-b:c"'), "two.toml")
    with pytest.raises(InvalidCatalog, match=r"'a-b-c' \(two\.toml\), and so has a:b-c \(one\.toml\)"):
        catalog.merge([first, second])


def test_the_error_for_an_unknown_name_lists_the_known_names() -> None:
    known = catalog.parse(ENTRY, "x")
    assert known.find("huge:1t") is None
    with pytest.raises(NotFound, match="no model 'huge:1t'; there are: tiny:1m"):
        known.get("huge:1t")


def test_models_are_found_by_use_case() -> None:
    known = catalog.parse(entry() + entry(name='"e:1"', use_cases='["embed", "search"]'), "x")
    assert [model.name for model in known.with_use_case("embed")] == ["e:1"]
    assert known.with_use_case("translate") == ()


def test_a_slug_has_only_letters_digits_and_single_hyphens() -> None:
    assert slug("smollm2:135m") == "smollm2-135m"
    assert slug("qwen3:0.6b") == "qwen3-0-6b"
    assert slug("a_b:c._d") == "a-b-c-d"


def test_the_parts_of_a_split_file_follow_from_the_first() -> None:
    assert split_parts("a/x-00001-of-00002.gguf") == ("a/x-00001-of-00002.gguf", "a/x-00002-of-00002.gguf")
    assert split_parts("x.gguf") == ("x.gguf",)


def test_the_shipped_catalogue_is_valid_and_its_files_can_be_verified() -> None:
    shipped = catalog.parse(files.shipped_catalog().read_text(encoding="utf-8"), "shipped")
    assert {"smollm2:135m", "gemma3:270m"} <= set(shipped.names)
    for model in shipped:
        assert model.description
        assert model.licence
        if isinstance(model.source, ConvertedSource):  # what it is made from is verified
            assert {"model.safetensors", "vocab.txt", "config.json"} <= model.source.inputs.keys()
            continue
        assert model.source.sha256
        assert model.source.size
        if isinstance(model.source, HubSource):
            assert len(model.source.revision) == 40, "a branch can change"


def test_a_catalogue_survives_a_round_trip_through_toml() -> None:
    shipped = catalog.parse(files.shipped_catalog().read_text(encoding="utf-8"), "shipped")
    assert catalog.parse(catalog.to_toml(shipped), "again").models == shipped.models


_words = st.text(min_size=1, max_size=12)


@given(
    description=_words,
    stop=st.lists(_words, max_size=3),
    template=st.none() | _words,
    arguments=st.dictionaries(_words, st.booleans() | st.integers(-(2**53), 2**53) | _words, max_size=3),
    context=st.integers(32, 16_777_216),
    engine=st.fixed_dictionaries(
        {},
        optional={
            "layout": st.sampled_from(["unified", "streams"]),
            "step_latency": st.floats(0.001, 60),
            "gpu_layers": st.integers(-1, 200),
            "tensor_split": st.lists(st.floats(0.5, 9), max_size=3),
            "rope": st.fixed_dictionaries({"scaling": st.sampled_from(["none", "yarn"])}),
            "loras": st.just([{"name": "a", "scale": 2, "source": {"hf": "o/r", "file": "a.gguf", "size": 7}}]),
        },
    ),
)
def test_any_entry_survives_a_round_trip_through_toml(
    description: str,
    stop: list[str],
    template: str | None,
    arguments: dict[str, bool | int | str],
    context: int,
    engine: dict[str, Any],
) -> None:
    model = Model.model_validate(
        {
            "name": "a:1",
            "description": description,
            "use_cases": ["chat"],
            "context": context,
            "source": {"package": "p", "file": "a/b.gguf"},
            "prompt": {"stop": stop, "arguments": arguments, "chat_template": template},
            "engine": engine,
        }
    )
    assert isinstance(model.source, PackageSource)
    assert catalog.parse(catalog.to_toml([model]), "x") == Catalog((model,), {"a:1": "x"})
