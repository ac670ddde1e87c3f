"""Hold the Jinja2 templates of everything that is generated as text."""
