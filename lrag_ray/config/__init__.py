"""Typed run configuration: schema, YAML loading, --set overrides, presets."""
