"""Vulkan devices: which there are, where they are, and how much of their memory is free."""
