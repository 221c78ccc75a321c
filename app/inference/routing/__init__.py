"""The choice of the model that serves a request: by a selector, an alias, or because another one does not serve."""
