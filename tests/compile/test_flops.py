"""Operations of products, counted by hand; `test_verb` has those of a whole step against `train.flops`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from dynrec_jax.compile.flops import product_flops

from .. import tiny

A, B = jnp.ones((3, 4)), jnp.ones((4, 5))
ONE = 2 * 3 * 4 * 5


def counted(function: Callable[..., Any], *arguments: Any, devices: int = 1, trips: Any = None) -> float:
    return product_flops(jax.make_jaxpr(function)(*arguments), devices, trips or {})


@jax.custom_vjp
def squared(x: jax.Array) -> jax.Array:
    return x @ x


squared.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x @ x @ x,))


@pytest.mark.parametrize(
    ("function", "times"),
    [
        (lambda: A @ B, 1),
        (lambda: jnp.einsum("zij,zjk->zik", jnp.stack([A] * 6), jnp.stack([B] * 6)), 6),
        (lambda: jax.jit(lambda: A @ B)() + A @ B, 2),
        (lambda: jax.lax.map(lambda _: A @ B, jnp.arange(7)), 7),
        (lambda: jax.lax.scan(lambda c, _: (c, jax.lax.map(lambda _: A @ B, jnp.arange(2))), 0, None, 3), 6),
        (lambda: jax.lax.cond(A.sum() > 0, lambda: A @ B, lambda: A @ B + A @ B), 2),
        (lambda: jax.vmap(lambda a: a @ B)(jnp.stack([A] * 5)), 5),
        (lambda: jax.grad(lambda a: (a @ B).sum())(A), 2),  # the product, and its gradient with respect to A
        (lambda: jax.grad(lambda a: jnp.sin(jax.checkpoint(lambda a: jnp.sin(a @ B).sum())(a)))(A), 3),
    ],
)  # fmt: skip
def test_products_are_counted_wherever_they_stand(function: Callable[[], Any], times: int):
    assert counted(function) == times * ONE


def test_of_a_custom_gradient_its_own_rule_counts():
    x = jnp.ones((4, 4))
    assert counted(squared, x) == 128
    assert counted(jax.grad(lambda x: squared(x).sum()), x) == 4 * 128


def test_a_loop_of_unknown_length_goes_by_its_scope():
    def f(n: jax.Array) -> jax.Array:
        def body(_: jax.Array, c: jax.Array) -> jax.Array:
            return c + (A @ B).sum()

        @jax.jit
        def inside(n: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, n, body, 0.0)

        with jax.named_scope("rounds"):
            return inside(n)

    assert counted(f, 3) == ONE
    assert counted(f, 3, trips={"rounds": 2.5}) == 2.5 * ONE
    assert counted(jax.vmap(f), jnp.arange(3), trips={"rounds": 2.0}) == 2 * ONE


def test_outside_of_shard_map_devices_share_and_inside_shapes_are_one_device_s():
    mesh = tiny.mesh(4, 1, 2)
    x, y = jnp.ones((8, 16)), jnp.ones((16, 8))
    assert counted(lambda: x @ y, devices=8) == 2 * 8 * 16 * 8 / 8

    def inside(x: jax.Array, y: jax.Array) -> jax.Array:
        return x @ y

    def sharded(axis_names: set[str]) -> Callable[..., Any]:
        specs = PartitionSpec("data"), PartitionSpec()
        return jax.shard_map(
            inside, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data"), axis_names=axis_names
        )

    with jax.set_mesh(mesh):
        assert counted(sharded({"slice", "data", "fsdp", "tensor"}), x, y, devices=8) == 2 * 2 * 16 * 8
        # Along "tensor" the compiler may still cut what is inside.
        assert counted(sharded({"data"}), x, y, devices=8) == 2 * 2 * 16 * 8 / 2
