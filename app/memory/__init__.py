"""What models remember: the parts of a conversation that go into a prompt."""
