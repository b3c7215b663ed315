"""Docstring-to-code pairs from installed Python sources: where they are, what they hold, how they are split."""
