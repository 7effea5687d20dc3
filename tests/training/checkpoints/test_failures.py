"""Checkpoints: what survives death and damage, what is refused and how."""

import os
import pathlib
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.training import checkpoints, manifest, named_arrays


def data_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold array data, largest first."""
    files = [p for p in (folder / "state").rglob("*") if p.is_file() and p.parent.name == "d"]
    return sorted(files, key=lambda p: -p.stat().st_size)


# Death.

MOMENTS = {  # where the process dies while it saves step 200 -> what is then restored
    "writing": 100,
    "committed": 100,
    "hashing": 100,
    "manifest_written": 100,
    "deleting": 200,
}
DEATH = """
import os, pathlib, shutil, signal, sys
import jax, orbax.checkpoint
import jax.numpy as jnp
from effarch.training import checkpoints, manifest

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def die_at(moment):
    if moment == "writing":  # the arrays are there, under a name that orbax has not made final
        rename = os.rename
        os.rename = lambda a, b: die() if str(a).endswith("state.orbax-checkpoint-tmp") else rename(a, b)
    elif moment == "committed":
        manifest.write = die
    elif moment == "hashing":
        hash_file, seen = manifest._hash, []
        def hash_three(path, **options):
            seen.append(path)
            return die() if len(seen) == 4 else hash_file(path, **options)
        manifest._hash = hash_three
    elif moment == "manifest_written":
        replace = os.replace
        os.replace = lambda a, b: die() if str(b).endswith("manifest.json") else replace(a, b)
    elif moment == "deleting":
        shutil.rmtree = die

def run(moment, folder):
    state = lambda step: {"w": jnp.arange(1_000_000.0) + step, "b": jnp.full(3, step)}
    store = checkpoints.Checkpoints(folder, fingerprint="abc", keep=1)
    store.save(100, state(100), {"step": 100})
    store.wait()
    die_at(moment)
    store.save(200, state(200), {"step": 200})
    store.wait()
    os._exit(3)  # nobody died

for moment in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        run(moment, pathlib.Path(sys.argv[1]) / moment)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
"""


@pytest.fixture(scope="module")
def dead_runs(tmp_path_factory, run_python):
    folder = tmp_path_factory.mktemp("dead runs")
    run_python(DEATH, folder, *MOMENTS)
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_saving(dead_runs, moment, small):
    state = lambda step: {"w": jnp.arange(1_000_000.0) + step, "b": jnp.full(3, step)}  # noqa: E731
    folder = dead_runs / moment
    with small.open_at(folder, keep=2) as store:
        assert store.steps() == [MOMENTS[moment]]
        step, got, record = store.restore(jax.eval_shape(state, 0))
        assert (step, record) == (MOMENTS[moment], {"step": step})
        small.assert_same(got, state(step))
        for again in (200, 300):
            store.save(again, state(again + 1), {"step": again})
    again = small.open_at(folder)
    assert again.steps() == [200, 300] and sorted(os.listdir(folder)) == ["200", "300"]
    _, got, _ = again.restore(jax.eval_shape(state, 0), step=200)
    offset = 0 if MOMENTS[moment] == 200 else 1  # a step that is complete is not written again
    small.assert_same(got, state(200 + offset))


def test_an_unfinished_first_save_is_no_checkpoint(tmp_path, caplog, small):
    assert small.open_at(tmp_path / "none").restore({}) is None
    small.fill(tmp_path, steps=(100,))
    (tmp_path / "100" / manifest.FILE_NAME).unlink()
    assert small.open_at(tmp_path).restore(small.target) is None
    assert [r.getMessage() for r in caplog.records] == [
        f"checkpoint 100 in {tmp_path} has no manifest (an unfinished save) and is passed over"
    ]


# Damage.


def truncate(folder):
    with open(data_files(folder)[0], "r+b") as file:
        file.truncate(100)


def flip_byte(folder, path=None):
    path = path or data_files(folder)[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": (truncate, r"state/.* has 100 bytes instead of \d+"),
    "flipped": (flip_byte, r"state/.* has changed bytes"),
    "deleted": (lambda f: data_files(f)[-1].unlink(), r"state/.* cannot be read \(No such file"),
    "record": (lambda f: flip_byte(f, f / "record" / "metadata"), "record/metadata has changed"),
    "manifest_text": (
        lambda f: (f / manifest.FILE_NAME).write_text("{"),
        r"manifest\.json cannot be read",
    ),
    "manifest_list": (
        lambda f: (f / manifest.FILE_NAME).write_text("[]"),
        r"manifest\.json cannot be read",
    ),
    "manifest_fingerprint": (
        lambda f: (f / manifest.FILE_NAME).write_text(
            (f / manifest.FILE_NAME).read_text().replace('"abc"', '"abd"')
        ),
        r"manifest\.json was changed",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_falls_back_to_the_one_before(tmp_path, caplog, damage, small):
    small.fill(tmp_path)
    break_it, message = DAMAGES[damage]
    break_it(tmp_path / "200")
    with small.open_at(tmp_path) as store:
        step, got, record = store.restore(small.target)
        assert (step, record) == (100, {"step": 100})
        small.assert_same(got, small.state(100))
        (warning,) = [r.getMessage() for r in caplog.records]
        assert warning.startswith(f"checkpoint 200 in {tmp_path} is damaged: ")
        assert re.search(message, warning)
        store.save(200, small.state(201), {})  # the run comes by step 200 again
        store.wait()
        assert sorted(os.listdir(tmp_path)) == ["100", "200"]
        _, got, _ = store.restore(small.target)
    small.assert_same(got, small.state(201))


@pytest.mark.parametrize("next_step", [150, 250])
def test_a_damaged_step_does_not_count_as_a_kept_one(tmp_path, next_step, small):
    """Whatever the next step is: the sound 100 stays and the damaged 200 goes."""
    small.fill(tmp_path)
    truncate(tmp_path / "200")
    with small.open_at(tmp_path) as store:
        assert store.restore(small.target)[0] == 100
        store.save(next_step, small.state(next_step), {})
        store.wait()
        assert store.steps() == [100, next_step]


def test_all_damaged_is_an_error_not_a_new_start(tmp_path, small):
    small.fill(tmp_path)
    truncate(tmp_path / "200")
    flip_byte(tmp_path / "100")
    with pytest.raises(ValueError, match=r"all 2 checkpoints in .* \(steps 100, 200\)"):
        small.open_at(tmp_path).restore(small.target)
    with pytest.raises(ValueError, match=r"checkpoint 100 .* has changed bytes"):
        small.open_at(tmp_path).restore(small.target, step=100)
    with pytest.raises(ValueError, match="no checkpoint of step 7; it has 100, 200"):
        small.open_at(tmp_path).restore(small.target, step=7)


# Checkpoints of another run.


def without_data(folder: pathlib.Path) -> pathlib.Path:
    """Takes all array data away: whoever reads an array, or hashes a file, fails otherwise."""
    shutil.rmtree(folder / "200" / "state")
    return folder


def test_another_fingerprint_is_refused(tmp_path, small):
    small.fill(tmp_path)
    without_data(tmp_path)
    with pytest.raises(checkpoints.CheckpointMismatch) as caught:
        small.open_at(tmp_path, fingerprint="xyz").restore(small.target)
    assert str(caught.value) == (
        f"{tmp_path} belongs to the config with fingerprint abc, not to xyz; choose another "
        "--workdir, or run the original config"
    )


F32 = jnp.float32
OTHERS = {
    "shape": (
        {"a": jax.ShapeDtypeStruct((999,), F32), "b": {"c": jax.ShapeDtypeStruct((7,), jnp.int32)}},
        ["a: float32[1000] in the checkpoint, the run wants float32[999]"],
    ),
    "dtype": (
        {
            "a": jax.ShapeDtypeStruct((1000,), jnp.bfloat16),
            "b": {"c": jax.ShapeDtypeStruct((7,), jnp.int32)},
        },
        ["a: float32[1000] in the checkpoint, the run wants bfloat16[1000]"],
    ),
    "missing": (
        {"a": jax.ShapeDtypeStruct((1000,), F32)},
        ["b/c: int32[7] in the checkpoint, unknown to the run"],
    ),
    "extra": (
        {
            "a": jax.ShapeDtypeStruct((1000,), F32),
            "b": {"c": jax.ShapeDtypeStruct((7,), jnp.int32)},
            **{f"x{i:02}": jax.ShapeDtypeStruct((i,), F32) for i in range(12)},
        },
        [f"x{i:02}: not in the checkpoint, the run wants float32[{i}]" for i in range(10)]
        + ["and 2 more"],
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_arrays_are_refused_before_any_is_read(tmp_path, other, small):
    target, lines = OTHERS[other]
    small.fill(tmp_path)
    without_data(tmp_path)
    with pytest.raises(checkpoints.CheckpointMismatch) as caught:
        small.open_at(tmp_path).restore(target)
    head, *listed = str(caught.value).splitlines()
    assert head.startswith(f"checkpoint 200 in {tmp_path} has other arrays than this run")
    assert [line.strip() for line in listed] == lines


def test_a_typed_key_is_not_its_uint32_data():
    key = jax.random.key(0)
    got = named_arrays.describe({"k": key, "d": jax.random.key_data(key), "n": 1})
    assert got == {"d": "uint32[2]", "k": "key<fry>[]", "n": "int64[]"}
    (line,) = named_arrays.differences({"k": got["d"]}, {"k": got["k"]})
    assert "uint32[2]" in line and "key<fry>[]" in line


# What cannot be stored, and saves that fail.


def test_unsupported_leaves_and_records_are_refused_before_anything_is_written(tmp_path, small):
    with small.open_at(tmp_path) as store:
        with pytest.raises(ValueError, match=r"opt/codes has dtype uint4.*store packed codes as"):
            store.save(1, {"opt": {"codes": jnp.zeros(4, jnp.uint4)}}, {})
        with pytest.raises(ValueError, match="name has dtype str"):
            store.save(1, {"name": "text"}, {})
        with pytest.raises(ValueError, match="record is not JSON"):
            store.save(1, small.state(1), {"x": np.float32(1)})
        assert os.listdir(tmp_path) == []
        store.save(1, small.state(1), {})
    assert small.open_at(tmp_path).steps() == [1]


def test_a_full_disk_ends_the_run_with_one_sentence(tmp_path, capfd, small):
    """Files may grow to 1 MB: orbax's own write fails in the background, as on a full disk."""
    small.fill(tmp_path, steps=(100,), keep=1)
    state = {"a": jax.random.normal(jax.random.key(0), (1000, 1000)), "b": {"c": jnp.zeros(7)}}
    store = small.open_at(tmp_path, keep=1)
    store.restore(small.target)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        store.save(200, state, {})
        with pytest.raises(checkpoints.CheckpointFailed, match=r"saving checkpoint 200 .* failed"):
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for call in (lambda: store.save(300, state, {}), store.close):
        with pytest.raises(checkpoints.CheckpointFailed, match="step 100 is the last complete one"):
            call()
    assert "Traceback" not in capfd.readouterr().err
    assert small.open_at(tmp_path).restore(small.target)[0] == 100


def test_a_failed_manifest_is_raised_by_the_next_save(tmp_path, monkeypatch, small):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyError), small.open_at(tmp_path, keep=1) as store:
        store.save(100, small.state(100), {})
        store.wait()
        monkeypatch.setattr(manifest, "write", full)
        store.save(200, small.state(200), {})
        with pytest.raises(checkpoints.CheckpointFailed, match=r"No space left.*step 100 is the"):
            store.save(300, small.state(300), {})
        raise KeyError("the caller's own exception is not hidden by the one of close")
    assert small.open_at(tmp_path).steps() == [100]
