"""Run directory, commit records, storage addresses."""
