"""The frozen generator: transformer, RoPE, attention, schedule, checkpoint loading, text and VAE adapters."""
