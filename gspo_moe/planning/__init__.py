"""What a run will cost, worked out before it is made. Torch-free."""
