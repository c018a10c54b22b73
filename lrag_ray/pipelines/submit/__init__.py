"""From a laptop to a cluster: what travels with a job, submitting, attaching and following."""
