"""Access of agents: their roles in the database, and the invitations with which hosts join."""
