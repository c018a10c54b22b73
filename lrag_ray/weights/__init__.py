"""Weights: what a configuration needs, where it is published, pulling, checking, converting and caching it."""
