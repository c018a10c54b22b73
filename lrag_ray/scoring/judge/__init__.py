"""The judge suite: a vision-language model answers questions about videos without knowing what made them."""
