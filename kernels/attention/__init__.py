"""Attention of packed texts."""
