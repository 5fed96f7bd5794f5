"""Sample order: exact to the original given its permutations, seeded and repeatable given ours."""

import numpy as np
import pytest

from llava_jax.data.sampler import (
    epoch_order,
    group_by_length,
    group_by_modality_length,
    seeded_permutations,
    split_to_even_chunks,
)
from llava_jax.data.scan import is_held
from llava_jax.errors import ConfigError, SampleError
from llava_jax.text.records import image_paths
from tests.conftest import json_lines, shared


def replay(permutations):
    """The permutations that the original drew, in its order of use."""
    left = iter(permutations)

    def permute(n):
        taken = next(left)
        assert len(taken) == n
        return taken

    permute.left = left
    return permute


def test_golden_sampler():
    orders = {"modality": group_by_modality_length, "length": group_by_length}
    for row in json_lines(shared("golden/sampler/sampler.jsonl")):
        permute = replay(row["randperms"])
        arguments = (row["lengths"], row["batch_size"], row["world_size"], permute)
        if "error" in row:
            with pytest.raises(SampleError, match="has no words"):
                orders[row["fn"]](*arguments)
        else:
            assert orders[row["fn"]](*arguments) == row["output"]
            assert next(permute.left, None) is None


def test_golden_chunks():
    for row in json_lines(shared("golden/sampler/split_to_even_chunks.jsonl")):
        out = split_to_even_chunks(row["indices"], row["lengths"], row["num_chunks"])
        assert out == row["output"]


def test_chunks_balance_and_uneven_counts_are_dealt_in_turn():
    assert split_to_even_chunks([0, 1, 2, 3], [9, 5, 4, 1], 2) == [[0, 3], [1, 2]]
    assert split_to_even_chunks([3, 1, 4], [0, 0, 0, 0, 0], 2) == [[3, 4], [1]]


def test_batches_are_of_one_modality_but_the_last():
    rng = np.random.default_rng(0)
    lengths = [int(n) * (-1 if i % 5 == 0 else 1) for i, n in enumerate(rng.integers(1, 99, 200))]
    order = group_by_modality_length(lengths, 4, 2, seeded_permutations(1, 0))
    assert sorted(order) == list(range(200))
    signs = [{lengths[i] > 0 for i in order[s : s + 8]} for s in range(0, 200 - 16, 8)]
    assert all(len(s) == 1 for s in signs)


def test_one_modality_is_only_grouped_by_length():
    order = group_by_modality_length([-3, -1, -2, -9], 2, 1, replay([[0, 1, 2, 3]]))
    assert order == [1, 0, 2, 3]


def test_epochs_differ_seeds_differ_and_repeats_agree():
    def order(seed, epoch):
        return epoch_order(50, seed, epoch).tolist()

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(s, e)) for s in (1, 2) for e in (0, 1)}) == 4
    assert sorted(order(1, 0)) == list(range(50))
    assert epoch_order(3, 1, 7, shuffle=False).tolist() == [0, 1, 2]


def test_the_seeded_permutation_is_the_one_it_always_was():
    assert list(seeded_permutations(42, 0)(10)) == [1, 8, 5, 3, 7, 9, 4, 0, 6, 2]


def test_groups_must_divide_the_batch():
    with pytest.raises(ConfigError, match="batch_size 6 is not a multiple of groups 4"):
        epoch_order(3, 0, 0, lengths=[1, 2, 3], batch_size=6, groups=4)


def sides(records, fraction, seed=0):
    """(kept, held out): indices of records."""
    held = [is_held(r, i, image_paths(r), fraction, seed) for i, r in enumerate(records)]
    return tuple([i for i, aside in enumerate(held) if aside is side] for side in (False, True))


def test_half_a_surrogate_pair_has_a_side_too():
    """JSON can hold one, in an id or a path."""
    records = [{"id": f"\ud800{i}"} for i in range(40)] + [{"image": "\udcff.png"}]
    kept, aside = sides(records, 0.5)
    assert sorted(kept + aside) == list(range(41))
    assert min(len(kept), len(aside)) > 5


@pytest.mark.parametrize("none", [{}, {"id": None}, {"id": ""}])
def test_records_without_an_id_do_not_all_land_on_one_side(none):
    assert sides([none] * 40, 0.5) == sides([{"id": i} for i in range(40)], 0.5)


def test_holdout_keeps_all_turns_of_an_image_on_one_side():
    records = [{"id": str(i), "image": f"images/{i // 3}.png"} for i in range(3000)]
    kept, aside = sides(records, 0.1, seed=3)
    assert sorted(kept + aside) == list(range(3000))
    assert 0.07 < len(aside) / 3000 < 0.13
    assert not {records[i]["image"] for i in kept} & {records[i]["image"] for i in aside}
    shuffled = records[::-1]
    again = {shuffled[i]["id"] for i in sides(shuffled, 0.1, seed=3)[1]}
    assert again == {records[i]["id"] for i in aside}
    assert sides(records, 0.1, seed=4)[1] != aside
    assert sides(records, 0.0)[1] == []
