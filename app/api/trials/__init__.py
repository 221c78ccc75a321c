"""The resources of trials: splits of calls and runs between a control and candidates."""
