"""Commands for files and batches."""
