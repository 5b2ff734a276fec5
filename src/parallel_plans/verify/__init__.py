"""A plan held against the model that it is for, by running both."""
