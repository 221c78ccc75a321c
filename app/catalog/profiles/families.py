"""
The families that are known, with the marks of their models.

The first family whose marks fit is that of a model. Marks are parts of the publishers' own templates:
`docs/profiles.md` has them in a table.
"""

from __future__ import annotations

from collections.abc import Mapping

from app.catalog.profiles.family import Family, Marks, RecommendedSampling, ThinkingTags

#: DeepSeek's control tokens have a full-width bar.
_BAR = "\uff5c"
_CHATML = ("<|im_start|>",)
_THINK = ThinkingTags()
_QWEN_PLAIN = RecommendedSampling(temperature=0.7, top_p=0.8, top_k=20, min_p=0.0)
_QWEN_THINKING = RecommendedSampling(temperature=0.6, top_p=0.95, top_k=20, min_p=0.0)
_LLAMA = RecommendedSampling(temperature=0.6, top_p=0.9)
_LLAMA_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
_QWEN_ENDS = ("<|im_end|>", "<|endoftext|>")

#: In the order in which they are tried.
MARKS: tuple[Marks, ...] = (
    Marks(
        Family(
            "deepseek-r1",
            "DeepSeek-R1 and its distils of Qwen and Llama",
            tools="deepseek",
            thinking=_THINK,
            calls_as_texts=True,
            ends=(f"<{_BAR}end▁of▁sentence{_BAR}>",),
            sampling=RecommendedSampling(temperature=0.6, top_p=0.95),
            published="generation_config.json",
        ),
        ("qwen2", "qwen3", "llama", "deepseek2"),
        (f"<{_BAR}Assistant{_BAR}>", "</think>"),
    ),
    Marks(
        Family(
            "qwen3-coder",
            "Qwen3-Coder",
            tools="coder",
            ends=_QWEN_ENDS,
            sampling=RecommendedSampling(temperature=0.7, top_p=0.8, top_k=20, repeat_penalty=1.05),
            published="generation_config.json",
        ),
        ("qwen3", "qwen3moe", "qwen3next"),
        (*_CHATML, "<function="),
    ),
    Marks(
        Family(
            "qwen3",
            "Qwen3 with a switch for thinking",
            tools="hermes",
            thinking=_THINK,
            ends=_QWEN_ENDS,
            sampling=_QWEN_THINKING,
            sampling_unthinking=_QWEN_PLAIN,
            published="model card, Best Practices",
        ),
        ("qwen3", "qwen3moe"),
        (*_CHATML, "enable_thinking"),
    ),
    Marks(
        Family(
            "qwen3-thinking",
            "Qwen3 2507 Thinking, which always thinks",
            tools="hermes",
            thinking=_THINK,
            ends=_QWEN_ENDS,
            sampling=_QWEN_THINKING,
            published="model card, Best Practices",
        ),
        ("qwen3", "qwen3moe", "qwen3next"),
        (*_CHATML, "<|im_start|>assistant\\n<think>\\n'"),
    ),
    Marks(
        Family(
            "qwen3-instruct",
            "Qwen3 2507 Instruct, which never thinks",
            tools="hermes",
            ends=_QWEN_ENDS,
            sampling=_QWEN_PLAIN,
            published="model card, Best Practices",
        ),
        ("qwen3", "qwen3moe", "qwen3next"),
        _CHATML,
    ),
    Marks(
        Family(
            "qwq",
            "QwQ 32B",
            tools="hermes",
            thinking=_THINK,
            ends=_QWEN_ENDS,
            sampling=RecommendedSampling(temperature=0.6, top_p=0.95, top_k=40),
            published="generation_config.json",
        ),
        ("qwen2",),
        (*_CHATML, "<think>"),
    ),
    Marks(
        Family(
            "qwen2.5",
            "Qwen2.5 and Qwen2.5-Coder",
            tools="hermes",
            ends=_QWEN_ENDS,
            sampling=RecommendedSampling(temperature=0.7, top_p=0.8, top_k=20, repeat_penalty=1.05),
            published="generation_config.json, of 3B and larger",
        ),
        ("qwen2", "qwen2moe"),
        (*_CHATML, "created by Alibaba Cloud", "<tool_call>"),
    ),
    Marks(
        Family(
            "llama3.1",
            "Llama 3.1, 3.2 and 3.3",
            tools="llama3",
            ends=_LLAMA_ENDS,
            sampling=_LLAMA,
            published="generation_config.json",
        ),
        ("llama",),
        ("<|start_header_id|>", '"parameters": '),
    ),
    Marks(
        Family("llama3", "Llama 3", ends=_LLAMA_ENDS, sampling=_LLAMA, published="generation_config.json"),
        ("llama",),
        ("<|start_header_id|>",),
        ("tools",),
    ),
    Marks(
        Family(
            "gemma3",
            "Gemma 3",
            tools="llama3",
            ends=("<end_of_turn>",),
            sampling=RecommendedSampling(temperature=1.0, top_p=0.95, top_k=64),
            published="generation_config.json",
        ),
        ("gemma3", "gemma3n"),
        ("<start_of_turn>",),
    ),
    Marks(
        Family(
            "phi4-reasoning",
            "Phi-4-reasoning and Phi-4-mini-reasoning",
            thinking=_THINK,
            ends=("<|im_end|>", "<|end|>"),
            sampling=RecommendedSampling(temperature=0.8, top_p=0.95, top_k=50),
            published="model card",
        ),
        ("phi3",),
        (),
        names=("reasoning",),
    ),
    Marks(
        Family(
            "phi4-mini",
            "Phi-4-mini, without published sampling",
            tools="phi4",
            tools_in_system=True,
            calls_in_content=True,
            ends=("<|end|>",),
        ),
        ("phi3",),
        ("<|tool|>", "<|end|>"),
    ),
    Marks(
        Family("phi4", "Phi-4 14B, without published sampling", ends=("<|im_end|>",)),
        ("phi3",),
        ("<|im_sep|>",),
    ),
    Marks(
        Family("phi3", "Phi-3 and Phi-3.5, without published sampling", ends=("<|end|>",)),
        ("phi3",),
        ("<|end|>", "<|assistant|>"),
        ("<|tool|>",),
    ),
    Marks(
        Family(
            "magistral",
            "Magistral, which thinks between tags of its own",
            tools="mistral-args",
            thinking=ThinkingTags("[THINK]", "[/THINK]"),
            ends=("</s>",),
            sampling=RecommendedSampling(temperature=0.7, top_p=0.95),
            published="model card",
        ),
        ("llama", "mistral3"),
        ("[INST]", "[THINK]", "[ARGS]"),
    ),
    Marks(
        Family(
            "mistral-small-3.2",
            "Mistral Small 3.2, Devstral and others with [ARGS]",
            tools="mistral-args",
            ends=("</s>",),
            sampling=RecommendedSampling(temperature=0.15),
            published="model card",
        ),
        ("llama", "mistral3"),
        ("[INST]", "[TOOL_CALLS]", "[ARGS]"),
    ),
    Marks(
        Family(
            "mistral-small",
            "Mistral Small 3 and 3.1",
            tools="mistral",
            ends=("</s>",),
            sampling=RecommendedSampling(temperature=0.15),
            published="model card",
        ),
        ("llama", "mistral3"),
        ("[INST]", "[TOOL_CALLS]", "[SYSTEM_PROMPT]"),
    ),
    Marks(
        Family(
            "mistral-nemo",
            "Mistral Nemo",
            tools="mistral",
            ends=("</s>",),
            sampling=RecommendedSampling(temperature=0.3),
            published="model card",
        ),
        ("llama",),
        ("[INST]", "[TOOL_CALLS]"),
        names=("nemo",),
    ),
    Marks(
        Family(
            "mistral",
            "Mistral 7B v0.3 and others of its form",
            tools="mistral",
            ends=("</s>",),
        ),
        ("llama",),
        ("[INST]", "[TOOL_CALLS]"),
    ),
    Marks(
        Family(
            "gpt-oss",
            "GPT-OSS",
            tools="harmony",
            has_channels=True,
            ends=("<|return|>", "<|call|>"),
            sampling=RecommendedSampling(temperature=1.0, top_p=1.0),
            published="the publisher's repository",
        ),
        ("gpt-oss",),
        ("<|channel|>",),
    ),
    Marks(
        Family("thinking", "any other model whose template has thinking between tags", thinking=_THINK),
        (),
        ("<think>", "</think>"),
    ),
)

FAMILIES: Mapping[str, Family] = {marks.family.name: marks.family for marks in MARKS}
