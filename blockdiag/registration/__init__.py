"""What other parts of PyTorch have to know of the ops."""
