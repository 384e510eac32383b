"""How models are taken apart and put together again: copies, traces, shared parameters, optimizers."""
