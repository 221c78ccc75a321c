"""Registration: models that users add to the catalogue of a data directory."""
