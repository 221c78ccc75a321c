"""What actions do: a function for each kind, and one that takes it back."""
