"""Hold the schedules, one (family, target) pair per file."""
