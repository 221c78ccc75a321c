"""The personal context of users: documents about their preferences, projects, knowledge and history."""
