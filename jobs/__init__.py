"""Ray job entry points, thin over the Python API."""
