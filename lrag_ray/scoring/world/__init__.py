"""Suite of the tiny world, where the truth of every frame is known."""
