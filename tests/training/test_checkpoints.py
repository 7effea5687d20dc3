"""Checkpoints: exact round trips, what survives death and damage, what is refused and how."""

import collections
import concurrent.futures
import json
import os
import pathlib
import re
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effarch.training import checkpoints, manifest, named_arrays

TrainState = collections.namedtuple("TrainState", "step params model_state opt_state")
RECORD = {"tokens": 12345, "name": "tiny", "losses": [1.5, None]}


def make_optimizer() -> optax.GradientTransformation:
    """A chain whose state has NamedTuples, masked nodes, empty states, dicts and counters."""
    dims = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    muon = optax.contrib.muon(
        1e-2,
        muon_weight_dimension_numbers=lambda params: {
            name: dims if name == "up" else None for name in params
        },
    )
    labels = {"up": "muon", "norm": "adam/no.decay", "half": "adam/no.decay"}
    groups = optax.multi_transform({"muon": muon, "adam/no.decay": optax.adamw(1e-3)}, labels)
    masked = optax.masked(optax.trace(0.9), {"up": True, "norm": False, "half": False})
    return optax.chain(optax.clip_by_global_norm(1.0), groups, masked)


def fill_with_noise(tree, seed: int):
    """The same tree with random values of the same dtypes (an optimizer starts with zeros)."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape, scale=9)).astype(x.dtype), tree
    )


def make_state(seed: int = 0) -> TrainState:
    """A small state in which no array of parameters or moments is zero."""
    params = {
        "up": jnp.ones((2, 8, 4)),
        "norm": jnp.ones((2, 8)),
        "half": jnp.ones(5, jnp.bfloat16),
    }
    opt_state = fill_with_noise(make_optimizer().init(params), seed)
    params = fill_with_noise(params, seed)
    model_state = {
        "bias": jnp.arange(3, dtype=jnp.int32) * seed,
        "packed": jnp.arange(6, dtype=jnp.uint8),
        "scale": jnp.asarray([0.5, 2.0], jnp.float8_e4m3fn),
        "is_warm": jnp.asarray(True),
        "key": jax.random.fold_in(jax.random.key(7), seed),
        "keys": jax.random.split(jax.random.key(8, impl="rbg"), 3),
        "none": None,
        "nothing": {},
        "no_rows": jnp.zeros((0, 4), jnp.bfloat16),
        "host": np.linspace(0, 1, 3),
        "count": 4 + seed,
    }
    return TrainState(jnp.asarray(seed, jnp.int32), params, model_state, opt_state)


def abstract(tree):
    """The target of a restore: shapes and dtypes of the arrays, host values as they are."""
    is_array = lambda leaf: isinstance(leaf, jax.Array)  # noqa: E731
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf, tree
    )


def to_host(leaf) -> np.ndarray:
    """A copy of the leaf's own bits on the host."""
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.array(leaf, copy=True)


def assert_same(got, want_host, like):
    """Same containers, dtypes and bits as the host copy `want_host` of `like`."""
    assert jax.tree.structure(got) == jax.tree.structure(like)
    for a, b, c in zip(jax.tree.leaves(got), jax.tree.leaves(want_host), jax.tree.leaves(like)):
        assert getattr(a, "dtype", type(a)) == getattr(c, "dtype", type(c))
        a = to_host(a)
        assert a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def open_at(folder, **options) -> checkpoints.Checkpoints:
    return checkpoints.Checkpoints(folder, **{"fingerprint": "abc", **options})


def fill(folder, steps=(100, 200), **options) -> dict[int, dict]:
    """Saves a small dict of arrays at each step; gives what was saved."""
    saved = {}
    with open_at(folder, **options) as store:
        for step in steps:
            saved[step] = small_state(step)
            store.save(step, saved[step], {"step": step})
    return saved


def small_state(step: int) -> dict:
    return {"a": jnp.arange(1000, dtype=jnp.float32) + step, "b": {"c": jnp.full(7, step)}}


def data_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold array data, largest first."""
    files = [p for p in (folder / "state").rglob("*") if p.is_file() and p.parent.name == "d"]
    return sorted(files, key=lambda p: -p.stat().st_size)


# Round trips.


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip_is_exact_with_all_leaf_and_container_types(tmp_path, asynchronous):
    state = make_state()
    want = jax.tree.map(to_host, state)
    with open_at(tmp_path / "a run", asynchronous=asynchronous) as store:
        store.save(2, state, RECORD)
        assert asynchronous or store.steps() == [2]
    for target in (abstract(make_state(1)), make_state(1)):
        step, got, record = open_at(tmp_path / "a run").restore(target)
        assert (step, record) == (2, RECORD)
        assert_same(got, want, state)
    assert jax.random.key_impl(got.model_state["keys"]) == "rbg"
    assert type(got.model_state["count"]) is int and got.model_state["host"].dtype == np.float64


def test_names_with_dots_and_slashes_do_not_collide(tmp_path):
    """Orbax joins the names by dots: {"a.b": x} and {"a": {"b": y}} would be one array."""
    state = {
        "a.b": jnp.ones(3),
        "a": {"b": jnp.zeros(3)},
        "a/b": jnp.full(3, 2.0),
        "%2E": jnp.ones(1),
    }
    with open_at(tmp_path) as store:
        store.save(1, state, {})
        _, got, _ = store.restore(abstract(state))
    assert_same(got, jax.tree.map(to_host, state), state)


def test_state_may_be_donated_right_after_save(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.5 + 1, tree), donate_argnums=0)
    state = {f"w{i}": jax.random.normal(jax.random.key(i), (512, 512)) for i in range(8)}
    first, state = state, step(state)
    assert first["w0"].is_deleted()  # this jax does donate here
    want = {}
    with open_at(tmp_path, keep=3) as store:
        for number in (1, 2, 3):
            want[number] = jax.tree.map(to_host, state)
            store.save(number, state, {})
            for _ in range(5):
                state = step(state)
        for number in (1, 2, 3):
            _, got, _ = store.restore(abstract(state), step=number)
            assert_same(got, want[number], state)


def test_target_sharding_is_used(tmp_path):
    state = {"a": jnp.arange(8.0), "key": jax.random.key(3)}
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    target = {
        "a": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding),
        "key": jax.ShapeDtypeStruct((), state["key"].dtype, sharding=replicated),
    }
    with open_at(tmp_path) as store:
        store.save(1, state, {})
        _, got, _ = store.restore(target)
    assert got["a"].sharding == sharding and got["key"].sharding == replicated
    np.testing.assert_array_equal(got["a"], np.arange(8.0))


# Which checkpoints stay.


def test_keep_and_keep_period(tmp_path):
    fill(tmp_path, steps=(0, 50, 100, 150, 200, 250, 300), keep=2, keep_period=100)
    assert open_at(tmp_path).steps() == [100, 200, 250, 300]
    assert sorted(os.listdir(tmp_path)) == ["100", "200", "250", "300"]


def test_step_0_is_kept_while_it_is_among_the_newest(tmp_path):
    fill(tmp_path, steps=(0, 5), keep=2, keep_period=100)
    assert open_at(tmp_path).steps() == [0, 5]


def test_the_old_one_stays_until_the_new_one_has_its_manifest(tmp_path, monkeypatch):
    fill(tmp_path, steps=(100,), keep=1)
    committed, go_on = threading.Event(), threading.Event()
    write = manifest.write

    def slow_write(*args, **kwargs):
        committed.set()
        assert go_on.wait(20)
        write(*args, **kwargs)

    monkeypatch.setattr(manifest, "write", slow_write)
    with open_at(tmp_path, keep=1) as store:
        store.restore(abstract(small_state(0)))
        store.save(200, small_state(200), {})
        assert committed.wait(20)
        assert (tmp_path / "200" / "state").is_dir() and store.steps() == [100]
        go_on.set()
        store.wait()
        assert store.steps() == [200] and os.listdir(tmp_path) == ["200"]


def test_saving_again_what_was_just_restored_writes_nothing(tmp_path):
    fill(tmp_path)
    with open_at(tmp_path) as store:
        store.restore(abstract(small_state(0)))
        before = (tmp_path / "200" / manifest.FILE_NAME).stat().st_mtime_ns
        store.save(200, small_state(200), {})
        store.wait()
        assert (tmp_path / "200" / manifest.FILE_NAME).stat().st_mtime_ns == before
        with pytest.raises(ValueError, match="step 150 is older than step 200"):
            store.save(150, small_state(150), {})


def test_saving_over_a_folder_that_was_not_restored_is_refused(tmp_path):
    fill(tmp_path)
    with open_at(tmp_path) as store, pytest.raises(ValueError, match="already holds step 200"):
        store.save(150, small_state(150), {})
    assert open_at(tmp_path).steps() == [100, 200]


def test_going_back_to_an_older_step_gives_up_the_newer_ones(tmp_path):
    fill(tmp_path, steps=(100, 200, 300), keep=3)
    with open_at(tmp_path, keep=3) as store:
        assert store.restore(abstract(small_state(0)), step=100)[0] == 100
        store.save(150, small_state(150), {})
        store.wait()
        assert store.steps() == [100, 150]


# Death.

MOMENTS = {  # where the process dies while it saves step 200 -> what is then restored
    "writing": 100,
    "committed": 100,
    "hashing": 100,
    "manifest_written": 100,
    "deleting": 200,
}
DEATH = """
import os, pathlib, shutil, signal, sys, threading
import jax, orbax.checkpoint
import jax.numpy as jnp
from effarch.training import checkpoints, manifest

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def die_while_writing(folder):
    while not list(folder.glob("200.orbax-checkpoint-tmp/state/**/d/*")):
        pass
    die()

def die_at(moment, folder):
    if moment == "writing":
        threading.Thread(target=die_while_writing, args=(folder,)).start()
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
    die_at(moment, folder)
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


def run_python(code: str, *args, **environment) -> str:
    """Runs code in a new process on CPU and gives what it printed."""
    root = pathlib.Path(__file__).resolve().parents[2]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def dead_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dead runs")
    run_python(DEATH, folder, *MOMENTS)
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_saving(dead_runs, moment):
    state = lambda step: {"w": jnp.arange(1_000_000.0) + step, "b": jnp.full(3, step)}  # noqa: E731
    folder = dead_runs / moment
    with open_at(folder, keep=2) as store:
        assert store.steps() == [MOMENTS[moment]]
        step, got, record = store.restore(abstract(state(0)))
        assert (step, record) == (MOMENTS[moment], {"step": step})
        assert_same(got, jax.tree.map(to_host, state(step)), got)
        for again in (200, 300):
            store.save(again, state(again + 1), {"step": again})
    again = open_at(folder)
    assert again.steps() == [200, 300] and sorted(os.listdir(folder)) == ["200", "300"]
    _, got, _ = again.restore(abstract(state(0)), step=200)
    offset = 0 if MOMENTS[moment] == 200 else 1  # a step that is complete is not written again
    assert_same(got, jax.tree.map(to_host, state(200 + offset)), got)


def test_an_unfinished_first_save_is_no_checkpoint(tmp_path, caplog):
    assert open_at(tmp_path / "none").restore({}) is None
    fill(tmp_path, steps=(100,))
    (tmp_path / "100" / manifest.FILE_NAME).unlink()
    assert open_at(tmp_path).restore(abstract(small_state(0))) is None
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
def test_damage_falls_back_to_the_one_before(tmp_path, caplog, damage):
    saved = fill(tmp_path)
    break_it, message = DAMAGES[damage]
    break_it(tmp_path / "200")
    with open_at(tmp_path) as store:
        step, got, record = store.restore(abstract(small_state(0)))
        assert (step, record) == (100, {"step": 100})
        assert_same(got, jax.tree.map(to_host, saved[100]), saved[100])
        (warning,) = [r.getMessage() for r in caplog.records]
        assert warning.startswith(f"checkpoint 200 in {tmp_path} is damaged: ")
        assert re.search(message, warning)
        store.save(200, small_state(201), {})  # the run comes by step 200 again
        store.wait()
        assert sorted(os.listdir(tmp_path)) == ["100", "200"]
        _, got, _ = store.restore(abstract(small_state(0)))
    assert_same(got, jax.tree.map(to_host, small_state(201)), got)


@pytest.mark.parametrize("next_step", [150, 250])
def test_a_damaged_step_does_not_count_as_a_kept_one(tmp_path, next_step):
    """Whatever the next step is: the sound 100 stays and the damaged 200 goes."""
    fill(tmp_path)
    truncate(tmp_path / "200")
    with open_at(tmp_path) as store:
        assert store.restore(abstract(small_state(0)))[0] == 100
        store.save(next_step, small_state(next_step), {})
        store.wait()
        assert store.steps() == [100, next_step]


def test_all_damaged_is_an_error_not_a_new_start(tmp_path):
    fill(tmp_path)
    truncate(tmp_path / "200")
    flip_byte(tmp_path / "100")
    with pytest.raises(ValueError, match=r"all 2 checkpoints in .* \(steps 100, 200\)"):
        open_at(tmp_path).restore(abstract(small_state(0)))
    with pytest.raises(ValueError, match=r"checkpoint 100 .* has changed bytes"):
        open_at(tmp_path).restore(abstract(small_state(0)), step=100)
    with pytest.raises(ValueError, match="no checkpoint of step 7; it has 100, 200"):
        open_at(tmp_path).restore(abstract(small_state(0)), step=7)


# Checkpoints of another run.


def without_data(folder: pathlib.Path) -> pathlib.Path:
    """Takes all array data away: whoever reads an array, or hashes a file, fails otherwise."""
    shutil.rmtree(folder / "200" / "state")
    return folder


def test_another_fingerprint_is_refused(tmp_path):
    fill(tmp_path)
    without_data(tmp_path)
    with pytest.raises(checkpoints.CheckpointMismatch) as caught:
        open_at(tmp_path, fingerprint="xyz").restore(abstract(small_state(0)))
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
def test_other_arrays_are_refused_before_any_is_read(tmp_path, other):
    target, lines = OTHERS[other]
    fill(tmp_path)
    without_data(tmp_path)
    with pytest.raises(checkpoints.CheckpointMismatch) as caught:
        open_at(tmp_path).restore(target)
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


def test_unsupported_leaves_and_records_are_refused_before_anything_is_written(tmp_path):
    with open_at(tmp_path) as store:
        with pytest.raises(ValueError, match=r"opt/codes has dtype uint4.*store packed codes as"):
            store.save(1, {"opt": {"codes": jnp.zeros(4, jnp.uint4)}}, {})
        with pytest.raises(ValueError, match="name has dtype str"):
            store.save(1, {"name": "text"}, {})
        with pytest.raises(ValueError, match="record is not JSON"):
            store.save(1, small_state(1), {"x": np.float32(1)})
        assert os.listdir(tmp_path) == []
        store.save(1, small_state(1), {})
    assert open_at(tmp_path).steps() == [1]


def test_a_full_disk_ends_the_run_with_one_sentence(tmp_path, capfd):
    """Files may grow to 1 MB: orbax's own write fails in the background, as on a full disk."""
    fill(tmp_path, steps=(100,), keep=1)
    state = {"a": jax.random.normal(jax.random.key(0), (1000, 1000)), "b": {"c": jnp.zeros(7)}}
    store = open_at(tmp_path, keep=1)
    store.restore(abstract(small_state(0)))
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
    assert open_at(tmp_path).restore(abstract(small_state(0)))[0] == 100


def test_a_failed_manifest_is_raised_by_the_next_save(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyError), open_at(tmp_path, keep=1) as store:
        store.save(100, small_state(100), {})
        store.wait()
        monkeypatch.setattr(manifest, "write", full)
        store.save(200, small_state(200), {})
        with pytest.raises(checkpoints.CheckpointFailed, match=r"No space left.*step 100 is the"):
            store.save(300, small_state(300), {})
        raise KeyError("the caller's own exception is not hidden by the one of close")
    assert open_at(tmp_path).steps() == [100]


def test_check_writable(tmp_path):
    open_at(tmp_path / "new folder" / "deep").check_writable()
    assert os.listdir(tmp_path / "new folder" / "deep") == []
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file" / "checkpoints", "/proc/checkpoints"):
        with pytest.raises(PermissionError, match=r"cannot be written to .*choose another"):
            open_at(bad).check_writable()
        with pytest.raises(
            checkpoints.CheckpointFailed, match=r"saving checkpoint 1 .*there is none"
        ):
            open_at(bad).save(1, small_state(1), {})


@pytest.mark.parametrize(
    "options, message", [({"keep": 0}, "keep=0"), ({"keep_period": -1}, "keep_period=-1")]
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        open_at(tmp_path, **options)
    with pytest.raises(ValueError, match="mount the bucket"):
        open_at("gs://bucket/run")


def test_manifest_names_every_file_and_the_run(tmp_path):
    """Sizes and hashes by another program; orbax is quiet at level INFO."""
    import effarch

    fill(tmp_path, steps=(100,))
    content = json.loads((tmp_path / "100" / manifest.FILE_NAME).read_text())
    names = sorted(
        str(p.relative_to(tmp_path / "100")) for p in (tmp_path / "100").rglob("*") if p.is_file()
    )
    assert sorted([*content["files"], manifest.FILE_NAME]) == names
    for name in content["files"]:
        out = subprocess.run(
            ["sha256sum", "--", str(tmp_path / "100" / name)], capture_output=True, text=True
        )
        assert out.stdout.split()[0].lstrip("\\") == content["files"][name]["sha256"]
        assert (tmp_path / "100" / name).stat().st_size == content["files"][name]["size"]
    assert (content["fingerprint"], content["step"]) == ("abc", 100)
    assert content["effarch"] == effarch.__version__
    assert content["leaves"] == {"a": "float32[1000]", "b/c": "int32[7]"}


def test_orbax_is_quiet_and_others_on_the_same_logger_are_not(tmp_path, caplog):
    from absl import logging

    with caplog.at_level("INFO", logger="absl"):
        fill(tmp_path)
        open_at(tmp_path).restore(abstract(small_state(0)))
        logging.info("someone else speaks")
    assert [r.getMessage() for r in caplog.records] == ["someone else speaks"]


# Other devices and processes.

MESHES = """
import sys
import jax, numpy as np
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from effarch.training import checkpoints

def place(shape, spec):
    return NamedSharding(jax.make_mesh(shape, ("data", "tensor")), spec)

value = np.arange(64.0, dtype=np.float32).reshape(8, 8)
with checkpoints.Checkpoints(sys.argv[1], fingerprint="abc") as store:
    state = {"w": jax.device_put(value, place((2, 4), P("data", "tensor")))}
    store.save(1, state, {})
    for sharding in (place((4, 2), P("tensor", "data")), place((8, 1), P(None, "data"))):
        target = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}
        _, got, _ = store.restore(target)
        assert got["w"].sharding == sharding
        assert len({s.device for s in got["w"].addressable_shards}) == 8
        np.testing.assert_array_equal(got["w"], value)
"""


@pytest.mark.slow
def test_another_mesh_of_eight_devices_and_one_device(tmp_path):
    run_python(MESHES, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    target = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    _, got, _ = open_at(tmp_path).restore(target)
    np.testing.assert_array_equal(got["w"], np.arange(64.0).reshape(8, 8))


TWO_PROCESSES = """
import pathlib, sys
import jax
folder, port, index = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, index)
import numpy as np
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from effarch.training import checkpoints

sharding = NamedSharding(jax.make_mesh((2,), ("data",)), P("data"))
target = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
local = np.arange(4, dtype=np.float32) + 4 * index
state = {"w": jax.make_array_from_process_local_data(sharding, local)}
with checkpoints.Checkpoints(folder, fingerprint="abc") as store:
    assert store.restore(target) is None
    store.save(1, state, {"n": 1})
    store.save(2, state, {"n": 2})
    store.wait()
    assert store.steps() == [1, 2]
    if index == 0:
        (folder / "2" / "record" / "metadata").write_text("")
    multihost_utils.sync_global_devices("damaged")
    step, got, record = store.restore(target)
    assert (step, record) == (1, {"n": 1}) and got["w"].sharding == sharding
    np.testing.assert_array_equal(got["w"].addressable_shards[0].data, local)
    store.save(2, state, {"n": 3})
    store.wait()
    assert store.steps() == [1, 2]
try:
    checkpoints.Checkpoints(folder, fingerprint="xyz").restore(target)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_save_and_restore_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        said = list(
            pool.map(lambda index: run_python(TWO_PROCESSES, tmp_path, port, index), range(2))
        )
    assert "fingerprint abc, not to xyz" in said[0] and "process 0 refused" in said[1]
    step, got, record = open_at(tmp_path).restore({"w": jax.ShapeDtypeStruct((8,), jnp.float32)})
    assert (step, record) == (2, {"n": 3})
    np.testing.assert_array_equal(got["w"], np.arange(8.0))
