"""What `collectives.py` is made of: collectives and bytes of a layer of every type that has a plan."""
