"""Training of the retrieval encoder: which windows in which order, the loop, its checkpoints. Knows nothing of Ray."""
