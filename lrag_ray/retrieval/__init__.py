"""Descriptors, retrieval encoder, history bank and similarity search."""
