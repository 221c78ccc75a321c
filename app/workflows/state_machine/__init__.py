"""The state machine of runs: states, events, transitions. Values only."""
