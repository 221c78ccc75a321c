"""The functions of the real-estate workflows: what is computed, read and checked by code and never by a model."""
