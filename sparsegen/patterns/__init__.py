"""Ship attention variants of the literature, one per file."""
