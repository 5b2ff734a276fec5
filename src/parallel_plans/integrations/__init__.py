"""Models under a plan in other people's tools."""
