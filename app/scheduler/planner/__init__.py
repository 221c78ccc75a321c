"""The planner: from a cluster, its demand and the time to what is started and stopped. Pure."""
