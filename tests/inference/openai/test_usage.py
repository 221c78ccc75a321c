"""The token counts of an answer in OpenAI's form."""

from __future__ import annotations

from app.inference.openai import answers
from app.inference.openai.chat import ChatRequest
from app.inference.openai.responses import document as responses
from app.inference.openai.responses.request import ResponsesRequest
from tests.inference.openai.test_thinking import HELLO, RUN, generated


def test_predictions_are_counted_over_all_texts_as_accepted_and_rejected() -> None:
    text = generated(tokens_drafted=5, tokens_accepted=3, alternatives=(generated(tokens_drafted=2),))
    details = answers.usage(text)["completion_tokens_details"]
    assert details == {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 4}
    thought = answers.usage(generated(reasoning_tokens=2, tokens_drafted=1, tokens_accepted=1))
    assert thought["completion_tokens_details"] == {
        "reasoning_tokens": 2,
        "accepted_prediction_tokens": 1,
        "rejected_prediction_tokens": 0,
    }


def test_a_response_needs_no_thinking_to_count_its_tokens() -> None:
    """Responses have no field for predictions."""
    chat = answers.document(ChatRequest.model_validate(HELLO), generated(tokens_drafted=5, tokens_accepted=3), RUN, 0)
    asked = ResponsesRequest.model_validate({"model": "m", "input": "Hello."})
    made = responses.answered(asked, RUN, chat)
    assert made["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}
