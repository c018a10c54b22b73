"""Algorithm 1: the block loop, keyed noise, resume by replay."""
