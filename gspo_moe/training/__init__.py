"""Training on megatron-core, which every module of this room may import: it is made ready here."""

from gspo_moe.platform import prepare_megatron

prepare_megatron()
