"""What a start is: stages joined with the engine."""
