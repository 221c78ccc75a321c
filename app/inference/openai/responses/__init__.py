"""Responses: the newer form of OpenAI's API for answers, as a form of chat completions."""
