from transformer_engine.unused import __getattr__ as __getattr__
