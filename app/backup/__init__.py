"""Backups: the database and the catalogue of an installation in one archive, and what makes an installation of it."""
