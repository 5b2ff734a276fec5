"""The plans that the model classes of transformers carry: judged by the verifier, and run by transformers itself."""
