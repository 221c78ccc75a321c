"""What models did: operations, outcomes, latencies and tokens, by model, kind of operation and namespace."""
