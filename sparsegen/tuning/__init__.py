"""Search over the knobs of schedules and keep the records."""
