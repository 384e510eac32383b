"""Taking models apart and putting them together: copies, traces, shared parameters, optimizers."""
