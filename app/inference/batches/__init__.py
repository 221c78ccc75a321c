"""Batches in the form of OpenAI's API: the requests of a file, done while models are idle."""
