"""Other libraries' layers, computed by blockdiag. Each module needs its library installed."""
