"""Plans of packed rows: every sample once, the same for any number of devices, and nearly full."""

from types import SimpleNamespace

import numpy as np
import pytest

from llava_jax.batch import Size
from llava_jax.data.layout import Exact, Fill
from llava_jax.data.packing import Sizes, best_fit, deal, fill_rows
from llava_jax.data.sampler import Epochs, seeded_random
from llava_jax.data.settings import DataFile, DataSettings
from llava_jax.errors import ConfigError
from llava_jax.plan.lengths import CAPTIONS_558K, draw_sizes


def layout(sizes: Sizes, parts: int = 1, run: int = 1, length: int = 2048, weight=1.0, **changes):
    settings = DataSettings(max_length=length, **changes).completed(None, 1, parts)
    data = SimpleNamespace(
        with_image=sizes.images > 0,
        file=np.zeros(len(sizes.length), np.int64),
        files=[DataFile("", "", weight)],
    )
    kind = {"exact": Exact, "fill": Fill}[settings.pack]
    return kind(Epochs(data, settings), settings, sizes, run)


def random_sizes(rng: np.random.RandomState) -> Sizes:
    """A small data set: a mixture of short and long, with up to 3 images, some records bad."""
    count, images = rng.randint(1, 150), rng.randint(0, 4)
    length = np.minimum(1 + rng.lognormal(3, rng.uniform(0.1, 1), count).astype(int), 64)
    targets = rng.randint(1, length + 1)
    bad = rng.random_sample(count) < 0.05
    columns = (np.where(bad, 0, length), rng.randint(0, images + 1, count), targets * ~bad)
    return Sizes(*(column.astype(np.int32) for column in columns))


def as_rows(found, epoch: int, within: int) -> tuple[list[list[int]], Size, int]:
    """(entries of each row, the room of a group, rows of a group) of a step."""
    entries = found.entries(epoch, within)
    records = found._epochs[epoch].records[entries]
    sizes = [Size(*(int(c[r]) for c in found._sizes)) for r in records]
    rows, shape = found.rows(epoch, within, list(range(len(entries))), sizes)
    assert sorted(i for row in rows for i in row) == list(range(len(entries)))
    assert len(rows) == shape.rows
    for first in range(0, len(rows), shape.group_rows):
        group = [i for row in rows[first : first + shape.group_rows] for i in row]
        assert sum(sizes[i].images for i in group) <= shape.images
        assert sum(sizes[i].targets for i in group) <= shape.targets
    assert all(sum(sizes[i].length for i in row) <= shape.length for row in rows)
    return [[entries[i] for i in row] for row in rows], shape.room, shape.rows


def test_two_hundred_data_sets_show_each_sample_once_whatever_the_devices():
    """Two epochs of each, on 1, 2, 4 and 8 devices; the part of real tokens is printed."""
    shares: dict[str, list[float]] = {"exact": [], "fill": []}
    for seed in range(200):
        rng = np.random.RandomState(seed)
        sizes, pack = random_sizes(rng), ("exact", "fill")[seed % 2]
        changes = {
            "pack": pack,
            "batch_size": int(rng.choice([8, 16, 24])),
            "pack_length": int(rng.choice([64, 100, 256])),
            "weight": float(rng.choice([1, 1, 1.5])),
            "seed": seed,
        }
        if pack == "fill":
            changes["pack_rows"] = 8
        plans = [layout(sizes, parts, 2, 64, **changes) for parts in (1, 2, 4, 8)]
        first = plans[0]
        assert all(plan.identity() == first.identity() for plan in plans)
        shares[pack].append(first.share)
        for step in range(first.steps(2)):
            epoch, within = first.locate(step)
            steps = [as_rows(plan, epoch, within) for plan in (first, plans[1 + seed % 3])]
            shown = [sorted(sorted(row) for row in rows if row) for rows, *_ in steps]
            # Of exact, devices ask for more rows, but not for other ones.
            assert all(rows == shown[0] for rows in shown)
            if within == 0:
                whole = first.before(epoch, first.steps(epoch + 1) - first.steps(epoch))
                assert sorted(whole) == list(range(first._epochs.samples))
        shapes = {as_rows(first, *first.locate(step))[1:] for step in range(first.steps(2))}
        assert len(shapes) <= (3 if pack == "exact" else 1)
    for pack, found in shares.items():
        print(f"{pack}: {np.mean(found):.1%} real tokens in {len(found)} data sets")


def test_full_rows_of_a_mixture_like_llavas_hold_few_empty_positions():
    sizes = draw_sizes(share=0.1)
    assert abs(sizes.length.mean() - 861) < 5
    for length, least in ((4096, 0.97), (8192, 0.975)):
        found = layout(sizes, 8, pack="fill", pack_length=length, batch_size=128)
        assert found.share >= least, found.summary
        assert "real tokens" in found.summary
    captions = draw_sizes(CAPTIONS_558K, share=0.02)
    assert layout(captions, pack="fill", pack_length=4224, batch_size=256).share > 0.95


@pytest.mark.slow
def test_a_plan_of_665k_samples_takes_seconds():
    import resource
    import time

    begun = time.process_time()
    layout(draw_sizes(), 8, pack="fill", pack_length=4096, batch_size=128)
    assert time.process_time() - begun < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2**20  # in KiB: 1 GB


def test_each_sample_goes_into_the_fullest_row_that_has_room():
    assert best_fit([3, 6, 4, 7, 2], 10) == [[3, 0], [1, 2], [4]]
    assert best_fit([5, 5, 5], 5) == [[0], [1], [2]]
    assert best_fit([9, 8, 1, 2], 10) == [[0, 2], [1, 3]]
    assert best_fit([], 10) == []


def test_rows_are_dealt_so_that_groups_need_alike():
    rows = Sizes(np.full(6, 9), np.array([3, 3, 3, 0, 0, 0]), np.array([0, 0, 0, 9, 9, 9]))
    order = deal(rows, 3).reshape(3, 2)
    assert rows.images[order].sum(1).tolist() == [3, 3, 3]
    assert rows.targets[order].sum(1).tolist() == [9, 9, 9]
    assert deal(rows, 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_samples_with_many_images_or_targets_do_not_end_up_in_one_row():
    length = np.full(400, 10, np.int32)
    images = np.where(np.arange(400) % 4, 0, 4).astype(np.int32)
    targets = np.where(np.arange(400) % 4, 1, 8).astype(np.int32)
    sizes = Sizes(length, images, targets)
    rows = fill_rows(sizes, np.arange(400), 40, 2, seeded_random(0))
    needs = rows.sums(sizes)
    assert needs.length.mean() > 0.95 * 40
    assert needs.images.max() <= 8
    assert needs.targets.max() <= 20


def test_text_alone_has_a_shape_without_images_and_shapes_are_few():
    rng = np.random.RandomState(0)
    images = np.repeat([1, 0], [640, 64])
    sizes = Sizes(rng.randint(20, 64, 704), images, rng.randint(1, 9, 704))
    found = layout(
        sizes, pack="exact", pack_length=128, batch_size=32, shuffle=False, run=40, length=64
    )
    assert 2 <= len(found.shapes) <= 3
    assert [shape.images == 0 for shape in found.shapes[:2]] == [True, False]
    shown = [as_rows(found, 0, within)[1].images for within in (0, 20, 21)]
    assert shown[0] > 0
    assert shown[1:] == [0, 0]


def test_rows_of_a_step_are_refused_where_devices_do_not_divide_them():
    with pytest.raises(ConfigError, match=r"data\.pack_rows 6 cannot be cut into 4 equal parts"):
        layout(draw_sizes(share=0.001), 4, pack="fill", pack_rows=6, batch_size=8)
    rows = [
        layout(draw_sizes(share=0.001), n, pack="fill", pack_length=4096, batch_size=128).step_rows
        for n in (1, 2, 8, 16)
    ]
    assert rows == [24, 24, 24, 32]
