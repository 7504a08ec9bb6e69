"""The results in docs/results.md, each by one command."""
