"""Which library computes the ops on each device, and how that is chosen."""
