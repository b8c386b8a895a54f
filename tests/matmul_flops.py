"""Counting the matrix products of a program, without running it."""

import math

import jax
from jax.extend.core import jaxprs_in_params


def matmul_flops(function, *args) -> int:
    """FLOPs of the matrix products of a function, a scan's body times its length."""

    def walk(jaxpr) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                shared = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
                total += 2 * shared * math.prod(eqn.outvars[0].aval.shape)
            assert eqn.primitive.name != "while", "the number of iterations is not known"
            inner = sum(walk(sub) for sub in jaxprs_in_params(eqn.params))
            total += inner * eqn.params.get("length", 1)
        return total

    return walk(jax.make_jaxpr(function)(*args).jaxpr)
