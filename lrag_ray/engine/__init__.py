"""Ray: actors, the rollout pool, scoring stages, progress."""
