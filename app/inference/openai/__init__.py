"""Requests and answers in the form of OpenAI's API, and their translation into requests to an engine."""
