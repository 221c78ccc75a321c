"""How notifications are delivered: a module for each kind of channel."""
