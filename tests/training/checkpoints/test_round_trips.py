"""Checkpoints: exact round trips, which steps are kept, what a folder holds."""

import collections
import json
import os
import subprocess
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effarch.training import checkpoints, manifest

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


# Round trips.


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip_is_exact_with_all_leaf_and_container_types(tmp_path, asynchronous, small):
    state = make_state()
    want = jax.tree.map(to_host, state)
    with small.open_at(tmp_path / "a run", asynchronous=asynchronous) as store:
        store.save(2, state, RECORD)
        assert asynchronous or store.steps() == [2]
    for target in (abstract(make_state(1)), make_state(1)):
        step, got, record = small.open_at(tmp_path / "a run").restore(target)
        assert (step, record) == (2, RECORD)
        assert_same(got, want, state)
    assert jax.random.key_impl(got.model_state["keys"]) == "rbg"
    assert type(got.model_state["count"]) is int and got.model_state["host"].dtype == np.float64


def test_names_with_dots_and_slashes_do_not_collide(tmp_path, small):
    """Orbax joins the names by dots: {"a.b": x} and {"a": {"b": y}} would be one array."""
    state = {
        "a.b": jnp.ones(3),
        "a": {"b": jnp.zeros(3)},
        "a/b": jnp.full(3, 2.0),
        "%2E": jnp.ones(1),
    }
    with small.open_at(tmp_path) as store:
        store.save(1, state, {})
        _, got, _ = store.restore(abstract(state))
    assert_same(got, jax.tree.map(to_host, state), state)


def test_state_may_be_donated_right_after_save(tmp_path, small):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.5 + 1, tree), donate_argnums=0)
    state = {f"w{i}": jax.random.normal(jax.random.key(i), (512, 512)) for i in range(8)}
    first, state = state, step(state)
    assert first["w0"].is_deleted()  # this jax does donate here
    want = {}
    with small.open_at(tmp_path, keep=3) as store:
        for number in (1, 2, 3):
            want[number] = jax.tree.map(to_host, state)
            store.save(number, state, {})
            for _ in range(5):
                state = step(state)
        for number in (1, 2, 3):
            _, got, _ = store.restore(abstract(state), step=number)
            assert_same(got, want[number], state)


def test_target_sharding_is_used(tmp_path, small):
    state = {"a": jnp.arange(8.0), "key": jax.random.key(3)}
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    target = {
        "a": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding),
        "key": jax.ShapeDtypeStruct((), state["key"].dtype, sharding=replicated),
    }
    with small.open_at(tmp_path) as store:
        store.save(1, state, {})
        _, got, _ = store.restore(target)
    assert got["a"].sharding == sharding and got["key"].sharding == replicated
    np.testing.assert_array_equal(got["a"], np.arange(8.0))


# Which checkpoints stay.


def test_keep_and_keep_period(tmp_path, small):
    small.fill(tmp_path, steps=(0, 50, 100, 150, 200, 250, 300), keep=2, keep_period=100)
    assert small.open_at(tmp_path).steps() == [100, 200, 250, 300]
    assert sorted(os.listdir(tmp_path)) == ["100", "200", "250", "300"]


def test_step_0_is_kept_while_it_is_among_the_newest(tmp_path, small):
    small.fill(tmp_path, steps=(0, 5), keep=2, keep_period=100)
    assert small.open_at(tmp_path).steps() == [0, 5]


def test_the_old_one_stays_until_the_new_one_has_its_manifest(tmp_path, monkeypatch, small):
    small.fill(tmp_path, steps=(100,), keep=1)
    committed, go_on = threading.Event(), threading.Event()
    write = manifest.write

    def slow_write(*args, **kwargs):
        committed.set()
        assert go_on.wait(20)
        write(*args, **kwargs)

    monkeypatch.setattr(manifest, "write", slow_write)
    with small.open_at(tmp_path, keep=1) as store:
        store.restore(small.target)
        store.save(200, small.state(200), {})
        assert committed.wait(20)
        assert (tmp_path / "200" / "state").is_dir() and store.steps() == [100]
        go_on.set()
        store.wait()
        assert store.steps() == [200] and os.listdir(tmp_path) == ["200"]


def test_saving_again_what_was_just_restored_writes_nothing(tmp_path, small):
    small.fill(tmp_path)
    with small.open_at(tmp_path) as store:
        store.restore(small.target)
        before = (tmp_path / "200" / manifest.FILE_NAME).stat().st_mtime_ns
        store.save(200, small.state(200), {})
        store.wait()
        assert (tmp_path / "200" / manifest.FILE_NAME).stat().st_mtime_ns == before
        with pytest.raises(ValueError, match="step 150 is older than step 200"):
            store.save(150, small.state(150), {})


def test_saving_over_a_folder_that_was_not_restored_is_refused(tmp_path, small):
    small.fill(tmp_path)
    with (
        small.open_at(tmp_path) as store,
        pytest.raises(ValueError, match="already holds step 200"),
    ):
        store.save(150, small.state(150), {})
    assert small.open_at(tmp_path).steps() == [100, 200]


def test_going_back_to_an_older_step_gives_up_the_newer_ones(tmp_path, small):
    small.fill(tmp_path, steps=(100, 200, 300), keep=3)
    with small.open_at(tmp_path, keep=3) as store:
        assert store.restore(small.target, step=100)[0] == 100
        store.save(150, small.state(150), {})
        store.wait()
        assert store.steps() == [100, 150]


def test_check_writable(tmp_path, small):
    small.open_at(tmp_path / "new folder" / "deep").check_writable()
    assert os.listdir(tmp_path / "new folder" / "deep") == []
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file" / "checkpoints", "/proc/checkpoints"):
        with pytest.raises(PermissionError, match=r"cannot be written to .*choose another"):
            small.open_at(bad).check_writable()
        with pytest.raises(
            checkpoints.CheckpointFailed, match=r"saving checkpoint 1 .*there is none"
        ):
            small.open_at(bad).save(1, small.state(1), {})


@pytest.mark.parametrize(
    "options, message", [({"keep": 0}, "keep=0"), ({"keep_period": -1}, "keep_period=-1")]
)
def test_wrong_options(tmp_path, options, message, small):
    with pytest.raises(ValueError, match=message):
        small.open_at(tmp_path, **options)
    with pytest.raises(ValueError, match="mount the bucket"):
        small.open_at("gs://bucket/run")


def test_manifest_names_every_file_and_the_run(tmp_path, small):
    """Sizes and hashes by another program; orbax is quiet at level INFO."""
    import effarch

    small.fill(tmp_path, steps=(100,))
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


def test_orbax_is_quiet_and_others_on_the_same_logger_are_not(tmp_path, caplog, small):
    from absl import logging

    with caplog.at_level("INFO", logger="absl"):
        small.fill(tmp_path)
        small.open_at(tmp_path).restore(small.target)
        logging.info("someone else speaks")
    assert [r.getMessage() for r in caplog.records] == ["someone else speaks"]
