"""Security: egress rules, the request guard, secrets and their masking, and texts and patterns from outside."""
