"""The demo: what one command shows of the whole project."""
