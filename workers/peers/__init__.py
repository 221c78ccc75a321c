"""Model files that hosts hand to each other: each agent may serve those of its host, and fetch those that it lacks."""
