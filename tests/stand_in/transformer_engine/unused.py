"""Names that megatron-core imports and this project never calls."""


class _Unused(type):
    def __call__(cls, *_: object, **__: object) -> None:
        raise NotImplementedError(f"{cls.__name__} is not part of the stand-in")


def __getattr__(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Unused(name, (), {})
