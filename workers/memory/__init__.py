"""What pools and control workers do for memory."""
