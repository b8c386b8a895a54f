"""What tests of several benchmarks use."""

import json

import pytest


@pytest.fixture
def sides_here(monkeypatch):
    """Makes the sides of a comparison live in this process; the list of those that were made."""
    from benchmarks import blocks, sides

    made = []

    class Here:
        """A `turns.Side` whose object is built at the first call, as by a worker."""

        def __init__(self, name, target, arguments, environment=None):
            assert target == "benchmarks.sides:Jax"
            self._arguments, self._side = arguments, None

        def call(self, method, **arguments):
            if self._side is None:
                self._side = sides.Jax(**json.loads(json.dumps(self._arguments)))
                made.append(self._side)
            return json.loads(json.dumps(getattr(self._side, method)(**arguments)))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(blocks, "Side", Here)
    return made
