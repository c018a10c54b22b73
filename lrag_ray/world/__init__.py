"""A small procedural world with known truth: scenes, and the training of a generator and a VAE on them."""
