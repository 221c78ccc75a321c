"""The fleet: which models there are, where their files lie, and which devices hold them."""
