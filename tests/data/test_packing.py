"""Plans of packed rows: every sample once, the same for any number of devices, and nearly full."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llava_jax.batch import Size
from llava_jax.data import layout as data_layout
from llava_jax.data.layout import Exact, Fill
from llava_jax.data.packing import Sizes, best_fit, deal, fill_rows, rows_of_step
from llava_jax.data.sampler import Epochs, seeded_random
from llava_jax.data.settings import DataFile, DataSettings
from llava_jax.plan.lengths import CAPTIONS_558K, draw_sizes


def layout(sizes: Sizes, parts: int = 1, run: int = 1, length: int = 2048, weight=1.0, **changes):
    settings = DataSettings(max_length=length, **changes).completed(None, 1, parts)
    data: Any = SimpleNamespace(
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


def test_a_plan_goes_to_any_number_of_devices_with_empty_rows_where_they_do_not_divide_it():
    """6 rows on 4 devices are 8; one row, all that a batch of 8 short samples needs, serves 8 devices."""
    sizes = draw_sizes(share=0.0005)
    plans = [
        layout(sizes, parts, 2, pack="fill", pack_rows=6, batch_size=8) for parts in (1, 2, 4, 8)
    ]
    assert len({str(plan.identity()) for plan in plans}) == 1
    shown = [[as_rows(plan, 0, n) for n in range(plan.steps(1))] for plan in plans]
    assert [{rows for *_, rows in steps} for steps in shown] == [{6}, {6}, {8}, {8}]
    for steps in shown[1:]:
        for (rows, *_), (first, *_) in zip(steps, shown[0]):
            assert sorted(r for r in rows if r) == sorted(r for r in first if r)
    small = Sizes(*(np.full(40, n, np.int32) for n in (60, 1, 5)))
    plans = [layout(small, n, pack="fill", pack_length=4096, batch_size=8) for n in (1, 8)]
    assert [plan.step_rows for plan in plans] == [1, 1]
    assert plans[0].identity() == plans[1].identity()
    assert "7 of 8 are empty" in plans[1].remark()
    rows = [rows_of_step(26.9, n) for n in (1, 2, 8, 16, 32, 64)]
    assert rows == [24, 24, 24, 32, 32, 24]


def test_rows_that_are_far_from_full_are_remarked_on_with_a_length_that_suits():
    captions = draw_sizes(CAPTIONS_558K, share=0.02)
    found = layout(captions, pack="fill", pack_length=4096, batch_size=256)
    assert "only 85." in found.remark()
    better = int(found.remark().partition("data.pack_length=")[2].partition(",")[0])
    assert not layout(captions, pack="fill", pack_length=better, batch_size=256).remark()
    few = Sizes(*(np.full(36, n, np.int32) for n in (64, 1, 5)))
    found = layout(few, length=64, pack="fill", pack_length=256, pack_rows=8, batch_size=32)
    assert "the last of an epoch's 2 steps has 1 of 8 rows" in found.remark()
    long = Sizes(*(np.full(64, n, np.int32) for n in (1100, 1, 5)))
    assert "only 53.7% of positions" in layout(long, pack="exact", batch_size=8).remark()
    assert not layout(
        draw_sizes(share=0.01), pack="exact", pack_length=4096, batch_size=128
    ).remark()


def test_an_epoch_is_packed_once_whatever_threads_look_at(monkeypatch):
    """Steps around the borders of five epochs, in the order of threads that work ahead."""
    packed = []
    real = data_layout.fill_rows
    monkeypatch.setattr(data_layout, "fill_rows", lambda *given: packed.append(1) or real(*given))
    found = layout(draw_sizes(share=0.0005), run=5, pack="fill", pack_rows=4, batch_size=16)
    total = found.steps(5)
    for step in range(total):
        for ahead in (2, 0, 1):
            as_rows(found, *found.locate(min(step + ahead, total - 1)))
    assert len(packed) == 5


def test_a_step_of_full_rows_names_the_number_of_steps_beside_the_recipes():
    found = layout(draw_sizes(share=0.001), pack="fill", pack_length=4096, batch_size=16)
    steps, recipe = found.steps(1), -(-found._epochs.samples // 16)
    assert found.step_words == (
        f"{found.step_rows} full rows, about {found._epochs.samples / steps:.0f} samples "
        f"({steps} steps an epoch by data.pack=fill; the recipe's are {recipe} of 16)"
    )
    assert layout(draw_sizes(share=0.001), pack="exact", batch_size=16).step_words == "16"
