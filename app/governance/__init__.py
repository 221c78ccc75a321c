"""The side that runs by itself: signals, rules, actions, alerts, jobs, probes."""
