"""Stands in for Transformer Engine 2.10 on a CPU: what megatron-core builds on, with that version's signatures.

Plain torch operators do the work; what Transformer Engine asserts about its arguments is asserted here too. Only for
one tensor-parallel rank.
"""

__version__ = "2.10.0"
