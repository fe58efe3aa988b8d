from transformer_engine import common as common
from transformer_engine.pytorch import distributed as distributed
from transformer_engine.pytorch import ops as ops
from transformer_engine.pytorch.attention import DotProductAttention as DotProductAttention
from transformer_engine.pytorch.module import GroupedLinear as GroupedLinear
from transformer_engine.pytorch.module import Linear as Linear
from transformer_engine.pytorch.module import RMSNorm as RMSNorm
from transformer_engine.unused import __getattr__ as __getattr__
