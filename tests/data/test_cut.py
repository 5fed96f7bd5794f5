"""Samples that are cut at data.max_length are counted, and the limit is named with its origin."""

import dataclasses

from tests.data.test_loader import MODEL, data, loader  # noqa: F401, a fixture


def test_the_first_cut_and_the_total_are_said_once(data, caplog):  # noqa: F811
    short = loader(data, max_length=24, batch_size=8)
    batches = [next(short) for _ in range(2 * short.steps_per_epoch)]
    assert sum(info["cut"] for _, info in batches)
    (line,) = (m for m in caplog.messages if "is cut" in m)
    assert "is longer than data.max_length 24 and is cut; the end of the run says how" in line
    report = short.report()
    count, ids = report["notes"]["truncated"], report["noted"]["truncated"]
    (total,) = short.cut_lines(report)
    assert total == (
        f"{count} of 37 samples were longer than data.max_length 24 and were cut: "
        f"{', '.join(ids)}, ..."
    )


def test_where_lengths_are_counted_the_number_is_said_before_the_first_step(data, caplog):  # noqa: F811
    packed = loader(data, max_length=24, batch_size=8, pack="exact", pack_length=24)
    (line,) = (m for m in caplog.messages if "longer" in m)
    for _ in range(packed.steps_per_epoch):
        next(packed)
    count = packed.report()["notes"]["truncated"]
    share = f"{count / 37:.1%}"
    assert line == (
        f"{count} of 37 samples ({share}) are longer than data.max_length 24 and will be cut"
    )
    assert not any("is cut" in m for m in caplog.messages)


def test_nothing_is_said_of_samples_that_fit(data, caplog):  # noqa: F811
    whole = loader(data, max_length=64)
    for _ in range(whole.steps_per_epoch):
        next(whole)
    assert not caplog.messages
    assert not list(whole.cut_lines(whole.report()))


def test_a_limit_of_the_model_is_said_to_be_that():
    from llava_jax.data.cut import limit_in_words

    positions = f"{MODEL.language.max_positions:,}"
    model = dataclasses.replace(MODEL, max_length=48)
    assert limit_in_words(48, model) == (
        f"data.max_length 48 (max_length of the model's config, which has {positions} positions)"
    )
    assert limit_in_words(47, model) == "data.max_length 47"
