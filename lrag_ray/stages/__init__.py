"""What a worker does. Never imports Ray."""
