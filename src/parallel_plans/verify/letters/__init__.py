"""How values lie on the ranks, followed through every operation of a step: `I`, `S(d)`, `P`, and what does not fit."""
