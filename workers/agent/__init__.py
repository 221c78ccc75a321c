"""The agent of a host: it starts and stops pools until observed equals desired."""
