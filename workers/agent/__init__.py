"""The agent of a host: it starts and stops pools until the observed state is the desired one."""
