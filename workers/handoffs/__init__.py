"""What control workers do for hand-offs."""
