"""Every type of causal language model that transformers builds, and what every judge of them needs."""
