"""A study: runs that differ in one setting, each at its best learning rate, measured query by query."""
