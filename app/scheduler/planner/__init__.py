"""The planner: a pure function from a cluster, its demand and the time to a plan."""
