"""Stages that take no time, for tests of the launcher."""
