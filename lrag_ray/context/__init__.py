"""What the generator attends to: the KV window, ContextPolicy and one file per method."""
