"""The search page: a query, and the passages that one model or two find for it."""
