"""Predicted time and memory of a step, and the sizes that follow."""
