"""Pickles as other versions and attackers write them."""

import pickle

PROTOCOLS = (2, 3, 4, 5)


class Reduced:
    """An object that is pickled as the call of a function and a state."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def of_numpy_1(data):
    """A small pickle or one of protocol 3 with the module names of numpy 1, and without frame."""
    data = data[:2] + data[11:] if data[2:3] == pickle.FRAME else data
    for module in (b"multiarray", b"numeric"):
        new, old = (b"numpy" + core + module for core in (b"._core.", b".core."))
        data = data.replace(bytes([len(new)]) + new, bytes([len(old)]) + old).replace(new, old)
    return data
