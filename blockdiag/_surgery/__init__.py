"""Model surgery: copies, traces, shared parameters, optimizers."""
