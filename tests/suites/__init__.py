"""Shared test classes, one per noun: a new implementation joins one, it does not get its own tests."""
