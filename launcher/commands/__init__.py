"""What each command does; imported only when it runs, since most of it needs pydantic, yaml and rich."""
