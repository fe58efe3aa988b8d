"""Computes again, alone, a mini-batch whose update a run skipped: `gspo-moe replay`."""
