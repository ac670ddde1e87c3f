"""Define the verbs of the language, one per file."""
