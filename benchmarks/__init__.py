"""One file a benchmark; results as JSON, and plots made from it."""
