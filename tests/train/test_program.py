"""The one step of a run: the same from real parameters and from shapes that are only planned."""

import jax
import pytest

from llava_jax.configs import common
from llava_jax.llava import param_shardings
from llava_jax.sharding import make_mesh, put_batch
from llava_jax.train.control import Flags, put_flags
from llava_jax.train.model_io import split_params
from llava_jax.train.program import abstract_batch, abstract_flags, make_program, planned_params
from tests.tiny import CONFIG, random_batch, random_params


@pytest.fixture(scope="module")
def mesh():
    return make_mesh()


@pytest.fixture(scope="module")
def params(mesh):
    return jax.device_put(random_params(), param_shardings(CONFIG, mesh))


def shown(tree):
    """Shape, type and place of every leaf."""
    return jax.tree.map(lambda x: (x.shape, str(x.dtype), x.sharding.spec), tree)


def test_a_planned_program_is_the_one_that_runs(mesh, params):
    config = common.get_config()
    planned = make_program(config, CONFIG, planned_params(CONFIG, mesh), mesh, steps=9)
    real = make_program(config, CONFIG, params, mesh, steps=9)
    assert shown(planned.state) == shown(real.state)
    assert shown(planned.frozen) == shown(real.frozen)

    trained, frozen = split_params(dict(params), set(real.state.params), real.compute.dtype)
    batch, flags = put_batch(random_batch(16), mesh, micro=2), put_flags(Flags(), mesh)
    shapes = abstract_batch(random_batch(16), mesh, micro=2), abstract_flags(mesh)
    assert shown((batch, flags)) == shown(shapes)
    with jax.set_mesh(mesh):
        text = planned.step.lower(planned.state, planned.frozen, *shapes).as_text()
        state = real.start(trained)
        assert shown(state) == shown(planned.state)
        assert real.step.lower(state, frozen, batch, flags).as_text() == text


def test_moments_lie_as_their_parameters(mesh):
    program = make_program(common.get_config(), CONFIG, planned_params(CONFIG, mesh), mesh, 9)
    places: dict = {
        p.shape: getattr(p.sharding, "spec", None) for p in program.state.params.values()
    }
    moments = [leaf for leaf in jax.tree.leaves(program.state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(program.state.params)
    assert all(leaf.sharding.spec == places[leaf.shape] for leaf in moments)
