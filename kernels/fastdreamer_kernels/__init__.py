"""The hot operations of a Dreamer update, each with a plain PyTorch reference that says what is right."""
