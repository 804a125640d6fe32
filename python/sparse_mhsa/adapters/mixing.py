"""Changing what an object of another library does, by the class it belongs to."""

from torch import nn


class Mixed(nn.Module):
    """First base of the classes that `mixed_class` makes; their instances can be copied and pickled."""

    mixin: "type[Mixed]"
    dense_class: type[nn.Module]
    """What the module was."""

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return _unpickled, (self.mixin, self.dense_class), self.__dict__


_CLASSES: dict[tuple[type[Mixed], type[nn.Module]], type[nn.Module]] = {}


def mixed_class(mixin: type[Mixed], dense_class: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a class whose methods are those of ``mixin`` first; ``isinstance`` checks go on to hold."""
    key = mixin, dense_class
    if key not in _CLASSES:
        attributes = {"mixin": mixin, "dense_class": dense_class}
        _CLASSES[key] = type(f"Sparse{dense_class.__name__}", (mixin, dense_class), attributes)
    return _CLASSES[key]


def _unpickled(mixin: type[Mixed], dense_class: type[nn.Module]) -> nn.Module:
    cls = mixed_class(mixin, dense_class)
    return cls.__new__(cls)
