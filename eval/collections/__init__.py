"""Test collections and where they are read from."""
