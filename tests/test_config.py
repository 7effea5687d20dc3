"""The config: defaults, overrides, checks, JSON round trip, fingerprint."""

import pytest

from effarch import config, config_check
from effarch.configs import gated_deltanet, hybrids, quickstart, sparse, transformer
from effarch.models import ffns, mixers

pytestmark = pytest.mark.smoke

SHIPPED = [
    quickstart.get_config(),
    quickstart.get_config("mixer=attention"),
    *[transformer.get_config(f"size={size}") for size in transformer.SIZES],
    *[gated_deltanet.get_config(f"size={size}") for size in gated_deltanet.SIZES],
    gated_deltanet.get_config("size=tiny,layers=hybrid"),
    *[hybrids.get_config(f"model={model}") for model in hybrids.MODELS],
    hybrids.get_config("mixer=hgrn2,ratio=0,size=340m"),
    *[sparse.get_config(f"ffn={ffn}") for ffn in sparse.FFNS],
    sparse.get_config("size=2b,mixer=spark"),
]


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda c: c.name)
def test_shipped_configs_pass_the_check_and_the_round_trip(shipped):
    finished = config_check.finish(shipped, num_devices=1)
    again = config.from_json(config.to_json(finished))
    assert config.to_json(again) == config.to_json(finished)
    assert config.fingerprint(again) == config.fingerprint(finished) == config.fingerprint(shipped)
    assert config_check.finish(again) == finished


def test_names_of_shipped_configs_differ_and_so_do_their_fingerprints():
    assert len({c.name for c in SHIPPED}) == len(SHIPPED)
    assert len({config.fingerprint(c) for c in SHIPPED}) == len(SHIPPED)


def test_default_holds_a_section_for_every_kind():
    blocks = config.default().model.blocks
    for name in (*mixers.KINDS, *ffns.KINDS):
        assert blocks[name].kind == name
    assert blocks.attention.window is None
    blocks.attention.window = 512  # optional fields take values of their type
    with pytest.raises(TypeError):
        blocks.attention.window = "wide"


def test_fingerprint_counts_only_blocks_and_optimizers_in_use():
    base = config.default()
    unused = config.default()
    del unused.model.blocks["gated_delta_net"]
    unused.optimizer.muon.momentum = 0.5
    assert config.fingerprint(unused) == config.fingerprint(base)
    unused.model.blocks.attention.qk_norm = True
    assert config.differences(base, unused) == [("model.blocks.attention.qk_norm", False, True)]


def test_fingerprint_ignores_what_does_not_change_the_result():
    base = config.default()
    for field, value in (("log.every_steps", 3), ("checkpoint.keep", 7), ("mesh.data", 2)):
        other = config.default()
        other.update_from_flattened_dict({field: value})
        assert config.fingerprint(other) == config.fingerprint(base), field
    other = config.default()
    other.data.seq_len = 512
    assert config.fingerprint(other) != config.fingerprint(base)
    assert config.differences(base, other) == [("data.seq_len", 256, 512)]


def test_fields_at_their_defaults_do_not_count():
    base = config.default()
    base.model.blocks.local = config.block("attention", window=64)
    base.model.layers = "local/glu"
    older = config.from_json(config.to_json(base))
    del older.model.z_loss, older.data.task, older.model.blocks.local["softcap"]
    del older.model.blocks["retnet"], older.optimizer.schedule
    saved = config.to_json(older)
    with pytest.raises(ValueError, match=r"data\.task is missing"):
        config_check.finish(older)
    completed = config.completed(config.from_json(saved))
    assert config_check.finish(completed) == config_check.finish(base)
    assert config.fingerprint(completed) == config.fingerprint(base)
    base.model.blocks.local.softcap = 30.0
    assert config.fingerprint(completed) != config.fingerprint(base)


def test_the_kind_of_a_block_counts_where_all_else_is_as_it_is_by_default():
    marks = []
    for kind in ("gated_delta_net", "delta_net"):
        c = config.default()
        c.model.blocks.mine, c.model.layers = config.block(kind), "mine/glu"
        marks.append(config.fingerprint(c))
    assert marks[0] != marks[1]


def changed(**fields):
    c = config.default()
    c.unlock()
    for name, value in fields.items():
        section, *rest = name.split("__")
        target = c
        for part in (section, *rest)[:-1]:
            target = target[part]
        last = (section, *rest)[-1]
        if last in target:
            with target.ignore_type():
                target[last] = value
        else:
            target[last] = value
    return c


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(model__wdith=3), "model.wdith is not a config field. Known:"),
        (dict(model__wdith=3), "Did you mean 'width'?"),
        (dict(trian=3), "trian is not a config field"),
        (dict(model__width="wide"), "model.width='wide' must be of type int"),
        (dict(model__width=2.5), "model.width=2.5 must be of type int"),
        (dict(model__width=True), "model.width=True must be of type int"),
        (dict(model__width=None), "model.width=None must be of type int"),
        (dict(optimizer__learning_rate=None), "optimizer.learning_rate=None must be of type float"),
        (dict(optimizer__learning_rate=0.0), "optimizer.learning_rate=0.0 must be above 0"),
        (dict(train__num_steps=0), "train.num_steps=0 must be above 0"),
        (dict(eval__every_steps=-1), "eval.every_steps=-1 must not be negative"),
        (dict(optimizer__kind="adam"), "optimizer.kind='adam' is not known"),
        (dict(model__remat="all"), "model.remat='all' is not known"),
        (dict(optimizer__schedule__kind="cosin"), "Did you mean 'cosine'?"),
        (dict(model__layers="atention/glu"), "Did you mean 'attention'?"),
        (dict(model__layers="attention/gul"), "Did you mean 'glu'?"),
        (dict(model__layers="glu/attention"), "'glu' (layer 0) is not the mixer of any section"),
        (dict(model__layers="none/glu"), "'none' (layer 0) is not the mixer"),
        (dict(model__layers="attention"), "'attention' is not a block"),
        (
            dict(model__blocks__attention__windw=3),
            "model.blocks.attention.windw is not a config field",
        ),
        (dict(model__blocks__attention__kind="atention"), "Did you mean 'attention'?"),
        (dict(model__blocks__glu="x"), "model.blocks.glu='x' must be a section"),
        (dict(train__accumulate=3), "data.batch_size=16 is not a multiple of train.accumulate=3"),
        (dict(mesh__data=3), "does not fit 8 device"),
        (dict(data__batch_size=12), "use a multiple of 8, for example 16"),
        (
            dict(mesh__context=8, mesh__fsdp=1, data__seq_len=252),
            "data.seq_len=252 cannot be split",
        ),
    ],
)
def test_wrong_configs_are_refused_in_one_sentence(fields, words):
    with pytest.raises(ValueError, match=r".") as error:
        config_check.finish(changed(**fields), num_devices=8)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_integers_serve_as_floats_and_lists_as_tuples():
    finished = config_check.finish(
        changed(optimizer__learning_rate=1, data__sources=["files:a", "files:b"])
    )
    assert isinstance(finished.optimizer.learning_rate, float)
    assert finished.data.sources == ("files:a", "files:b")


def test_a_finished_config_cannot_be_changed():
    finished = config_check.finish(config.default())
    with pytest.raises(AttributeError):
        finished.seed = 1


def test_block_makes_a_section_of_its_own():
    c = config.default()
    c.model.blocks.local = config.block("attention", window=64)
    c.model.layers = "local/glu + attention/glu"
    finished = config_check.finish(c)
    assert finished.model.blocks.local.window == 64
    assert finished.model.blocks.attention.window is None
    with pytest.raises(ValueError, match="Did you mean 'window'"):
        config.block("attention", windw=3)
    with pytest.raises(ValueError, match="Did you mean 'attention'"):
        config.block("atention")


def test_references_are_resolved():
    c = config.default()
    c.model.blocks.glu.hidden = 4 * c.model.get_ref("width")
    c.model.width = 512
    assert config_check.finish(c).model.blocks.glu.hidden == 2048


def test_parse_arg():
    assert config.parse_arg("size=1b,seq=512", size="tiny", seq=256) == {"size": "1b", "seq": 512}
    assert config.parse_arg(None, size="tiny") == {"size": "tiny"}
    with pytest.raises(ValueError, match="Did you mean 'size'"):
        config.parse_arg("sise=1b", size="tiny")
    with pytest.raises(ValueError, match="expected a value of type int"):
        config.parse_arg("seq=long", seq=256)
    with pytest.raises(ValueError, match="Did you mean '340m'"):
        transformer.get_config("size=340mb")


def test_placeholders_have_the_type_of_their_annotation():
    section = config.block("attention")
    assert section.get_type("num_kv_heads") is int
    assert section.get_type("softcap") is float
