"""A plan found from a model: how its values lie is inferred from one step, and what is found is verified."""
