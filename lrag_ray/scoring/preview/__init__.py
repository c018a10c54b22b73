"""The preview suite: cheap, training-free measures. Not VBench."""
