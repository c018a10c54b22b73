"""Ray's job API: where it answers, jobs and their states, and logs that survive cut connections."""
