"""metrics.jsonl and TensorBoard events: exact numbers, cutting back, crashes."""

import json
import math
import struct
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from effarch.training import writers


def _fill(writer, steps, seed=0):
    """Deterministic values except for a `time/` key, as a loop would write them."""
    for step in steps:
        values = np.random.default_rng((seed, step)).standard_normal(3)
        clock = np.random.default_rng().random()
        writer.write(step, {"loss": np.float32(values[0]), "x/y": values[1], "time/s": clock})
        if step % 5 == 0:
            writer.write(step, {"loss": values[2]}, kind="eval")


def _without_time(path):
    """The lines with every `time/` pair cut out of the text itself, not parsed and rewritten."""
    lines = []
    for line in path.read_text().splitlines():
        start = line.find(', "time/s": ')
        lines.append(line if start < 0 else line[:start] + "}")
    return lines


def _events(folder):
    """Every event of a folder, by the record framing: length, its crc, data, the data's crc."""
    events = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack_from("<Q", data, position)
            events.append(event_pb2.Event.FromString(data[position + 12 : position + 12 + length]))
            position += 16 + length
    return events


def test_values_come_back_exactly(tmp_path):
    values = {
        "third": 1 / 3,
        "tiny": 5e-324,
        "float32": np.float32(0.1),
        "bfloat16": jnp.asarray(0.1, jnp.bfloat16),
        "device": jnp.float32(2.5),
        "tokens": 2**53 + 1,
    }
    with writers.MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(3, values)
    (record,) = writers.read_metrics(tmp_path)
    assert record == {
        "step": 3,
        "kind": "train",
        "third": 1 / 3,
        "tiny": 5e-324,
        "float32": 0.10000000149011612,  # float32(0.1) in float64
        "bfloat16": 0.10009765625,  # 205 * 2**-11
        "device": 2.5,
        "tokens": 9007199254740993,
    }
    assert isinstance(record["tokens"], int)


def test_values_that_are_not_finite_are_valid_json_and_come_back(tmp_path):
    with writers.MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": jnp.nan})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    plain = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert plain == {"step": 1, "kind": "train", "a": "nan", "b": "inf", "c": "-inf", "d": "nan"}
    (record,) = writers.read_metrics(tmp_path)
    assert math.isnan(record["a"]) and math.isnan(record["d"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


def test_kinds_are_read_apart_and_unknown_ones_refused(tmp_path):
    assert writers.read_metrics(tmp_path) == []
    with writers.MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 2.0})
        writer.write(1, {"loss": 3.0}, kind="eval")
        with pytest.raises(ValueError, match=r"kind 'test' .* train, eval"):
            writer.write(1, {"loss": 3.0}, kind="test")
    assert [r["loss"] for r in writers.read_metrics(tmp_path)] == [2.0, 3.0]
    assert [r["loss"] for r in writers.read_metrics(tmp_path, "eval")] == [3.0]


@pytest.mark.parametrize("value", ["1.0", [1.0, 2.0], None, 1j])
def test_only_single_numbers_are_written(tmp_path, value):
    with writers.MetricsWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(ValueError, match="'loss'"):
            writer.write(1, {"loss": value})
        with pytest.raises(ValueError, match="'step'"):
            writer.write(1, {"step": 1.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_every_line_is_in_the_file_at_once(tmp_path):
    writer = writers.MetricsWriter(tmp_path, tensorboard=False)
    for step in range(1, 4):
        writer.write(step, {"loss": 1.0})
        assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == step
    writer.close()
    writer.close()


def test_cut_back_keeps_exactly_the_lines_up_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with writers.MetricsWriter(tmp_path, tensorboard=False) as writer:
        _fill(writer, range(21))
    before = path.read_bytes().splitlines(keepends=True)
    with writers.MetricsWriter(tmp_path, start_step=10, tensorboard=False):
        pass
    assert path.read_bytes() == b"".join(before[:14])  # train 0 to 10, evaluations at 0, 5, 10
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left
    with writers.MetricsWriter(tmp_path, tensorboard=False):
        pass
    assert path.read_bytes() == b""  # nothing precedes a start at step 0
    with pytest.raises(ValueError, match="start_step -1"):
        writers.MetricsWriter(tmp_path, start_step=-1)


def test_a_resumed_run_repeats_every_byte_but_the_clock(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    with writers.MetricsWriter(whole, tensorboard=False) as writer:
        _fill(writer, range(1, 31))
    for start, stop in ((0, 17), (15, 24), (20, 30)):
        with writers.MetricsWriter(resumed, start_step=start, tensorboard=False) as writer:
            _fill(writer, range(start + 1, stop + 1))
    paths = [folder / "metrics.jsonl" for folder in (whole, resumed)]
    assert paths[0].read_bytes() != paths[1].read_bytes()
    assert _without_time(paths[0]) == _without_time(paths[1])


def test_an_evaluation_that_is_there_already_is_not_written_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with writers.MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 2.0})
        writer.write(1, {"loss": math.nan, "time/s": 1.0}, kind="eval")
    before = path.read_bytes()
    with writers.MetricsWriter(tmp_path, start_step=1, tensorboard=False) as writer:
        writer.write(1, {"loss": math.nan, "time/s": 9.0}, kind="eval")
        assert path.read_bytes() == before
        writer.write(1, {"loss": 3.0}, kind="eval")
        writer.write(2, {"loss": 2.0})
    kinds = [(record["step"], record["kind"]) for record in writers.read_metrics(tmp_path)]
    assert kinds == [(1, "train"), (1, "eval"), (1, "eval"), (2, "train")]


@pytest.mark.parametrize("tail", [b'{"step": 4, "ki', b'{"step": 4, "kind": "train"}', b"\0\0\0"])
def test_a_half_written_last_line_is_left_out_and_then_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    with writers.MetricsWriter(tmp_path, tensorboard=False) as writer:
        _fill(writer, range(1, 4))
    good = path.read_bytes()
    path.write_bytes(good + tail)
    assert [record["step"] for record in writers.read_metrics(tmp_path)] == [1, 2, 3]
    with writers.MetricsWriter(tmp_path, start_step=4, tensorboard=False) as writer:
        assert path.read_bytes() == good
        writer.write(5, {"loss": 1.0})
    assert writers.read_metrics(tmp_path)[-1]["step"] == 5


@pytest.mark.parametrize("line", ["{", "[1]", '{"kind": "train"}', '{"step": "1", "kind": "a"}'])
def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    record = '{"step": 1, "kind": "train"}\n'
    path.write_text(f"{record}{line}\n{record}")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .* repair or delete it"):
        writers.read_metrics(tmp_path)
    with pytest.raises(ValueError, match="line 2"):
        writers.MetricsWriter(tmp_path, start_step=5)
    assert path.read_text() == f"{record}{line}\n{record}"


def test_tensorboard_gets_every_scalar_and_is_purged_on_resume(tmp_path):
    with writers.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 2.5, "time/mfu": 0.25})
        writer.write(2, {"loss": 2.25, "time/mfu": 0.5})
        writer.write(2, {"loss": 3.0}, kind="eval")
    # Within the same second: the events must go to a file of their own.
    with writers.MetricsWriter(tmp_path, start_step=1) as writer:
        writer.write(2, {"loss": 2.0})
    events = _events(tmp_path / "tensorboard")
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars == [
        (1, "train/loss", 2.5),
        (1, "train/time/mfu", 0.25),
        (2, "train/loss", 2.25),
        (2, "train/time/mfu", 0.5),
        (2, "eval/loss", 3.0),
        (2, "train/loss", 2.0),
    ]
    starts = [e.step for e in events if e.session_log.status == event_pb2.SessionLog.START]
    assert starts == [0, 2]  # the second start hides everything of step 2 and later before it


def test_events_reach_their_file_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "_EVENT_SECONDS", 0.05)
    with writers.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 2.5})
        tags, deadline = [], time.monotonic() + 30
        while not tags and time.monotonic() < deadline:
            time.sleep(0.05)
            tags = [v.tag for e in _events(tmp_path / "tensorboard") for v in e.summary.value]
        assert tags == ["train/loss"]
