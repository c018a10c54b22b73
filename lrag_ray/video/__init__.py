"""Streaming latent-to-pixel decode, mp4 writing, frame reading."""
