"""COAT's update in plain JAX: decode, Adam, encode."""

from effarch.kernels.coat import api, groups


def coat_adam(g, m, v, start, rates, group_size, expand):
    """See `api.coat_adam`; `start` [2]: 1 / (1 - b1^count), 1 / (1 - b2^count); `rates`: b1, b2, eps."""
    m_values, v_values = (
        groups.ungrouped(groups.decode(groups.grouped(x.codes, group_size), x.shared), g.shape)
        for x in (m, v)
    )
    d, m_values, v_values = groups.step(g, m_values, v_values, start, rates)
    return d, *(store(x, group_size, expand) for x in (m_values, v_values))


def store(x, group_size: int, expand: bool) -> api.Moment:
    """An array as it is kept."""
    codes, shared = groups.encode(groups.grouped(x, group_size), expand)
    return api.Moment(groups.ungrouped(codes, x.shape), shared)
